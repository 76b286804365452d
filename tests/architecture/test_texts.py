"""The form of modules and docstrings, and what no text may hold."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("jaxft", "theory", "experiments")
LONGEST_MODULE = 600
DRAWERS = {"utils", "util", "helpers", "helper", "misc", "common"}
WITH_SECTIONS = (
    "jaxft/structure",
    "jaxft/kernels",
    "jaxft/geometry",
    "jaxft/train",
    "jaxft/nn",
    "jaxft/data",
    "jaxft/tuning",
)
"""Packages whose functions state their arguments and what they return."""

SOURCES = {
    str(file.relative_to(ROOT)): file.read_text()
    for package in PACKAGES
    for file in sorted((ROOT / package).rglob("*.py"))
}
MACHINE_FOLDERS = ("work", "root", "home", "tmp", "Users", "opt")
MACHINE_PATH = re.compile(rf"(?<![\w.$}}~/<>*)-])/(?:{'|'.join(MACHINE_FOLDERS)})/")


def public_functions(source: str) -> list[ast.FunctionDef]:
    """Functions of a module and methods of its classes, without a leading underscore and not nested in a function.

    The signatures of an overloaded function have no docstring of their own.
    """
    body = ast.parse(source).body
    for node in [n for n in body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]:
        body += node.body
    functions = [n for n in body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
    return [f for f in functions if "overload" not in map(ast.unparse, f.decorator_list)]


def statements(function: ast.FunctionDef) -> int:
    """Statements at the top level of a function, its docstring aside."""
    return len(function.body) - (ast.get_docstring(function) is not None)


def missing_sections(function: ast.FunctionDef) -> list[str]:
    """Sections that the docstring lacks. One of at most two statements, or of one argument, is clear from its line."""
    args = function.args
    names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs) if a.arg not in ("self", "cls")]
    if len(names) < 2 or statements(function) <= 2:
        return []
    gives = ast.unparse(function.returns) if function.returns else "None"
    wanted = ["Args:"] + ([] if gives == "None" else ["Yields:" if "Iterator" in gives else "Returns:"])
    return [section for section in wanted if section not in (ast.get_docstring(function) or "")]


def exported(path: str) -> set[str]:
    """Names in ``__all__`` of the package of a module; a package without one exports what has no underscore."""
    init = SOURCES[f"{Path(path).parent}/__init__.py"]
    listed = re.search(r"__all__ = (\[.*?\])", init, re.DOTALL)
    return set(ast.literal_eval(listed[1])) if listed else set()


@pytest.mark.parametrize("path", SOURCES)
def test_module_is_short_documented_and_named_after_its_content(path):
    source = SOURCES[path]
    assert len(source.splitlines()) <= LONGEST_MODULE
    assert not DRAWERS & set(Path(path).with_suffix("").parts)
    assert ast.get_docstring(ast.parse(source)), "no module docstring"
    assert not [f.name for f in public_functions(source) if not ast.get_docstring(f)]


@pytest.mark.parametrize("path", [path for path in SOURCES if path.startswith(WITH_SECTIONS)])
def test_exported_functions_state_arguments_and_results(path):
    names = exported(path)
    functions = [f for f in public_functions(SOURCES[path]) if not names or f.name in names]
    lacking = {f.name: missing_sections(f) for f in functions if missing_sections(f)}
    assert not lacking


def test_no_text_names_a_folder_of_one_machine():
    files = repository_files()
    assert {"README.md", "pyproject.toml", "tests/conftest.py"} <= set(files)
    found = {}
    for name in files:
        lines = (ROOT / name).read_bytes().decode(errors="ignore").splitlines()
        hits = [i for i, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
        if hits and not name.endswith((".npz", ".png", ".pdf")):
            found[name] = hits
    assert not found


def test_a_path_of_a_machine_would_be_seen():
    for folder in MACHINE_FOLDERS:
        assert MACHINE_PATH.search(f"read from /{folder}/data")
        assert not MACHINE_PATH.search(f"https://host.org/{folder}/x and runs/{folder}/x")


def repository_files() -> list[str]:
    """Files of the repository: tracked, and untracked ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the files of the repository are known to git alone: {error}")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
