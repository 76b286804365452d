"""Command line: ``python -m tests.benchmarks kernels|structure|geometry|preferences [--quick] [--only ROW]``."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path

from tests.benchmarks import geometry, kernels, preferences, structure

RESULTS = Path(__file__).with_name("results.md")
COMMAND = "python -m tests.benchmarks"
TITLES = {
    "kernels": "Empirical NTK",
    "structure": "Structured inference",
    "geometry": "Mode connectivity",
    "preferences": "Preference tuning",
}
NOTES = {
    "kernels": kernels.NOTES,
    "structure": structure.NOTES,
    "geometry": geometry.NOTES,
    "preferences": preferences.NOTES,
}
PACKAGES = {
    "kernels": ("jax", "flax", "numpy", "torch", "neural_tangents"),
    "structure": ("jax", "numpy", "torch", "torch_struct", "nltk"),
    "geometry": ("jax", "numpy", "scipy", "torch"),
    "preferences": ("jax", "flax", "optax", "numpy", "torch", "transformers", "trl"),
}


def environment(packages: tuple[str, ...]) -> str:
    """Versions and processors."""
    found = [name for name in packages if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in found)
    return f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}."


def replace_section(text: str, title: str, section: str) -> str:
    """The text with the section of a title, from its heading to the next of the same level, replaced or appended."""
    sections = [part.strip() for part in re.split(r"^(?=# )", text, flags=re.MULTILINE) if part.strip()]
    places = [i for i, part in enumerate(sections) if part.splitlines()[0] == f"# {title}"]
    for i in places:
        sections[i] = section.strip()
    return "\n\n".join(sections if places else [*sections, section.strip()]) + "\n"


def main() -> int:
    """Prints the tables; a full run with all peers writes them to results.md, beside those of other benchmarks."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Speed and error, side by side.")
    parser.add_argument("what", choices=list(TITLES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes; nothing is written")
    benchmarks = {"kernels": kernels, "structure": structure, "geometry": geometry, "preferences": preferences}
    rows = sorted({name for benchmark in benchmarks.values() for name in benchmark.ROWS})
    parser.add_argument("--only", choices=rows, help="one row; nothing is written")
    options = parser.parse_args()
    if options.only and options.only not in benchmarks[options.what].ROWS:
        parser.error(f"{options.what} has no row {options.only}: {', '.join(benchmarks[options.what].ROWS)}")
    tables = benchmarks[options.what].measure(quick=options.quick, only=options.only)
    packages = PACKAGES[options.what]
    head = f"`{COMMAND} {options.what}`\n\n{environment(packages)} {NOTES[options.what]}"
    text = f"# {TITLES[options.what]}\n\n{head}\n\n{tables.strip()}\n"
    print(text)
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if options.quick or options.only or missing:
        why = "it takes a full run" + (f" with {', '.join(missing)} installed" if missing else "")
        print(f"{RESULTS.name} is left as it was: {why}.", file=sys.stderr)
    else:
        RESULTS.write_text(replace_section(RESULTS.read_text(), TITLES[options.what], text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
