"""Frames that nobody normal sends: fuzz.py finds nothing that passes the guard and nothing that is kept out by it."""

import random
import sys
from pathlib import Path

import pytest
from conftest import need
from lab import EXAMPLES, run

pytestmark = pytest.mark.slow
FUZZ = Path(__file__).with_name("fuzz.py")


def fuzz(*options):
    """Run fuzz.py; return what it did."""
    return run(sys.executable, "-B", FUZZ, *options, check=False)


@pytest.mark.parametrize("br_netfilter", [0, 1])
@pytest.mark.parametrize("seed", [1, random.SystemRandom().randrange(1 << 32)], ids=["fixed", "fresh"])
def test_nothing_gets_past_the_guard_and_nothing_is_kept_out(seed, br_netfilter):
    need("nft", "ip")
    result = fuzz("--frames", "100000", "--seed", seed, "--br-netfilter", br_netfilter)
    print(result.stdout)
    assert "0 violations, 0 false drops" in result.stdout and result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "rule", ["jump instances_drop_ip6", "jump instances_drop_rogue", "jump renewal", "jump queries"]
)
def test_missing_rule_is_found(rule, tmp_path):
    need("nft", "ip")
    rules = tmp_path / "bridge.nft"
    lines = (EXAMPLES / "nftables" / "bridge.nft").read_text().splitlines(keepends=True)
    rules.write_text("".join(line for line in lines if rule not in line))
    result = fuzz("--frames", "5000", "--seed", "1", "--rules", rules)
    assert result.returncode == 1 and ("violation: " in result.stdout or "false drop: " in result.stdout), result.stderr
