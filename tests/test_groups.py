"""Starts the groups of tests that need a process of their own, and accounts for every skip of the suite."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GROUP = os.environ.get("JAXFT_TEST_GROUP", "")
HERE = Path(__file__).parent

ENVIRONMENT = {
    "sharding": {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
    "bad_input": {},
}


@pytest.mark.parametrize("group", ENVIRONMENT)
def test_group_passes_in_its_own_process(group):
    if GROUP:
        pytest.fail("a group must not start groups: pytest was given the wrong folder")
    env = os.environ | ENVIRONMENT[group] | {"JAXFT_TEST_GROUP": group}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / group)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_every_skip_states_its_reason():
    bare = []
    for file in HERE.rglob("test_*.py"):
        for call in re.findall(r"(?:mark\.skip|pytest\.skip|importorskip)\b[^\n]*", Path(file).read_text()):
            if not re.search(r"\(.*[\"']\w.{7,}", call) and file != Path(__file__):
                bare.append(f"{file.name}: {call}")
    assert not bare
