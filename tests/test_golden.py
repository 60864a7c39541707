"""The files that the scripts make of the events of examples/output, byte for byte."""

from lab import EXAMPLES


def test_registry_and_outputs_are_those_of_the_example(golden_host):
    for name in ("instances.json", "instances.hosts", "instances.nftables_chains", "instances.nftables_sets"):
        assert (golden_host.folder / name).read_text() == (EXAMPLES / "output" / name).read_text(), name
