"""Frames that nobody normal sends: none gets past the guard, and of what honest guests send nothing is held up."""

import random
import sys
from pathlib import Path

import pytest
from conftest import need
from lab import EXAMPLES, run

pytestmark = pytest.mark.slow
FUZZ = Path(__file__).with_name("fuzz.py")
SEEDS = {"fixed": 1, "fresh": random.SystemRandom().randrange(1 << 32)}
MISSING = {  # a rule of bridge.nft: what is found when it is not there
    "jump instances_drop_ip6": "violation: at the guest: IPv6 from an address that is not the sender's",
    "jump queries": "violation: the bridge believes a multicast query",
    "@ll,0,44 0x0180c200000": "violation: at the host, past the bridge: IPv4 from an address that is not the sender's",
    "ether type ip6 ip6 hoplimit set": "violation: at the host: router's message",
    "jump renewal": "false drop: at the host",
}


def fuzz(*options):
    """Run fuzz.py; return its exit status and output."""
    need("nft", "ip")
    result = run(sys.executable, "-B", FUZZ, *options, check=False)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("br_netfilter", [0, 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_frame_gets_past_the_guard_and_no_honest_one_is_held_up(seed, br_netfilter):
    if br_netfilter and not Path("/proc/sys/net/bridge").exists():
        need("br_netfilter")  # part of a kernel, or a module of it
    status, output = fuzz("--frames", 100_000, "--seed", SEEDS[seed], "--br-netfilter", br_netfilter)
    assert status == 0 and "0 violations, 0 false drops" in output, output


@pytest.mark.parametrize("rule", MISSING)
def test_missing_rule_is_found(rule, tmp_path):
    rules = tmp_path / "bridge.nft"
    lines = (EXAMPLES / "nftables" / "bridge.nft").read_text().splitlines(keepends=True)
    rules.write_text("".join(line for line in lines if rule not in line))
    status, output = fuzz("--frames", 10_000, "--seed", 1, "--rules", rules)
    assert status == 1 and MISSING[rule] in output, output
