"""What a user of ``jaxft.lab`` reads after a mistake, and that a mistake leaves nothing behind."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest

from jaxft.core.checks import UserError
from jaxft.lab import (
    Records,
    RunOptions,
    config_json,
    draw_agreement,
    draw_drift,
    draw_dynamics,
    jsonable,
    make_mesh,
    open_run,
    parse_config,
    save_figure,
    start_distributed,
)


@dataclasses.dataclass(frozen=True)
class Model:
    width: int = 32
    kind: Literal["encoder", "decoder"] = "encoder"

    def faults(self):
        return [] if self.width > 0 else [f"width must be positive, got {self.width}."]


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model = Model()
    lr: float = 0.1
    sizes: tuple[int, ...] = (16, 64)
    prompt: bool = True
    seed: int = 0

    def faults(self):
        return [] if self.lr > 0 else [f"lr must be positive, got {self.lr}."]


PRESETS = {"smoke": Config(), "cpu": Config(), "accel": Config()}


def faults_of(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse_config(Config, PRESETS, argv, prog="run demo")
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--model.widht", "3"], "--model.widht: unknown option. Did you mean --model.width?"),
        (["--width", "3"], "--width: unknown option. Did you mean --model.width?"),
        (["--ler=3"], "--ler=3: unknown option. Did you mean --lr?"),
        (["--model.width", "a"], "--model.width: must be int, got 'a'."),
        (["--lr"], "--lr: must be float, got nothing."),
        (["--sizes", "1", "b"], "--sizes: must be tuple[int, ...], got '1 b'."),
        (
            ["--model.kind", "encodr"],
            "--model.kind: must be one of encoder, decoder, got 'encodr'. Did you mean encoder?",
        ),
        (["--prompt", "yes"], "--prompt: cannot be read, got 'yes'. A switch takes no value, an option one."),
        (["--preset", "cup"], "--preset: no preset of this name, got 'cup'. Did you mean cpu?"),
        (["extra", "--lr", "1"], "extra: unknown option. "),
        (["--fresh", "--run-dir", "x"], "--fresh and --run-dir exclude each other: "),
        (["--model.width", "-1"], "model.width must be positive, got -1."),
    ],
)
def test_a_fault_of_the_command_line_is_named_with_the_way_out(capsys, argv, line):
    header, fault, footer = faults_of(capsys, *argv)
    assert header == "run demo: 1 fault, nothing was created."
    assert fault.strip().startswith(line)
    assert footer == "See run demo --help."


def test_all_faults_are_reported_together(capsys):
    lines = faults_of(capsys, "--model.widht", "3", "--preset", "x", "--seed", "b", "--lr", "-1", "--model.width", "0")
    assert lines[0] == "run demo: 5 faults, nothing was created."
    text = "\n".join(lines)
    for part in ("--model.widht", "--preset", "--seed: must be int", "lr must be positive", "model.width must be"):
        assert part in text


def begin(options, config=None, seed=None):
    config = config or Config()
    return open_run("demo", config, preset="cpu", seed=config.seed if seed is None else seed, where=options)


def refusal(*args, **kwargs):
    with pytest.raises(UserError) as error:
        begin(*args, **kwargs)
    return str(error.value)


def test_no_directory_after_a_failed_validation(tmp_path):
    options = RunOptions(root=tmp_path / "runs")
    shown = refusal(options, Config(lr=-1.0, model=Model(width=0)))
    assert "lr must be positive, got -1.0" in shown
    assert "model.width must be positive, got 0" in shown
    assert refusal(options, seed=4).startswith("open_run: seed must be the configuration's, got 4 and Config(")
    both = RunOptions(root=tmp_path / "runs", run_dir=tmp_path / "x", fresh=True)
    assert "fresh and run_dir exclude each other" in refusal(both)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_configuration_is_refused_with_the_fields(tmp_path):
    options = RunOptions(run_dir=tmp_path / "mine")
    begin(options).close()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    shown = refusal(options, Config(lr=0.2, model=Model(width=64)))
    assert shown == (
        f"open_run: {tmp_path / 'mine'} belongs to another configuration, got lr: 0.1 -> 0.2; "
        "model.width: 32 -> 64. Give each configuration a folder of its own."
    )
    with pytest.raises(UserError, match='experiment: "demo" -> "other"'):
        open_run("other", Config(), preset="cpu", seed=0, where=options)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_foreign_folder_or_file_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    shown = refusal(RunOptions(run_dir=tmp_path))
    assert "must be a run or empty" in shown
    assert "Choose a folder that is empty or does not exist." in shown
    assert "must be a run or empty" in refusal(RunOptions(run_dir=tmp_path / "thesis.tex"))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_broken_file_of_a_run_is_named_with_its_line(tmp_path):
    begin(RunOptions(run_dir=tmp_path)).close()
    (tmp_path / "config.json").write_text('{\n"lr": }')
    assert f"{tmp_path / 'config.json'}:2: " in refusal(RunOptions(run_dir=tmp_path))


def test_a_run_opened_twice_is_refused_until_it_is_closed(tmp_path):
    options = RunOptions(root=tmp_path)
    with begin(options):
        shown = refusal(options)
        assert (
            "may have one process at a time, got a lock held by another process. Wait for it, or use --fresh" in shown
        )
    begin(options).close()


def test_arrays_and_report_say_what_is_missing(tmp_path):
    with begin(RunOptions(root=tmp_path)) as run:
        run.save_arrays("a", x=np.ones(1))
        with pytest.raises(UserError, match=r"load_arrays: .*arrays holds no b.npz, got a\. Save it first\."):
            run.load_arrays("b")
        with pytest.raises(UserError, match=r"save_arrays: a name must be a file name without folders, got '\.\./b'"):
            run.save_arrays("../b", x=np.ones(1))
        with pytest.raises(UserError, match="arrays must hold numbers or strings, got objects in x"):
            run.save_arrays("b", x=np.array([{}], dtype=object))
        with pytest.raises(UserError, match="report: the run must be finished, got running"):
            run.report()


def test_a_bad_line_in_the_middle_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError) as error:
        Records(path).read()
    assert str(error.value) == f"{path}:2: a line must hold one JSON object, got 'nonsense\\n'. Remove the line."


def test_values_without_a_json_form_are_named():
    with pytest.raises(UserError, match="jsonable: values must be numbers, strings or arrays, got object"):
        jsonable({"a": object()})

    @dataclasses.dataclass(frozen=True)
    class Odd:
        f: object = print

    with pytest.raises(UserError, match=r"config_json: fields must be .*, got builtin_function_or_method at f"):
        config_json(Odd())


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(UserError, match=r"make_mesh: the sizes must multiply to the \d+ devices"):
        make_mesh({"data": len(jax.devices()) + 1})
    with pytest.raises(UserError, match="make_mesh: an axis has at least one device"):
        make_mesh({"data": 0})


def test_an_incomplete_cluster_is_refused_before_it_hangs(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match=r"got no JAX_NUM_PROCESSES, JAX_PROCESS_ID\. Set JAX_NUM_PROCESSES"):
        start_distributed(True)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers"):
        start_distributed(True)


def test_asking_for_a_cluster_where_there_is_none_says_what_to_set(monkeypatch, capfd):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    jax.devices()
    with pytest.raises(UserError, match="Run this same command on every worker"):
        start_distributed(True)
    assert "waiting for all workers" in capfd.readouterr().err


def test_figures_refuse_columns_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="draw_dynamics: columns of a must be of one length"):
        draw_dynamics([("a", [0, 1], [0.0, 1.0], [0.0])], quantity="q")
    with pytest.raises(UserError, match=r"draw_drift: values must be \(seeds, 2\), got \(2,\) for a"):
        draw_drift([("a", [0, 1], [0.0, 1.0])], quantity="q")
    with pytest.raises(UserError, match="draw_agreement: x, y, labels and groups must be of one length"):
        draw_agreement([0.0], [1.0, 2.0], ["a"], ["b"])
    for draw in (draw_dynamics, draw_drift):
        with pytest.raises(UserError, match="needs at least one series"):
            draw([], quantity="q")
    figure, _ = draw_agreement([0.0], [1.0], ["a"], ["b"])
    with pytest.raises(UserError, match="save_figure: columns must be of one length"):
        save_figure(figure, {"a": [1], "b": []}, Path(tmp_path / "figures"), "f")
    assert not (tmp_path / "figures").exists()
