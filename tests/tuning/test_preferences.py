import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxft.data.causal_tokenizer import make_causal_tokenizer
from jaxft.tuning.encoding import encode_preferences
from jaxft.tuning.preferences import PreferencePair, make_preferences, read_preferences

USER = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level vocabulary that merges across spaces, dots and line ends where it may."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(
        ["It is blue. It is green.\n\n What color is the sky?\n\n user assistant"] * 3, trainer
    )
    return make_causal_tokenizer(tokenizer, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHATML)


@pytest.fixture(scope="module")
def sentencepiece():
    """A vocabulary as of Llama 2: a begin token, and a space put before whatever is encoded."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "<0x0A>", *"abcdefghijklmnopqrstuvwxyz?.:", "▁i", "▁b"]
    merges = [("▁", "i"), ("▁", "b")]
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return make_causal_tokenizer(tokenizer, bos_token="<s>", eos_token="</s>")


def pair(prompt="a:", chosen=" yes", rejected=" no", line=1):
    return PreferencePair(prompt, chosen, rejected, line, {})


LAYOUTS = {
    "explicit": ({"prompt": "q", "chosen": "a", "rejected": "b"}, ("q", "a", "b")),
    "implicit": ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, ("The sky is", " blue.", " green.")),
    "within a word": ({"chosen": "q: grey", "rejected": "q: green"}, ("q:", " grey", " green")),
    "a line end stays": ({"chosen": "q\nyes", "rejected": "q\nno"}, ("q\n", "yes", "no")),
    "one begins the other": ({"chosen": "q a", "rejected": "q a more"}, ("q", " a", " a more")),
    "explicit chat": ({"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}, ([USER], [BLUE], [GREEN])),
    "implicit chat": ({"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, ([USER], [BLUE], [GREEN])),
    "prompt repeated": (
        {"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        ([USER], [BLUE], [GREEN]),
    ),
    "string beside chats": (
        {"prompt": "shown", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        ([USER], [BLUE], [GREEN]),
    ),
    "string before answers": (
        {"prompt": USER["content"], "chosen": [BLUE], "rejected": [GREEN]},
        ([USER], [BLUE], [GREEN]),
    ),
    "chat before strings": (
        {"prompt": [USER], "chosen": BLUE["content"], "rejected": GREEN["content"]},
        ([USER], [BLUE], [GREEN]),
    ),
    "answers": ({"question": "q", "response_j": "a", "response_k": "b"}, ("q", "a", "b")),
    "persona": (
        {"question": "q", "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"},
        ("q", " Yes", " No"),
    ),
    "alpaca first": ({"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1}, ("q", "a", "b")),
    "alpaca second": (
        {"instruction": "q", "input": "x", "output_1": "a", "output_2": "b", "preference": 2},
        ("q\n\nx", "b", "a"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_prompt_chosen_and_rejected(layout):
    record, expected = LAYOUTS[layout]
    (made,) = make_preferences([{**record, "score": 0.5}]).pairs
    assert (made.prompt, made.chosen, made.rejected) == expected
    assert made.extra == {"score": 0.5}


def test_a_stated_end_of_the_prompt_keeps_responses_that_begin_alike_whole():
    head = "\n\nHuman: sky?\n\nAssistant:"
    record = {"chosen": head + " It is blue", "rejected": head + " It is green"}
    (made,) = make_preferences([record], prompt_end="\n\nAssistant:").pairs
    assert (made.prompt, made.chosen, made.rejected) == (head, " It is blue", " It is green")
    (made,) = make_preferences([record]).pairs
    assert made.prompt == head + " It is"


def test_lines_and_lists_give_the_same_pairs_with_their_lines(tmp_path):
    rows = [{"prompt": "q\n", "chosen": f"a{i}", "rejected": "b"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    a, b = read_preferences(tmp_path / "a.jsonl"), read_preferences(tmp_path / "b.json")
    assert a == read_preferences(tmp_path / "lines.json")
    assert [p.line for p in a.pairs] == [1, 2, 3]
    assert [p.line for p in b.pairs] == [2, 7, 12]
    assert [p._replace(line=0) for p in a.pairs] == [p._replace(line=0) for p in b.pairs]


def test_useless_pairs_are_dropped_with_their_lines_where_asked():
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": " ", "rejected": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    kept = make_preferences(rows, on_fault="drop")
    assert [p.line for p in kept.pairs] == [3]
    assert kept.dropped == [(1, "chosen and rejected are identical"), (2, "chosen is empty")]


@pytest.mark.slow
@pytest.mark.oracle
def test_implicit_prompts_equal_those_of_trl():
    trl = pytest.importorskip("trl.data_utils", reason="trl is not installed")
    for name in ("implicit", "implicit chat", "a line end stays"):
        record = LAYOUTS[name][0]
        (made,) = make_preferences([record]).pairs
        assert trl.extract_prompt(record) == {name: getattr(made, name) for name in ("prompt", "chosen", "rejected")}


def test_prompt_ids_are_those_of_the_prompt_alone_and_responses_decode_to_themselves(byte_level):
    # The vocabulary would merge the letters of the first pair, and space and word of the second, across the boundary.
    pairs = [pair("It i", "s blue", "t"), pair("It ", "is", "green"), pair("It", " is", " green")]
    assert len(byte_level.ids(" is")) == 1
    encoded = encode_preferences(byte_level, pairs, max_tokens=64, append_eos=False)
    for i, given in enumerate(pairs):
        assert encoded.prompts[i] == byte_level.ids(given.prompt)
        for ids, text in ((encoded.chosen[i], given.chosen), (encoded.rejected[i], given.rejected)):
            assert byte_level.text(ids) == text
            assert byte_level.tokenizer.decode(encoded.prompts[i] + ids) == f"{given.prompt}{text}"
    assert encoded.notes.boundary_merged.tolist() == [True, True, False]
    assert "2 that would merge tokens across the boundary" in encoded.report()
    assert encoded.chosen[2] == byte_level.ids("It is")[len(encoded.prompts[2]) :]


def test_no_space_is_put_before_a_response_by_vocabularies_that_put_one_before_texts(sentencepiece):
    # "b" after "a " would be one token with the space, which belongs to the prompt.
    pairs = [pair("a:", "b", " b"), pair("a ", "b", "i")]
    encoded = encode_preferences(sentencepiece, pairs, max_tokens=64, append_eos=False)
    names = [[sentencepiece.tokenizer.id_to_token(i) for i in ids] for ids in encoded.prompts + encoded.chosen]
    assert names == [["<s>", "▁", "a", ":"], ["<s>", "▁", "a", "▁"], ["b"], ["b"]]
    assert [sentencepiece.text(ids) for ids in encoded.rejected] == [" b", "i"]
    assert encoded.notes.boundary_merged.tolist() == [False, True]
    assert not encoded.notes.text_changed.any()


def test_a_begin_token_that_the_prompt_spells_out_stands_once(sentencepiece):
    (spelt,) = encode_preferences(sentencepiece, [pair("<s>a:", "b", "c")], max_tokens=64).prompts
    assert spelt.count(1) == 1


def test_texts_that_the_vocabulary_cannot_spell_are_noted(sentencepiece):
    pairs = [pair("a:", "b", "c"), pair("a:", "b", "B"), pair("a:", "b", "cÜ", line=2)]
    notes = encode_preferences(sentencepiece, pairs, max_tokens=64).notes
    assert notes.text_changed.tolist() == [False, True, True]


def test_every_whole_response_ends_with_one_end_token(byte_level):
    (end,) = byte_level.eos_ids
    pairs = [pair(chosen=" yes<|end|>"), PreferencePair([USER], [BLUE], [GREEN], 2, {})]
    encoded = encode_preferences(byte_level, pairs, max_tokens=128)
    for ids in encoded.chosen + encoded.rejected:
        assert ids[-1] == end
        assert ids.count(end) == 1
    assert byte_level.text(encoded.chosen[1]) == "It is blue.<|end|>"
    plain = encode_preferences(byte_level, pairs, max_tokens=128, append_eos=False)
    assert [ids.count(end) for ids in plain.chosen + plain.rejected] == [1, 1, 0, 1]


def test_chats_are_rendered_up_to_where_the_assistant_begins(byte_level):
    record = PreferencePair([USER], [BLUE], [GREEN], 1, {})
    encoded = encode_preferences(byte_level, [record], max_tokens=128)
    text = byte_level.tokenizer.decode(encoded.prompts[0], skip_special_tokens=False)
    assert text == "<|start|>user\nWhat color is the sky?<|end|>\n<|start|>assistant\n"
    other = encode_preferences(
        byte_level, [record], max_tokens=128, chat_template="{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    )
    assert byte_level.text(other.chosen[0]) == "[It is blue.]<|end|>"
    assert not encoded.notes.text_changed.any()


@pytest.mark.slow
@pytest.mark.oracle
def test_pairs_equal_what_the_published_library_makes_of_the_whole_text(byte_level):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level.tokenizer, eos_token="<|end|>", chat_template=CHATML
    )
    record = PreferencePair([USER], [BLUE], [GREEN], 1, {})
    encoded = encode_preferences(byte_level, [record, pair("sky?", " blue", " green")], max_tokens=128)
    line_end = byte_level.ids("\n")  # follows the end token of a turn, and is left out
    for ids, answer in ((encoded.chosen[0], BLUE), (encoded.rejected[0], GREEN)):
        whole = theirs.apply_chat_template([USER, answer], return_dict=False)
        assert encoded.prompts[0] + ids + line_end == whole
    assert encoded.prompts[1] + encoded.chosen[1] == theirs("sky? blue<|end|>")["input_ids"]


def test_long_prompts_keep_their_end_and_responses_their_start(sentencepiece):
    whole = encode_preferences(sentencepiece, [pair("abcdef:", "xyz", "yz")], max_tokens=64)
    cut = encode_preferences(sentencepiece, [pair("abcdef:", "xyz", "yz")], max_tokens=6, max_prompt_tokens=4)
    assert cut.prompts == [[1, *whole.prompts[0][-3:]]]
    assert (cut.chosen, cut.rejected) == ([whole.chosen[0][:2]], [whole.rejected[0][:2]])
    assert (whole.notes.prompt_cut.tolist(), whole.notes.response_cut.tolist()) == ([False], [False])
    assert (cut.notes.prompt_cut.tolist(), cut.notes.response_cut.tolist()) == ([True], [True])
    context = len(whole.prompts[0]) + len(whole.chosen[0])
    exact = encode_preferences(sentencepiece, [pair("abcdef:", "xyz", "yz")], max_tokens=context)
    assert (exact.chosen, exact.rejected) == (whole.chosen, whole.rejected)


def test_responses_that_begin_alike_are_noted(byte_level):
    pairs = [pair(), pair(chosen=" no, sir"), pair(chosen=" not"), pair(chosen=" n", rejected=" n.")]
    notes = encode_preferences(byte_level, pairs, max_tokens=64).notes
    # " no" ends with an end token that " no, sir" lacks at that place: the texts decide.
    assert notes.one_is_prefix.tolist() == [False, True, True, True]
    assert notes.first_tokens_equal.tolist() == [True] * 4


def test_pairs_that_do_not_fit_are_dropped_where_asked(byte_level):
    pairs = [pair("a" * 40, line=4), pair(line=5), pair("a:", " yes.", " yes?", line=6)]
    room = len(byte_level.ids("a:")) + len(byte_level.ids(" yes"))
    encoded = encode_preferences(byte_level, pairs, max_tokens=room, on_fault="drop")
    assert encoded.lines == [5]
    assert [fault.line for fault in encoded.dropped] == [4, 6]
    assert "the prompt has" in encoded.dropped[0].text
    assert "agree in the" in encoded.dropped[1].text


def test_selected_pairs_keep_their_notes_and_lines(byte_level):
    pairs = [pair(line=3), pair(chosen=" no, sir", line=4), pair("b:", line=9)]
    encoded = encode_preferences(byte_level, pairs, max_tokens=64)
    chosen = encoded.select(np.array([2, 1]))
    assert chosen.lines == [9, 4]
    assert chosen.notes.one_is_prefix.tolist() == [False, True]
    assert chosen.lengths.tolist() == encoded.lengths[[2, 1]].tolist()
    assert (len(chosen), chosen.prompts[0]) == (2, encoded.prompts[2])


def test_a_system_message_beside_chat_messages_is_the_first_turn():
    turns = [{"role": "user", "content": "hi"}]
    row = {"system": "be brief", "prompt": turns, "chosen": "yes", "rejected": "no"}
    (pair,) = make_preferences([row]).pairs
    assert pair.prompt == [{"role": "system", "content": "be brief"}, *turns]
    assert pair.extra == {}
