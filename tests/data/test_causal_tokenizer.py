"""Tokenizers of checkpoint folders, chat templates and rows, against the published library where it is installed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxft.core.checks import UserError
from jaxft.data.causal_rows import causal_tokens
from jaxft.data.causal_tokenizer import (
    load_causal_tokenizer,
    make_causal_tokenizer,
    require_vocabulary,
    tokenize_continuations,
    tokenize_prompts,
    tokenize_texts,
)
from jaxft.data.chat_templates import ChatTemplate, render_chat
from jaxft.data.records import Fault, JsonObject, read_json_objects

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What <b>color</b> is the sky?"},
    {"role": "assistant", "content": "Blue, it's said."},
    {"role": "user", "content": "  Sure?\n"},
]
SEEN = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
TEMPLATES = {
    "chatml": (
        "{%- for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] }}"
        "{{ '<|end|>' + '\n' }}{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|start|>assistant\n' }}\n{%- endif %}\n"
    ),
    "begin token and trimming": (
        "{{ bos_token }}\n{% for m in messages %}\n    {% set name = m['role'] | upper %}\n"
        "    [{{ name }}] {{ m.content | trim }}\n{% endfor %}\n"
    ),
    "namespace, break and json": (
        "{%- set ns = namespace(system='') %}\n{%- for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content %}{% continue %}{% endif %}{% if loop.index > 3 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{{ ns.system }}{{ eos_token }}"
    ),
    "generation blocks": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
}


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """A byte-level vocabulary with control tokens that puts a begin token before texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(["What color is the sky? It is blue. user assistant"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 0), ("<|end|>", 2)]
    )
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, **files: dict) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_special_tokens_and_template_of_a_folder_are_found(tmp_path, bpe):
    padded = Tokenizer.from_str(bpe.to_str())
    padded.enable_padding(length=50)
    padded.enable_truncation(3)
    folder = write(
        tmp_path,
        padded,
        tokenizer_config={"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}, "chat_template": "x"},
        generation_config={"eos_token_id": [2, 9]},
    )
    loaded = load_causal_tokenizer(folder)
    assert (loaded.bos_ids, loaded.eos_ids, loaded.pad_id) == ((0,), (2, 9), 2)
    assert len(loaded.ids("sky" * 20)) > 3
    assert loaded.chat_template == ChatTemplate("x", {"bos_token": "<|begin|>", "eos_token": "<|end|>"})
    (folder / "chat_template.jinja").write_text("y\n")
    assert load_causal_tokenizer(folder).chat_template == ChatTemplate("y\n", SEEN)


def test_a_folder_with_tokenizer_json_alone_takes_its_end_from_the_model(tmp_path, bpe):
    loaded = load_causal_tokenizer(write(tmp_path, bpe, config={"eos_token_id": 2}))
    assert (loaded.eos_ids, loaded.pad_id, loaded.chat_template) == ((2,), 2, None)
    bare = tmp_path / "bare"
    bare.mkdir()
    assert load_causal_tokenizer(write(bare, bpe)).eos_ids == ()


@pytest.mark.parametrize(("flag", "expected"), [(None, (0,)), (True, (0,)), (False, ())])
def test_the_configuration_decides_on_the_begin_token(tmp_path, bpe, flag, expected):
    config = {"bos_token": "<|begin|>"} | ({} if flag is None else {"add_bos_token": flag})
    assert load_causal_tokenizer(write(tmp_path, bpe, tokenizer_config=config)).bos_ids == expected


def test_the_named_default_of_several_templates_is_taken(tmp_path, bpe):
    listed = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    loaded = load_causal_tokenizer(write(tmp_path, bpe, tokenizer_config={"chat_template": listed}))
    assert loaded.chat_template == ChatTemplate("d")


def test_padding_given_by_name_wins_over_the_end_token(tmp_path, bpe):
    config = {"pad_token": "<|start|>", "eos_token": "<|end|>"}
    assert load_causal_tokenizer(write(tmp_path, bpe, tokenizer_config=config)).pad_id == 1


def test_an_end_token_that_the_tokenizer_appends_is_no_part_of_a_prompt(bpe):
    made = make_causal_tokenizer(bpe, bos_token="<|begin|>", eos_token="<|end|>")
    assert tokenize_prompts(made, ["sky"]) == [[0, *made.ids("sky")]]
    assert tokenize_texts(made, ["sky"]) == [[0, *made.ids("sky"), 2]]
    assert tokenize_texts(made, ["sky"], append_eos=False) == [[0, *made.ids("sky")]]


def test_cut_prompts_keep_their_end_and_cut_texts_their_start(bpe):
    made = make_causal_tokenizer(bpe, eos_token="<|end|>")
    ids = made.ids("what color?")
    assert tokenize_prompts(made, ["what color?"], max_tokens=4) == [[0, *ids[-3:]]]
    assert tokenize_texts(made, ["what color?"], max_tokens=4) == [[0, *ids[:3]]]


def test_continuations_keep_the_rest_of_the_joined_text_unless_a_token_reaches_across(bpe):
    made = make_causal_tokenizer(bpe)
    prompts, responses, merged = tokenize_continuations(
        made, ["What color", "It i"], [[" is", "?"], ["s"]], add_bos=False
    )
    assert merged == [False, True]
    assert prompts[0] + responses[0][0] == made.ids("What color is")
    assert prompts[1] + responses[1][0] != made.ids("It is")
    assert made.texts([ids for row in responses for ids in row]) == [" is", "?", "s"]


def test_a_vocabulary_beyond_the_token_table_is_refused_and_a_smaller_one_is_not(bpe):
    made = make_causal_tokenizer(bpe)
    require_vocabulary(made, made.size)
    require_vocabulary(made, made.size + 50)
    grown = Tokenizer.from_str(bpe.to_str())
    grown.add_special_tokens([AddedToken("<|new|>")])
    with pytest.raises(UserError, match=rf"below the {made.size} of .*1 beyond it: '<\|new\|>' = {made.size}"):
        require_vocabulary(make_causal_tokenizer(grown), made.size)


def test_prompts_of_messages_end_where_the_assistant_begins(bpe):
    made = make_causal_tokenizer(bpe, eos_token="<|end|>", chat_template=TEMPLATES["chatml"])
    (ids,) = tokenize_prompts(made, [CHAT[1:2]])
    assert made.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|start|>user\nWhat <b>color</b> is the sky?<|end|>\n<|start|>assistant\n"
    )
    (other,) = tokenize_prompts(made, [CHAT[1:2]], chat_template="{{ messages[0].content }}{{ eos_token }}")
    assert made.text(np.array(other)) == "What <b>color</b> is the sky?<|end|>"
    assert made.texts([other], skip_special=True) == ["What <b>color</b> is the sky?"]


def test_blocks_of_generation_and_json_are_rendered_as_they_stand():
    seen = {"bos_token": "<s>", "eos_token": "</s>"}
    said = render_chat(ChatTemplate(TEMPLATES["generation blocks"], seen), CHAT[1:3])
    assert said == "What <b>color</b> is the sky?Blue, it's said.</s>"
    said = render_chat(ChatTemplate(TEMPLATES["namespace, break and json"], seen), CHAT)
    assert (
        said == '{"role": "user", "content": "What <b>color</b> is the sky?"}' + json.dumps(CHAT[2]) + "Be brief.</s>"
    )


def test_a_template_is_given_no_clock_unless_one_is_passed():
    template = ChatTemplate("{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}2024{% endif %}")
    assert render_chat(template, CHAT) == "2024"
    assert render_chat(template, CHAT, variables={"strftime_now": lambda _: "1999"}) == "1999"


@pytest.mark.parametrize(
    "source",
    ["{{ messages.append(1) }}", "{{ messages.__class__.__mro__ }}{{ [].__class__.__base__.__subclasses__() }}"],
)
def test_templates_run_in_a_sandbox(source):
    with pytest.raises(UserError, match=r"^render_chat: "):
        render_chat(ChatTemplate(source), CHAT)


@pytest.mark.slow
@pytest.mark.oracle
def test_chats_and_prompts_equal_those_of_the_published_library(tmp_path, bpe):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    theirs = transformers.AutoTokenizer.from_pretrained(write(tmp_path, bpe, tokenizer_config=config))
    for source in TEMPLATES.values():
        ours = make_causal_tokenizer(bpe, bos_token="<|begin|>", eos_token="<|end|>", chat_template=source)
        for ask in (False, True):
            text = render_chat(ChatTemplate(source, SEEN), CHAT, add_generation_prompt=ask)
            options = {"chat_template": source, "add_generation_prompt": ask}
            assert text == theirs.apply_chat_template(CHAT, tokenize=False, **options)
        expected = theirs.apply_chat_template(CHAT, chat_template=source, add_generation_prompt=True, return_dict=False)
        assert tokenize_prompts(ours, [CHAT]) == [expected]
    assert tokenize_texts(ours, ["What color"]) == [theirs("What color")["input_ids"]]


@pytest.mark.slow
@pytest.mark.oracle
def test_a_published_folder_is_read_as_the_published_library_reads_it():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = os.environ.get("JAXFT_DECODER")
    if not folder:
        pytest.skip("JAXFT_DECODER names no folder of a decoder")
    ours, theirs = load_causal_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id in ours.eos_ids
    texts = ["What color is the sky?", " It is\n\nblue  ", "naïve 東京"]
    assert tokenize_prompts(ours, texts) == theirs(texts)["input_ids"]
    assert [ours.text(ours.ids(text)) for text in texts] == texts
    if ours.chat_template is not None:
        expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        assert tokenize_prompts(ours, [CHAT]) == [expected]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_padded_on_the_side_asked_for(side):
    rows = [[5, 6, 7], [8]]
    batch = causal_tokens(rows, side=side, pad_id=9, multiple=4)
    assert {field.dtype for field in batch} == {np.dtype(np.int32)}
    for i, ids in enumerate(rows):
        pad = 4 - len(ids)
        text, empty = range(len(ids)), [0] * pad
        for field, inside, outside in zip(
            batch, (ids, [1] * len(ids), [*text]), ([9] * pad, empty, empty), strict=True
        ):
            assert field[i].tolist() == (inside + outside if side == "right" else outside + inside)
    assert causal_tokens(rows, tokens=3).input_ids.shape == (2, 3)


def test_items_of_a_json_list_have_the_line_on_which_they_begin(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('\n[\n {"a": "]\\n,"},\n {"a": [1,\n 2]} ,{"b":\n 3},\n 4\n]\n')
    items = read_json_objects(path)
    assert items == [
        JsonObject(3, {"a": "]\n,"}),
        JsonObject(4, {"a": [1, 2]}),
        JsonObject(5, {"b": 3}),
        Fault(7, "a JSON int where an object is expected"),
    ]
    path.write_text('[{"a": 1},\n {"b"}]')
    assert read_json_objects(path) == [Fault(2, "not JSON (Expecting ':' delimiter at column 6)")]
    path.write_text(" [ ]")
    assert read_json_objects(path) == []
