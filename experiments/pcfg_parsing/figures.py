"""The figures of a run, from its records and arrays."""

from collections.abc import Iterator, Sequence

import numpy as np

from experiments.pcfg_parsing.parsers import PARSERS
from experiments.pcfg_parsing.prepare import Prepared
from experiments.pcfg_parsing.probing import tree_from_marginals
from experiments.pcfg_parsing.rows import bayes_of, best_layer, by_layer, kinds_of, models, networks, strongest
from jaxft.evaluation.span_probes import at_spans, span_index
from jaxft.lab.figures import Drawing, draw_drift, draw_scatter, draw_trees, save_figure
from jaxft.lab.records import Record, number, of_kind
from jaxft.lab.run import Run
from jaxft.structure.trees import Tree

UNLABELLED = "•"
POINTS = 1500
"""Spans drawn in a panel."""
TITLES = {
    "marginal": "Span marginals",
    "constituency": "Depth of common ancestors",
    "depth": "Depth of words",
    "label": "Labels of constituents",
}
QUANTITY = {
    "marginal": "correlation within widths (Pearson)",
    "constituency": "correlation within places (Pearson)",
    "depth": "correlation within places (Pearson)",
    "label": "accuracy (fraction)",
}


def draw_figures(run: Run, records: Sequence[Record], prepared: Prepared) -> list[str]:
    """Writes the figures of the run and returns their names."""
    names = []
    for name, drawing in _drawings(run, records, prepared):
        save_figure(*drawing, run.figures, name)
        names.append(name)
    return names


def _drawings(run: Run, records: Sequence[Record], prepared: Prepared) -> Iterator[tuple[str, Drawing]]:
    yield "loss", _loss(records)
    yield "gap", _gap(records)
    for target in dict.fromkeys(r["target"] for r in of_kind(records, "probe")):
        # The other scores are in probes.csv; of marginals, what a linear probe sees is a question of its own.
        for kind in kinds_of(records) if target == "marginal" else [strongest(records)]:
            yield f"layers-{target}-{kind}", _layers(records, target, kind)
    yield "marginals", _marginals(run, records, prepared)
    yield "trees", _trees(run, records, prepared)


def _paths(records: Sequence[Record], since: int) -> Iterator[tuple[str, list[int], np.ndarray]]:
    """Gap over steps of every model, a row a network."""
    for model in models(records):
        seeds = [key["seed"] for key in networks(records) if key["model"] == model]
        events = [of_kind(records, "event", model=model, seed=seed) for seed in seeds]
        rows = [[number(r["gap_nats"]) for r in path if r["local_step"] >= since] for path in events]
        steps = [r["local_step"] for r in events[0] if r["local_step"] >= since]
        yield model, steps, np.array(rows)


def _loss(records: Sequence[Record]) -> Drawing:
    """The loss over training, above the exact Bayes loss; the start is left out."""
    bayes = bayes_of(records)
    floor = bayes["bayes_loss_nats"]
    return draw_drift(
        [(model, steps, floor + gaps) for model, steps, gaps in _paths(records, 1)],
        quantity="expected loss of hidden words (nats)",
        levels={
            "exact posterior (Bayes)": floor,
            "same rules, equally likely": bayes["wrong_loss_nats"],
            "frequencies of words": bayes["unigram_loss_nats"],
        },
        title="Held-out loss against the exact Bayes loss",
    )


def _gap(records: Sequence[Record]) -> Drawing:
    return draw_drift(
        [(model, steps, np.maximum(gaps, 1e-7)) for model, steps, gaps in _paths(records, 1)],
        quantity="KL(Bayes ‖ model) of a hidden word (nats)",
        title="Gap to the Bayes loss",
        log=True,
    )


def _layers(records: Sequence[Record], target: str, kind: str) -> Drawing:
    """Score by layer: trained networks in colour, their control task and untrained networks in grey."""
    series, control = [], []
    deepest = max(models(records), key=lambda m: max(r["layer"] for r in of_kind(records, "probe", model=m)))
    for model in models(records):
        seeds = [key["seed"] for key in networks(records) if key["model"] == model]
        fields = [{"model": model, "seed": seed, "target": target, "probe": kind} for seed in seeds]
        scores = [by_layer(records, "score", **f, trained=True) for f in fields]
        series.append((model, list(range(len(scores[0]))), scores))
        if model == deepest:
            untrained = [by_layer(records, "score", **f, trained=False) for f in fields]
            controls = [by_layer(records, "control_score", **f, trained=True) for f in fields]
            grey = [(f"{model}, untrained", untrained), (f"{model}, control task", controls)]
            control += [(label, list(range(len(values[0]))), values) for label, values in grey]
    ceiling = bayes_of(records).get(f"{target}_ceiling")
    return draw_drift(
        [*series, *control],
        quantity=QUANTITY[target],
        abscissa="layer (0: embeddings)",
        control=[label for label, *_ in control],
        title=f"{TITLES[target]} read by {'a probe with a hidden layer' if kind == 'mlp' else 'a linear probe'}",
        whole=True,
        levels=None if ceiling is None else {"exact expectation": ceiling},
    )


def best_network(records: Sequence[Record]) -> tuple[dict, Record]:
    """The network whose probed marginals are best, and their record."""
    kind = strongest(records)
    found = [
        (key, best_layer(records, **key, target="marginal", probe=kind, trained=True)) for key in networks(records)
    ]
    return max(found, key=lambda pair: np.nan_to_num(number(pair[1]["score"]), nan=-np.inf))


def _marginals(run: Run, records: Sequence[Record], prepared: Prepared) -> Drawing:
    """Predicted against exact marginals of test spans: the best network, and the same before training."""
    key, best = best_network(records)
    index = span_index(prepared.test.lengths)
    exact = at_spans(prepared.test.marginals, index)
    rows = np.unique(np.linspace(0, len(exact) - 1, min(POINTS, len(exact))).astype(int))
    groups = []
    for label, state in (("trained", "trained"), ("untrained", "untrained")):
        found = run.load_arrays(f"{key['model']}-{key['seed']}-{state}")[best["probe"]][best["layer"]]
        groups.append((f"{key['model']}, layer {best['layer']}, {label}", exact[rows], found[rows]))
    quantities = ("exact marginal (probability)", "probed marginal (probability)")
    return draw_scatter(groups, quantities=quantities, control=[groups[1][0]])


def _trees(run: Run, records: Sequence[Record], prepared: Prepared) -> Drawing:
    """One sentence with its drawn tree, the exact parser's and the probe's; in colour what the drawn tree lacks."""
    key, best = best_network(records)
    test, index = prepared.test, span_index(prepared.test.lengths)
    probed = run.load_arrays(f"{key['model']}-{key['seed']}-trained")[best["probe"]][best["layer"]]
    charts = {
        "drawn with the sentence": test.gold,
        "exact marginals": PARSERS["exact marginals"](prepared),
        f"marginals probed from {key['model']}, layer {best['layer']}": tree_from_marginals(probed, index, test),
    }
    wide = np.arange(test.gold.shape[2])[None] - np.arange(test.gold.shape[1])[:, None] >= 2
    probe = list(charts.values())[-1]
    number_ = shown_sentence(test.lengths, ((probe > 0) & wide[None]) != (test.gold > 0))
    words = _words(prepared, number_)
    gold = {(int(i), int(j)) for i, j in np.argwhere(test.gold[number_])}
    trees, marked = [], []
    for title, chart in charts.items():
        spans = {(int(i), int(j)) for i, j in np.argwhere(chart[number_]) if j - i >= 2}
        trees.append((title, _tree(spans, words, prepared, number_ if title.startswith("drawn") else None)))
        marked.append(spans - gold)
    return draw_trees(trees, marked=marked)


def shown_sentence(lengths: np.ndarray, wrong: np.ndarray) -> int:
    """A sentence of about nine words, short enough to be read, and rather one where the probe is wrong."""
    distance = np.abs(lengths - 9) + 100 * ~wrong.any(axis=(1, 2))
    return int(np.argmin(distance))


def _words(prepared: Prepared, number_: int) -> list[str]:
    names = prepared.grammar.names
    ids = prepared.test.tokens[number_, : prepared.test.lengths[number_]]
    return [names.words[i] if names else f"w{i}" for i in ids.tolist()]


def _tree(spans: set[tuple[int, int]], words: list[str], prepared: Prepared, labelled: int | None) -> Tree:
    """The tree of binary spans; with the labels of a sentence of the test, or with dots."""
    names = prepared.grammar.names

    def label(i: int, j: int) -> str:
        if labelled is None:
            return UNLABELLED
        found = int(prepared.test.labels[labelled, i, j])
        return names.symbols[found] if names else f"A{found}"

    def built(i: int, j: int) -> "Tree | str":
        if j - i == 1:
            return words[i]
        # A word is no span of the chart, so that either side of the split may be missing there.
        middle = next(k for k in range(i + 1, j) if all(b - a == 1 or (a, b) in spans for a, b in ((i, k), (k, j))))
        return Tree(label(i, j), (built(i, middle), built(middle, j)))

    tree = built(0, len(words))
    return tree if isinstance(tree, Tree) else Tree(UNLABELLED, (tree,))
