"""The demonstration."""

import os
import signal
import subprocess
import tempfile

import pytest
from conftest import PROGRAMS, need
from lab import EXAMPLES, bound, process_file, run

pytestmark = pytest.mark.slow


def left(pid, folder):
    """Return what the demonstration has left."""
    namespaces = [line for line in run("ip", "netns").stdout.splitlines() if f"demo{pid}-" in line]
    pids = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if folder in process_file(pid, "cmdline")]
    return namespaces + os.listdir(folder) + pids


@pytest.mark.parametrize("number", [0, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_demo_comes_out_as_expected_or_says_that_it_is_interrupted_and_leaves_nothing(number):
    need(*PROGRAMS)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # dnsmasq reads there when it is no longer root
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        demo = subprocess.Popen(bound(EXAMPLES / "demo.py"), env=os.environ | {"TMPDIR": folder}, **pipes)
        while "Without the guard" not in demo.stdout.readline():
            assert demo.poll() is None
        assert left(demo.pid, folder)
        demo.send_signal(number)  # 0 does nothing
        output = demo.communicate()[0]
        assert demo.returncode == (1 if number else 0) and "Traceback" not in output, output
        assert output.endswith("demo.py: interrupted\n") == bool(number) and left(demo.pid, folder) == []
