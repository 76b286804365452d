"""The experiment at its smallest: what it writes, and that a stopped run ends like one that was not."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.mode_connectivity.config import PRESETS, ModeConnectivityConfig, net_sizes
from experiments.mode_connectivity.execute import pairs_of
from experiments.mode_connectivity.findings import findings_of
from experiments.mode_connectivity.networks import (
    initial_params,
    leaves_by_name,
    make_network,
    params_from_leaves,
    trainer,
)
from experiments.mode_connectivity.pairs import PATHS, measure_pair
from experiments.mode_connectivity.prepare import load, prepare
from experiments.mode_connectivity.rows import theorem_rows, vacuity_notes
from jaxft.data.images import split_images
from jaxft.geometry.path_loss import mean_over_batches
from jaxft.lab.config import config_faults, parse_config
from jaxft.train import init_state

SHAPE = (4, 4, 1)
TINY = {
    "nets": "1x8",
    "seeds": "0",
    "training.steps": "4",
    "training.event-every": "2",
    "training.batch-size": "8",
    "stability.draws": "2",
    "paths.points": "5",
    "paths.steps": "2",
    "paths.batch-size": "8",
    "plane.net": "1x8",
    "plane.points": "3",
    "heuristics.models": "0",
}
TABLES = ("paths.csv",)


@pytest.fixture(scope="session")
def images_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "tiny.npz"
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.integers(0, 60, (60, *SHAPE[:2])) + 60 * y[:, None, None]
    np.savez(path, x=x.astype(np.uint8), y=y)
    return path


def flags(images_file: Path, **changes: str) -> list[str]:
    options = {"data": str(images_file)} | TINY | changes
    return [part for name, value in options.items() for part in (f"--{name}", *value.split())]


def command(folder: Path, images_file: Path, **changes: str) -> list[str]:
    return ["run", "mode_connectivity", "--preset", "smoke", "--run-dir", str(folder), *flags(images_file, **changes)]


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, images_file):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(command(folder, images_file)) == 0
    return folder


def test_run_writes_what_it_promises(finished):
    report = (finished / "report.md").read_text()
    for part in ("Theorem 1", "certificate", "All paths", "Findings", "Ensembles", "peak memory", "tiny.npz"):
        assert part in report
    assert "vacuous" in report
    kinds = [r["kind"] for r in read(finished)]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "event": 2 * 2 * 2,
        "network": 2 * 2,
        "path": 2 * len(PATHS),
        "pair": 2,
        "matrix": 1,
    }
    for name in ("paths-1x8-0", "paths-1x8-0.5", "matrix", "plane"):
        for suffix in ("png", "pdf", "csv"):
            assert (finished / "figures" / f"{name}.{suffix}").stat().st_size > 0
    assert json.loads((finished / "status.json").read_text())["state"] == "finished"


def test_certificate_is_the_largest_loss_of_the_recorded_path(finished):
    records = read(finished)
    for pair in (r for r in records if r["kind"] == "pair"):
        arrays = np.load(finished / "arrays" / f"1x8-{pair['dropout']:g}-0-paths.npz")
        losses = arrays["theorem.train_loss"]
        assert len(losses) == 8 * pair["segments"] + 1
        np.testing.assert_allclose(losses.max(), pair["certificate"], rtol=1e-4)
        assert pair["certificate"] <= pair["bound"] * (1 + 1e-6)
        np.testing.assert_allclose([losses[0], losses[-1]], [pair["loss_a"], pair["loss_b"]], rtol=1e-5)
    found = {f.claim.split("/")[1]: (f.status, control.status) for f, control in findings_of(records)}
    assert found["certificate_is_the_maximum_on_the_path"][0] == "holds"
    assert found["constructive_path_within_the_bound"][0] == "holds"


def test_all_paths_join_the_same_losses(finished):
    arrays = dict(np.load(finished / "arrays" / "1x8-0-0-paths.npz"))
    ends = {path: arrays[f"{path}.test_loss"][[0, -1]] for path in PATHS}
    for path, values in ends.items():
        np.testing.assert_allclose(values, ends["line"], rtol=1e-4, err_msg=path)


@pytest.fixture(scope="module")
def tiny(images_file):
    argv = ["--preset", "smoke", *flags(images_file)]
    config = parse_config(ModeConnectivityConfig, PRESETS, argv, prog="test")[0]
    arrays = np.load(images_file)
    return config, prepare(config, split_images(arrays["x"], arrays["y"], seed=config.seed))


def test_losses_are_means_over_the_images_of_their_split(tiny):
    config, prepared = tiny
    network = prepared.network("1x8")
    params = initial_params(network, config, 0)
    found = mean_over_batches(network.split_losses, params, prepared.splits)
    images = prepared.images
    for split, x, y in (("train", images.x_train, images.y_train), ("test", images.x_test, images.y_test)):
        logits = np.asarray(network.f(params, jnp.asarray(x)), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(found[f"{split}_loss"], -log_p[np.arange(len(y)), y].mean(), rtol=1e-5)
        np.testing.assert_allclose(found[f"{split}_error"], (log_p.argmax(axis=1) != y).mean(), atol=1e-6)


def test_leaves_survive_a_file_of_arrays(tiny, tmp_path):
    network = tiny[1].network("1x8")
    params = initial_params(network, tiny[0], 1)
    with (tmp_path / "a.npz").open("wb") as file:
        np.savez(file, allow_pickle=False, **leaves_by_name(params))
    again = params_from_leaves(network, dict(np.load(tmp_path / "a.npz")))
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_networks_draw_their_own_dropout_by_one_program(tiny):
    config, prepared = tiny
    network = prepared.network("1x8", 0.5)
    tx, segment = trainer("1x8", 0.5, prepared.image_shape, 3, config.training, None)
    state = init_state(initial_params(network, config, 0), tx)
    rows = jnp.arange(8)[None]

    def after(number: int):
        numbers = jnp.full(len(prepared.x_train), number, jnp.int32)
        moved, _ = segment(state, (prepared.x_train, numbers), prepared.y_train, rows)
        return np.asarray(moved.params["Dense_0"]["kernel"])

    np.testing.assert_array_equal(after(3), after(3))
    assert not np.array_equal(after(3), after(4))


@pytest.mark.parametrize("name", ["vgg1x4", pytest.param("conv2x4", marks=pytest.mark.slow)])
def test_pair_of_convolution_nets_is_measured(tiny, name):
    config, prepared = tiny
    network = prepared.network(name)
    a, b = (initial_params(network, config, n) for n in (0, 1))
    found = measure_pair(network, a, b, prepared, config, number=0)
    missing = {"repaired"} if name.startswith("conv") else set()  # without biases there is nothing to shift
    assert {row["path"] for row in found.paths} == set(PATHS) - missing
    (row,) = (row for row in found.paths if row["path"] == "theorem")
    np.testing.assert_allclose(row["train_loss_max"], found.facts["certificate"], rtol=1e-4)


def test_presets_are_valid_and_their_networks_can_be_made():
    for preset in PRESETS.values():
        assert not config_faults(preset)
        for net in preset.nets:
            network = make_network(net, 0.0, (28, 28, 1), 10)
            shapes = jax.eval_shape(network.init, jax.random.key(0))
            kind, layers, width = net_sizes(net)
            assert len(network.groups) == network.hidden_layers == layers
            assert kind == "mlp" or jax.tree.leaves(shapes["conv_0"])[-1].shape[-1] == width
    assert all(net.startswith("conv") for net in PRESETS["conv"].nets)
    assert PRESETS["cpu"] == ModeConnectivityConfig()


def test_pairs_have_numbers_of_their_own():
    pairs = list(pairs_of(PRESETS["cpu"]))
    assert [p.number for p in pairs] == list(range(len(pairs)))
    assert len({p.file("a") for p in pairs}) == len(pairs)


def recorded(net: str, certificate: float, line: float, *, seed: int = 0, epsilon: float = 0.1) -> list[dict]:
    key = {"net": net, "dropout": 0.0, "seed": seed}
    facts = {"certificate": certificate, "bound": certificate, "segments": 7}
    sides = {f"{name}_{side}": epsilon for name in ("loss", "epsilon", "epsilon_median") for side in "ab"}
    maxima = {"train_loss_max": line, "train_error_max": 0.0}
    return [
        {"kind": "path", **key, "path": "line", **maxima},
        {"kind": "path", **key, "path": "theorem", **(maxima | {"train_loss_max": certificate})},
        {"kind": "pair", **key, **facts, **sides},
    ]


def test_report_says_where_the_theorem_is_vacuous():
    records = recorded("1x64", 0.2, 0.4) + recorded("2x64", 1.0, 0.8) + recorded("3x64", 3.0, 0.8)
    wide, narrow, worse = vacuity_notes(records, classes=10)
    assert "1x64, no dropout: not vacuous for 1 of 1 pairs" in wide
    assert "2x64, no dropout: vacuous for 1 of 1 pairs" in narrow
    assert "chance" not in narrow
    assert f"beyond the loss of chance, {math.log(10):.3g}" in worse
    assert [row["certificate"] for row in theorem_rows(records)] == [0.2, 1.0, 3.0]


@pytest.mark.parametrize(("narrow", "wide", "status"), [(0.1, 0.01, "holds"), (0.01, 0.1, "violated")])
def test_width_claim_compares_pairs_of_one_seed_and_its_control_pairs_of_one_width(narrow, wide, status):
    records = []
    for seed, factor in enumerate((1.0, 3.0, 10.0)):
        records += recorded("1x8", 1, 1, seed=seed, epsilon=narrow * factor)
        records += recorded("1x16", 1, 1, seed=seed, epsilon=wide * factor * 1.01**seed)
    found = {f.claim.split("/")[1]: (f, control) for f, control in findings_of(records)}
    finding, control = found["epsilon_falls_with_width"]
    assert finding.status == status
    assert control.status == "inconclusive"
    np.testing.assert_allclose(finding.predicted, np.log10(narrow * 30 ** (1 / 3)))


def test_finished_run_prints_its_report_and_computes_nothing(finished, images_file, capsys):
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    assert main(command(finished, images_file)) == 0
    assert "Mode connectivity: paths with certificates" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
def test_networks_that_diverge_fail_the_run_and_are_recorded(tmp_path, images_file, capsys):
    options = {"dropout": "0", "plane.dropout": "0", "training.learning-rate": "1e30"}
    assert main(command(tmp_path / "run", images_file, **options)) == 1
    assert "No pair of networks stayed finite" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    lost = [r for r in read(tmp_path / "run") if r["kind"] == "diverged"]
    assert lost  # a network whose units all die in the first step may stay finite
    assert all("finite" in r["reason"] and r["local_step"] > 0 for r in lost)


@pytest.mark.parametrize("questions", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_stopped_run_ends_bitwise_like_one_that_was_not(
    finished, images_file, tmp_path, stop_and_resume, same_outcome, questions
):
    folder = tmp_path / "run"
    stop_and_resume(command(folder, images_file), folder, questions)
    assert same_outcome(folder, finished, TABLES)


@pytest.mark.slow
@pytest.mark.parametrize("lines", [3, 8, 20])
def test_killed_run_ends_bitwise_like_one_that_was_not(
    finished, images_file, tmp_path, kill_and_resume, same_outcome, lines
):
    folder = tmp_path / "run"
    kill_and_resume(command(folder, images_file), folder, lines)
    assert same_outcome(folder, finished, TABLES)


@pytest.mark.slow
def test_run_with_fine_tuned_networks_reports_them(images_file, tmp_path):
    options = {"dropout": "0", "plane.dropout": "0", "heuristics.models": "4"}
    assert main(command(tmp_path / "run", images_file, **options)) == 0
    assert "two heuristics explain" in (tmp_path / "run" / "report.md").read_text()


def test_losses_are_means_over_no_more_images_than_asked_for():
    config = dataclasses.replace(PRESETS["smoke"], evaluation_images=100)
    prepared = prepare(config, load(config))
    (x, y), (x_test, _) = prepared.splits
    assert x.shape[0] * x.shape[1] == x_test.shape[0] * x_test.shape[1] == 100
    assert len(prepared.x_train) == 1437
    assert sorted(set(y.ravel().tolist())) == list(range(10))
