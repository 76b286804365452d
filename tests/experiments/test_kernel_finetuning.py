"""The experiment at its smallest: what it writes, and that a stopped run ends like one that was not."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.kernel_finetuning.config import PRESETS, KernelFinetuningConfig
from experiments.kernel_finetuning.dynamics import is_kernel_descent
from experiments.kernel_finetuning.prepare import load_model, load_task, make_unit
from experiments.kernel_finetuning.rows import run_rows, table_rows
from jaxft.kernels import logit_difference, output_jacobian
from jaxft.lab.config import parse_config
from jaxft.lab.pretraining import PretrainingConfig, review_checkpoint

TINY = {
    "k": "2",
    "splits": "13",
    "arms": "prompt head",
    "optimizers": "sgd adam sign",
    "test-cap": "12",
    "probe-examples": "8",
    "drift-examples": "2",
    "training.steps": "4",
    "training.event-every": "2",
    "training.batch-size": "1",
    "training.sgd-rates": "0.00002 1e30",
    "training.sign-rates": "0.00001",
    "solving.ridges": "0.1",
    "solving.f0-scales": "0",
    "solving.gammas": "0.5",
    "adapters.ranks": "2",
    "adapters.draws": "2",
    "pretraining.width": "8",
    "pretraining.heads": "2",
    "pretraining.steps": "5",
    "pretraining.sentences": "100",
}
TABLES = ("table.csv", "rows.csv")


def flags(options: dict[str, str]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", *value.split())]


def command(folder: Path, **changes: str) -> list[str]:
    return ["run", "kernel_finetuning", "--preset", "smoke", "--run-dir", str(folder), *flags(TINY | changes)]


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(command(folder)) == 0
    return folder


def test_run_writes_what_it_promises(finished):
    report = (finished / "report.md").read_text()
    parts = ("Diagnostics", "Findings", "Adapters", "Permuted labels", "K asym.", "paper's thresholds", "peak memory")
    for part in parts:
        assert part in report
    kinds = [r["kind"] for r in read(finished)]
    arms, ended = 2, 2 * 3
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "start": arms,
        "kernel": arms * 4,
        "control": arms * 3,
        "adapter": arms * 2,
        "event": ended * 3 + arms,  # of a phase that diverged, the start alone
        "result": ended,
        "diverged": arms,
    }
    for name in (
        "dynamics-reviews-2",
        "kernel-drift-reviews-2",
        "alignment-reviews-2",
        "adapters-reviews-2",
        "accuracy",
    ):
        for suffix in ("png", "pdf", "csv"):
            assert (finished / "figures" / f"{name}.{suffix}").stat().st_size > 0
    assert json.loads((finished / "status.json").read_text())["state"] == "finished"


def test_measured_start_lies_on_the_prediction(finished):
    """At step 0 kernel descent and fine-tuning are the same network."""
    starts = [e for e in read(finished) if e["kind"] == "event" and e["local_step"] == 0]
    assert len(starts) == 8
    for e in starts:
        assert abs(e["predicted_probe_loss_nats"] - e["probe_loss_nats"]) < 1e-5
        assert e["feature_drift"] < 1e-5
        assert e["kernel_drift"] < 1e-5
        assert -1 <= e["alignment"] <= 1


@pytest.mark.parametrize("optimizer", ["sgd", "sign"])
def test_kernel_descent_predicts_the_change_of_the_loss(finished, optimizer):
    """With a small learning rate the network stays where its kernel holds; sign descent sees one example a step."""
    records = [r for r in read(finished) if r["kind"] == "event" and r["rate"] < 1]
    for arm in ("prompt", "head"):
        path = [r for r in records if (r["arm"], r["optimizer"]) == (arm, optimizer)]
        predicted, measured = (
            path[-1][name] - path[0][name] for name in ("predicted_probe_loss_nats", "probe_loss_nats")
        )
        assert abs(predicted - measured) < 0.1 * abs(measured) + 1e-6


def test_sign_descent_is_predicted_for_single_examples_of_two_classes_alone():
    single = PRESETS["smoke"].training
    single = dataclasses.replace(single, batch_size=1)
    assert is_kernel_descent("sign", 2, single)
    assert not is_kernel_descent("sign", 3, single)
    assert not is_kernel_descent("sign", 2, dataclasses.replace(single, batch_size=2))
    assert not is_kernel_descent("sign", 2, dataclasses.replace(single, objective="mse"))
    assert is_kernel_descent("adam", 3, dataclasses.replace(single, batch_size=2))


def test_asymmetric_kernels_equal_dense_products_of_gradients(finished):
    """Both orientations: the sign is on the training examples, then on those of the pool."""
    config, _, _ = parse_config(KernelFinetuningConfig, PRESETS, command(finished)[2:4] + flags(TINY), prog="test")
    model = load_model(config)
    unit = make_unit(config, model, load_task(config, model, "reviews"), k=2, split=13, arm="head")
    jacobian = output_jacobian(logit_difference(unit.f), unit.params, unit.train.inputs)
    rows = np.concatenate([np.reshape(leaf, (4, -1)) for leaf in jax.tree.leaves(jacobian)], axis=1)
    dense = rows @ np.sign(rows).T
    saved = np.load(finished / "arrays" / "reviews-2-13-head.npz")
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * np.abs(dense).max()}
    np.testing.assert_allclose(saved["asymmetric_signgd"][:4], dense, **tolerance)
    np.testing.assert_allclose(saved["asymmetric_signgd_flipped"][:, :4], dense, **tolerance)
    assert saved["asymmetric_signgd"].shape == (20, 4)
    assert saved["asymmetric_signgd_flipped"].shape == (4, 20)


def test_accel_runs_the_paper_s_fourteen_tasks():
    accel = PRESETS["accel"]
    order = "sst2 sst5 mr cr mpqa subj trec agnews mnli snli qnli rte mrpc qqp"
    assert accel.task == tuple(order.split())
    assert (accel.splits, accel.k) == ((13, 21, 42, 87, 100), (16, 64))


def records_of(*, kernel: str, diverged: bool) -> list[dict]:
    """One unit that fine-tunes by sign descent, and has one kernel."""
    unit = {"task": "t", "k": 1, "split": 0, "arm": "head"}
    phase = {**unit, "optimizer": "sign", "rate": 1.0}
    names = ("feature_drift", "kernel_drift", "linearization_gap", "alignment")
    measured = {"accuracy": 0.5, "accuracy_linearized": 0.5, **dict.fromkeys(names, 0.1)}
    end = {"kind": "diverged"} if diverged else {"kind": "result", "dev_score": 0.0, **measured}
    return [
        {**unit, "kind": "start", "accuracy_start": 0.5, "chi": 0.5},
        {**unit, "kind": "kernel", "kernel": kernel, "accuracy": 0.5, "solver": "ridge"},
        {**phase, **end},
    ]


@pytest.mark.parametrize(
    ("kernel", "diverged", "verdict"),
    [
        ("asymmetric_signgd", False, "1 of 1"),
        ("asymmetric_signgd", True, "diverged"),
        ("sgd", False, "no kernel"),  # as for more than two classes
    ],
)
def test_verdict_where_a_rate_diverged_or_the_optimiser_has_no_kernel(kernel, diverged, verdict):
    (row,) = table_rows(run_rows(records_of(kernel=kernel, diverged=diverged)))
    assert row["kernel method"] == row["paper's thresholds"] == verdict
    assert (row["fine-tuned"] is None) == diverged
    assert (row["K"] is None) == (kernel == "sgd")


def test_diverged_rate_is_named_and_the_others_go_on(finished):
    records = read(finished)
    diverged = [r for r in records if r["kind"] == "diverged"]
    assert {(r["optimizer"], r["rate"]) for r in diverged} == {("sgd", 1e30)}
    assert all("finite at step" in r["reason"] for r in diverged)
    assert "1e+30" in (finished / "report.md").read_text()
    assert {r["rate"] for r in records if r["kind"] == "result" and r["optimizer"] == "sgd"} == {2e-5}


def test_run_whose_phases_all_diverge_fails(tmp_path, capsys):
    options = {"arms": "head", "optimizers": "sgd", "training.sgd-rates": "1e30", "adapters.ranks": ""}
    options |= {"solving.kernels": "sgd", "solving.solvers": "ridge"}
    assert main(command(tmp_path / "run", **options)) == 1
    assert "Every phase diverged" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert "adapter" not in {r["kind"] for r in read(tmp_path / "run")}


@pytest.mark.slow
def test_five_classes_have_no_asymmetric_kernel_and_no_error(tmp_path):
    folder = tmp_path / "data" / "sst5"
    folder.mkdir(parents=True)
    lines = [f"a film {i}\t{label}" for i in range(4) for label in range(5)]
    for split in ("train", "test"):
        (folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    checkpoint = review_checkpoint(PretrainingConfig(width=8, heads=2, steps=5, sentences=100))
    options = {"task": "sst5", "data": str(folder.parent), "model": str(checkpoint), "arms": "head"}
    options |= {"optimizers": "sign", "k": "1", "adapters.ranks": "", "test-cap": "5"}
    assert main(command(tmp_path / "run", **options)) == 0
    assert "needs two classes; without it: sst5" in (tmp_path / "run" / "report.md").read_text()
    records = read(tmp_path / "run")
    assert {r["kernel"] for r in records if r["kind"] == "kernel"} == {"sgd", "signgd", "preconditioned"}
    assert {r["predicted_probe_loss_nats"] for r in records if r["kind"] == "event"} == {None}


def test_finished_run_prints_its_report_and_computes_nothing(finished, capsys):
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    assert main(command(finished)) == 0
    assert "Is this fine-tuning run a kernel method?" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    # A phase of two events asks three times, one that diverges in its first steps asks once. Here: in the middle of
    # the third phase; of the first; in the second, which diverges; in the last.
    "questions",
    [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 3, 18))],
)
def test_stopped_run_ends_bitwise_like_one_that_was_not(finished, tmp_path, stop_and_resume, same_outcome, questions):
    folder = tmp_path / "run"
    stop_and_resume(command(folder), folder, questions)
    assert same_outcome(folder, finished, TABLES)


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 12, 24])
def test_killed_run_ends_bitwise_like_one_that_was_not(finished, tmp_path, kill_and_resume, same_outcome, lines):
    folder = tmp_path / "run"
    kill_and_resume(command(folder), folder, lines)
    assert same_outcome(folder, finished, TABLES)
