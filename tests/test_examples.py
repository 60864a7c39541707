"""The examples, run for real."""

import subprocess

from conftest import PROGRAMS, need
from lab import TOP

EXAMPLES = TOP / "examples"


def test_demo_comes_out_as_expected_and_leaves_nothing():
    need(*PROGRAMS)
    before = subprocess.run(["ip", "netns"], capture_output=True).stdout
    result = subprocess.run([EXAMPLES / "demo.sh"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stdout + result.stderr
    assert subprocess.run(["ip", "netns"], capture_output=True).stdout == before
