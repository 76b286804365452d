import json

import pytest

from jaxft.data.readers import Example, load_splits, read_examples
from jaxft.data.tasks import get_task

SST2, RTE, MNLI = get_task("sst2"), get_task("rte"), get_task("mnli")


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_tsv_quotes_are_literal(write):
    path = write("train.tsv", 'sentence\tlabel\n"unbalanced , and fine\t1\na "b" c\t0\n')
    assert read_examples(path, SST2) == [Example('"unbalanced , and fine', None, 1), Example('a "b" c', None, 0)]


def test_only_newlines_end_a_line(write):
    # These characters end a line for str.splitlines.
    path = write("train.tsv", "sentence\tlabel\r\none\u2028two\x85three\t1\r\n\r\n")
    assert read_examples(path, SST2) == [Example("one\u2028two\x85three", None, 1)]


def test_csv_is_unquoted(write):
    path = write("train.csv", 'label,text\n1,"good, ""really"" good"\n0,"two\nlines"\n')
    assert read_examples(path, SST2) == [Example('good, "really" good', None, 1), Example("two\nlines", None, 0)]


def test_table_without_header_holds_the_label_first(write):
    assert read_examples(write("train.csv", "0,question\n1,fine\n"), SST2)[0] == Example("question", None, 0)
    assert read_examples(write("pairs.tsv", "1\tp\th\n"), RTE) == [Example("p", "h", 1)]


def test_byte_order_mark_is_no_part_of_the_header(write):
    assert len(read_examples(write("train.csv", "\ufefftext,label\nfine,1\n"), SST2)) == 1


def test_jsonl_labels_may_be_numbers_or_names(write):
    rows = [
        {"premise": "p", "hypothesis": "h", "label": "not_entailment", "idx": 0},
        {"premise": "p", "hypothesis": "h", "label": 0, "extra": [1]},
    ]
    path = write("train.jsonl", "\n".join(map(json.dumps, rows)))
    assert [example.label for example in read_examples(path, RTE)] == [1, 0]


@pytest.mark.parametrize(
    ("task", "header", "row", "expected"),
    [
        ("qnli", "index\tquestion\tsentence\tlabel", "3\tq\ts\tentailment", Example("q", "s", 0)),
        ("rte", "index\tsentence1\tsentence2\tlabel", "3\tp\th\tnot_entailment", Example("p", "h", 1)),
        ("mrpc", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\tx\ty", Example("x", "y", 1)),
        ("qqp", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\tx\ty\t0", Example("x", "y", 0)),
        ("mnli", "index\tsentence1\tsentence2\tlabel1\tgold_label", "0\tp\th\tneutral\tcontradiction", None),
    ],
)
def test_glue_columns_are_found_by_name(write, task, header, row, expected):
    examples = read_examples(write("train.tsv", f"{header}\n{row}\n"), get_task(task))
    assert examples == [expected or Example("p", "h", 2)]


def test_pairs_without_a_gold_label_are_left_out(write):
    path = write("train.tsv", "premise\thypothesis\tgold_label\np\th\t-\np\th\tneutral\n")
    assert read_examples(path, MNLI) == [Example("p", "h", 1)]


def test_both_forms_of_rte_xml_mean_the_same(write):
    pair = "<pair id='1' {}><t>A &amp; B\r\nagree.</t>\n<h>A agrees.</h></pair>"
    corpus = "<?xml version='1.0'?><!DOCTYPE c SYSTEM 'x.dtd'><c>{}</c>"
    forms = [("value='TRUE'", "value='FALSE'"), ("entailment='YES'", "entailment='NO'")]
    read = [
        read_examples(write(f"rte{i}_dev.xml", corpus.format("".join(map(pair.format, form)))), RTE)
        for i, form in enumerate(forms)
    ]
    assert read[0] == read[1] == [Example("A & B\nagree.", "A agrees.", label) for label in (0, 1)]


def table(n, start=0):
    return "sentence\tlabel\n" + "".join(f"text {start + i}\t{i % 2}\n" for i in range(n))


@pytest.mark.parametrize("place", ["", "sst2/", "SST-2/", "sentiment/sst2/"])
def test_a_labelled_test_file_is_the_test_split(write, tmp_path, place):
    for name, n in (("train", 5), ("dev", 3), ("test", 4)):
        write(f"{place}{name}.tsv", table(n))
    splits = load_splits(tmp_path, SST2)
    assert (len(splits.train), len(splits.test), splits.source) == (5, 4, "train: train.tsv; test: test.tsv")


@pytest.mark.parametrize("test", ["index\tsentence\n0\ta text\n", "sentence\tlabel\na text\t-1\n"])
def test_dev_stands_in_for_a_test_file_without_labels(write, tmp_path, test):
    write("train.tsv", table(5))
    write("dev.tsv", table(3))
    write("test.tsv", test)
    splits = load_splits(tmp_path, SST2)
    assert (len(splits.train), len(splits.test)) == (5, 3)
    assert "no labels" in splits.source


def test_train_and_dev_of_a_kshot_folder_are_joined(write, tmp_path):
    for name, n, start in (("train", 4, 0), ("dev", 4, 10), ("test", 6, 20)):
        write(f"sst2/16-42/{name}.tsv", table(n, start))
    splits = load_splits(tmp_path / "sst2" / "16-42", SST2)
    assert (len(splits.train), len(splits.test)) == (8, 6)
    assert splits.source == "train: train.tsv + dev.tsv; test: test.tsv"


def test_one_file_is_split_the_same_way_every_time(write, tmp_path):
    write("mr/all.tsv", table(11))
    task = get_task("mr")
    first, second = load_splits(tmp_path, task), load_splits(tmp_path / "mr", task)
    assert first == second
    assert (len(first.train), len(first.test)) == (9, 2)
    assert sorted(first.train + first.test) == sorted(read_examples(tmp_path / "mr" / "all.tsv", task))


@pytest.mark.parametrize(
    ("name", "train", "test"), [("sst2", 6920, 1821), ("sst5", 8544, 2210), ("mr", 8530, 2132), ("rte", 1767, 2400)]
)
def test_published_sets_have_their_counts(data_dir, name, train, test):
    splits = load_splits(data_dir, get_task(name))
    assert (len(splits.train), len(splits.test)) == (train, test)
    assert {example.label for example in splits.train} == set(range(get_task(name).classes))


def test_published_rte_has_its_class_counts(data_dir):
    counts = [
        sum(example.label == 0 for example in read_examples(data_dir / "entailment" / f"{name}.xml", RTE))
        for name in ("rte1_dev", "rte2_dev", "rte3_test")
    ]
    assert counts == [283, 210, 410]
