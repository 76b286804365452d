"""The constructed transformer against a plain dynamic program of this file, its approximations, and the claims."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure.inside_outside import Marginals, inside_outside
from jaxft.structure.pcfg import PCFG, to_dense, to_sparse
from theory.claims import check_claim
from theory.pcfg_parsing import approximation, construction_claims
from theory.pcfg_parsing.construction import encode_sentences, inside_outside_transformer
from theory.pcfg_parsing.construction_claims import (
    CLAIMS,
    LENGTHS,
    MAX_TOKENS,
    NONTERMINALS,
    PRETERMINALS,
    forward,
    toy,
)
from theory.pcfg_parsing.layout import embedding_width, head_counts, layer_count
from theory.pcfg_parsing.readouts import read_inside, read_marginals, read_posterior

BY_NAME = {claim.id.removeprefix("pcfg_parsing/"): claim for claim in CLAIMS}
VARIANTS = {
    "directional": {},
    "symmetric": {"heads": "symmetric"},
    "lowrank": {"heads": "lowrank"},
    "hard": {"attention": "hard"},
}


def charts(grammar, words, mask):
    """Inside and outside probabilities ``[i, j, a]`` of one sentence, by the definition."""
    root, rule, emit = (np.exp(np.asarray(x, np.float64)) for x in grammar[:3])
    n, (s, a, _) = len(words), rule.shape
    inner, outer = np.zeros((n, n + 1, a)), np.zeros((n, n + 1, a))
    for t, word in enumerate(words):
        inner[t, t + 1, s:] = emit.sum(axis=1) if mask[t] else emit[:, word]
    for i, j in ((i, i + w) for w in range(2, n + 1) for i in range(n - w + 1)):
        for k in range(i + 1, j):
            inner[i, j, :s] += np.einsum("abc,b,c->a", rule, inner[i, k], inner[k, j])
    outer[0, n] = root
    for i, j in ((i, i + w) for w in range(n - 1, 0, -1) for i in range(n - w + 1)):
        for k in range(j + 1, n + 1):
            outer[i, j] += np.einsum("abc,a,c->b", rule, outer[i, k, :s], inner[j, k])
        for k in range(i):
            outer[i, j] += np.einsum("abc,a,b->c", rule, outer[k, j, :s], inner[k, i])
    return inner, outer


def run(model, tokens, lengths, mask):
    batch = encode_sentences(model, tokens, lengths, mask=mask)
    hidden = forward(model.config, model.params, batch).hidden
    return hidden, read_marginals(model, hidden[-1], batch), read_posterior(model, hidden[-1])


def largest_error(grammar, case, marginals, posterior):
    """Of log Z, span and tag posteriors and leave-one-out word posteriors, over the sentences of the toy."""
    s, worst = NONTERMINALS, 0.0
    emit = np.exp(np.asarray(grammar.log_emit, np.float64))
    for row, n in enumerate(LENGTHS):
        inner, outer = charts(grammar, np.asarray(case.tokens[row, :n]), np.asarray(case.mask[row]))
        z = (inner[0, n] * outer[0, n]).sum()
        mu = inner * outer / z
        words = np.stack([outer[t, t + 1, s:] for t in range(n)]) @ emit
        pairs = [
            (marginals.log_z[row], np.log(z)),
            (marginals.span[row, :n, : n + 1], mu[..., :s]),
            (marginals.span[row, n:], 0),
            (marginals.tag[row, :n], np.stack([mu[t, t + 1, s:] for t in range(n)])),
            (marginals.tag[row, n:], 0),
            (posterior[row, :n], words / words.sum(axis=1, keepdims=True)),
            (posterior[row, n:], 0),
        ]
        worst = max(worst, *(np.abs(np.asarray(one) - other).max(initial=0) for one, other in pairs))
    return worst


def build(case, variant, **options):
    grammar = case.low_rank if variant == "lowrank" else case.grammar
    return inside_outside_transformer(grammar, MAX_TOKENS, **VARIANTS[variant], **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_definition_in_double_precision(x64, variant):
    case = toy(7)
    model = build(case, variant)
    _, marginals, posterior = run(model, case.tokens, case.lengths, case.mask)
    assert largest_error(model.grammar, case, marginals, posterior) < 1e-12


def test_equals_the_definition_in_single_precision():
    with jax.enable_x64(True):
        case = toy(7)
    single = case._replace(**{n: jax.tree.map(jnp.float32, getattr(case, n)) for n in ("grammar", "low_rank")})
    with jax.default_matmul_precision("highest"):
        model = build(single, "directional", tilt=4.0)
        assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
        _, marginals, posterior = run(model, case.tokens, case.lengths, case.mask)
    assert largest_error(model.grammar, case, marginals, posterior) < 5e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_are_those_of_the_formulas(x64, variant):
    model, sizes, options = build(toy(7), variant), (NONTERMINALS, PRETERMINALS), VARIANTS[variant]
    assert model.config.layers == layer_count(MAX_TOKENS)
    assert model.config.width == embedding_width(*sizes, MAX_TOKENS, **options)
    heads = head_counts(*sizes, rank=construction_claims.RANK, **options)
    assert [stage.heads for stage in model.config.stages] == list(heads.values())


@pytest.mark.parametrize(
    ("variant", "max_tokens"), [("directional", 1), ("directional", 3), pytest.param("hard", 2, marks=pytest.mark.slow)]
)
def test_small_models_are_exact_too(x64, variant, max_tokens):
    case = toy(7)
    model = inside_outside_transformer(case.grammar, max_tokens, **VARIANTS[variant])
    assert model.config.layers == layer_count(max_tokens)
    words = min(max_tokens, 2)  # of three the batch has two
    tokens = case.tokens[:, :words]
    _, marginals, _ = run(model, tokens, None, None)
    for row in range(len(tokens)):
        inner, outer = charts(case.grammar, np.asarray(tokens[row]), np.zeros(words, bool))
        z = (inner[0, -1] * outer[0, -1]).sum()
        assert abs(float(marginals.log_z[row]) - np.log(z)) < 1e-12
        np.testing.assert_allclose(marginals.span[row], (inner * outer)[..., :NONTERMINALS] / z, atol=1e-12)


def test_tilting_changes_nothing(x64):
    case = toy(7)
    _, marginals, posterior = run(build(case, "directional"), case.tokens, case.lengths, case.mask)
    _, other, posterior_too = run(build(case, "directional", tilt=5.0), case.tokens, case.lengths, case.mask)
    np.testing.assert_allclose(other.log_z, marginals.log_z, atol=1e-12)
    np.testing.assert_allclose(other.span, marginals.span, atol=1e-12)
    np.testing.assert_allclose(posterior_too, posterior, atol=1e-12)


def test_a_sentence_without_a_parse_has_no_posteriors_and_no_nan(x64):
    case = toy(7)
    # Preterminals that no rule and no root derives: sentences of word 0 alone have no parse.
    emit = case.grammar.log_emit.at[:, 0].set(-jnp.inf)
    model = inside_outside_transformer(case.grammar._replace(log_emit=emit), MAX_TOKENS)
    lengths = jnp.full_like(case.lengths, 3)
    _, marginals, posterior = run(model, jnp.zeros_like(case.tokens), lengths, case.mask & False)
    assert bool((marginals.log_z == -jnp.inf).all())
    assert not marginals.span.any()
    assert not marginals.tag.any()
    assert not posterior.any()


def test_wider_charts_are_zero_before_their_layer(x64):
    case = toy(7)
    model = build(case, "directional")
    hidden, _, _ = run(model, case.tokens, case.lengths, case.mask)
    width = np.arange(MAX_TOKENS + 1)[None, :] - np.arange(MAX_TOKENS)[:, None]
    for layer in range(1, MAX_TOKENS + 1):
        chart = np.asarray(read_inside(model, hidden[layer]))
        assert not chart[:, width > layer].any()
        assert chart[0][width == layer].any()


@pytest.mark.parametrize("name", BY_NAME)
def test_claim_holds_and_its_control_is_violated(name):
    assert check_claim(BY_NAME[name]).status == "holds"
    assert check_claim(BY_NAME[name], control=True).status == "violated"


@pytest.mark.parametrize("name", BY_NAME)
def test_claim_holds_at_other_seeds(name):
    assert check_claim(BY_NAME[name], first_seed=100).status == "holds"


def test_a_posterior_of_masked_words_alone_is_what_the_inference_library_gives(x64):
    case = toy(7)
    _, _, posterior = run(build(case, "directional"), case.tokens, case.lengths, case.mask)
    tag = np.asarray(inside_outside(case.grammar, case.tokens, case.lengths, mask=case.mask).tag)
    # A masked word's preterminals are weighed by the sum of their emissions, which is 1.
    wanted = tag @ np.exp(np.asarray(case.grammar.log_emit))
    masked = np.asarray(case.mask)
    np.testing.assert_allclose(np.asarray(posterior)[masked], wanted[masked], atol=1e-12)


def test_restricted_grammar_is_the_grammar_without_the_dropped_symbols(x64):
    case, kept = toy(7), np.array([0, 2, 4, 5, 8])
    s, a = NONTERMINALS, NONTERMINALS + PRETERMINALS
    out = np.where(np.isin(np.arange(a), kept), 0, -np.inf)
    parts = (out[:s, None, None], out[None, :, None], out[None, None, :])
    rule = np.asarray(case.grammar.log_rule) + sum(parts)
    root, emit = np.asarray(case.grammar.log_root) + out, np.asarray(case.grammar.log_emit) + out[s:, None]
    silenced = PCFG(jnp.asarray(root), jnp.asarray(rule), jnp.asarray(emit))
    words, mask = np.asarray(case.tokens[0]), np.asarray(case.mask[0])
    wanted, small = charts(silenced, words, mask), approximation.restrict_symbols(case.grammar, kept)
    for one, full in zip(charts(small, words, mask), wanted, strict=True):
        np.testing.assert_allclose(one, full[..., kept], atol=1e-15)
    assert not wanted[0][..., np.setdiff1d(np.arange(a), kept)].any()
    listed = approximation.restrict_symbols(to_sparse(case.grammar), kept)
    for one, other in zip(to_dense(listed)[:3], small[:3], strict=True):
        np.testing.assert_array_equal(one, other)


def test_expanded_posteriors_are_zero_for_dropped_symbols():
    kept, draw = np.array([0, 2, 3]), np.random.default_rng(0)
    span, tag, root = (jnp.asarray(draw.uniform(size=size)) for size in ((1, 4, 5, 2), (1, 4, 1), (1, 3)))
    small = Marginals(jnp.zeros(1), span, tag, root, jnp.ones(1, bool))
    full = approximation.expand_marginals(small, kept, 3, 5)
    np.testing.assert_array_equal(full.span[..., [0, 2]], span)
    np.testing.assert_array_equal(full.tag[..., [0]], tag)
    np.testing.assert_array_equal(full.root[..., kept], root)
    assert not full.span[..., 1].any()
    assert not full.tag[..., 1].any()
    assert not full.root[..., [1, 4]].any()


@pytest.mark.parametrize("moments", ["inside", "marginal"])
def test_projection_on_all_directions_is_exact(x64, moments):
    case = toy(7)
    bases = approximation.width_bases(case.grammar, case.tokens, case.lengths, rank=NONTERMINALS, moments=moments)
    identity = np.einsum("wxr,wxq->wrq", bases, bases)
    np.testing.assert_allclose(identity, np.broadcast_to(np.eye(NONTERMINALS), identity.shape), atol=1e-12)
    found = approximation.projected_inside_outside(case.grammar, case.tokens, case.lengths, bases=bases, mask=case.mask)
    wanted = inside_outside(case.grammar, case.tokens, case.lengths, mask=case.mask)
    for name in ("log_z", "span", "tag", "root", "parsable"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-12)


def test_symbols_are_kept_by_their_expected_counts():
    counts = np.array([0.1, 3.0, 2.0, 5.0, 0.0, 4.0])
    kept = approximation.frequent_symbols(counts, 4, keep_nonterminals=2, keep_preterminals=1)
    assert kept.tolist() == [1, 3, 5]
