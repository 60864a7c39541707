"""The files that the reference implementation of the design made of these events, byte for byte."""

import json
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def test_registry_and_outputs_are_the_reference_ones(golden_host):
    assert golden_host.registry() == json.loads((GOLDEN / "instances.json").read_text())
    for name in ("instances.hosts", "instances.nftables_sets"):
        assert (golden_host.folder / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_chains_load_and_hold_each_address_with_its_mac(golden_host):
    golden_host.load_chains()
    for entry, comment in (
        ("10.83.0.23 . 10:66:6a:4c:a1:13", "build-runner"),
        ("0xfd835eed000000000000000000000014 . 10:66:6a:4c:a1:14", "mail"),
    ):
        listing = golden_host.run("nft", "list", "table", "bridge", "instances").stdout
        assert f'{entry} counter packets 0 bytes 0 comment "{comment}"' in listing
