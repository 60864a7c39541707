"""The files that the reference implementation of the design made of these events, byte for byte."""

import json
from pathlib import Path

import pytest
from lab import PROCESS, environment, sys

GOLDEN = Path(__file__).parent / "golden"
EVENTS = [
    ("--initialize br0 host", ""),
    ("add 10:66:6a:4c:a1:11 10.83.0.11 web", ""),
    ("add 00:01:00:01:2f:8a:5b:10:66:6a:4c:a1:11 2001:67c:83::11 web", "10:66:6a:4c:a1:11"),
    ("add 00:01:00:01:2f:8a:5b:10:66:6a:4c:a1:11 fd83:5eed::11 web", "10:66:6a:4c:a1:11"),
    ("add 10:66:6a:4c:a1:12 10.83.0.12", ""),
    ("add 10:66:6a:4c:a1:13 10.83.0.13 build-runner", ""),
    ("add 00:04:9c:11 fd83:5eed::14 mail", "10:66:6a:4c:a1:14"),
    ("add 10:66:6a:4c:a1:15 10.83.0.15 web", ""),
    ("old 10:66:6a:4c:a1:13 10.83.0.23 build-runner", ""),
]


@pytest.fixture
def golden_host(host):
    """The host after the events and a run of the processor."""
    for arguments, mac in EVENTS:
        host.update(*arguments.split(), DNSMASQ_MAC=mac)
    variables = {"INSTANCES_ADDRESS_SETS": "host,web,ghost", "INSTANCES_HOSTS_DOMAIN": ".instance.internal"}
    host.run(sys.executable, PROCESS, env=environment(host.base, **variables))
    return host


def test_registry_and_outputs_are_the_reference_ones(golden_host):
    assert golden_host.registry() == json.loads((GOLDEN / "instances.json").read_text())
    for name in ("instances.hosts", "instances.nftables_sets"):
        assert (golden_host.folder / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_chains_load_and_hold_each_address_with_its_mac(golden_host):
    golden_host.load_chains()
    for entry, comment in (
        ("10.83.0.23 . 10:66:6a:4c:a1:13", "build-runner"),
        ("fd83:5eed::14 . 10:66:6a:4c:a1:14", "mail"),
    ):
        listing = golden_host.run("nft", "list", "table", "bridge", "instances").stdout
        assert f'{entry} counter packets 0 bytes 0 comment "{comment}"' in listing
