"""Continuations are those of the decoder without a cache."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.types import CausalTokens, ResponseBatch
from jaxft.nn.decoder import decoder_config
from jaxft.nn.decoder_outputs import make_next_token_logits, make_response_token_log_probs
from jaxft.nn.generation import generate
from tests.nn.test_decoder import CONFIGS, SIZES, make_params

TEXTS = [[3, 5, 2], [7, 1, 8, 8, 12], [4]]
WIDTH, NEW, ROOM = 6, 5, 12


def prompts_of(texts, side: str = "left", width: int = WIDTH) -> CausalTokens:
    def row(values):
        room = [0] * (width - len(values))
        return room + values if side == "left" else values + room

    fields = [texts, [[1] * len(x) for x in texts], [list(range(len(x))) for x in texts]]
    return CausalTokens(*(jnp.asarray([row(x) for x in field], jnp.int32) for field in fields))


@partial(jax.jit, static_argnums=0)
def call(f, params, batch):
    return f(params, batch)


def next_token_log_probs(config, params, texts) -> np.ndarray:
    """Of every token after those of each text, by the decoder without a cache; texts are widened to one shape."""
    logits = call(make_next_token_logits(config), params, prompts_of(texts, "right", ROOM))
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_continuations_take_the_likeliest_token_of_a_decoder_without_a_cache(family):
    config, params = CONFIGS[family], make_params(CONFIGS[family])
    sides = (prompts_of(TEXTS, side) for side in ("left", "right"))
    both = jax.tree.map(lambda *x: jnp.concatenate(x), *sides)
    out = generate(config, params, both, max_new_tokens=NEW)
    assert out.lengths.tolist() == [NEW] * 6
    np.testing.assert_array_equal(out.ids[:3], out.ids[3:])
    np.testing.assert_allclose(out.log_probs[:3], out.log_probs[3:], atol=2e-5)
    # By induction: every token is the likeliest after the prompt and those before it.
    whole = [text + ids for text, ids in zip(TEXTS, out.ids.tolist(), strict=False)]
    log_probs = next_token_log_probs(config, params, whole)
    for row, text in enumerate(TEXTS):
        expected = log_probs[row, len(text) - 1 : len(text) - 1 + NEW]
        assert out.ids[row].tolist() == expected.argmax(axis=-1).tolist()
        np.testing.assert_allclose(out.log_probs[row], expected.max(axis=-1), atol=2e-5)


def responses_of(texts, out) -> ResponseBatch:
    """What was generated, as responses to the prompts, each in a row padded on the right."""
    whole = [
        text + ids[:length] for text, ids, length in zip(texts, out.ids.tolist(), out.lengths.tolist(), strict=True)
    ]
    tokens = CausalTokens(*(x[:, None] for x in prompts_of(whole, "right", ROOM)))
    first = np.array([len(text) - 1 for text in texts])[:, None, None]
    mask = np.arange(NEW)[None, None] < np.asarray(out.lengths)[:, None, None]
    fields = ((first + np.arange(NEW)) * mask, np.asarray(out.ids)[:, None] * mask, mask)
    return ResponseBatch(tokens, *(jnp.asarray(x, jnp.int32) for x in fields))


def test_log_probs_are_those_of_the_model_whatever_the_sampling():
    options = {"temperature": 2.0, "top_k": 4, "top_p": 0.9}
    config, params = CONFIGS["llama"], make_params(CONFIGS["llama"])
    prompts = prompts_of(TEXTS)
    out = generate(config, params, prompts, max_new_tokens=NEW, eos_ids=(3, 11), key=jax.random.key(3), **options)
    expected = call(make_response_token_log_probs(config), params, responses_of(TEXTS, out))[:, 0]
    np.testing.assert_allclose(out.log_probs, expected, atol=2e-5)


def test_a_continuation_ends_with_an_end_token_and_is_padded_beyond():
    config, params = CONFIGS["gpt_neox"], make_params(CONFIGS["gpt_neox"])
    free = generate(config, params, prompts_of(TEXTS), max_new_tokens=NEW)
    ends = (int(free.ids[0, 2]), int(free.ids[1, 0]))
    out = generate(config, params, prompts_of(TEXTS), max_new_tokens=NEW, eos_ids=ends, pad_id=9)
    for row in range(3):
        ids = free.ids[row].tolist()
        length = next((k + 1 for k, token in enumerate(ids) if token in ends), NEW)
        assert int(out.lengths[row]) == length
        assert out.ids[row].tolist() == ids[:length] + [9] * (NEW - length)
        np.testing.assert_array_equal(out.log_probs[row, length:], 0)
        np.testing.assert_allclose(out.log_probs[row, :length], free.log_probs[row, :length], atol=1e-6)
    assert len(set(out.lengths.tolist())) > 1


COUNTED = 4000


@pytest.mark.parametrize("options", [{}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.7}])
def test_tokens_are_drawn_as_often_as_they_are_probable(options):
    config, params = CONFIGS["gpt2"], make_params(CONFIGS["gpt2"])
    options = {"temperature": 1.3, **options}
    prompts = prompts_of([TEXTS[0]] * COUNTED, "right", 3)
    out = generate(config, params, prompts, max_new_tokens=1, key=jax.random.key(0), **options)
    log_probs = next_token_log_probs(config, params, TEXTS)[0, 2] / options["temperature"]
    probs = np.exp(log_probs) / np.exp(log_probs).sum()
    order = np.argsort(-probs)
    # From the likeliest on, in words: at most top_k, and of these no more than are needed for top_p.
    kept = list(order[: options.get("top_k", 13)])
    share = probs[kept] / probs[kept].sum()
    kept = kept[: int(np.sum(np.cumsum(share) < options.get("top_p", 1.0))) + 1]
    expected = np.zeros(13)
    expected[kept] = probs[kept] / probs[kept].sum()
    counts = np.bincount(np.asarray(out.ids)[:, 0], minlength=13) / COUNTED
    assert (counts[expected == 0] == 0).all()
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected * (1 - expected) / COUNTED)).all()
    assert len(kept) > 1


def test_draws_depend_on_the_key_and_the_row_alone():
    config, params = CONFIGS["olmo2"], make_params(CONFIGS["olmo2"])
    draw = partial(generate, config, params, max_new_tokens=NEW, temperature=1.5)
    three, again = (draw(prompts_of(TEXTS), key=jax.random.key(7)) for _ in range(2))
    np.testing.assert_array_equal(three.ids, again.ids)
    others = draw(prompts_of([TEXTS[0], [9, 9], [10, 2, 6, 1]]), key=jax.random.key(7))
    np.testing.assert_array_equal(others.ids[0], three.ids[0])
    assert not np.array_equal(others.ids[1:], three.ids[1:])
    alone = draw(prompts_of(TEXTS[:2]), key=jax.random.key(7))
    np.testing.assert_array_equal(alone.ids, three.ids[:2])
    assert not np.array_equal(draw(prompts_of(TEXTS), key=jax.random.key(8)).ids, three.ids)
    same = draw(prompts_of([TEXTS[0]] * 3), key=jax.random.key(7))
    assert len({tuple(row) for row in same.ids.tolist()}) == 3


def test_a_program_is_compiled_once_for_all_prompts_of_a_shape_and_all_temperatures(caplog):
    config = decoder_config("gpt2", **{**SIZES, "vocab_size": 17})
    params = make_params(config)
    with jax.log_compiles():
        for seed, temperature in enumerate((0.5, 1.0, 2.0)):
            prompts, key = prompts_of(TEXTS[seed:][:1]), jax.random.key(seed)
            generate(config, params, prompts, max_new_tokens=2, temperature=temperature, key=key)
    compiled = [r for r in caplog.records if "Finished XLA compilation of jit(_generated)" in r.getMessage()]
    assert len(compiled) == 1


def test_bfloat16_parameters_generate():
    config, params = CONFIGS["llama"], make_params(CONFIGS["llama"])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    out = generate(config, half, prompts_of(TEXTS), max_new_tokens=NEW)
    assert out.log_probs.dtype == jnp.float32
    expected = call(make_response_token_log_probs(config), half, responses_of(TEXTS, out))[:, 0]
    np.testing.assert_allclose(out.log_probs, expected, atol=0.1)


def test_generation_works_in_float64_and_under_jit(x64):
    config = CONFIGS["gpt2"]
    params = jax.tree.map(lambda x: x.astype(jnp.float64), make_params(config))
    out = jax.jit(lambda p: generate(config, p, prompts_of(TEXTS), max_new_tokens=2))(params)
    assert out.log_probs.dtype == jnp.float64
    expected = next_token_log_probs(config, params, TEXTS).max(axis=-1)
    np.testing.assert_allclose(out.log_probs[:, 0], [expected[row, len(x) - 1] for row, x in enumerate(TEXTS)])
