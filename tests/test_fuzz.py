"""Frames that nobody normal sends, and events in any order: nothing gets past the guard that must not, and what honest
guests send is not held up."""

import random
import sys
from pathlib import Path

import pytest
from conftest import need
from lab import EXAMPLES, HAS_BR_NETFILTER, bound, run

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
SEEDS = {"fixed": 4035630378, "fresh": random.SystemRandom().randrange(1 << 32)}
MISSING = {  # a part of a rule's listing: what is found when such rules are not there
    "jump instances_drop_ip6": "violation: at the guest: IPv6 from an address that is not the sender's",
    "jump instances_drop_query": "violation: the bridge believes a multicast query",
    "0x180c2": "violation: at the host, past the bridge: IPv4 from an address that is not the sender's",
    "ip6 hoplimit set": "violation: at the host: router's message",
    "ip daddr . ether daddr @instances_ip accept": "false drop: at the host",
}
LEASED = "answer {server} ack b 10.83.0.22 all; data4 b 10.83.0.22"
UNTAUGHT = {  # a line of bridge.nft: steps, and what is found in them when the line is not there
    "goto instances_sent": (f"start none 1000 1000; {LEASED.format(server='h')}", "false drop"),
    "iifname $server": (f"start u 1000 1000; {LEASED.format(server='r')}", "false drop"),
    "jump instances_learn\n": ("start none 1000 1000; na r fe80::1 fe80::1; dad b fe80::1", "violation"),
}


def fuzz(program, *options):
    """Run a fuzzer; return its exit status and output."""
    need("nft", "ip")
    result = run(*bound(sys.executable, "-B", HERE / program, *options), check=False)
    return result.returncode, result.stdout + result.stderr


def found_nothing(program, *options):
    status, output = fuzz(program, *options)
    assert status == 0 and "0 violations, 0 false drops" in output, output


RUNS = [("fixed", "--br-netfilter", 0), ("fresh", "--br-netfilter", 1), ("fixed", "--listed"), ("fresh", "--listed")]


@pytest.mark.parametrize(("seed", "options"), [(seed, options) for seed, *options in RUNS], ids=str)
def test_no_frame_gets_past_the_guard_and_no_honest_one_is_held_up(seed, options):
    if 1 in options and not HAS_BR_NETFILTER:
        need("br_netfilter")  # part of a kernel, or a module of it
    found_nothing("fuzz.py", "--frames", 60_000, "--seed", SEEDS[seed], *options)


@pytest.mark.parametrize("rule", MISSING)
def test_missing_rule_is_found(rule):
    status, output = fuzz("fuzz.py", "--frames", 10_000, "--seed", 1, "--without", rule)
    assert status == 1 and MISSING[rule] in output, output


@pytest.mark.parametrize("seed", SEEDS)
def test_whose_an_address_is_follows_the_model_through_any_sequence(seed):
    found_nothing("sequences.py", "--seconds", 12, "--seed", SEEDS[seed])


@pytest.mark.parametrize("line", UNTAUGHT)
def test_missing_line_is_found_in_a_sequence(line, tmp_path):
    rules = tmp_path / "bridge.nft"
    lines = (EXAMPLES / "nftables" / "bridge.nft").read_text().splitlines(keepends=True)
    rules.write_text("".join(other for other in lines if line not in other))
    steps, what = UNTAUGHT[line]
    status, output = fuzz("sequences.py", "--rules", rules, "--again", steps)
    assert status == 1 and output.startswith(what), output
    found_nothing("sequences.py", "--again", steps)
