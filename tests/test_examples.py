"""The examples, run for real."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import PROGRAMS, need
from lab import TOP

EXAMPLES = TOP / "examples"


@pytest.fixture
def folder():
    """A folder that dnsmasq may read when it is no longer root, as it may not those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_demo_comes_out_as_expected_and_leaves_nothing(folder):
    need(*PROGRAMS)
    namespaces = subprocess.run(["ip", "netns"], capture_output=True).stdout
    env = os.environ | {"TMPDIR": str(folder)}
    result = subprocess.run([EXAMPLES / "demo.sh"], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert subprocess.run(["ip", "netns"], capture_output=True).stdout == namespaces
    assert not os.listdir(folder)
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if bytes(folder) in path.read_bytes()]
