import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure.parses import Parses, parse_mask, parse_spans, parses_to_trees
from jaxft.structure.pcfg import SymbolNames

NAMES = SymbolNames(["S", "NP"], ["D", "N", "V"], ["the", "dog", "barks"])
TOKENS = jnp.array([[0, 1, 2], [2, 0, 0], [0, 0, 0]])
PARSES = Parses(
    spans=jnp.array([[[0, 3], [0, 2], [0, 1], [1, 2], [2, 3]], [[0, 1], [0, 0], [0, 0], [0, 0], [0, 0]], [[0, 0]] * 5]),
    labels=jnp.array([[0, 1, 2, 3, 4], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
    valid=jnp.array([[True] * 5, [True] + [False] * 4, [False] * 5]),
    score=jnp.zeros(3),
    bottoms=jnp.array([[0, 1, 2, 3, 4], [4, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
)


def test_trees_have_the_names_and_words():
    trees = parses_to_trees(PARSES, TOKENS, NAMES)
    assert [str(tree) for tree in trees] == ["(S (NP (D the) (N dog)) (V barks))", "(S (V barks))", "None"]


def test_trees_of_thousands_of_words_are_made():
    n = 3000
    spans = np.zeros((1, 2 * n - 1, 2), int)
    spans[0, ::2] = np.stack([np.arange(n), np.full(n, n)], axis=1)  # right-branching
    spans[0, 1::2] = np.stack([np.arange(n - 1), np.arange(1, n)], axis=1)
    labels = np.where(spans[..., 1] - spans[..., 0] > 1, 0, 2)
    parses = Parses(jnp.asarray(spans), jnp.asarray(labels), jnp.asarray(labels >= 0), jnp.zeros(1))
    (tree,) = parses_to_trees(parses, np.zeros((1, n), int), NAMES)
    assert tree is not None
    assert tree.leaves() == ["the"] * n


def test_spans_are_the_nodes_that_exist():
    assert parse_spans(PARSES) == [[(0, 0, 3), (1, 0, 2), (2, 0, 1), (3, 1, 2), (4, 2, 3)], [(0, 0, 1)], []]


@pytest.mark.parametrize("compiled", [False, True])
def test_mask_marks_the_nodes(compiled):
    def both(parses):
        return parse_mask(parses, 3), parse_mask(parses, 3, nonterminals=2)

    anywhere, by_label = (jax.jit(both) if compiled else both)(PARSES)
    assert anywhere.shape == (3, 3, 4)
    assert by_label.shape == (3, 3, 4, 2)
    for b, nodes in enumerate(parse_spans(PARSES)):
        assert [tuple(x) for x in np.argwhere(anywhere[b]).tolist()] == sorted((i, j) for _, i, j in nodes)
        found = [tuple(x) for x in np.argwhere(by_label[b]).tolist()]
        assert found == sorted((i, j, label) for label, i, j in nodes if label < 2)
