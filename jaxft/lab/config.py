"""Configurations: frozen dataclasses, chosen by preset, overridden on the command line, named by a hash.

A configuration class may define ``faults(self) -> list[str]``; every fault of a command line, the unknown keys and
unreadable values included, is reported at once, before anything is created.
"""

import contextlib
import dataclasses
import enum
import hashlib
import io
import json
import math
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar

from jaxft.core.checks import nearest, require

C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where and how a run is kept. No part of the configuration: the hash does not see it."""

    root: Path = Path("runs")
    """Folder of all runs (``--runs-root``)."""
    run_dir: Path | None = None
    """Folder of this run, instead of the one its configuration names."""
    fresh: bool = False
    """Start anew in a sibling folder rather than resume."""
    distributed: bool = False
    """Start ``jax.distributed``; every worker runs the same command."""


def parse_config(
    config_type: type[C], presets: Mapping[str, C], argv: Sequence[str], *, prog: str
) -> tuple[C, RunOptions, str]:
    """Reads a command line: ``--preset`` chooses the base, every other flag overrides one field of it.

    Args:
      config_type: The dataclass; nested dataclasses become dotted flags, ``--model.width 128``.
      presets: Complete configurations by name.
      argv: The command line, program name excluded.
      prog: How the program is called, for its messages.

    Returns:
      The configuration, where to keep the run, and the name of the preset (``cpu`` unless chosen).

    Raises:
      SystemExit: Status 2 on any fault, all faults on stderr; status 0 after ``--help``.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     seed: int = 0
      ...     lr: float = 0.1
      >>> parse_config(Config, {"cpu": Config()}, ["--lr", "0.5"], prog="run")[0]
      Config(seed=0, lr=0.5)
    """
    groups = _groups(argv)
    preset, faults = _chosen_preset(groups, presets)
    if "--help" in argv or "-h" in argv:
        _read(config_type, presets, preset, [["--help"]], prog, console=True)
    known = _known_flags(presets[preset])
    faults += [f"{g[0]}: unknown option. {_suggestion(g[0], known)}" for g in groups if _flag(g) not in known]
    named = [g for g in groups if _flag(g) in known and _flag(g) != "--preset"]
    parsed = _read(config_type, presets, preset, named, prog)
    if parsed is None:
        readable = [g for g in named if _read(config_type, presets, preset, [g], prog) is not None]
        faults += [_unreadable(config_type, g) for g in named if g not in readable]
        # Where each flag is fine but not their combination, the parser itself says why and exits.
        parsed = _read(config_type, presets, preset, readable, prog, console=readable == named)
    config, options = parsed or (presets[preset], RunOptions())
    faults += config_faults(config) + _option_faults(options)
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        print(f"{prog}: {count}, nothing was created.\n{lines}\nSee {prog} --help.", file=sys.stderr)
        raise SystemExit(2)
    return config, options, preset


def config_faults(config: Any) -> list[str]:
    """What ``faults`` of the configuration and of every configuration nested in it report.

    A fault of a nested configuration carries the dotted name of its field.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     width: int
      ...     def faults(self):
      ...         return [] if self.width > 0 else [f"width must be positive, got {self.width}"]
      >>> config_faults(Config(-1))
      ['width must be positive, got -1']
    """
    found = list(config.faults()) if hasattr(config, "faults") else []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += [f"{field.name}.{fault}" for fault in config_faults(value)]
    return found


def config_json(config: Any) -> str:
    """The configuration as canonical JSON: sorted keys, paths as strings, 1.0 written as 1.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     seed: int = 0
      ...     data: Path = Path("a/b")
      ...     lr: float = 1.0
      >>> print(config_json(Config()))
      {
        "data": "a/b",
        "lr": 1,
        "seed": 0
      }
    """
    return json.dumps(_plain(config, ""), sort_keys=True, indent=2, allow_nan=False)


def config_hash(config: Any) -> str:
    """Ten hex digits of the sha256 of the configuration without ``seed``, which the run's folder names beside it.

    The same in every process and on every platform.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     seed: int = 0
      ...     lr: float = 0.1
      >>> config_hash(Config(seed=1)) == config_hash(Config(seed=2))
      True
      >>> config_hash(Config(lr=0.2)) == config_hash(Config())
      False
    """
    fields = {k: v for k, v in json.loads(config_json(config)).items() if k != "seed"}
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields in which two configurations differ, as read from JSON.

    Example:
      >>> differences({"optim": {"lr": 0.1}, "a": 1}, {"optim": {"lr": 0.2}, "a": 1})
      ['optim.lr: 0.1 -> 0.2']
    """
    before, after = _flatten(old), _flatten(new)
    names = sorted(before.keys() | after.keys())
    shown = {n: [json.dumps(side[n]) if n in side else "(absent)" for side in (before, after)] for n in names}
    return [f"{name}: {a} -> {b}" for name, (a, b) in shown.items() if a != b]


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in nested.items():
        inner = isinstance(value, Mapping) and value
        flat |= _flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def _plain(value: Any, name: str) -> Any:
    """JSON types alone; numbers of equal value become equal text."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {f.name: _plain(getattr(value, f.name), f"{name}.{f.name}".lstrip(".")) for f in fields}
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{name}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, float):
        if not math.isfinite(value):
            return repr(float(value))
        return int(value) if value.is_integer() and abs(value) < 2**53 else float(value)
    what = f"{type(value).__name__} at {name}"
    known = isinstance(value, str | int | None)
    require(known, "config_json", "fields must be numbers, strings, paths or sequences of them", what, "Store its name")
    return value


def _known_flags(config: Any, prefix: str = "") -> list[str]:
    """Every flag the parser accepts, with hyphens for underscores."""
    flags = [] if prefix else ["--preset", "--runs-root", "--run-dir", "--fresh", "--distributed"]
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            flags += _known_flags(value, f"{prefix}{name}.")
        else:
            flags.append(f"--{prefix}{name}")
            flags += [f"--{prefix}no-{name}"] if isinstance(value, bool) else []
    return flags


def _groups(argv: Sequence[str]) -> list[list[str]]:
    """Each flag with the values that follow it."""
    groups: list[list[str]] = []
    for token in argv:
        if token.startswith("--") or not groups:
            groups.append([token])
        else:
            groups[-1].append(token)
    return groups


def _flag(group: Sequence[str]) -> str:
    return group[0].partition("=")[0].replace("_", "-")


def _values(group: Sequence[str]) -> list[str]:
    _, equals, value = group[0].partition("=")
    return [value, *group[1:]] if equals else list(group[1:])


def _suggestion(token: str, known: Sequence[str]) -> str:
    flag = _flag([token])
    same_leaf = [k for k in known if k.rpartition(".")[2] == flag.lstrip("-").rpartition(".")[2]]
    return f"Did you mean {' or '.join(same_leaf)}?" if same_leaf else nearest(flag, known)


def _chosen_preset(groups: Sequence[Sequence[str]], presets: Mapping[str, Any]) -> tuple[str, list[str]]:
    default = "cpu" if "cpu" in presets else next(iter(presets))
    chosen = [" ".join(_values(g)) for g in groups if _flag(g) == "--preset"]
    if not chosen or chosen[-1] in presets:
        return (chosen or [default])[-1], []
    return default, [f"--preset: no preset of this name, got {chosen[-1]!r}. {nearest(chosen[-1], presets)}"]


def _read(
    config_type: type[C],
    presets: Mapping[str, C],
    preset: str,
    groups: Sequence[Sequence[str]],
    prog: str,
    *,
    console: bool = False,
) -> tuple[C, RunOptions] | None:
    """The parsed command line; ``None`` if it cannot be read (with ``console`` the parser explains and exits)."""
    import tyro

    arg, switch = tyro.conf.arg, tyro.conf.FlagCreatePairsOff
    fields = [
        ("config", Annotated[config_type, arg(name="")]),
        ("preset", Annotated[Literal[tuple(presets)], arg(help="Configuration that the other flags override.")]),
        ("runs_root", Annotated[Path, arg(help="Folder of all runs.")], Path("runs")),
        (
            "run_dir",
            Annotated[Path | None, arg(help="Folder of this run, instead of the one named by its hash.")],
            None,
        ),
        ("fresh", Annotated[bool, switch, arg(help="Start anew in a sibling folder instead of resuming.")], False),
        ("distributed", Annotated[bool, switch, arg(help="Several processes: run this command on every one.")], False),
    ]
    command = dataclasses.make_dataclass("Command", fields)
    args = [token for group in groups for token in group]
    silence = contextlib.nullcontext() if console else contextlib.redirect_stderr(io.StringIO())
    default = command(presets[preset], preset)
    try:
        with silence:
            out = tyro.cli(command, prog=prog, description=config_type.__doc__, args=args, default=default)
    except SystemExit:
        if console:
            raise
        return None
    return out.config, RunOptions(out.runs_root, out.run_dir, out.fresh, out.distributed)


def _unreadable(config_type: type, group: Sequence[str]) -> str:
    """The fault of a known flag whose values do not fit its type."""
    values = " ".join(_values(group))
    kind: Any = config_type
    for name in _flag(group).lstrip("-").replace("-", "_").split("."):
        kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    got = f"got {values!r}" if values else "got nothing"
    if typing.get_origin(kind) is Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        return f"{group[0]}: must be one of {', '.join(choices)}, {got}. {nearest(values, choices)}"
    if kind is None or kind is bool:
        return f"{_flag(group)}: cannot be read, {got}. A switch takes no value, an option one."
    name = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")
    return f"{_flag(group)}: must be {name}, {got}."


def _option_faults(options: RunOptions) -> list[str]:
    both = options.fresh and options.run_dir is not None
    return ["--fresh and --run-dir exclude each other: name a new folder with --run-dir alone."] if both else []
