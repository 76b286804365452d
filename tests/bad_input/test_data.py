"""What a user of ``jaxft.data`` is told."""

import re

import pytest
from tokenizers import Tokenizer, models

from jaxft.data.batching import batch_indices, length_buckets
from jaxft.data.kshot import cap_test, sample_kshot
from jaxft.data.readers import Example, load_splits, read_examples
from jaxft.data.reviews import review_corpus, review_examples, review_tokenizer
from jaxft.data.tasks import get_task, with_prompt
from jaxft.data.tokenization import (
    encode_plain,
    encode_prompt,
    label_word_ids,
    load_tokenizer,
    make_text_tokenizer,
    pad,
)

SST2, RTE = get_task("sst2"), get_task("rte")
ONE = [Example("the plot was dull .", None, 0)]
PAIR = [Example("dull", "loud", 0)]
BERT = make_text_tokenizer(review_tokenizer())
HEAD = "sentence\tlabel\n"

FILES = {
    "column count": ("train.tsv", f"{HEAD}a\t1\nb\tc\t1\n", SST2, "train.tsv:3: 3 columns where 2"),
    "label outside": ("train.tsv", f"{HEAD}a\t1\nb\t2\n", SST2, "train.tsv:3: label '2' is none of sst2"),
    "label absent": ("train.tsv", "sentence\tsource\na\tx\n", SST2, "train.tsv:2: no label in a column label"),
    "label empty": ("train.tsv", f"{HEAD}a\t\n", SST2, "train.tsv:2: no label"),
    "empty text": ("train.tsv", f"{HEAD} \t1\n", SST2, "train.tsv:2: empty text in column sentence"),
    "one text of two": ("train.tsv", f"{HEAD}a\t1\n", RTE, "no text in a column sentence1\\+sentence2"),
    "unknown header": ("train.tsv", "w\tx\ty\tz\n", SST2, "train.tsv:1: no known text column"),
    "bytes": ("train.tsv", f"{HEAD}a\t1\n".encode() + b"caf\xe9\t1\n", SST2, "train.tsv:3: byte 0xe9 is not UTF-8"),
    "open quote": ("train.csv", 'text,label\na,1\n"b,1\n', SST2, "train.csv:3: not csv"),
    "quoted lines": ("train.csv", 'text,label\n"a\nb",1\nc,7\n', SST2, "train.csv:4: label '7'"),
    "json": ("train.jsonl", '{"text": "a", "label": 1}\n{"text": \n', SST2, "train.jsonl:2: not JSON"),
    "json list": ("train.jsonl", "[1]\n", SST2, "train.jsonl:1: a JSON list"),
    "xml": ("rte1_dev.xml", "<c>\n<pair value='TRUE'>\n<t>a</t>\n</c>", RTE, "rte1_dev.xml:4: not XML"),
    "xml label": ("r.xml", "<c>\n<pair value='X'><t>a</t><h>b</h></pair></c>", RTE, "r.xml:2: label 'X'"),
    "xml hypothesis": ("r.xml", "<c>\n<pair value='TRUE'><t>a</t></pair></c>", RTE, "r.xml:2: no text in a column"),
    "xml unlabelled": ("r.xml", "<c>\n<pair id='1'><t>a</t><h>b</h></pair></c>", RTE, "r.xml:2: no label"),
    "no examples": ("train.tsv", HEAD, SST2, "a file must hold examples"),
    "empty file": ("train.tsv", "", SST2, "a file must hold examples"),
    "suffix": ("train.dat", HEAD, SST2, "must end in one of"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_faulty_file_is_named_with_its_line(tmp_path, case):
    name, content, task, pattern = FILES[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"^read_examples: .*{pattern}"):
        read_examples(path, task)


def test_all_faults_of_a_file_are_counted(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text(HEAD + "a\t9\n" * 7)
    with pytest.raises(ValueError, match=r"train.tsv:2: .*train.tsv:6: .* and 2 more. Correct train.tsv\.$"):
        read_examples(path, SST2)


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("sentence\tlabel\n" + "a\t1\nb\t0\n")


FOLDERS = {
    "empty": ([], "must hold sst2: train .* with nothing"),
    "other task": (["mr/all.tsv"], "with mr. Name the folder"),
    "no test": (["train.tsv"], "without a dev file and with no test file"),
    "twice": (["x/sst2/train.tsv", "y/SST-2/train.tsv"], "one folder must hold sst2, got .*SST-2"),
    "k-shot": (["SST-2/16-13/train.tsv", "SST-2/16-21/train.tsv"], "Name one of the k-shot folders, as .*16-13"),
    "too few": (["all.tsv"], "must hold 5 examples, got 2"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_without_the_task_is_described(tmp_path, case):
    names, pattern = FOLDERS[case]
    make(tmp_path, *names)
    with pytest.raises(ValueError, match=f"^load_splits: .*{pattern}"):
        load_splits(tmp_path, SST2)


def test_a_file_with_faults_alone_is_refused_not_passed_over(tmp_path):
    make(tmp_path, "train.tsv", "dev.tsv")
    (tmp_path / "test.tsv").write_text(f"{HEAD}a\n")
    with pytest.raises(ValueError, match=r"test\.tsv:2: 1 columns"):
        load_splits(tmp_path, SST2)


def test_missing_paths_are_named(tmp_path):
    with pytest.raises(ValueError, match="load_splits: the data folder must exist"):
        load_splits(tmp_path / "none", SST2)
    with pytest.raises(ValueError, match="read_examples: the file must exist"):
        read_examples(tmp_path / "none.tsv", SST2)
    with pytest.raises(ValueError, match=r"load_tokenizer: the checkpoint must hold tokenizer\.json, got no "):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"load_tokenizer: tokenizer\.json must be one of the tokenizers library"):
        load_tokenizer(tmp_path)


THREE = [Example(str(i), None, i % 2) for i in range(6)]
CALLS = {
    "unknown task": (lambda: get_task("agnew"), "get_task: .*Did you mean agnews"),
    "no mask": (lambda: with_prompt(SST2, template="{a} ."), "{mask} 0 times"),
    "two masks": (lambda: with_prompt(SST2, template="{mask} {a} {mask}"), "{mask} 2 times"),
    "stray b": (lambda: with_prompt(SST2, template="{a} {b} {mask}"), "{b} 1 times"),
    "no b": (lambda: with_prompt(RTE, template="{a} {mask}"), "{b} 0 times"),
    "brace": (lambda: with_prompt(SST2, template="{a} {c} {mask}"), "a brace outside"),
    "word count": (lambda: with_prompt(SST2, label_words=["good"]), "1 label words for the classes negative, positive"),
    "same words": (lambda: with_prompt(SST2, label_words=["x", "x"]), "repeated label words 'x'"),
    "empty word": (lambda: with_prompt(SST2, label_words=["x", " "]), "an empty label word"),
    "both at once": (lambda: with_prompt(SST2, template="{a}", label_words=["x"]), "0 times; 1 label words"),
    "k of 0": (lambda: sample_kshot(THREE, classes=2, k=0, seed=0), "k must be at least 1"),
    "empty split": (lambda: sample_kshot([], classes=2, k=1, seed=0), "must hold examples"),
    "one class": (lambda: sample_kshot(THREE[::2], classes=2, k=1, seed=0), "0 of class 1. Check that"),
    "large k": (lambda: sample_kshot(THREE, classes=2, k=2, seed=0), "3 of class 0, 3 of class 1. Pass k <= 1"),
    "foreign label": (lambda: sample_kshot(THREE, classes=1, k=1, seed=0), r"labels must be in \[0, 1\), got \[1\]"),
    "cap of 0": (lambda: cap_test(THREE, cap=0), "cap must be at least 1"),
    "empty test": (lambda: cap_test([]), "test split must hold examples"),
    "no mask token": (lambda: make_text_tokenizer(Tokenizer(models.WordLevel({"[CLS]": 0}, "[CLS]"))), r"only \[CLS\]"),
    "two tokens": (lambda: label_word_ids(BERT, ["great plot", "dull"]), "'great plot' = great plot"),
    "unknown word": (lambda: label_word_ids(BERT, ["great", "zebra"]), r"'zebra' = \[UNK\]"),
    "one token": (lambda: label_word_ids(BERT, ["great", "Great"]), "'Great' twice"),
    "template too long": (lambda: encode_prompt(BERT, SST2, ONE, max_tokens=6), r"template \(6 tokens .* 1 of text"),
    "no second text": (lambda: encode_prompt(BERT, RTE, ONE), r"must hold two texts, got others at \[0\]"),
    "stray second text": (lambda: encode_prompt(BERT, SST2, PAIR), "must hold one text"),
    "mixed": (lambda: encode_plain(BERT, ONE + PAIR, max_tokens=9, token_types=2), r"one text, got others at \[1\]"),
    "no room": (lambda: encode_plain(BERT, PAIR, max_tokens=4, token_types=2), "3 special tokens and 2 of text"),
    "no batch": (lambda: pad(encode_prompt(BERT, SST2, ONE), []), "a batch must hold examples"),
    "foreign index": (lambda: pad(encode_prompt(BERT, SST2, ONE), [1]), r"in \[0, 1\), got \[1\]"),
    "short rows": (lambda: pad(encode_prompt(BERT, SST2, ONE), length=5), r"longest example \(11 tokens\)"),
    "multiple of 0": (lambda: pad(encode_prompt(BERT, SST2, ONE), multiple=0), "multiple must be at least 1"),
    "no examples": (lambda: batch_indices(0, 2, seed=0, stop=1), "at least 1 example"),
    "batch of 0": (lambda: batch_indices(3, 0, seed=0, stop=1), "batch_size must be at least 1"),
    "steps": (lambda: batch_indices(3, 1, seed=0, start=2, stop=1), r"0 <= start <= stop, got \[2, 1\)"),
    "no lengths": (lambda: length_buckets([], batch_size=2), "lengths must be positive"),
    "length of 0": (lambda: length_buckets([3, 0], batch_size=2), "lengths must be positive"),
    "bucket of 0": (lambda: length_buckets([3], batch_size=0), "sizes must be positive"),
    "no corpus": (lambda: review_corpus(size=0, seed=0), "size must be at least 1"),
    "no reviews": (lambda: review_examples(size=0, seed=0), r"size must be in \[1, 100000\]"),
    "noise": (lambda: review_examples(size=1, seed=0, noise_frac=1.5), r"noise_frac must be in \[0, 1\], got 1.5"),
}


@pytest.mark.parametrize("case", CALLS)
def test_bad_arguments_are_refused_with_the_way_out(case):
    call, pattern = CALLS[case]
    with pytest.raises(ValueError, match=r"^\w+: ") as error:
        call()
    assert re.search(pattern, str(error.value)), error.value
