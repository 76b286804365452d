"""What a user of the constructed transformer and of its approximations is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.checks import UserError
from jaxft.core.types import TokenBatch
from jaxft.nn import AttentionStage, FeedForward, ReluAttentionConfig, make_relu_attention
from jaxft.structure.pcfg import random_pcfg
from theory.pcfg_parsing import approximation
from theory.pcfg_parsing.compression import project_stream
from theory.pcfg_parsing.construction import encode_sentences, inside_outside_transformer

GRAMMAR = random_pcfg(jax.random.key(0), 2, 3, 5)
UNARY = GRAMMAR._replace(log_unary=jnp.full((2, 5), -jnp.inf))
MODEL = inside_outside_transformer(GRAMMAR, 4)
TOKENS = jnp.array([[0, 1, 2]])
STAGE = AttentionStage(1, 2, 1, 1)


def construct(**options):
    return lambda: inside_outside_transformer(options.pop("grammar", GRAMMAR), options.pop("n", 4), **options)


def bases(*shape):
    return lambda: approximation.projected_inside_outside(GRAMMAR, TOKENS, bases=jnp.ones(shape))


CASES = {
    "unary rules": (construct(grammar=UNARY), "no unary rules.*Collapse"),
    "no words": (construct(n=0), "at least 1, got 0"),
    "unknown attention": (construct(attention="sotf"), "Did you mean soft"),
    "unknown heads": (construct(heads="symetric"), "Did you mean symmetric"),
    "heads of hard attention": (construct(attention="hard", heads="symmetric"), "no choice of heads"),
    "dense grammar as low rank": (construct(heads="lowrank"), "LowRankPCFG, got PCFG"),
    "negative tilt": (construct(tilt=-1.0), "tilt must be positive"),
    "traced grammar": (
        lambda: jax.jit(lambda g: inside_outside_transformer(g, 2).params["embeddings"]["token"])(GRAMMAR),
        "Build the model before jit",
    ),
    "too long": (lambda: encode_sentences(MODEL, jnp.zeros((1, 5), int)), "1 to 4 words, got 5.*larger max_tokens"),
    "no tokens": (lambda: encode_sentences(MODEL, jnp.zeros((1, 0), int)), "1 to 4 words, got 0"),
    "word outside": (lambda: encode_sentences(MODEL, jnp.array([[0, 5, -1]])), r"0\.\.4, got \[5, -1\]"),
    "length outside": (lambda: encode_sentences(MODEL, TOKENS, jnp.array([4])), r"lie in 1\.\.3, got \[4\]"),
    "empty sentence": (lambda: encode_sentences(MODEL, TOKENS, jnp.array([0])), "Drop empty sentences"),
    "batch beyond positions": (
        lambda: make_relu_attention(MODEL.config)[1](MODEL.params, TokenBatch(*[jnp.ones((1, 6), int)] * 4)),
        "at most 5 positions, got 6",
    ),
    "sizes of a model": (
        lambda: ReluAttentionConfig(0, 4, 3, (AttentionStage(1, 0, 1, 1, (FeedForward("relu", 0),)),), "sof"),  # pyright: ignore[reportArgumentType]
        r"vocab_size=0, stages\[0\].heads=0, stages\[0\].steps\[0\].hidden=0, attention='sof'",
    ),
    "unknown step": (
        lambda: ReluAttentionConfig(1, 4, 3, (AttentionStage(1, 1, 1, 1, (FeedForward("gatd", 1),)),)),  # pyright: ignore[reportArgumentType]
        "step of kind 'gatd'",
    ),
    "too many symbols to keep": (
        lambda: approximation.frequent_symbols(np.ones(5), 2, keep_nonterminals=3, keep_preterminals=0),
        r"keep_nonterminals must lie in 1\.\.2, got 3",
    ),
    "no preterminal kept": (lambda: approximation.restrict_symbols(GRAMMAR, np.array([0, 1])), "a preterminal"),
    "unsorted symbols": (lambda: approximation.restrict_symbols(GRAMMAR, np.array([3, 0])), "ascending"),
    "restricted unary rules": (lambda: approximation.restrict_symbols(UNARY, np.array([0, 3])), "no unary rules"),
    "rank above s": (lambda: approximation.width_bases(GRAMMAR, TOKENS, rank=3), r"rank must lie in 1\.\.2"),
    "unknown moments": (
        lambda: approximation.width_bases(GRAMMAR, TOKENS, rank=1, moments="insid"),  # pyright: ignore[reportArgumentType]
        "Did you mean inside",
    ),
    "bases of another length": (bases(3, 2, 1), r"\[4, 2, r\], got \(3, 2, 1\)"),
    "bases of another grammar": (bases(4, 3, 1), r"\[4, 2, r\]"),
    "projected unary rules": (
        lambda: approximation.projected_inside_outside(UNARY, TOKENS, bases=jnp.ones((4, 2, 1))),
        "no unary rules",
    ),
    "projected hard attention": (
        lambda: project_stream(inside_outside_transformer(GRAMMAR, 2, attention="hard"), np.eye(2)),
        "without steps, got hard",
    ),
    "basis of another grammar": (lambda: project_stream(MODEL, np.eye(3)), "must have 2 rows"),
}


@pytest.mark.parametrize("name", CASES)
def test_message_says_what_is_wrong_and_what_to_do(name):
    call, words = CASES[name]
    with pytest.raises(UserError, match=words):
        call()


def test_words_behind_the_end_and_masked_ones_need_no_number():
    hidden = jnp.array([[False, False, True]])
    batch = encode_sentences(MODEL, jnp.array([[0, 1, 99]]), jnp.array([2]), mask=hidden)
    assert batch.input_ids.tolist() == [[6, 0, 1, 7]]
    assert encode_sentences(MODEL, jnp.array([[0, 1, 99]]), mask=hidden).input_ids.tolist() == [[6, 0, 1, 5]]
