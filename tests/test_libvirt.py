"""The example libvirt, with what libvirt says to its hook; tests/incus.sh runs it with a real one."""

import json
import sys

import pytest
from conftest import lock_held
from lab import EXAMPLES, HOST_MAC, environment

pytestmark = pytest.mark.slow

FIRST, SECOND, THIRD, NOBODYS = (f"52:54:00:00:00:0{number}" for number in (1, 2, 3, 4))
UUID, OTHER_UUID = "a7fd4e27-5ba7-46c0-9016-066def279d02", "6f650cc7-72e3-4594-aa43-6863cfceb0a7"
BEFORE = {
    HOST_MAC: {"name": "host"},
    FIRST: {"name": "ubuntu", "ipv4": "10.83.0.11"},
    SECOND: {"name": "box", "libvirt": OTHER_UUID},
    NOBODYS: {"name": "Mail"},
}
INTERFACE = "<interface type='bridge'><mac address='{}'/><source bridge='{}'/>{}</interface>"
FILTERED = "<filterref filter='clean-traffic'/>"
# A command virsh that says what stands in a file, and ends with the status of another
VIRSH = '#!/bin/sh\ncat "${0%/*}/says"\nexit "$(cat "${0%/*}/status")"\n'


def domain(name, *interfaces):
    return f"<domain><name>{name}</name><uuid>{UUID}</uuid><devices>{''.join(interfaces)}</devices></domain>"


def names(text):
    return {mac: instance["name"] for mac, instance in json.loads(text).items()}


class Libvirt:
    """A host with br0, the registry of before, and a command virsh."""

    def __init__(self, host):
        self.host, self.folder = host, host.folder / "bin"
        self.folder.mkdir()
        self.registry = host.folder / "instances.json"
        self.registry.write_text(json.dumps(BEFORE))
        (self.folder / "virsh").write_text(VIRSH)
        (self.folder / "virsh").chmod(0o755)
        (host.folder / "dnsmasq.br0.leases").write_text("")
        self.env = environment(host.base)
        self.env["PATH"] = f"{self.folder}:{EXAMPLES}/dnsmasq:{self.env['PATH']}"

    def hook(self, *arguments, xml=""):
        """Run the hook, with no journal to write to; it ends well whatever happens. Return the registry's text."""
        command = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh", sys.executable]
        command += [EXAMPLES / "libvirt" / "qemu", *arguments]
        result = self.host.run(*command, env=self.env, input=xml, check=False)
        assert (result.returncode, result.stdout) == (0, ""), result.stderr
        return self.registry.read_text()

    def start(self, *arguments):
        """Say that a domain starts; return the names in the registry."""
        return names(self.hook("box", "start", "begin", "-", xml=domain(*arguments)))

    def compare(self, says="", status=0):
        (self.folder / "says").write_text(says)
        (self.folder / "status").write_text(f"{status}\n")
        return names(self.hook())


@pytest.fixture
def libvirt(host):
    return Libvirt(host)


def unchanged(libvirt):
    return json.loads(libvirt.registry.read_text()) == BEFORE


def test_libvirt_example_names_all_interfaces_on_the_bridge_before_the_first_lease(libvirt):
    nets = [INTERFACE.format(THIRD.upper(), "br0", FILTERED), INTERFACE.format("52:54:00:00:00:09", "virbr0", "")]
    found = libvirt.start("box", INTERFACE.format(FIRST, "br0", FILTERED), *nets)
    assert found == {HOST_MAC: "host", FIRST: "box", SECOND: "", THIRD: "box-2", NOBODYS: "Mail"}
    registry = json.loads(libvirt.registry.read_text())
    assert registry[FIRST] == {"name": "box", "ipv4": "10.83.0.11", "libvirt": UUID}
    assert registry[THIRD] == {"name": "box-2", "ipv6_lla": "fe80::5054:ff:fe00:3", "libvirt": UUID}
    marker = libvirt.host.folder / "instances.updated"
    marker.unlink()
    libvirt.start("box", INTERFACE.format(FIRST, "br0", FILTERED), *nets)
    assert json.loads(libvirt.registry.read_text()) == registry and not marker.exists()


@pytest.mark.parametrize("name", ["host", "mail", "my_box", "b" * 64])
def test_libvirt_example_takes_no_name_from_others_and_gives_none_that_is_not_one(libvirt, name):
    found = libvirt.start(name, INTERFACE.format(THIRD, "br0", ""))
    assert found == names(json.dumps(BEFORE)) | {THIRD: ""}


def test_libvirt_example_leaves_the_host_alone_when_a_domain_has_its_mac_address(libvirt):
    libvirt.start("box", INTERFACE.format(HOST_MAC, "br0", FILTERED))
    assert unchanged(libvirt)


@pytest.mark.parametrize("operation", ["prepare", "started", "stopped", "release", "migrate", "restore", "unheard-of"])
def test_libvirt_example_does_nothing_at_other_times(libvirt, operation):
    libvirt.hook("box", operation, "begin", "-", xml=domain("box", INTERFACE.format(FIRST, "br0", "")))
    assert unchanged(libvirt)


WHATEVER = ["", "<domain>", "no xml", domain("box"), domain("box", "<interface><mac/></interface>")]


@pytest.mark.parametrize("xml", WHATEVER)
def test_libvirt_example_lets_a_domain_start_whatever_comes(libvirt, xml):
    libvirt.hook("box", "start", "begin", "-", xml=xml)
    assert unchanged(libvirt)


def test_libvirt_example_lets_a_domain_start_without_a_registry_or_its_lock(libvirt):
    with lock_held(libvirt.host.base):
        libvirt.start("box", INTERFACE.format(FIRST, "br0", FILTERED))
    assert unchanged(libvirt)
    libvirt.registry.write_text("{")
    assert libvirt.hook("box", "start", "begin", "-", xml=domain("box", INTERFACE.format(FIRST, "br0", ""))) == "{"


def test_libvirt_example_lets_a_domain_start_without_instances_update(libvirt):
    libvirt.env["PATH"] = "/usr/sbin:/usr/bin"
    libvirt.start("box", INTERFACE.format(FIRST, "br0", FILTERED))
    assert unchanged(libvirt)


def test_libvirt_example_removes_what_libvirt_has_no_more(libvirt):
    assert SECOND in libvirt.compare(f"{UUID}\n{OTHER_UUID}\n")
    assert libvirt.compare(f"{UUID}\n").keys() == BEFORE.keys() - {SECOND}


def test_libvirt_example_removes_nothing_while_libvirt_does_not_answer(libvirt):
    libvirt.compare("", 1)
    assert unchanged(libvirt)
    (libvirt.folder / "virsh").unlink()
    libvirt.hook()
    assert unchanged(libvirt)


def test_libvirt_example_keeps_a_domain_until_its_leases_are_ended(libvirt):
    leases = libvirt.host.folder / "dnsmasq.br0.leases"
    leases.write_text(f"1795629618 {SECOND} 10.83.0.12 ubuntu *\n")
    libvirt.compare()
    assert unchanged(libvirt)
    leases.write_text("")
    assert SECOND not in libvirt.compare()
