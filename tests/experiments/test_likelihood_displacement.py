"""The experiment at its smallest: what it writes, and that a stopped run ends like one that was not."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.likelihood_displacement.config import PRESETS
from experiments.likelihood_displacement.execute import plans_of
from experiments.likelihood_displacement.rows import single_runs
from experiments.likelihood_displacement.unalignment import rank

TINY = {
    "single.comparisons": "no>never",
    "single.similar": "no>never",
    "single.prompts": "1",
    "single.optimizers": "sgd adam",
    "single.arms": "blocks",
    "percentiles.scores": "ches",
    "percentiles.percentiles": "0 100",
    "percentiles.seeds": "0",
    "unalignment.seeds": "0",
    "unalignment.new-tokens": "6",
    "pretraining.width": "8",
    "pretraining.steps": "5",
    "pretraining.conversations": "60",
}
TABLES = ("runs.csv", "report.md")


def flags(options: dict[str, str]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", *value.split())]


def command(folder: Path, **changes: str) -> list[str]:
    return ["run", "likelihood_displacement", "--preset", "smoke", "--run-dir", str(folder), *flags(TINY | changes)]


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(command(folder)) == 0
    return folder


def test_run_writes_what_it_promises(finished):
    report = (finished / "report.md").read_text()
    for part in ("One prompt, two answers", "Who gained", "Percentiles of scores", "Tuned on refusals", "Findings"):
        assert part in report
    kinds = [(r.get("part"), r["kind"]) for r in read(finished)]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        ("sft", "result"): 1,
        ("single", "start"): 2,
        ("single", "step_size"): 5,
        ("single", "event"): 2 * 4,
        ("single", "result"): 2,
        ("percentiles", "score"): 2,
        ("percentiles", "result"): 4,
        ("unalignment", "start"): 1,
        ("unalignment", "result"): 2,
    }
    for name in ("path-0", "predicted-change", "mass-flow", "percentiles", "refusals", "first-tokens"):
        for suffix in ("png", "pdf", "csv"):
            assert (finished / "figures" / f"{name}.{suffix}").stat().st_size > 0
    assert json.loads((finished / "status.json").read_text())["state"] == "finished"


def test_steps_are_predicted_by_the_gram_matrix_and_by_the_update(finished):
    """Steps are small; what they change in float32 is measured to a few digits."""
    for r in (r for r in read(finished) if r["kind"] == "event"):
        for side in ("chosen", "rejected"):
            scale = abs(r[f"change_{side}"]) + 1e-5
            assert abs(r[f"predicted_{side}"] - r[f"change_{side}"]) < 0.1 * scale + 2e-6
            if r["optimizer"] == "sgd":
                assert abs(r[f"gram_{side}"] - r[f"predicted_{side}"]) < 1e-3 * scale + 2e-6


def test_the_error_of_a_step_is_of_first_order_in_its_size_unless_responses_are_exchanged(finished):
    tried = [r for r in read(finished) if r["kind"] == "step_size"]
    sizes, errors, swapped = (np.array([r[name] for r in tried]) for name in ("size", "error", "swapped"))
    assert abs(np.polyfit(np.log(sizes), np.log(errors), 1)[0] - 1) < 0.15
    assert swapped.min() > 0.1


def test_sums_of_steps_are_the_change_of_the_run(finished):
    for r in single_runs(read(finished)):
        assert abs(r["change_chosen"] - r["change"]) < 1e-5


def test_phases_are_numbered_one_after_another_without_overlap():
    plans = plans_of(PRESETS["cpu"])
    phases = [*plans.sft.values(), *(p.phase for part in plans[1:] for p in part)]
    ends = [-1] + [phase.end for phase in phases]
    assert [phase.base for phase in phases] == [end + 1 for end in ends[:-1]]
    keys = [tuple(phase.key.items()) for phase in phases]
    assert len(set(keys)) == len(keys)


def test_refusals_are_preferred_by_wording_then_compliances():
    part = PRESETS["cpu"].unalignment
    texts = ["i cannot help with that .", "sorry , i will not do that .", "sure , to", "bread"]
    kinds = ["refusal", "refusal", "compliance", "other"]
    ranks = [rank(part, kind, text) for kind, text in zip(kinds, texts, strict=True)]
    assert ranks == sorted(set(ranks))


def test_finished_run_prints_its_report_and_computes_nothing(finished, capsys):
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    assert main(command(finished)) == 0
    assert "Likelihood displacement in preference tuning" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("questions", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 6, 9, 13))])
def test_stopped_run_ends_bitwise_like_one_that_was_not(finished, tmp_path, stop_and_resume, same_outcome, questions):
    folder = tmp_path / "run"
    stop_and_resume(command(folder), folder, questions)
    assert same_outcome(folder, finished, TABLES[:1])


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 12, 20])
def test_killed_run_ends_bitwise_like_one_that_was_not(finished, tmp_path, kill_and_resume, same_outcome, lines):
    folder = tmp_path / "run"
    kill_and_resume(command(folder), folder, lines)
    assert same_outcome(folder, finished, TABLES[:1])


@pytest.mark.slow
def test_adapters_alone_are_trained_where_a_rank_is_given(tmp_path):
    options = {"training.lora-rank": "2", "training.accumulate": "2", "single.optimizers": "rmsprop"}
    assert main(command(tmp_path / "run", **options)) == 0
    assert "LoRA adapters of rank 2" in (tmp_path / "run" / "report.md").read_text()
    kept = np.load(tmp_path / "run" / "arrays" / "sft-0.npz")
    assert all(name.endswith(("lora_a", "lora_b")) for name in kept.files)
