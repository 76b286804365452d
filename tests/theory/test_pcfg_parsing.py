"""The claims of pcfg_parsing on inference: each holds, its control is violated, and faults of the library show."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure import (
    LowRankPCFG,
    bracketing_chart,
    em_step,
    excess_loss,
    inside,
    inside_outside,
    length_log_probs,
    masked_word_posterior,
    mbr_parse,
    outside,
    sample_sentences,
    sample_trees,
    tree_entropy,
    tree_kl,
    viterbi,
)
from jaxft.structure.k_best import k_best
from jaxft.structure.prefix import prefix_log_probability
from theory.claims import check_claim
from theory.pcfg_parsing import (
    CLAIMS,
    construction_claims,
    decoding,
    grammars,
    invariances,
    objective,
    posteriors,
    samples,
    trained,
)

OTHERS = {claim.id for claim in construction_claims.CLAIMS}
BY_NAME = {claim.id.removeprefix("pcfg_parsing/"): claim for claim in CLAIMS if claim.id not in OTHERS}
TRAINED = [claim.id.removeprefix("pcfg_parsing/") for claim in trained.CLAIMS]


@pytest.fixture
def claim_modules():
    return (grammars, posteriors, invariances, decoding, samples, objective, trained)


@pytest.mark.parametrize(
    "name",
    [  # which trains a dozen models
        pytest.param(name, marks=[pytest.mark.slow] if name == "training-approaches-bayes" else []) for name in BY_NAME
    ],
)
def test_claim_holds_and_its_control_is_violated(name):
    assert check_claim(BY_NAME[name]).status == "holds"
    assert check_claim(BY_NAME[name], control=True).status == "violated"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in TRAINED else []) for name in BY_NAME]
)
def test_claim_holds_at_other_seeds(name):
    assert check_claim(BY_NAME[name], first_seed=100).status == "holds"


def _found(change):
    """Inside-Outside with something of what it finds changed."""
    return lambda *args, **options: change(inside_outside(*args, **options))


def _shifted(found):
    return found._replace(span=jnp.roll(found.span, 1, axis=2))


def _too_heavy(found):
    return found._replace(span=found.span * 1.001)


def _counts_transposed(found: Any):
    if found.counts is None:
        return found
    counts = found.counts
    return found._replace(counts=counts._replace(log_rule=jnp.swapaxes(counts.log_rule, 1, 2)))


def _factors_confused(grammar, *args, **options):
    if isinstance(grammar, LowRankPCFG):
        grammar = grammar._replace(log_left=grammar.log_right)
    return inside_outside(grammar, *args, **options)


def _without_roots(found):
    return found._replace(root=jnp.zeros_like(found.root))


def _swapped(function):
    """The grammar's rules with their children swapped."""
    return lambda grammar, *args, **options: function(_with_swapped_children(grammar), *args, **options)


def _with_swapped_children(grammar):
    return grammar._replace(log_rule=jnp.swapaxes(grammar.log_rule, 1, 2))


def _flat_emissions(function):
    def run(grammar, *args, **options):
        return function(grammar._replace(log_emit=jnp.zeros_like(grammar.log_emit)), *args, **options)

    return run


def _one_mask(grammar, tokens, lengths, *, mask):
    """Every hidden word but the first of a sentence is read."""
    first = mask & (jnp.cumsum(mask, axis=1) == 1)
    posterior = masked_word_posterior(grammar, tokens, lengths, mask=mask)
    one = masked_word_posterior(grammar, tokens, lengths, mask=first)
    return jnp.where(first[..., None], one, posterior)


def _words_confused(grammar, tokens, lengths):
    """A step that gives the counts of every word to the next."""
    better, log_z = em_step(grammar, tokens, lengths)
    return better._replace(log_emit=jnp.roll(better.log_emit, 1, axis=1)), log_z


def _without_posteriors(span, lengths):
    return mbr_parse(jnp.ones_like(span), lengths)


def _best_repeated(*args, k):
    found = k_best(*args, k=k)
    return [p._replace(score=jnp.sort(jnp.where(jnp.isfinite(p.score), p.score[0], p.score))[::-1]) for p in found]


def _splits_forgotten(scores, **options):
    """A chart without the wide spans that start at the second or third word."""
    (values,) = bracketing_chart(scores.at[:, 1:3, 3:].add(-jnp.inf), **options)
    return (values,)


def _repeating_sampler(tables, *, key, **options):
    """The second half of the sentences are one and the same."""
    drawn = sample_sentences(tables, key=key, **options)
    half = len(drawn.tokens) // 2
    return jax.tree.map(lambda x: jnp.concatenate([x[:half], x[half : half + 1].repeat(len(x) - half, axis=0)]), drawn)


FAULTS = {
    "spans shifted by one": ("inside_outside", _found(_shifted), ("node-posteriors", "scores-to-marginals")),
    "spans too heavy": ("inside_outside", _found(_too_heavy), ("sum-rules", "node-posteriors")),
    "rule counts transposed": ("inside_outside", _found(_counts_transposed), ("rule-counts", "scores-to-marginals")),
    "no posterior of roots": ("inside_outside", _found(_without_roots), ("sum-rules", "node-posteriors")),
    "children swapped": (
        "inside_outside",
        _swapped(inside_outside),
        ("sentence-probability", "rule-counts"),
    ),
    "factors confused": ("inside_outside", _factors_confused, ("routes-agree",)),
    "inside of a swapped grammar": ("inside", _swapped(inside), ("inside-and-outside",)),
    "outside of a swapped grammar": ("outside", _swapped(outside), ("inside-and-outside",)),
    "entropy of a swapped grammar": ("tree_entropy", _swapped(tree_entropy), ("tree-entropy",)),
    "divergence the wrong way": (
        "tree_kl",
        lambda p, q, *args: tree_kl(q, p, *args),
        ("tree-divergence",),
    ),
    "Viterbi on a swapped grammar": ("viterbi", _swapped(viterbi), ("best-tree",)),
    "k best that repeat the best": ("k_best", _best_repeated, ("k-best-trees",)),
    "recall without posteriors": ("mbr_parse", _without_posteriors, ("expected-recall", "recall-of-the-likeliest")),
    "trees forgotten": ("bracketing_chart", _splits_forgotten, ("catalan-numbers",)),
    "lengths of other symbols": (
        "length_log_probs",
        lambda *args: jnp.roll(length_log_probs(*args), 1, axis=1),
        ("length-table",),
    ),
    "prefixes too improbable": (
        "prefix_log_probability",
        lambda *args: 1.01 * prefix_log_probability(*args),
        ("prefix-probability",),
    ),
    "sampler that repeats itself": (
        "sample_sentences",
        _repeating_sampler,
        ("sampled-trees", "sampled-words", "span-frequency"),
    ),
    "trees drawn without the words": (
        "sample_trees",
        lambda grammar, words, *args, **options: sample_trees(grammar, 0 * words, *args, **options),
        ("trees-of-a-sentence",),
    ),
    "words that tell nothing": (
        "masked_word_posterior",
        _flat_emissions(masked_word_posterior),
        ("optimum-of-the-objective", "posterior-of-hidden-words", "bayes-loss-is-not-beaten"),
    ),
    "hidden words read": ("masked_word_posterior", _one_mask, ("posterior-of-hidden-words",)),
    "excess too small": (
        "excess_loss",
        lambda *args: jax.tree.map(lambda x: 0.5 * x, excess_loss(*args)),
        ("excess-is-divergence", "measured-excess"),
    ),
    "counts given to other words": ("em_step", _words_confused, ("likelihood-never-falls",)),
}


@pytest.mark.parametrize(
    ("fault", "name"),
    [  # one claim a fault is enough for the fast suite: each compiles its programs anew
        pytest.param(fault, name, marks=[pytest.mark.slow] if i or name in TRAINED else [])
        for fault, (_, _, names) in FAULTS.items()
        for i, name in enumerate(names)
    ],
)
def test_claim_is_violated_by_a_fault_of_the_code(patched, fault, name):
    patched(*FAULTS[fault][:2])
    assert check_claim(BY_NAME[name]).status == "violated"


def test_misfit_counts_trees_that_the_grammar_has_not(x64):
    drawn = samples.sentences(0, 5)
    exact = grammars.brute_force(grammars.unseen_words(grammars.toy(0).grammar), [0] * 5)
    fair = samples._misfit(drawn.parses, exact)
    strange = drawn.parses._replace(labels=drawn.parses.labels.at[:100].set(6))
    assert fair < 1 < samples._misfit(strange, exact)


def test_bracketings_are_all_binary_trees():
    assert [len(set(decoding.bracketings(0, n))) for n in range(1, 8)] == [1, 1, 2, 5, 14, 42, 132]


def test_masks_hide_a_word_of_every_sentence():
    mask = trained._masks(0, "masks", 500)
    assert mask.any(axis=1).all()
    assert np.abs(mask.mean() - (trained.MASKED_FRAC + (1 - trained.MASKED_FRAC) / grammars.TOKENS)) < 0.03


def test_grammar_is_one_of_distributions(x64):
    for grammar in (grammars.toy(0).grammar, grammars.other_grammar(0)):
        for scores, axes in ((grammar.log_root, 0), (grammar.log_rule, (1, 2)), (grammar.log_emit, 1)):
            np.testing.assert_allclose(np.exp(scores).sum(axis=axes), 1.0, rtol=1e-12)
