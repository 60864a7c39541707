"""What the tests stand on."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import need

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


def test_failure_with_a_fixture_of_a_module_is_shown_and_its_namespace_goes(tmp_path):
    need("ip")
    (tmp_path / "test_failing.py").write_text(FAILING)
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-p", "conftest", "-p", "no:cacheprovider", tmp_path]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and "INTERNALERROR" not in result.stdout + result.stderr
    name = result.stdout.partition("AssertionError: ")[2].split()[0]
    assert name.endswith("-failing") and name not in subprocess.check_output(["ip", "netns"], text=True)
