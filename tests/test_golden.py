"""The files that the scripts make of the events of examples/output, byte for byte."""

from lab import EXAMPLES


def test_registry_and_outputs_are_those_of_the_example(golden_host):
    for name in ("instances.json", "instances.hosts", "instances.nftables_chains", "instances.nftables_sets"):
        assert (golden_host.folder / name).read_text() == (EXAMPLES / "output" / name).read_text(), name


def test_chains_load_and_hold_each_address_with_its_mac(golden_host):
    golden_host.run("nft", "-f", golden_host.example("nftables/bridge.nft"))
    for entry, comment in (
        ("10.83.0.23 . 10:66:6a:4c:a1:13", "build-runner"),
        ("0xfd835eed000000000000000000000014 . 10:66:6a:4c:a1:14", "mail"),
    ):
        listing = golden_host.run("nft", "list", "table", "bridge", "instances").stdout
        assert f'{entry} comment "{comment}"' in listing
