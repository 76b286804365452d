"""What a user of ``python -m experiments`` is told: exit status 2, a clear message, and nothing is created."""

import importlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import PAPERS
from experiments.__main__ import main
from jaxft.lab.config import RunOptions
from jaxft.lab.pretraining import PretrainingConfig, review_checkpoint
from jaxft.lab.run import open_run

RUN = ["run", "kernel_finetuning", "--preset", "smoke"]
TINY = ["--pretraining.width", "8", "--pretraining.heads", "2", "--pretraining.steps", "5"]
SST2 = "sentence\tlabel\n"


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a small checkpoint, to be damaged."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    source = review_checkpoint(PretrainingConfig(width=8, heads=2, steps=5))
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


CONFIGURATION = {
    "unknown key": (["--trainin.steps", "3"], "training.steps"),
    "unknown task": (["--task", "sst3", "--data", "."], "Did you mean sst"),
    "data missing": (["--task", "sst2"], "Pass --data"),
    "k of 0": (["--k", "0"], "must be positive, got 0"),
    "two faults at once": (["--k", "0", "--training.objective", "mes"], "Did you mean mse?"),
    "kernel without sgd": (["--solving.kernels", "signgd"], "must hold sgd"),
    "unknown solver": (["--solving.solvers", "svm"], "svm"),
    "sign without its kernel": (["--solving.kernels", "sgd", "preconditioned"], "must hold asymmetric_signgd"),
    "logistic regression without a ridge": (["--solving.ridges", "0"], "logistic regression needs a positive one"),
    "a weight of 0": (["--solving.gammas", "0"], "gammas: must be positive"),
    "a share above 1": (["--solving.mixes", "1.5"], "mixes: must lie in [0, 1]"),
    "no memory": (["--solving.memory-gib", "0"], "memory_gib: must be positive"),
    "boundless memory": (["--solving.memory-gib", "inf"], "memory_gib: must be positive and finite"),
    "a rate of 0": (["--training.sign-rates", "0"], "sign_rates: needs positive rates"),
    "rank and draws": (["--adapters.ranks", "0", "--adapters.draws", "1"], "must be 2 or more, got 1"),
    "prompt for two tasks": (["--task", "sst2", "mr", "--data", ".", "--template", "{a} {mask}"], "one by one"),
}


@pytest.mark.parametrize("case", CONFIGURATION)
def test_faulty_configuration(case, fails):
    argv, said = CONFIGURATION[case]
    assert said in fails([*RUN, *argv])


def test_k_larger_than_a_class_and_wrong_label_words(fails):
    assert "k" in fails([*RUN, *TINY, "--k", "5000"])
    assert "magnificent" in fails([*RUN, *TINY, "--label-words", "magnificent", "terrible"])
    assert "label words" in fails([*RUN, *TINY, "--label-words", "great"])


def test_unknown_experiment_names_the_nearest(capsys):
    assert main(["run", "kernel_finetunning"]) == 2
    assert "Did you mean kernel_finetuning?" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["run", "-h"]])
def test_help_before_an_experiment_is_named(argv, capsys):
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith("usage: python -m experiments")


DATA = {
    "a label outside the classes": (SST2 + "good\t1\nbad\t7\n", "train.tsv:3"),
    "one class": (SST2 + "good\t1\n" * 9, "class"),
    "an empty split": (SST2, "train.tsv"),
}


@pytest.mark.parametrize("case", DATA)
def test_faulty_data(case, fails, tmp_path, checkpoint):
    text, said = DATA[case]
    folder = tmp_path / "sst2"
    folder.mkdir()
    (folder / "train.tsv").write_text(text)
    (folder / "test.tsv").write_text(SST2 + "good\t1\nbad\t0\n")
    argv = [*RUN, "--model", str(checkpoint), "--task", "sst2", "--data", str(folder)]
    assert said in fails(argv)


def test_faulty_checkpoint(fails, checkpoint):
    argv = [*RUN, "--model", str(checkpoint)]
    name = "bert.embeddings.LayerNorm.weight"

    def set_nan(tensors):
        tensors[name][0] = np.nan

    damage(checkpoint, set_nan)
    assert "LayerNorm" in fails(argv)
    damage(checkpoint, lambda tensors: tensors.update({name: np.ones(3, np.float32)}))
    assert "(3,)" in fails(argv)
    damage(checkpoint, lambda tensors: tensors.pop(name))
    assert "missing: embeddings.LayerNorm.weight" in fails(argv)
    damage(checkpoint, lambda tensors: tensors.update({name: np.ones(8, np.float32), "stray": np.ones(1, np.float32)}))
    assert "stray" in fails(argv)
    whole = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in fails(argv)


OTHER_SETTINGS = {
    "kernel_finetuning": (TINY, "pretraining.width: 16 -> 8"),
    "likelihood_displacement": (["--training.beta", "0.5"], "training.beta: 0.1 -> 0.5"),
    "mode_connectivity": (["--paths.bends", "7"], "paths.bends: 2 -> 7"),
    "pcfg_parsing": (["--training.steps", "3"], "training.steps: 20 -> 3"),
}


def test_every_experiment_has_other_settings():
    assert set(OTHER_SETTINGS) == set(PAPERS)


@pytest.mark.parametrize("slug", OTHER_SETTINGS)
def test_run_dir_of_another_configuration_lists_the_fields(slug, capsys, tmp_path):
    argv, said = OTHER_SETTINGS[slug]
    preset = importlib.import_module(f"experiments.{slug}").PRESETS["smoke"]
    folder = tmp_path / "run"
    with open_run(slug, preset, preset="smoke", seed=0, where=RunOptions(run_dir=folder)):
        pass
    before = (folder / "config.json").read_bytes()
    assert main(["run", slug, "--preset", "smoke", *argv, "--run-dir", str(folder)]) == 2
    assert said in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == before
