"""Layouts against the sequences they were made from, and against each other through causal functions."""

import itertools

import jax
import numpy as np
import pytest

from jaxft.data.batching import length_buckets
from jaxft.nn.decoder import DecoderConfig, init_decoder
from jaxft.nn.decoder_outputs import make_response_log_probs
from jaxft.tuning.encoding import EncodedPreferences, PairNotes
from jaxft.tuning.packing import batch_shape, make_response_batch, response_batch, row_lengths, token_use

PROMPTS = [[3, 4, 5], [6], [7, 8]]
RESPONSES = [[[9, 3], [4, 5, 6]], [[7], [8]], [[9, 9, 9, 4], [5]]]
PAD = 1
LAYOUTS = list(itertools.product(("packed", "padded"), ("right", "left")))
SHAPES = [(*layout, r) for layout in LAYOUTS for r in (1, 2, 3)]


def examples(r):
    """The pairs above with their first r responses; the third is another two tokens."""
    return PROMPTS, [[*responses, [2, 3]][:r] for responses in RESPONSES]


def visible(segments):
    """Which column each column sees, by the rule that stands at ``CausalTokens``."""
    t = len(segments)
    return np.array(
        [[j <= i and segments[j] and segments[j] in (1, segments[i]) for j in range(t)] for i in range(t)], bool
    )


def seen_text(batch, example, column):
    """The tokens that a column of an example sees, in order of their positions."""
    t = batch.tokens.input_ids.shape[2]
    row, i = divmod(int(column), t)
    ids, segments, positions = (np.asarray(field[example, row]) for field in batch.tokens)
    sees = [j for j in range(t) if visible(segments)[i, j]]
    assert [positions[j] for j in sees] == list(range(len(sees)))
    return [ids[j] for j in sees]


@pytest.mark.parametrize(("layout", "side", "r"), SHAPES)
def test_the_source_of_a_token_sees_the_prompt_and_the_tokens_before_it(layout, side, r):
    prompts, responses = examples(r)
    batch = make_response_batch(prompts, responses, layout=layout, side=side, pad_id=PAD)
    assert batch.tokens.input_ids.shape == (
        3,
        1 if layout == "packed" else r,
        16 if (layout, r) == ("packed", 3) else 8,
    )
    assert batch.source.shape == (3, r, 8)
    for i, j in itertools.product(range(3), range(r)):
        size = int(batch.mask[i, j].sum())
        assert batch.mask[i, j].tolist() == [1] * size + [0] * (8 - size)
        assert batch.targets[i, j, :size].tolist() == responses[i][j]
        for k in range(size):
            assert seen_text(batch, i, batch.source[i, j, k]) == prompts[i] + responses[i][j][:k]
        assert not batch.source[i, j, size:].any()
        assert not batch.targets[i, j, size:].any()


@pytest.mark.parametrize(("layout", "side"), LAYOUTS)
def test_padding_is_of_segment_0_and_the_rest_is_text(layout, side):
    batch = make_response_batch(*examples(2), layout=layout, side=side, pad_id=PAD, tokens=11)
    padding = batch.tokens.segment_ids == 0
    assert (batch.tokens.input_ids[padding] == PAD).all()
    ends = padding[..., 0] if side == "left" else padding[..., -1]
    assert ends.all()
    prompts, responses = sum(map(len, PROMPTS)), sum(len(ids) for pair in RESPONSES for ids in pair)
    assert (~padding).sum() == prompts * (1 if layout == "packed" else 2) + responses


def attention_states(table, tokens):
    """Two layers of attention that look at positions, written out in numpy: ``[b, t]`` to ``[b, t, d]``."""
    ids, segments, positions = tokens
    x = table[ids] + np.sin(positions[..., None] / (1.0 + np.arange(table.shape[1])))
    allowed = np.array([visible(row) for row in segments])
    for _ in range(2):
        weights = np.where(allowed, np.exp(x @ x.transpose(0, 2, 1)), 0.0)
        x = np.tanh(x + weights @ x / np.maximum(weights.sum(-1, keepdims=True), 1e-300))
    return x


def log_softmax(scores):
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def log_probs(table, batch):
    """Log-probability of each response through ``source``, as every consumer of a batch takes it."""
    n, s, t = batch.tokens.input_ids.shape
    states = attention_states(table, [field.reshape(n * s, t) for field in batch.tokens]).reshape(n, s * t, -1)
    at = np.take_along_axis(states[:, None], batch.source[..., None], axis=2)
    scores = np.take_along_axis(log_softmax(at @ table.T), batch.targets[..., None], axis=3)[..., 0]
    return (scores * batch.mask).sum(-1)


def by_hand(table, prompt, response):
    """Log-probability of one response, each token from a row of its own without padding."""
    total = 0.0
    for k, token in enumerate(response):
        ids = np.array([prompt + response[:k]])
        row = (ids, np.ones_like(ids), np.arange(ids.shape[1])[None])
        total += log_softmax(attention_states(table, row)[0, -1] @ table.T)[token]
    return total


def test_packed_equals_padded_equals_one_text_at_a_time():
    table = 0.5 * np.random.default_rng(0).standard_normal((10, 4))
    prompts, responses = examples(2)
    expected = np.array([[by_hand(table, p, ids) for ids in rs] for p, rs in zip(prompts, responses, strict=True)])
    for layout, side in LAYOUTS:
        batch = make_response_batch(prompts, responses, layout=layout, side=side, pad_id=PAD)
        np.testing.assert_allclose(log_probs(table, batch), expected, rtol=1e-12)


def test_packed_equals_padded_through_a_decoder():
    config = DecoderConfig("llama", 12, 8, 2, 2, 1, 4, 16, 32, init_scale=0.5)
    params = init_decoder(config, key=jax.random.key(0))
    f = jax.jit(make_response_log_probs(config))
    packed = make_response_batch(*examples(2), layout="packed", side="right", pad_id=PAD)
    padded = make_response_batch(*examples(2), layout="padded", side="left", pad_id=PAD)
    np.testing.assert_allclose(f(params, packed), f(params, padded), rtol=1e-5)


@pytest.fixture
def encoded():
    """The pairs above without notes."""
    chosen, rejected = ([list(side) for side in part] for part in zip(*RESPONSES, strict=True))
    notes = PairNotes(*np.zeros((len(PairNotes._fields), 3), bool))
    return EncodedPreferences(PROMPTS, chosen, rejected, [1, 2, 3], notes, [], PAD)


def test_a_batch_of_pairs_holds_chosen_rejected_and_the_continuations_asked_about(encoded):
    batch = response_batch(encoded, [2, 0], continuations=[[2], [3, 3]], multiple=1)
    direct = make_response_batch(
        [PROMPTS[2], PROMPTS[0]],
        [[*RESPONSES[2], [2], [3, 3]], [*RESPONSES[0], [2], [3, 3]]],
        multiple=1,
        pad_id=PAD,
    )
    for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(direct), strict=True):
        assert a.dtype == np.int32
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_one_shape_holds_all_pairs(encoded, layout):
    shape = batch_shape(encoded, layout=layout, continuations=[[2, 3]], multiple=4)
    for i in range(3):
        batch = response_batch(
            encoded,
            [i],
            layout=layout,
            continuations=[[2, 3]],
            tokens=shape.tokens,
            response_tokens=shape.response_tokens,
        )
        assert batch.tokens.input_ids.shape[2] == shape.tokens
        assert batch.source.shape == (1, 3, shape.response_tokens)
    whole = response_batch(encoded, layout=layout, continuations=[[2, 3]], multiple=4)
    assert (whole.tokens.input_ids.shape[2], whole.source.shape[2]) == shape


def test_lengths_of_rows_make_buckets_that_hold_them(encoded):
    for layout in ("packed", "padded"):
        for indices, width in length_buckets(row_lengths(encoded, layout=layout), batch_size=2, multiple=1):
            used = response_batch(encoded, indices, layout=layout, multiple=1)
            assert used.tokens.input_ids.shape[2] == width


def test_packing_saves_a_prompt_for_each_further_response():
    prompts, responses = [[2] * 90], [[[3] * 5, [4] * 5]]
    packed, padded = (
        token_use(make_response_batch(prompts, responses, layout=layout, multiple=1)) for layout in ("packed", "padded")
    )
    assert (packed, padded) == ((100, 100, 1.0), (190, 190, 1.0))
    short = token_use(make_response_batch(prompts, responses, tokens=200))
    assert short.fill_frac == 0.5
