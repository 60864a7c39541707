"""The example libvirt, with what libvirt says to its hook; machines/incus.sh runs it with a real one."""

import sys

import pytest
from conftest import lock_held
from lab import EXAMPLES, HOST_MAC, mounted
from test_release import Managed, serve

pytestmark = pytest.mark.slow

FIRST, SECOND, THIRD, NOBODYS = (f"52:54:00:00:00:0{number}" for number in (1, 2, 3, 4))
UUID, OTHER_UUID = "a7fd4e27-5ba7-46c0-9016-066def279d02", "6f650cc7-72e3-4594-aa43-6863cfceb0a7"
BEFORE = {
    HOST_MAC: {"name": "host"},
    FIRST: {"name": "ubuntu", "ipv4": "10.83.0.11"},
    SECOND: {"name": "box", "libvirt": OTHER_UUID},
    NOBODYS: {"name": "Mail"},
}
NAMES = {mac: instance["name"] for mac, instance in BEFORE.items()}
INTERFACE = "<interface type='bridge'><mac address='{}'/><source bridge='{}'/>{}</interface>"
FILTERED = "<filterref filter='clean-traffic'/>"
ON_BR0 = INTERFACE.format(FIRST, "br0", FILTERED)
# A command virsh that says what stands in a file, and ends with the status of another
VIRSH = '#!/bin/sh\ncat "${0%/*}/says"\nexit "$(cat "${0%/*}/status")"\n'
# Another host runs the one domain, and has defined the other; a third host does not answer
SEVERAL = f"""\
#!/bin/sh
case "$*" in
*ssh://b/*dumpxml*) cat "${{0%/*}}/far" ;;
*ssh://b/*--all*) printf '%s\\n' {UUID} {OTHER_UUID} ;;
*ssh://b/*) echo {UUID} ;;
*ssh://c/*) exit 1 ;;
esac
"""


def domain(name, *interfaces):
    return f"<domain><name>{name}</name><uuid>{UUID}</uuid><devices>{''.join(interfaces)}</devices></domain>"


class Libvirt(Managed):
    """A host with br0, the registry of before, and a command virsh."""

    def __init__(self, host):
        super().__init__(host, BEFORE, virsh=VIRSH)
        (host.folder / "default" / "libvirt" / "qemu").mkdir(parents=True)

    def hook(self, *arguments, xml=""):
        """Run the hook, with no journal to write to; it ends well whatever happens."""
        command = mounted(dict.fromkeys(["/run", "/etc/default", "/var/log"], self.host.folder / "default"))
        command += [sys.executable, EXAMPLES / "libvirt" / "qemu", *arguments]
        result = self.host.run(*command, env=self.env, input=xml, check=False)
        assert (result.returncode, result.stdout) == (0, ""), result.stderr

    def start(self, name, *interfaces):
        """Say that a domain starts; return the names in the registry."""
        self.hook(name, "start", "begin", "-", xml=domain(name, *interfaces))
        return self.names()

    def compare(self, says="", status=0):
        (self.folder / "says").write_text(says)
        (self.folder / "status").write_text(f"{status}\n")
        self.hook()
        return self.names()


@pytest.fixture
def libvirt(host):
    return Libvirt(host)


def test_libvirt_example_names_all_interfaces_on_the_bridge_before_the_first_lease(libvirt):
    nets = [INTERFACE.format(THIRD.upper(), "br0", FILTERED), INTERFACE.format("52:54:00:00:00:09", "virbr0", "")]
    found = libvirt.start("box", ON_BR0, *nets)
    assert found == {HOST_MAC: "host", FIRST: "box", SECOND: "", THIRD: "box-2", NOBODYS: "Mail"}
    entries = libvirt.entries()
    assert entries[FIRST] == {"name": "box", "ipv4": "10.83.0.11", "libvirt": UUID}
    assert entries[THIRD] == {"name": "box-2", "ipv6_lla": "fe80::5054:ff:fe00:3", "libvirt": UUID}
    marker = libvirt.host.folder / "instances.updated"
    marker.unlink()
    libvirt.start("box", ON_BR0, *nets)
    assert libvirt.entries() == entries and not marker.exists()


def test_libvirt_example_has_its_settings_from_the_file_since_libvirt_passes_no_variables(libvirt):
    settings = libvirt.host.folder / "default" / "instances"
    settings.write_text(f"# which\nINSTANCES_BASE_PATH='{libvirt.host.base}' # a registry\n")
    del libvirt.env["INSTANCES_BASE_PATH"]
    assert libvirt.start("box", ON_BR0)[FIRST] == "box"


def test_libvirt_example_takes_no_name_from_others_and_puts_a_hyphen_for_what_no_name_in_dns_has(libvirt):
    names = {"host": "", "mail": "", "7up": "", "b" * 64: ""}
    names |= {"my vm": "my-vm", "ubuntu22.04": "ubuntu22-04", "win2k22_dc (2)": "win2k22-dc--2"}
    for domain_name, name in names.items():
        assert libvirt.start(domain_name, INTERFACE.format(THIRD, "br0", "")) == NAMES | {THIRD: name}


def test_libvirt_example_does_nothing_at_other_times_or_by_what_is_no_guest_s_domain(libvirt):
    """The last has the host's MAC address."""
    odd, hosts = domain("box", "<interface><mac/></interface>"), domain("box", INTERFACE.format(HOST_MAC, "br0", ""))
    calls = [("start", xml) for xml in ("", "<domain>", "no xml", domain("box"), odd, hosts)]
    operations = ("prepare", "started", "stopped", "release", "migrate", "restore", "unheard-of")
    calls += [(operation, domain("box", ON_BR0)) for operation in operations]
    for operation, xml in calls:
        libvirt.hook("box", operation, "begin", "-", xml=xml)
        assert libvirt.entries() == BEFORE


def test_libvirt_example_lets_a_domain_start_without_a_lock_or_instances_update_or_a_registry(libvirt):
    with lock_held(libvirt.host.base):
        libvirt.start("box", ON_BR0)
    assert libvirt.entries() == BEFORE
    path, libvirt.env["PATH"] = libvirt.env["PATH"], "/usr/sbin:/usr/bin"
    libvirt.start("box", ON_BR0)
    assert libvirt.entries() == BEFORE
    libvirt.env["PATH"] = path
    libvirt.registry.write_text("{")
    libvirt.hook("box", "start", "begin", "-", xml=domain("box", ON_BR0))
    assert libvirt.registry.read_text() == "{"


def test_libvirt_example_removes_what_is_gone_unless_libvirt_or_dnsmasq_is_silent_or_another_host_writes(libvirt):
    assert libvirt.compare(f"{UUID}\n{OTHER_UUID}\n") == libvirt.compare("", 1) == NAMES
    virsh = (libvirt.folder / "virsh").rename(libvirt.folder / "none")
    libvirt.hook()
    assert libvirt.entries() == BEFORE
    virsh.rename(libvirt.folder / "virsh")
    libvirt.host.stop_dnsmasq()
    libvirt.compare()
    assert libvirt.entries() == BEFORE
    leases = serve(libvirt.host, f"{SECOND} 10.83.0.112 ubuntu *")
    # Nor on a host that follows another: who writes the registry compares it with the libvirts of all hosts
    follows = libvirt.host.folder / "instances.follows"
    follows.write_text("a writes it")
    libvirt.start("box", ON_BR0)
    libvirt.compare()
    assert libvirt.entries() == BEFORE and SECOND in leases.read_text()
    follows.unlink()
    assert libvirt.compare(f"{UUID}\n").keys() == BEFORE.keys() - {SECOND} and leases.read_text() == ""


def test_libvirt_example_keeps_a_domain_that_has_moved_to_another_host(libvirt):
    """Here, libvirt does not know it any more, as after it was undefined."""
    moved = "starting up\nshutting down, reason=migrated\nterminating on signal 15\n"
    again = f"{moved}starting up\nshutting down, reason=destroyed\n"
    cases = [("", "migrated", True), (moved, "-", True), ("", "shutdown", False), (again, "-", False)]
    for log, reason, stays in cases:
        (libvirt.host.folder / "default" / "libvirt" / "qemu" / "box.log").write_text(log)
        libvirt.start("box", ON_BR0)
        libvirt.hook("box", "release", "end", reason, xml=domain("box"))
        assert (FIRST in libvirt.compare(f"{OTHER_UUID}\n")) == stays


def test_libvirt_example_compares_with_the_libvirts_of_all_hosts(libvirt):
    """Who runs on another gets its name, and only what none of them has is removed."""
    xml = domain("far", INTERFACE.format(THIRD, "br0", FILTERED)).replace("</domain>", "\n</domain>")
    (libvirt.folder / "far").write_text(xml.replace("<domain>", "<domain type='qemu'>"))
    (libvirt.folder / "virsh").write_text(SEVERAL)
    libvirt.hook("qemu:///system", "qemu+ssh://b/system")
    assert libvirt.names() == NAMES | {THIRD: "far"}
    (libvirt.folder / "virsh").write_text(SEVERAL.replace(UUID, "").replace(OTHER_UUID, ""))
    before = libvirt.entries()
    libvirt.hook("qemu:///system", "qemu+ssh://c/system")
    assert libvirt.entries() == before
    libvirt.hook("qemu:///system", "qemu+ssh://b/system")
    assert libvirt.entries().keys() == {HOST_MAC, FIRST, NOBODYS}
