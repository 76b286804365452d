"""What a user of probes and of the parsing experiment is told: the rule, what came, the way out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.checks import UserError
from jaxft.core.types import TokenBatch
from jaxft.evaluation.probes import fit_probes, fit_ridge_probes, probe_outputs
from jaxft.evaluation.selectivity import agreement, agreement_by_group, control_targets
from jaxft.evaluation.span_probes import SpanIndex, span_features, span_index
from jaxft.lab.figures import draw_scatter, draw_trees
from jaxft.nn.capture import make_layer_outputs
from jaxft.nn.transformer import EncoderConfig, init_encoder
from jaxft.structure.trees import parse_tree

RUN = ["run", "pcfg_parsing", "--preset", "smoke"]
KEY = jax.random.key(0)
X, Y = np.zeros((2, 5, 3), np.float32), np.zeros((5, 1), np.float32)
TREE = parse_tree("(S (N dogs) (V bark))")


CONFIGURATION = {
    "unknown key": (["--trainin.steps", "3"], "training.steps"),
    "a model that is no name": (["--models", "12x6"], "A<heads>L<layers>, as A4L2, got '12x6'"),
    "a model without layers": (["--models", "A2L0"], "got 'A2L0'"),
    "heads that do not divide": (["--models", "A3L1"], "must be a multiple of the heads of A3L1, got 16"),
    "the same model twice": (["--models", "A2L1", "A2L1"], "models: repeats"),
    "no seed": (["--seeds"], "seeds: needs at least one"),
    "two sources": (["--corpus.grammar", ".", "--corpus.treebank", "."], "give one of them"),
    "a grammar that does not exist": (["--corpus.grammar", "no.cfg"], "grammar: no.cfg does not exist"),
    "held-out files of no treebank": (["--corpus.held-out", "a*"], "Pass --corpus.treebank"),
    "sentences of two words": (["--corpus.max-length", "2"], "max_length: must lie in 3..512, got 2"),
    "two faults at once": (["--training.steps", "0", "--probing.hidden", "0"], "hidden: must be positive, got 0"),
    "no hidden words": (["--training.mask-frac", "0"], "mask_frac: must lie in (0, 1], got 0"),
    "unknown masking": (["--training.masking", "berd"], "Did you mean bert?"),
    "too few sentences": (["--probing.test-sentences", "2"], "test_sentences: must be 8 or more, got 2"),
    "probes without marginals": (["--probing.targets", "depth"], "must hold marginal"),
}


@pytest.mark.parametrize("case", CONFIGURATION)
def test_faulty_configuration(case, fails):
    argv, said = CONFIGURATION[case]
    assert said in fails([*RUN, *argv])


GRAMMARS = {
    "weights that do not sum to one": ('S -> N N [0.9]\nN -> "a" [1.0]\n', "g.cfg"),
    "a line that is no rule": ('S -> N N\nN "a"\n', "g.cfg:2"),
    "sentences that are all too long": (
        'S -> A A [1.0]\nA -> B B [1.0]\nB -> C C [1.0]\nC -> D D [1.0]\nD -> "d" [1.0]\n',
        "10",
    ),
}


@pytest.mark.parametrize("case", GRAMMARS)
def test_faulty_grammar(case, fails, tmp_path):
    text, said = GRAMMARS[case]
    (tmp_path / "g.cfg").write_text(text)
    assert said in fails([*RUN, "--corpus.grammar", str(tmp_path / "g.cfg")])


def test_faulty_treebank(fails, tmp_path):
    assert "must hold files named *.mrg or *.ptb" in fails([*RUN, "--corpus.treebank", str(tmp_path)])
    (tmp_path / "wsj.mrg").write_text("( (S (NP (NN tea))\n")
    assert "wsj.mrg:1" in fails([*RUN, "--corpus.treebank", str(tmp_path)])


WRONG: Any = {"objective": "logistics", "execution": "pmap"}
PROBES = {
    "features of one layer": (lambda: fit_probes(X[0], Y, key=KEY), "features must be [l, n, d]"),
    "targets of other examples": (lambda: fit_probes(X, Y[:3], key=KEY), "shapes (2, 5, 3) and (3, 1)"),
    "numbers as classes": (lambda: fit_probes(X, Y[:, 0], key=KEY, objective="cross_entropy"), "must be integers"),
    "targets above one": (lambda: fit_probes(X, Y + 2, key=KEY, objective="logistic"), "must lie in [0, 1], got 2..2"),
    "an objective that is not": (
        lambda: fit_probes(X, Y, key=KEY, objective=WRONG["objective"]),
        "Did you mean logistic?",
    ),
    "no steps": (lambda: fit_probes(X, Y, key=KEY, steps=0), "sizes must be positive"),
    "a way that is not": (lambda: fit_probes(X, Y, key=KEY, execution=WRONG["execution"]), "auto, map or vmap"),
    "a class too many": (
        lambda: fit_probes(X, np.arange(5), key=KEY, objective="cross_entropy", classes=4),
        "labels must lie in 0..3",
    ),
    "features that are not finite": (lambda: fit_ridge_probes(X * np.nan, Y), "features must be finite"),
    "no regularisation": (lambda: fit_ridge_probes(X, Y, l2=0), "l2 must be positive, got 0"),
    "other layers": (lambda: probe_outputs(fit_ridge_probes(X, Y), X[:1]), "features must be [2, n, 3]"),
    "no types": (lambda: control_targets(np.zeros((3, 0), int), Y[:, 0]), "types must be [n, k]"),
    "an empty pool": (lambda: control_targets(np.zeros((3, 1), int), Y[:0, 0]), "pool must not be empty"),
    "nothing to compare": (lambda: agreement(Y[:0, 0], Y[:0, 0]), "must be [n], n the same"),
    "groups of others": (lambda: agreement_by_group(Y[:, 0], Y[:, 0], np.arange(3)), "a group a target"),
    "spans beyond the sentence": (
        lambda: span_features(np.zeros((1, 1, 2, 3), np.float32), span_index(np.array([4]))),
        "spans must lie in 1 sentences of 2 words",
    ),
    "words among spans": (
        lambda: span_features(
            np.zeros((1, 1, 4, 3), np.float32), SpanIndex(np.array([0, 0]), np.array([0, 1]), np.array([2, 2]))
        ),
        "single words or longer ones",
    ),
    "no groups to draw": (lambda: draw_scatter([], quantities=("x", "y")), "needs at least one group"),
    "points without a partner": (lambda: draw_scatter([("a", [1.0], [])], quantities=("x", "y")), "of one length"),
    "no trees": (lambda: draw_trees([]), "needs at least one tree"),
    "marks for another number of trees": (lambda: draw_trees([("a", TREE)], marked=[set(), set()]), "Mark every tree"),
}


@pytest.mark.parametrize("case", PROBES)
def test_faulty_call(case):
    call, said = PROBES[case]
    with pytest.raises(UserError) as caught:
        call()
    assert said in str(caught.value)


def test_capture_names_ids_outside_the_model():
    config = EncoderConfig("bert", 9, 4, 1, 2, 8, 5, 2, 1e-12, pad_id=0)
    ids = jnp.array([[1, 20]])
    batch = TokenBatch(ids, ids * 0 + 1, ids * 0, jnp.array([0]))
    with pytest.raises(UserError, match="input_ids from 1 to 20"):
        make_layer_outputs(config)(init_encoder(config, key=KEY), batch)
