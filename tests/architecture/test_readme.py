"""What the README says can be done can be done: its code runs, its commands, links, extras and slugs exist."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import experiments
import theory

ROOT = Path(__file__).parents[2]
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")}
README = TEXTS["README.md"]
BLOCKS = [(name, code) for name, text in TEXTS.items() for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def test_readme_has_code():
    assert BLOCKS


@pytest.mark.parametrize(("name", "code"), BLOCKS)
def test_code_runs_as_it_stands(name, code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{name}: {done.stderr}"


@pytest.mark.parametrize("name", TEXTS)
def test_links_inside_the_repository_lead_somewhere(name):
    links = [link for link in re.findall(r"\]\(([^)#]+)", TEXTS[name]) if "://" not in link]
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("name", TEXTS)
def test_extras_named_in_a_command_exist(name):
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {extra for group in re.findall(r"\.\[([\w,]+)\]", TEXTS[name]) for extra in group.split(",")}
    assert named
    assert named <= known


def test_modules_run_by_a_command_exist():
    modules = {module for text in TEXTS.values() for module in re.findall(r"python -m ([\w.]+)", text)}
    assert {"experiments", "theory"} <= modules
    assert not [module for module in modules if not runs(module)]


def runs(module):
    """Whether ``python -m`` finds something to run: a package's main module, or what a module does as the main one."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.origin and spec.submodule_search_locations is None:
        return '__name__ == "__main__"' in Path(spec.origin).read_text()
    return spec is not None and importlib.util.find_spec(f"{module}.__main__") is not None


def test_flags_of_experiment_commands_exist():
    commands = re.findall(r"python -m experiments run (\w+)([^\n`#\"|&]*)", README)
    assert {slug for slug, _ in commands} <= set(experiments.PAPERS)
    for slug in experiments.PAPERS:
        command = [sys.executable, "-m", "experiments", "run", slug, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        known = set(re.findall(r"--[\w.-]+", done.stdout))
        used = {flag for named, rest in commands for flag in re.findall(r"--[\w.-]+", rest) if named == slug}
        assert used <= known


def test_papers_said_to_be_there_are_the_ones_that_are():
    rows = re.findall(r"^\| (`\w+`[^|]*) \|[^|]*\| (.+) \|$", README, re.MULTILINE)
    there = {slug for slugs, status in rows for slug in re.findall(r"`(\w+)`", slugs) if status != "planned"}
    assert there == set(theory.PAPERS) | set(experiments.PAPERS)
