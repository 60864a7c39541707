"""What the tests stand on."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import need
from lab import is_alive, wait_for

FAILING = """
import pytest
from lab import Namespace

@pytest.fixture(scope="module")
def namespace():
    namespace = Namespace("failing")
    yield namespace
    namespace.close()

def test_of_a_failure(namespace):
    assert False, namespace.name

def test_that_is_not_reached(namespace):
    pass
"""
WAITING = """
from lab import Namespace, bound, run

def test_that_waits():
    namespace = Namespace("waiting")
    code = "setsid sh -c 'trap : INT TERM HUP; echo $$ >>pids; while :; do sleep 1; done' & echo $$ >>pids; wait"
    namespace.start("sh", "-c", code)
    run(*bound("sh", "-c", "echo $$ >>pids; echo $PPID >worker; exec sleep 600"))
"""


@contextlib.contextmanager
def started(folder, text, *options):
    """Start pytest with a file of tests and options in a folder; give the process."""
    need("ip", "setpriv")
    (folder / "test_it.py").write_text(text)
    command = ["env", "--default-signal", sys.executable, "-B", "-m", "pytest"]  # nohup ignores one of them
    command += ["-p", "conftest", "-p", "no:cacheprovider", *options, folder]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=env, cwd=folder, start_new_session=True, **pipes) as pytest_run:
        try:
            yield pytest_run
        finally:
            pytest_run.kill()


ENDS = [(number, "run", ()) for number in ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL")]
ENDS += [("SIGTERM", "run", ("-n", "1")), ("SIGKILL", "worker", ("-n", "1", "--max-worker-restart", "0"))]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "whose", "options"), ENDS, ids=str)
def test_run_that_is_ended_or_loses_its_worker_leaves_no_namespace_and_no_process(tmp_path, number, whose, options):
    pids = tmp_path / "pids"
    with started(tmp_path, WAITING, *options) as pytest_run:
        wait_for(lambda: pids.exists() and pids.read_text().count("\n") == 3, "its processes")
        worker = int((tmp_path / "worker").read_text())
        os.kill(worker if whose == "worker" else pytest_run.pid, signal.Signals[number])
        said = pytest_run.communicate(timeout=60)[0]
    assert whose == "run" or "crashed" in said
    wait_for(lambda: not any(map(is_alive, pids.read_text().split())), "the end of its processes")
    wait_for(lambda: f"inst{worker}-" not in subprocess.check_output(["ip", "netns"], text=True), "no namespace")


def test_failure_with_a_fixture_of_a_module_is_shown_and_its_namespace_goes(tmp_path):
    with started(tmp_path, FAILING, "-x") as pytest_run:
        said = pytest_run.communicate(timeout=60)[0]
    assert pytest_run.returncode == 1 and "INTERNALERROR" not in said
    name = said.partition("AssertionError: ")[2].split()[0]
    assert name.endswith("-failing") and name not in subprocess.check_output(["ip", "netns"], text=True)
