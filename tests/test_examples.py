"""The demonstration."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import PROGRAMS, need
from lab import EXAMPLES, process_file, run

pytestmark = pytest.mark.slow


@pytest.fixture
def folder():
    """A folder that dnsmasq may read when it is no longer root, as it may not those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_demo_comes_out_as_expected_and_leaves_nothing(folder):
    need(*PROGRAMS)
    env = os.environ | {"TMPDIR": str(folder)}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    demo = subprocess.Popen([EXAMPLES / "demo.py"], text=True, env=env, **pipes)
    output = demo.communicate()[0]
    assert demo.returncode == 0, output
    assert f"demo{demo.pid}-" not in run("ip", "netns").stdout
    assert not os.listdir(folder)
    assert not [pid for pid in filter(str.isdigit, os.listdir("/proc")) if str(folder) in process_file(pid, "cmdline")]
