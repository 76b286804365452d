"""Claims on objectives: Inside-Outside is the optimum of masked language modelling, and EM climbs the likelihood.

Expectations over sentences are exact: sums over all 216 sentences of three words, each with every word hidden in turn.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.structure import PCFG, brute_force, em_step, excess_loss, masked_word_posterior
from jaxft.structure.enumeration import enumerated_masked_posterior
from theory.claims import Evidence
from theory.pcfg_parsing.grammars import (
    LENGTHS,
    NONTERMINALS,
    PAPER,
    SETTING,
    TOKENS,
    WORDS,
    compiled,
    make_claim,
    other_grammar,
    toy,
    unseen_words,
)

ROWS = 1024
"""Sentences in a call of the compiled program: others are padding."""
SHORT = 3
STEPS = 6


# Thousands of sentences go through it: here a little optimising pays.
@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
def _posterior(grammar: Any, tokens: jax.Array, lengths: jax.Array, mask: jax.Array) -> jax.Array:
    return masked_word_posterior(grammar, tokens, lengths, mask=mask)


def hidden_words(grammar: PCFG, tokens: np.ndarray, lengths: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Posterior of hidden words ``[b, 7, v]`` of any number of sentences."""
    rows, found = len(tokens), []
    for start in range(0, rows, ROWS):
        at = np.minimum(np.arange(start, start + ROWS), rows - 1)
        arrays = (jnp.asarray(x) for x in (tokens[at], lengths[at].astype(np.int32), mask[at]))
        found.append(np.asarray(_posterior(grammar, *arrays)))
    return np.concatenate(found)[:rows]


HIDDEN_ROWS = np.array([3, 6])
"""Sentences of four words and of one."""


def _two_hidden(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words and lengths of these sentences, with the first word hidden and the last but one."""
    lengths = LENGTHS[HIDDEN_ROWS]
    place = np.arange(TOKENS)[None]
    mask = (place == 0) | (place == lengths[:, None] - 2)
    return np.asarray(toy(seed).tokens)[HIDDEN_ROWS], lengths, mask


@functools.cache
def _filled_in(seed: int) -> np.ndarray:
    """Posteriors by summing over all words at the hidden places."""
    rows = zip(*_two_hidden(seed), strict=True)
    grammar = toy(seed).grammar
    return np.concatenate([enumerated_masked_posterior(grammar, words[:n], mask[:n]) for words, n, mask in rows])


def posterior_of_hidden_words(seed: int, *, leak: bool = False) -> Evidence:
    """Posterior of two hidden words against sums over all ways to fill them in; the control sees one of the two."""
    tokens, lengths, mask = _two_hidden(seed)
    mask[0, 0] &= not leak
    found = hidden_words(toy(seed).grammar, tokens, lengths, mask)
    measured = np.concatenate([row[:n] for row, n in zip(found, lengths.tolist(), strict=True)])
    return Evidence(measured, _filled_in(seed), setting=SETTING)


class Hidden(NamedTuple):
    """All sentences of three words with one word hidden, and what is to be said of it."""

    probability: np.ndarray
    """Of each sentence, given the length."""
    words: np.ndarray
    """The hidden words ``[sentence, place]``."""
    posterior: np.ndarray
    """Of Inside-Outside ``[sentence, place, v]``."""
    models: np.ndarray
    """Of other models ``[model, sentence, place, v]``."""


@functools.cache
def hidden(seed: int, *, wrong_grammar: bool = False) -> Hidden:
    """With ``wrong_grammar`` the posterior is that of another grammar, and the true one is among the models."""
    own, other = toy(seed).grammar, other_grammar(seed)
    words = np.array(list(itertools.product(range(WORDS), repeat=SHORT)), np.int32)
    joint = _joint_probabilities(own, words)
    tokens = np.zeros((SHORT * len(words), TOKENS), np.int32)
    tokens[:, :SHORT] = np.repeat(words, SHORT, axis=0)
    place = np.tile(np.arange(SHORT), len(words))
    mask = np.arange(TOKENS)[None] == place[:, None]
    sizes = np.full(len(tokens), SHORT)
    shape = (len(words), SHORT, WORDS)
    true, wrong = (
        hidden_words(grammar, tokens, sizes, mask)[np.arange(len(tokens)), place].reshape(shape)
        for grammar in (own, other)
    )
    ours, theirs = (wrong, true) if wrong_grammar else (true, wrong)
    tempered = [ours**power / (ours**power).sum(axis=2, keepdims=True) for power in (0.8, 1.25)]
    models = [theirs, *tempered, np.full(shape, 1 / WORDS)]
    return Hidden(joint / joint.sum(), words, ours, np.stack(models))


def _joint_probabilities(grammar: PCFG, words: np.ndarray) -> np.ndarray:
    """Probability of each sentence, by enumeration of the trees of so many words."""
    emit = np.exp(np.asarray(grammar.log_emit))
    total = np.zeros(len(words))
    for derivation in brute_force(unseen_words(grammar), [0] * SHORT).derivations:
        tags = np.array([symbol - NONTERMINALS for symbol, _, _ in derivation.nodes() if symbol >= NONTERMINALS])
        total += np.exp(derivation.log_prob) * emit[tags[None], words].prod(axis=1)
    return total


def _loss(case: Hidden, said: np.ndarray) -> float:
    """Expected surprise of a hidden word, in nats."""
    sentence, place = np.indices(case.words.shape)
    return float((case.probability[:, None] * -np.log(said[sentence, place, case.words])).sum() / SHORT)


def optimum_of_the_objective(seed: int, *, wrong_grammar: bool = False) -> Evidence:
    """Expected loss of Inside-Outside against the least of four other models; the control has another grammar."""
    case = hidden(seed, wrong_grammar=wrong_grammar)
    others = [_loss(case, model) for model in case.models]
    setting = {"sentences": len(case.words), "words": SHORT, "models": len(others)}
    return Evidence(_loss(case, case.posterior), min(others), setting=setting)


def excess_is_divergence(seed: int, *, wrong_grammar: bool = False) -> Evidence:
    """Expected loss of four models less that of Inside-Outside, against their excess loss as it is estimated.

    The control takes the posterior of another grammar for the true one.
    """
    case = hidden(seed, wrong_grammar=wrong_grammar)
    bayes = _loss(case, case.posterior)
    predicted = [_loss(case, model) - bayes for model in case.models]
    by_sentence = [np.asarray(_excess(case.posterior, np.log(model))) for model in case.models]
    measured = [(case.probability * excess).sum() for excess in by_sentence]
    return Evidence(np.array(measured), np.array(predicted), setting={"sentences": len(case.words), "words": SHORT})


@compiled
@functools.partial(jax.vmap, in_axes=(0, 0))
def _excess(posterior: jax.Array, log_model: jax.Array) -> jax.Array:
    """Of each sentence."""
    return excess_loss(posterior[None], log_model[None], jnp.ones((1, SHORT), bool))[0]


@compiled
def _em(grammar: Any, tokens: jax.Array, lengths: jax.Array) -> tuple[Any, jax.Array]:
    return em_step(grammar, tokens, lengths)


def likelihood_never_falls(seed: int, *, other_words: bool = False) -> Evidence:
    """Greatest fall of the likelihood in six steps of EM; the control expects counts on sentences of other words."""
    case, grammar, likelihood = toy(seed), other_grammar(seed), []
    read = np.asarray(case.tokens)
    read = jnp.asarray((read + 1) % WORDS if other_words else read)
    for _ in range(STEPS + 1):
        better, log_z = _em(grammar, case.tokens, case.lengths)
        likelihood.append(float(log_z.sum()))
        grammar = _em(grammar, read, case.lengths)[0] if other_words else better
    falls = -np.diff(likelihood)
    gained = likelihood[-1] - likelihood[0]
    return Evidence(falls.max(), 1e-10, setting=SETTING | {"steps": STEPS, "gained_nats": gained})


CLAIMS = (
    make_claim(
        "posterior-of-hidden-words",
        "One pass with the hidden words summed out gives the Bayes posterior of each of them.",
        PAPER,
        "identity",
        posterior_of_hidden_words,
        {"leak": True},
        "a hidden word is seen",
        seeds=2,
    ),
    make_claim(
        "optimum-of-the-objective",
        "On sentences of the grammar no model has a lower masked loss than Inside-Outside.",
        PAPER,
        "bound",
        optimum_of_the_objective,
        {"wrong_grammar": True},
        "posterior of another grammar",
        seeds=3,
    ),
    make_claim(
        "excess-is-divergence",
        "What a model's masked loss exceeds the Bayes loss by is its mean divergence from the posterior.",
        f"derived; cf. {PAPER}",
        "identity",
        excess_is_divergence,
        {"wrong_grammar": True},
        "posterior of another grammar",
        seeds=2,
    ),
    make_claim(
        "likelihood-never-falls",
        "A step of EM never lowers the likelihood of the sentences whose counts it expects.",
        "Lari and Young 1990, section 3",
        "bound",
        likelihood_never_falls,
        {"other_words": True},
        "counts expected on sentences of other words",
        seeds=3,
    ),
)
