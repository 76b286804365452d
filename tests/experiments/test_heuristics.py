"""The language-model part at its smallest: what it measures, and that a stopped one ends like one that was not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments.mode_connectivity.heuristics as part
from experiments.mode_connectivity.heuristics import measure_heuristics
from experiments.mode_connectivity.heuristics_config import SMOKE
from experiments.mode_connectivity.heuristics_data import SPLITS, heuristic_sentences
from experiments.mode_connectivity.heuristics_rows import draw_heuristics, heuristics_section, network_rows, pair_rows
from experiments.mode_connectivity.heuristics_training import encoder_config
from jaxft.core.units import named_leaves
from jaxft.lab.resumable import Stopped
from jaxft.nn import make_class_logits

CONFIG = dataclasses.replace(SMOKE, corpus_sentences=1000)


class Kept:
    """Arrays of a run, in memory."""

    def __init__(self):
        self.files = {}

    def has_arrays(self, name):
        return name in self.files

    def load_arrays(self, name):
        return self.files[name]

    def save_arrays(self, name, /, **arrays):
        self.files[name] = {key: np.asarray(value) for key, value in arrays.items()}


@pytest.fixture(scope="module")
def kept():
    return Kept()


@pytest.fixture(scope="module")
def result(kept):
    return measure_heuristics(CONFIG, kept, seed=0)


@pytest.fixture(scope="module")
def sentences():
    return heuristic_sentences(CONFIG, seed=0)


def tree_of(leaves):
    tree = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = jnp.asarray(leaf)
    return tree


def test_losses_and_lines_are_those_of_the_kept_networks(kept, result, sentences):
    """By hand: logits of all sentences at once, on the line between two networks in the middle."""
    f = jax.jit(make_class_logits(encoder_config(CONFIG, sentences.layout), pooling="mean"))
    networks = [tree_of(kept.files[f"heuristics-{number}"]) for number in (0, 3)]
    middle = jax.tree.map(lambda a, b: (a + b) / 2, *networks)
    for split, (x, y) in zip(SPLITS, sentences.evaluation, strict=True):
        x, y = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (x, y))
        logits = [np.asarray(f(params, x), float) for params in (*networks, middle)]
        chosen = np.asarray(y)
        losses = [-(u - np.log(np.exp(u).sum(1, keepdims=True)))[np.arange(len(u)), chosen].mean() for u in logits]
        accuracies = [(u.argmax(1) == chosen).mean() for u in logits]
        np.testing.assert_allclose(result.losses[split][[0, 3]], losses[:2], rtol=1e-5)
        np.testing.assert_allclose(result.accuracies[split][[0, 3]], accuracies[:2], atol=1e-6)
        # The middle is one of the five points of the line.
        assert result.barriers[split][0, 3] >= losses[2] - np.mean(losses[:2]) - 1e-6


def test_networks_share_start_and_data_and_differ_in_order_alone(kept, sentences):
    networks = [kept.files[f"heuristics-{number}"] for number in range(CONFIG.models)]
    base = kept.files["heuristics-pretrained"]
    for path, leaf in networks[0].items():
        if path.startswith("encoder"):
            moved = [np.linalg.norm(network[path] - base[path]) for network in networks]
            apart = np.linalg.norm(networks[1][path] - leaf)
            assert apart <= sum(moved[:2]) * (1 + 1e-5)
    assert any((networks[0][path] != networks[1][path]).any() for path in networks[0])
    _, y = sentences.train
    assert len(y) == CONFIG.train_sentences
    assert sentences.evaluation[0][1].sum() == y.sum()


def test_finished_networks_are_not_trained_again(kept, result, monkeypatch):
    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(part, "fine_tuned", never)
    monkeypatch.setattr(part, "pretrained", never)
    again = measure_heuristics(CONFIG, kept, seed=0)
    assert again is not None
    for name, values in result.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], values, err_msg=name)


def test_a_stopped_part_goes_on_where_it_was(kept, result):
    other, seen = Kept(), []
    with pytest.raises(Stopped):
        measure_heuristics(
            CONFIG, other, seed=0, advance=lambda note: seen.append(note), stopped=lambda: len(seen) == 2
        )
    assert set(other.files) == {"heuristics-pretrained", "heuristics-0", "heuristics-1"}
    measure_heuristics(CONFIG, other, seed=0)
    for name, arrays in kept.files.items():
        for path, leaf in arrays.items():
            np.testing.assert_array_equal(other.files[name][path], leaf, err_msg=f"{name} {path}")


def test_networks_that_diverge_are_left_out(kept):
    other = Kept()
    other.files = {**kept.files, "heuristics-1": {}}
    assert measure_heuristics(CONFIG, other, seed=0) is None, "three are too few for a test over networks"
    rest = measure_heuristics(dataclasses.replace(CONFIG, models=5), other, seed=0)
    assert rest is not None
    assert rest.numbers.tolist() == [0, 2, 3, 4]
    assert rest.left_out.tolist() == [1]
    assert heuristics_section(CONFIG, None)[1] == "Too few networks learnt their task. Lower the learning rate."


def test_networks_that_learn_nothing_are_left_out(kept, result):
    bar = float(np.sort(result.accuracies["train"])[1])
    assert measure_heuristics(dataclasses.replace(CONFIG, least_accuracy=bar + 1e-6), kept, seed=0) is None


def test_a_shuffled_network_is_the_same_function_behind_a_barrier(kept, result, sentences):
    """By hand, for the first network itself: shuffled units of one layer, and the line half way."""
    f = jax.jit(make_class_logits(encoder_config(CONFIG, sentences.layout), pooling="mean"))
    first = tree_of(kept.files["heuristics-0"])
    order = np.random.default_rng(0).permutation(4 * CONFIG.width)
    shuffled = jax.tree.map(lambda leaf: leaf, first)
    layer = shuffled["encoder"]["layers"]["mlp"]
    layer["in"] = {name: leaf[..., order] for name, leaf in layer["in"].items()}
    layer["out"]["kernel"] = layer["out"]["kernel"][:, order]
    x, _ = sentences.train
    np.testing.assert_allclose(f(shuffled, x), f(first, x), atol=1e-4)
    half = jax.tree.map(lambda a, b: (a + b) / 2, first, shuffled)
    assert np.abs(f(half, x) - f(first, x)).max() > 1e-3
    assert all(barrier >= 0 for barrier in result.shuffled.values())
    assert result.shuffled["train"] > result.barriers["train"].max()


def test_tables_and_figure_show_every_network(result):
    rows, pairs = network_rows(result), pair_rows(result)
    assert sorted(row["network"] for row in rows) == list(range(CONFIG.models))
    assert [row["cluster"] for row in rows] == sorted(result.clusters.tolist())
    assert len(pairs) == 6
    assert all(row["rank correlation"] is None or abs(row["rank correlation"]) <= 1 for row in pairs)
    text = "\n".join(heuristics_section(CONFIG, result))
    assert "accuracy 1 is the structural rule" in text
    table = draw_heuristics(result, split="challenge").table
    bars = [value for column, value in zip(table["column"], table["value"], strict=True) if column is None]
    assert sorted(bars) == sorted(result.accuracies["challenge"].tolist())


def test_leaves_are_kept_by_path(kept, sentences):
    base = tree_of({k: v for k, v in kept.files["heuristics-pretrained"].items() if k != "loss"})
    assert set(named_leaves(base)) == set(kept.files["heuristics-pretrained"]) - {"loss"}
