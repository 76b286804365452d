"""The preference benchmark on one accelerator: ``python -m tests.benchmarks.preferences_gpu [--tiny] [--only ROW]``.

Needs jax, flax, optax, torch and transformers; weights are random. Each route runs in a process of its own, so that one
that fails leaves the others, and peaks are those of the route; while one runs, the next imports what it needs. Prints a
Markdown table a row; all numbers go to ``preferences_gpu.json`` under ``$OUT``, where that is set.
"""

import argparse
import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODULE = "tests.benchmarks.preferences_gpu"
COLUMNS = ("route", "seconds (least, most)", "times ours", "runs", "first call, s", "peak MiB", "error", "note")
BF16, F32 = "bfloat16", "float32"
LONGEST = 75
"""Seconds that a route may take with all it needs to start."""
ENOUGH = 2.0
"""Seconds of runs after which a route is not run again."""

Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Route:
    """One way to do the work of a row: ``start`` names a function of this module, which returns what is to be timed."""

    label: str
    start: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def torch(self) -> bool:
        """Whether torch does the work."""
        return self.start.startswith("torch_")


@dataclasses.dataclass(frozen=True)
class Row:
    """A work; errors are those of what each route found, relative to the route ``reference``."""

    title: str
    size: tuple[str, tuple[int, ...]]
    """Of the decoder, and pairs, tokens of a prompt and of a response; or rows and tokens."""
    tiny: tuple[int, ...]
    reference: str
    routes: tuple[Route, ...]


def _ches(start: str, dtype: str, batch: int, note: str = "", **options: Any) -> Route:
    kind = {"ours_ches": f"ours, {options.get('layout')}", "torch_ches": "torch"}[start]
    return Route(f"{kind}, {dtype}", start, {"dtype": dtype, "batch": batch, **options}, note or f"{batch} at a time")


def _dpo(label: str, dtype: str = BF16, **options: Any) -> Route:
    start = "torch_dpo" if label.startswith("torch") else "ours_dpo"
    return Route(f"{label}, {dtype}", start, {"dtype": dtype, **options})


def _forward(dtype: str) -> tuple[Route, ...]:
    own = [Route(f"ours, {dtype}", "ours_forward", {"dtype": dtype})]
    if dtype == BF16:
        options = {"dtype": dtype, "attention": "cudnn"}
        own.append(Route(f"ours, attention by cuDNN, {dtype}", "ours_forward", options))
    return (*own, Route(f"torch, {dtype}", "torch_forward", {"dtype": dtype}))


ROWS = {
    "ches": Row(
        "CHES",
        ("410m", (512, 128, 128)),
        (6, 8, 6),
        "ours, packed, float32",
        (
            _ches("ours_ches", BF16, 64, layout="packed"),
            _ches("ours_ches", BF16, 64, layout="padded"),
            _ches("torch_ches", BF16, 64),
            Route(
                "torch, the authors' way, bfloat16",
                "torch_ches",
                {"dtype": BF16, "batch": 0, "part": 32},
                "one pair at a time, two passes, logits; 32 pairs, scaled up",
            ),
            _ches("ours_ches", F32, 64, layout="packed"),
            _ches("torch_ches", F32, 64),
        ),
    ),
    "dpo-step": Row(
        "A step of DPO",
        ("410m", (16, 256, 256)),
        (4, 8, 6),
        "ours, packed, float32",
        (
            _dpo("ours, packed", layout="packed"),
            _dpo("ours, padded", layout="padded"),
            _dpo("ours, packed, 1024 tokens at the unembedding", layout="packed", chunk=1024),
            _dpo("ours, packed, layers computed again", layout="packed", remat=True, chunk=1024),
            _dpo("ours, packed, attention by cuDNN", layout="packed", attention="cudnn"),
            _dpo("ours, padded, attention by cuDNN", layout="padded", attention="cudnn"),
            _dpo("torch by hand"),
            _dpo("torch by hand, layers computed again", remat=True),
            _dpo("ours, packed", F32, layout="packed"),
        ),
    ),
    "forward-410m": Row(
        "Forward, 410M", ("410m", (8, 1024)), (2, 16), "ours, float32", (*_forward(BF16), _forward(F32)[0])
    ),
    "forward-1b": Row("Forward, 1.4B", ("1b", (8, 1024)), (2, 16), "torch, bfloat16", _forward(BF16)),
}


def _config(row: Row, tiny: bool, **fields: Any) -> Any:
    from tests.benchmarks import preferences_problems as problems

    config = {"410m": problems.PYTHIA_410M, "1b": problems.PYTHIA_1B}[row.size[0]]
    return dataclasses.replace(problems.TINY if tiny else config, scan_layers=True, **fields)


def _pairs(config: Any, sizes: tuple[int, ...]) -> list[Any]:
    from tests.benchmarks.preferences_problems import Size, draw_pairs

    n, prompt, response = sizes
    return draw_pairs(Size(config, n, (prompt, prompt), (response, response)))


def _ids(config: Any, sizes: tuple[int, ...]) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, config.vocab_size, sizes).astype(np.int32)


def ours_ches(config: Any, sizes: tuple[int, ...], *, dtype: str, layout: str, batch: int) -> Run:
    """Scores of all pairs."""
    from jaxft.nn.decoder_outputs import make_response_states
    from jaxft.tuning.ches import ches_scores
    from tests.benchmarks.preferences_problems import draw_params, lay_out

    params, f = draw_params(config, dtype=dtype), make_response_states(config)
    laid = lay_out(_pairs(config, sizes), layout)
    return lambda: ches_scores(f, params, laid, batch_size=batch)


def torch_ches(config: Any, sizes: tuple[int, ...], *, dtype: str, batch: int, part: int = 0) -> Run:
    """Batches without logits; with a batch of 0 as the authors do it."""
    from tests.benchmarks import torch_preferences as peer

    model, pairs = _torch_model(config, dtype), _pairs(config, sizes)
    pairs = pairs[: part or len(pairs)]
    return lambda: peer.ches_batched(model, pairs, batch=batch) if batch else peer.ches_one_by_one(model, pairs)


def ours_dpo(config: Any, sizes: tuple[int, ...], *, dtype: str, layout: str, **options: Any) -> Run:
    """The loss of a step, after it is taken."""
    import jax.numpy as jnp

    from tests.benchmarks.preferences_dpo import start_ours
    from tests.benchmarks.preferences_problems import Size

    size = Size(config, *(sizes[0], (0, 0), (0, 0)))
    return start_ours(size, _pairs(config, sizes), layout, dtype=jnp.dtype(dtype), **options)[0]


def torch_dpo(config: Any, sizes: tuple[int, ...], *, dtype: str) -> Run:
    """Likewise, by hand."""
    from tests.benchmarks import torch_preferences as peer
    from tests.benchmarks.preferences_dpo import OPTIONS

    model = _torch_model(config, dtype)
    if config.remat:
        model.gradient_checkpointing_enable()
    return peer.plain_dpo(model, _pairs(config, sizes), **OPTIONS)[0]


def ours_forward(config: Any, sizes: tuple[int, ...], *, dtype: str) -> Run:
    """Hidden states."""
    import jax

    from jaxft.nn.decoder_outputs import make_hidden_states
    from tests.benchmarks.preferences_problems import draw_params, plain_tokens

    params, tokens = draw_params(config, dtype=dtype), plain_tokens(_ids(config, sizes))
    f = jax.jit(make_hidden_states(config))
    return lambda: f(params, tokens)


def torch_forward(config: Any, sizes: tuple[int, ...], *, dtype: str) -> Run:
    """Hidden states."""
    import torch

    model = _torch_model(config, dtype)
    ids = torch.tensor(_ids(config, sizes)).long().to(model.device)

    @torch.inference_mode()
    def run() -> Any:
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    return run


def _torch_model(config: Any, dtype: str) -> Any:
    import torch

    from tests.benchmarks.preferences_problems import draw_weights
    from tests.benchmarks.torch_decoders import torch_decoder

    model = torch_decoder(config, draw_weights(config), dtype=dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _measure(name: str, number: int, tiny: bool) -> dict[str, Any]:
    """Of a route, in this process."""
    import numpy as np

    row = ROWS[name]
    route, sizes = row.routes[number], row.tiny if tiny else row.size[1]
    options = dict(route.options)
    fields = {name: options.pop(name) for name in ("remat", "attention") if name in options}
    config = _config(row, tiny, **fields)
    wait, peak, device = _torch_device() if route.torch else _jax_device(options["dtype"])
    run = globals()[route.start](config, sizes, **options)

    def once() -> tuple[float, Any]:
        begun = time.perf_counter()
        value = run()
        wait(value)
        return time.perf_counter() - begun, value

    first, *values = once()
    seconds: list[float] = []
    values += [once()[1]]  # a second warm-up, whose value counts
    while len(seconds) < 2 or (len(seconds) < 15 and sum(seconds) < ENOUGH):
        seconds.append(once()[0])
    share = min(options.get("part", sizes[0]), sizes[0]) / sizes[0]
    found = np.concatenate([_numbers(value) for value in values])
    return {
        "seconds": [x / share for x in seconds],
        "first": max(first - statistics.median(seconds), 0.0),
        "peak": peak(),
        "device": device,
        "found": found.tolist(),
    }


def _numbers(value: Any) -> Any:
    """A few numbers of what a run found."""
    import numpy as np

    value = value.detach().float().cpu().numpy() if hasattr(value, "detach") else np.asarray(value, np.float32)
    return value.reshape(-1)[:8] if value.ndim < 3 else value[0, -1, :64]


def _torch_device() -> tuple[Callable[[Any], None], Callable[[], float | None], str]:
    import torch

    if not torch.cuda.is_available():
        return lambda _: None, lambda: None, "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name()
    return lambda _: torch.cuda.synchronize(), lambda: torch.cuda.max_memory_allocated() / 2**20, name


def _jax_device(dtype: str) -> tuple[Callable[[Any], None], Callable[[], float | None], str]:
    import jax

    if dtype == F32:
        jax.config.update("jax_default_matmul_precision", "highest")

    def peak() -> float | None:
        stats = jax.devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] / 2**20 if stats else None

    return jax.block_until_ready, peak, jax.devices()[0].device_kind


def _opened(name: str, number: int, tiny: bool) -> subprocess.Popen[str]:
    """A process for a route, which waits for a word before it touches the device."""
    # What torch measures must not share the device.
    settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
    settings |= {"JAX_PLATFORMS": "cpu"} if ROWS[name].routes[number].torch else {}
    command = [sys.executable, "-m", MODULE, "--child", name, str(number), *(["--tiny"] if tiny else [])]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env={**os.environ, **settings}, text=True, **pipes)


def _result(child: subprocess.Popen[str]) -> dict[str, Any]:
    """What a process finds, once it is told to begin."""
    try:
        out, err = child.communicate("begin\n", timeout=LONGEST)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return {"failed": f"stopped after {LONGEST} s"}
    if child.returncode == 0:
        return json.loads(out.splitlines()[-1])
    print(err[-3000:], file=sys.stderr, flush=True)
    lines = [line for line in err.splitlines() if "Error" in line]
    return {"failed": (lines[-1].strip() if lines else f"exit status {child.returncode}")[:200]}


def _table(row: Row, found: dict[str, dict[str, Any]], tiny: bool) -> str:
    good = {label: one for label, one in found.items() if "failed" not in one}
    unit = statistics.median(next(iter(good.values()))["seconds"]) if good else 1.0
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " :--- |" * len(COLUMNS)]
    notes = {route.label: route.note for route in row.routes}
    for label, one in good.items():
        seconds = statistics.median(one["seconds"])
        error, peak = _error(one, good.get(row.reference)), one["peak"]
        cells = [
            label,
            f"{seconds:.4g} ({min(one['seconds']):.4g}, {max(one['seconds']):.4g})",
            f"{seconds / unit:.3g}",
        ]
        cells += [str(len(one["seconds"])), f"{one['first']:.3g}", "–" if peak is None else f"{peak:.0f}"]
        lines.append("| " + " | ".join([*cells, error, notes[label]]) + " |")
    lines += ["", *(f"{label}: did not end, {one['failed']}." for label, one in found.items() if "failed" in one)]
    devices = ", ".join(sorted({one["device"] for one in good.values()}))
    sizes = " x ".join(map(str, row.tiny if tiny else row.size[1]))
    kind = "pairs x tokens of a prompt x of a response" if len(row.tiny) == 3 else "rows x tokens"
    head = f"{'tiny' if tiny else row.size[0]}, {sizes} {kind}, on {devices}; error: from {row.reference}"
    return f"## {row.title}\n\n{head}.\n\n" + "\n".join(lines).strip() + "\n"


def _error(one: dict[str, Any], reference: dict[str, Any] | None) -> str:
    import numpy as np

    if reference is None or one is reference:
        return "–"
    count = min(len(one["found"]), len(reference["found"]))
    found, exact = (np.array(x["found"][:count]) for x in (one, reference))
    return f"{np.linalg.norm(found - exact) / np.linalg.norm(exact):.1e}"


def main() -> int:
    """Prints the tables; a row that ran out of time is left out."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Preference tuning on one accelerator.")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    parser.add_argument("--only", choices=list(ROWS), help="one row")
    parser.add_argument("--routes", default="", help="only those whose label holds this")
    parser.add_argument("--seconds", type=float, default=420.0, help="after which no route is started")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, number = options.child[0], int(options.child[1])
        needed = ("preferences_dpo", *(["torch_decoders"] if ROWS[name].routes[number].torch else []))
        for module in needed:
            importlib.import_module(f"tests.benchmarks.{module}")
        sys.stdin.readline()
        print(json.dumps(_measure(name, number, options.tiny)))
        return 0
    names = [options.only] if options.only else list(ROWS)
    jobs = [(name, i) for name in names for i, route in enumerate(ROWS[name].routes) if options.routes in route.label]
    _measure_all(jobs, options.tiny, options.seconds)
    return 0


def _measure_all(jobs: list[tuple[str, int]], tiny: bool, seconds: float) -> None:
    begun, record = time.perf_counter(), {}
    following = _opened(*jobs[0], tiny)
    for place, (name, number) in enumerate(jobs):
        child, spent = following, time.perf_counter() - begun
        late, last = spent > seconds, place + 1 == len(jobs)
        if not last and not late:
            following = _opened(*jobs[place + 1], tiny)
        label = ROWS[name].routes[number].label
        record.setdefault(name, {})[label] = {"failed": "not started, time is up"} if late else _result(child)
        took = time.perf_counter() - begun - spent
        print(f"  {name}: {label}, {took:.0f} s", file=sys.stderr, flush=True)
        if "OUT" in os.environ:
            Path(os.environ["OUT"], "preferences_gpu.json").write_text(json.dumps(record, indent=1))
        if last or jobs[place + 1][0] != name:
            print(_table(ROWS[name], record[name], tiny), flush=True)
    if following.poll() is None:
        following.kill()


if __name__ == "__main__":
    sys.exit(main())
