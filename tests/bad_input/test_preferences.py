"""What a user of preference pairs, their tokenisation and response classes is told."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxft.core.checks import UserError
from jaxft.data.causal_rows import causal_tokens
from jaxft.data.causal_tokenizer import (
    load_causal_tokenizer,
    make_causal_tokenizer,
    require_vocabulary,
    tokenize_prompts,
    tokenize_texts,
)
from jaxft.data.chat_templates import ChatTemplate, render_chat
from jaxft.evaluation.response_classes import ResponseClass, class_rates, classify_responses, compare_rates
from jaxft.tuning.encoding import encode_preferences
from jaxft.tuning.packing import make_response_batch, response_batch
from jaxft.tuning.preferences import PreferencePair, make_preferences, read_preferences

GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}
USER = {"role": "user", "content": "q"}
YES = {"role": "assistant", "content": "a"}
NO = {"role": "assistant", "content": "b"}

WORDS = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<end>", "<unk>", *"abcdefgh"])}, unk_token="<unk>"))
WORDS.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
TOKENIZER = make_causal_tokenizer(WORDS, eos_token="<end>")

RECORDS = {
    "missing": ({"prompt": "q", "chosen": "a"}, "no rejected beside chosen, prompt"),
    "unknown": ({"text": "q"}, "no prompt, chosen, rejected beside text"),
    "empty object": ({}, "no prompt, chosen, rejected beside nothing"),
    "alpaca lacking": ({"instruction": "q", "output_1": "a", "output_2": "b"}, "no preference beside instruction"),
    "alpaca tie": (
        {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1.5},
        "preference 1.5 is neither 1 nor 2",
    ),
    "type": ({**GOOD, "chosen": 3}, "chosen is a int where a string or a list of messages"),
    "null": ({**GOOD, "rejected": None}, "rejected is a NoneType where"),
    "mixed": ({**GOOD, "chosen": [YES]}, "one of chosen and rejected is a string, the other a list"),
    "role": ({"prompt": [{"content": "q"}], "chosen": [YES], "rejected": [NO]}, "prompt: message 1 has no role"),
    "content": (
        {"prompt": [USER], "chosen": [{"role": "assistant", "content": 1}], "rejected": [NO]},
        "chosen: message 1 has a int as content",
    ),
    "no turns": ({"prompt": [USER], "chosen": [], "rejected": [NO]}, "chosen: no list of messages"),
    "turn": ({"prompt": ["q"], "chosen": [YES], "rejected": [NO]}, "prompt: message 1 is a str"),
    "assistant last": (
        {"prompt": [YES], "chosen": [YES], "rejected": [NO]},
        "the prompt ends with a turn of the assis",
    ),
    "user answers": (
        {"prompt": [USER], "chosen": [USER, YES], "rejected": [NO]},
        "a response holds a turn of the user",
    ),
    "nothing shared": ({"chosen": "a", "rejected": "b"}, "chosen and rejected have no prompt in common"),
    "no turn shared": ({"chosen": [YES], "rejected": [NO]}, "chosen and rejected have no prompt in common"),
    "identical": ({**GOOD, "chosen": "b"}, "chosen and rejected are identical"),
    "identical chats": ({"chosen": [USER, YES], "rejected": [USER, YES]}, "chosen and rejected are identical"),
    "empty": ({**GOOD, "chosen": " \n"}, "chosen is empty"),
    "empty turn": (
        {"prompt": [USER], "chosen": [{"role": "assistant", "content": ""}], "rejected": [NO]},
        "chosen is empty",
    ),
    "chat cut short": ({"chosen": [USER], "rejected": [USER, NO]}, "chosen is empty"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_that_is_no_pair_is_named_with_its_file_and_line(tmp_path, case):
    record, pattern = RECORDS[case]
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=rf"^read_preferences: each line must hold .*pairs\.jsonl:2: {pattern}"):
        read_preferences(path)
    with pytest.raises(ValueError, match=rf"^make_preferences: each line must hold .*record:2: {pattern}"):
        make_preferences([GOOD, record])


def test_faults_of_all_kinds_are_reported_together(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{**GOOD, "chosen": "b"}, {"prompt": "q"}, {**GOOD, "chosen": ""}]
    path.write_text("\n".join([*map(json.dumps, rows), "{", "[1]", *["{}"] * 3]))
    with pytest.raises(
        ValueError, match=r"jsonl:1: .*:2: no chosen, .*:3: chosen is.*:4: not JSON.*:5: .* and 3 more\."
    ):
        read_preferences(path)
    with pytest.raises(ValueError, match=r"got \S*jsonl:2: no chosen, rejected beside prompt; \S*:4: not JSON"):
        read_preferences(path, on_fault="drop")


def test_useless_pairs_come_with_the_way_out():
    with pytest.raises(ValueError, match=r"record:1: chosen is empty. Correct them, or pass on_fault='drop'\.$"):
        make_preferences([{**GOOD, "chosen": ""}])
    with pytest.raises(ValueError, match=r"there must be a pair, got none in record \(record:1: chosen is empty\)"):
        make_preferences([{**GOOD, "chosen": ""}], on_fault="drop")


FILES = {
    "suffix": ("pairs.csv", "", r"must end in \.jsonl or \.json"),
    "bytes": ("pairs.jsonl", b'{"a": 1}\n\xe9', r"pairs\.jsonl:2: byte 0xe9 is not UTF-8"),
    "list": ("pairs.json", '[{"a": 1},\n{]', r"pairs\.json:2: not JSON"),
    "empty": ("pairs.jsonl", "", "there must be a pair, got none in"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_holds_no_pairs_is_refused(tmp_path, case):
    name, content, pattern = FILES[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"^read_preferences: .*{pattern}"):
        read_preferences(tmp_path / name)


def test_options_of_the_reader_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"^read_preferences: the file must exist"):
        read_preferences(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"on_fault must be refuse or drop, got ignore"):
        make_preferences([GOOD], on_fault="ignore")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"record:1: what chosen and rejected have in common holds no 'A:'"):
        make_preferences([{"chosen": "q a", "rejected": "q b"}], prompt_end="A:")


def pair(prompt="a b", chosen="c", rejected="d", line=7):
    return PreferencePair(prompt, chosen, rejected, line, {})


ENCODINGS = {
    "no pairs": ([], {}, "there must be a pair"),
    "context": ([pair()], {"max_tokens": 1}, "must hold a prompt and a token of a response, got 1"),
    "prompt limit": ([pair()], {"max_tokens": 4, "max_prompt_tokens": 4}, "Pass max_tokens >= 5"),
    "long prompt": (
        [pair("a " * 9)],
        {},
        "fit into 8 tokens .*, got line:7: the prompt has 9 tokens. Pass max_prompt_t",
    ),
    "same tokens": ([pair(chosen="x", rejected="y")], {}, "line:7: chosen and rejected are the same tokens"),
    "same start": (
        [pair("a " * 7)._replace(chosen="c a", rejected="c b")],
        {},
        "line:7: .* agree in the 1 tokens kept",
    ),
    "empty prompt": ([pair("")], {}, "line:7: the prompt has no token"),
    "all dropped": ([pair("")], {"on_fault": "drop"}, "there must be a pair left, got line:7: the prompt has no token"),
    "no template": ([PreferencePair([USER], [YES], [NO], 7, {})], {}, "messages need a chat template"),
    "template differs": (
        [PreferencePair([USER], [YES], [NO], 7, {})],
        {"chat_template": "{{ add_generation_prompt }}{% for m in messages %}{{ m.content }}{% endfor %}"},
        "the template must render a prompt alike with and without a response, got line 7",
    ),
}


@pytest.mark.parametrize("case", ENCODINGS)
def test_pairs_that_cannot_be_encoded_are_named_by_line(case):
    pairs, options, pattern = ENCODINGS[case]
    with pytest.raises(ValueError, match=rf"^\w+: .*{pattern}"):
        encode_preferences(TOKENIZER, pairs, **{"max_tokens": 8} | options)


def test_a_tokenizer_without_an_end_token_says_so():
    bare = make_causal_tokenizer(WORDS)
    with pytest.raises(
        ValueError, match=r"^encode_preferences: append_eos needs an end token.*Pass append_eos=False\.$"
    ):
        encode_preferences(bare, [pair()], max_tokens=8)
    with pytest.raises(ValueError, match=r"^tokenize_texts: append_eos needs an end token"):
        tokenize_texts(bare, ["a"])


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"^require_vocabulary: .* below the 8 of .*2 beyond it: 'g' = 8, 'h' = 9\. Load"
    ):
        require_vocabulary(TOKENIZER, 8)
    with pytest.raises(ValueError, match=r"^make_causal_tokenizer: special tokens must be .*, got bos_token '<s>'"):
        make_causal_tokenizer(WORDS, bos_token="<s>")
    with pytest.raises(ValueError, match=r"add_bos needs a begin token"):
        make_causal_tokenizer(WORDS, add_bos=True)
    with pytest.raises(ValueError, match=r"^load_causal_tokenizer: the checkpoint must hold tokenizer.json"):
        load_causal_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"^load_causal_tokenizer: tokenizer.json must be one of the tokenizers library"
    ):
        load_causal_tokenizer(tmp_path)
    WORDS.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"^load_causal_tokenizer: tokenizer_config.json must be JSON"):
        load_causal_tokenizer(tmp_path)


TEMPLATES = {
    "syntax": ("{% for %}", "the template must be jinja2, got .* at line 1"),
    "raises": ("{{ raise_exception('roles must alternate') }}", "accept the conversation, got roles must alternate"),
    "undefined": ("{{ tools.names }}", "must be there, got 'tools' is undefined. Pass it in variables"),
    "type": ("{{ messages + 1 }}", "must accept the conversation"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_fails_says_why(case):
    source, pattern = TEMPLATES[case]
    with pytest.raises(ValueError, match=rf"^render_chat: .*{pattern}"):
        render_chat(ChatTemplate(source), [USER])


def test_messages_and_prompts_are_checked():
    with pytest.raises(ValueError, match=r"^render_chat: each message must have .*message 1 has no content"):
        render_chat(ChatTemplate("x"), [{"role": "user"}])
    with pytest.raises(ValueError, match=r"^tokenize_prompts: a prompt must have a token, got none at \[1\]"):
        tokenize_prompts(TOKENIZER, ["a", ""])
    with pytest.raises(ValueError, match=r"^tokenize_prompts: messages need a chat template"):
        tokenize_prompts(TOKENIZER, [[USER]])
    with pytest.raises(ValueError, match=r"^causal_tokens: a row must have a token, got none at \[0\]"):
        causal_tokens([[], [1]])
    with pytest.raises(ValueError, match=r"^causal_tokens: tokens must hold the longest \(2\), got 1"):
        causal_tokens([[1, 2]], tokens=1)
    with pytest.raises(ValueError, match=r"^causal_tokens: side must be right or left, got 'both'"):
        causal_tokens([[1, 2]], side="both")  # pyright: ignore[reportArgumentType]


BATCHES = {
    "none": ([], [], {}, "each prompt must have its responses, got 0 prompts"),
    "unequal": ([[1]], [], {}, "got 1 prompts, 0 lists"),
    "uneven": ([[1], [2]], [[[1]], [[1], [2]]], {}, r"the same number of responses, one or more, got \[1, 2\]"),
    "no response": ([[1]], [[]], {}, r"the same number of responses, one or more, got \[0\]"),
    "empty prompt": ([[1], []], [[[1]], [[1]]], {}, r"must have a token, got none at \[1\]"),
    "empty response": ([[1]], [[[1], []]], {}, r"must have a token, got none at \[0\]"),
    "layout": ([[1]], [[[1]]], {"layout": "dense"}, "layout must be packed or padded, got 'dense'"),
    "side": ([[1]], [[[1]]], {"side": "top"}, "side must be right or left, got 'top'"),
    "tokens": ([[1]], [[[1, 2]]], {"tokens": 2}, r"tokens must hold the longest \(3\), got 2"),
    "response tokens": ([[1]], [[[1, 2]]], {"response_tokens": 1}, r"response_tokens must hold the longest \(2\)"),
    "multiple": ([[1]], [[[1, 2]]], {"multiple": 0}, "multiple must be at least 1"),
}


@pytest.mark.parametrize("case", BATCHES)
def test_what_makes_no_batch_is_refused(case):
    prompts, responses, options, pattern = BATCHES[case]
    with pytest.raises(ValueError, match=rf"^make_response_batch: .*{pattern}"):
        make_response_batch(prompts, responses, **options)


def test_indices_beyond_the_pairs_are_refused():
    encoded = encode_preferences(TOKENIZER, [pair()], max_tokens=8)
    with pytest.raises(ValueError, match=r"^response_batch: indices must be in \[0, 1\), got \[1\]"):
        response_batch(encoded, [0, 1])
    with pytest.raises(ValueError, match=r"^make_response_batch: each prompt must have its responses"):
        response_batch(encoded, [])


CLASSES = {
    "none": ([], ["a"], "there must be classes of different names"),
    "twice": ([ResponseClass("x", ("a",)), ResponseClass("x", ("b",))], ["a"], "classes of different names"),
    "other": ([ResponseClass("other", ("a",))], ["a"], "classes of different names"),
    "silent": ([ResponseClass("x")], ["a"], "must have phrases or ids, none of them empty, got x"),
    "empty phrase": ([ResponseClass("x", ("",))], ["a"], "must have phrases or ids, none of them empty, got x"),
    "pattern": ([ResponseClass("x", patterns=("(",))], ["a"], r"must be a regular expression, got '\(' of x"),
    "ids for texts": ([ResponseClass("x", ("a",))], [[1]], "must say something of token ids"),
    "texts for ids": ([ResponseClass("x", token_prefixes=((1,),))], ["a"], "must say something of texts"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_classes_that_say_nothing_of_the_responses_are_refused(case):
    classes, responses, pattern = CLASSES[case]
    with pytest.raises(ValueError, match=rf"^classify_responses: .*{pattern}"):
        classify_responses(responses, classes)


def test_rates_need_responses_in_pairs():
    with pytest.raises(ValueError, match=r"^class_rates: there must be a response"):
        class_rates([])
    with pytest.raises(ValueError, match=r"^compare_rates: both must label the same prompts, got 1 and 2"):
        compare_rates(["a"], ["a", "b"], "a")
    with pytest.raises(ValueError, match=r"^compare_rates: the class must occur, got 'refusl'. Did you mean refusal\?"):
        compare_rates(["refusal"], ["other"], "refusl")


def test_a_system_message_that_would_be_lost_is_refused():
    row = {"system": "be brief", "prompt": "hi", "chosen": "yes", "rejected": "no"}
    with pytest.raises(UserError, match="record:1: a system message needs a prompt of chat messages"):
        make_preferences([row])


def test_a_phrase_without_its_tuple_is_refused():
    with pytest.raises(UserError, match="phrases must come in a tuple, got refusal: prefixes='I can'"):
        classify_responses(["It is sunny"], [ResponseClass("refusal", prefixes="I can")])  # pyright: ignore
