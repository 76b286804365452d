"""Who may import whom, and what an import costs."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("jaxft", "theory", "experiments")
SOURCES = {
    str(file.relative_to(ROOT)): ast.parse(file.read_text())
    for package in PACKAGES
    for file in sorted((ROOT / package).rglob("*.py"))
}
MATPLOTLIB_LIVES_IN = "jaxft/lab/figures"
NEURAL_TANGENTS_LIVES_IN = "jaxft/kernels/neural_tangents_shim.py"
ORACLES = {"neural_tangents", "torch", "transformers"}
COSTLY = ("matplotlib", "orbax", "sklearn", *sorted(ORACLES))
"""Seconds to import; a command that only lists or reads a configuration must not pay for them."""

WRONG_IMPORTS = {
    "experiments stand on theory, theory on the library": ("theory/claims.py", "import experiments.__main__"),
    "layers of the library": ("jaxft/kernels/ntk.py", "import jaxft.nn.mlp"),
    "core needs nothing but jax, numpy, scipy and jaxtyping": ("jaxft/core/trees.py", "import optax"),
    "only nn imports flax": ("jaxft/evaluation/probes.py", "import flax.linen"),
    "a prediction is arithmetic on arrays": ("theory/claims.py", "import optax"),
    "mathematics knows no optimiser, file or figure": ("jaxft/nn/mlp.py", "import optax"),
    "experiments are independent of each other": (
        "experiments/second/__init__.py",
        "import experiments.kernel_finetuning",
    ),
}
"""Contract -> file and line that break it."""


def imports(tree: ast.AST) -> list[tuple[str, ast.stmt]]:
    """Top-level names imported anywhere under ``tree``, each with its node."""
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(((node.module or "").split(".")[0], node))
    return found


def verdicts(folder: Path) -> dict[str, str]:
    """What import-linter says of every contract in ``folder``: KEPT or BROKEN."""
    if importlib.util.find_spec("importlinter") is None:
        pytest.skip("import-linter is not installed (it is in the extra 'test')")
    code = "from importlinter.cli import lint_imports_command as run; run(['--no-cache', '--no-logo'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    found = dict(re.findall(r"^(\S.*) (KEPT|BROKEN)\b", done.stdout, re.MULTILINE))
    assert found, done.stdout + done.stderr
    return found


def test_contracts_hold():
    found = verdicts(ROOT)
    assert set(found) == set(WRONG_IMPORTS)
    assert not [name for name, verdict in found.items() if verdict != "KEPT"]


def test_every_contract_breaks_on_an_import_against_it(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path, line in WRONG_IMPORTS.values():
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text((file.read_text() if file.exists() else "") + f"\n{line}\n")
    assert not [name for name, verdict in verdicts(tmp_path).items() if verdict != "BROKEN"]


def test_only_figures_imports_matplotlib_and_only_inside_functions():
    for file, tree in SOURCES.items():
        # What only type checkers see is no import.
        lazy = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) or for_type_checkers(n)]
        inside = {id(node) for part in lazy for node in ast.walk(part)}
        eager = [node.lineno for name, node in imports(tree) if name == "matplotlib" and id(node) not in inside]
        used = any(name == "matplotlib" for name, _ in imports(tree))
        assert not eager, f"{file}: lines {eager}"
        assert not used or file.startswith(MATPLOTLIB_LIVES_IN), file


def for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def test_oracles_are_imported_by_tests_alone():
    """But for neural-tangents, whose kernels are part of the library where it is installed."""
    found = {(file, name) for file, tree in SOURCES.items() for name, _ in imports(tree) if name in ORACLES}
    assert found == {(NEURAL_TANGENTS_LIVES_IN, "neural_tangents")}


def test_importing_costs_no_figure_checkpoint_or_oracle_library():
    modules = ["jaxft.lab", "jaxft.nn", "jaxft.data", "theory", "experiments"]
    modules += [f"{package}.{path.stem}" for package in PACKAGES[1:] for path in (ROOT / package).glob("[!_]*")]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(COSTLY)
