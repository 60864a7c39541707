"""The demonstration."""

import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import PROGRAMS, need
from lab import EXAMPLES, bound, process_file, run

pytestmark = pytest.mark.slow


@pytest.fixture
def folder():
    """A folder that dnsmasq may read when it is no longer root, as it may not those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def start_demo(folder):
    """Start it; what it prints is to be read from its standard output."""
    need(*PROGRAMS)
    env = os.environ | {"TMPDIR": str(folder)}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(bound(EXAMPLES / "demo.py"), text=True, env=env, **pipes)


def left(demo, folder):
    """Return what it has left."""
    namespaces = [line for line in run("ip", "netns").stdout.splitlines() if f"demo{demo.pid}-" in line]
    pids = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if str(folder) in process_file(pid, "cmdline")]
    return namespaces + os.listdir(folder) + pids


def test_demo_comes_out_as_expected_and_leaves_nothing(folder):
    demo = start_demo(folder)
    output = demo.communicate()[0]
    assert demo.returncode == 0, output
    assert left(demo, folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_demo_that_is_interrupted_says_so_and_leaves_nothing(folder, number):
    demo = start_demo(folder)
    while "Without the guard" not in demo.stdout.readline():
        assert demo.poll() is None
    assert left(demo, folder)
    demo.send_signal(number)
    output = demo.communicate()[0]
    assert demo.returncode == 1 and output.endswith("demo.py: interrupted\n") and "Traceback" not in output
    assert left(demo, folder) == []
