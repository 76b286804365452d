import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from jaxft.lab import RunOptions, config_hash, config_json, differences, parse_config


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float = 0.1
    name: Literal["sgd", "adam"] = "sgd"


@dataclasses.dataclass(frozen=True)
class Config:
    optim: Optim = Optim()
    tasks: tuple[str, ...] = ("sst2",)
    data: Path | None = Path("data/a")
    use_prompt: bool = True
    seed: int = 0


PRESETS = {"smoke": Config(tasks=("rte",)), "cpu": Config(), "accel": Config(optim=Optim(lr=1e-3))}


def parse(*argv):
    return parse_config(Config, PRESETS, argv, prog="run demo")


def test_cpu_is_the_preset_unless_another_is_chosen():
    assert parse() == (PRESETS["cpu"], RunOptions(), "cpu")
    assert parse("--preset", "accel") == (PRESETS["accel"], RunOptions(), "accel")
    assert parse("--preset=smoke")[0] == PRESETS["smoke"]


def test_flags_override_fields_of_the_preset_at_any_depth():
    config, _, preset = parse("--optim.lr", "0.5", "--preset", "smoke", "--no-use-prompt", "--seed=3")
    assert preset == "smoke"
    assert config == Config(optim=Optim(lr=0.5), tasks=("rte",), use_prompt=False, seed=3)
    assert parse("--tasks", "a", "b", "--data", "None")[0] == Config(tasks=("a", "b"), data=None)


def test_run_options_are_read_alongside_and_leave_the_hash_alone():
    config, options, _ = parse("--runs-root", "elsewhere", "--fresh", "--distributed")
    assert options == RunOptions(root=Path("elsewhere"), fresh=True, distributed=True)
    assert config_hash(config) == config_hash(PRESETS["cpu"])
    assert parse("--run_dir", "here")[1].run_dir == Path("here")


def test_help_lists_nested_options_and_exits_zero(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--optim.lr", "--runs-root", "--preset", "--fresh"))


def test_hash_is_the_same_in_every_process():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_config as t; print(t.config_hash(t.PRESETS['accel']))"
    )
    hashes = set()
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, str(Path(__file__).parent)]
        hashes.add(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip())
    assert hashes == {config_hash(PRESETS["accel"])}


def test_hash_sees_every_field_but_the_seed():
    base = config_hash(Config())
    assert config_hash(Config(seed=7)) == base
    changed = [Config(optim=Optim(lr=0.2)), Config(tasks=("sst2", "rte")), Config(data=None), Config(use_prompt=False)]
    assert len({base, *map(config_hash, changed)}) == 5


def test_hash_is_of_values_not_of_their_spelling():
    assert config_hash(Config(optim=Optim(lr=1))) == config_hash(Config(optim=Optim(lr=1.0)))
    assert config_hash(Config(optim=Optim(lr=1e-1))) == config_hash(parse("--optim.lr", "0.10")[0])
    infinite = [config_hash(Config(optim=Optim(lr=float(x)))) for x in ("inf", "-inf", "nan")]
    assert len(set(infinite)) == 3


def test_json_reads_back_with_paths_as_text():
    assert json.loads(config_json(Config())) == {
        "optim": {"lr": 0.1, "name": "sgd"},
        "tasks": ["sst2"],
        "data": "data/a",
        "use_prompt": True,
        "seed": 0,
    }


def test_differences_name_dotted_fields_and_absent_ones():
    old, new = (json.loads(config_json(c)) for c in (Config(), Config(optim=Optim(lr=0.2), tasks=("a", "b"))))
    assert differences(old, new) == ["optim.lr: 0.1 -> 0.2", 'tasks: ["sst2"] -> ["a", "b"]']
    assert differences(old, {k: v for k, v in old.items() if k != "seed"}) == ["seed: 0 -> (absent)"]
    assert differences({"a": {"b": 1}}, {"a": 2}) == ["a: (absent) -> 2", "a.b: 1 -> (absent)"]
    assert differences(old, old) == []
