"""The demonstration."""

import os
import signal
import subprocess
import tempfile

import pytest
from conftest import PROGRAMS, need
from lab import EXAMPLES, bound, process_file, run

pytestmark = pytest.mark.slow


@pytest.fixture
def demo():
    """The demonstration, begun: what it prints is to be read from its standard output."""
    need(*PROGRAMS)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # dnsmasq reads there when it is no longer root
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        env = os.environ | {"TMPDIR": folder}
        demo = subprocess.Popen(bound(EXAMPLES / "demo.py"), text=True, env=env, **pipes)
        demo.folder = folder
        yield demo


def left(demo):
    """Return what it has left."""
    namespaces = [line for line in run("ip", "netns").stdout.splitlines() if f"demo{demo.pid}-" in line]
    pids = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if demo.folder in process_file(pid, "cmdline")]
    return namespaces + os.listdir(demo.folder) + pids


@pytest.mark.parametrize("number", [0, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_demo_comes_out_as_expected_or_says_that_it_is_interrupted_and_leaves_nothing(demo, number):
    while "Without the guard" not in demo.stdout.readline():
        assert demo.poll() is None
    assert left(demo)
    demo.send_signal(number)  # 0 does nothing
    output = demo.communicate()[0]
    assert demo.returncode == (1 if number else 0) and "Traceback" not in output, output
    assert output.endswith("demo.py: interrupted\n") == bool(number) and left(demo) == []
