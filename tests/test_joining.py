"""Guests that join a bridge whose guard was there first, as after every boot."""

import contextlib
import signal
import time

import pytest
from conftest import PROGRAMS, need
from lab import Host, wait_for

pytestmark = pytest.mark.slow
IPV6 = ("2001", "fd83")
HOSTS = ("10.83.0.1", "2001:67c:83::1", "fd83:5eed::1")


@pytest.fixture
def guarded(tmp_path):
    """A host with the examples' guard on before anybody joins."""
    need(*PROGRAMS)
    with contextlib.closing(Host(tmp_path)) as host:
        host.start_guarded()
        yield host


def in_use(client, *prefixes: str) -> bool:
    """Tell whether a client has addresses that begin so, and the registry has them and no others of their kinds."""
    registered = set(client.host.registry().get(client.mac, {}).values())
    return all(client.addresses(prefix)[-1:] and client.addresses(prefix)[-1] in registered for prefix in prefixes)


def test_first_frames_after_a_lease_pass_before_the_registry_is_in_force(guarded):
    """Nor does it matter that meanwhile another guest leaves the registry."""
    client, other = guarded.client("web", "10:66:6a:4c:a1:11"), "10:66:6a:4c:a1:12"
    guarded.update("add", other, "10.83.0.12")
    guarded.settle()
    guarded.stop(guarded.service)
    client.dhcp4("web")
    for mac in (other, client.mac):  # the client's lease is not there yet
        guarded.update("--remove", mac)
    guarded.run(*guarded.applying())
    listed = guarded.run("nft", "list", "set", "bridge", "instances", "instances_macs").stdout
    assert client.mac not in listed and other not in listed
    assert client.pings("10.83.0.1") and not guarded.dropped(client.mac)
    guarded.run("nft", "flush", "set", "bridge", "instances", "instances_leased")
    assert not client.pings("10.83.0.1") and guarded.dropped(client.mac, "not registered")


@pytest.mark.parametrize("forwarding", ["0", "1"])
def test_ten_guests_that_start_at_once_are_all_registered_and_reach_the_host(guarded, forwarding):
    guarded.set("net/ipv4/ip_forward", forwarding)
    guarded.set("net/ipv6/conf/all/forwarding", forwarding)
    guests = [guarded.client(f"guest{number}", f"10:66:6a:4c:a1:1{number}", wait=False) for number in range(10)]
    for guest in guests:
        guest.start_dhcp6(guest.label)
        if guest in guests[:6]:
            guest.start_dhcp4(guest.label)
    for guest in guests:
        both = guest in guests[:6]
        kinds = (*IPV6, "10.83") if both else IPV6
        wait_for(lambda g=guest, k=kinds: in_use(g, *k), f"{guest.label} registered")
        guest.wait_pings(*HOSTS[0 if both else 1 :])
    assert {i["name"] for i in guarded.registry().values()} == {"host", *(guest.label for guest in guests)}


class Guest:
    """A guest with a lease of each kind, and other systems on it: the same MAC address and name, another DUID."""

    def __init__(self, host: Host):
        self.host, self.client = host, host.client("web", "10:66:6a:4c:a1:11")
        self.client.start_dhcp4("web")
        self.process = self.boot("a", None)

    def boot(self, system: str, former):
        """Boot a system that knows of no lease, for a former one; return its process when its leases are in use."""
        (self.client.folder / f"leases6-{system}").unlink(missing_ok=True)
        if former:
            self.client.stop(former, signal.SIGKILL)
            self.client.run("ip", "address", "flush", "dev", "eth0", "to", "2000::/3")
            self.client.run("ip", "address", "flush", "dev", "eth0", "to", "fc00::/7")
        process = self.client.start_dhcp6("web", system)
        wait_for(lambda: in_use(self.client, *IPV6, "10.83"), f"system {system} in use")
        self.client.wait_pings(*HOSTS)
        return process

    def addresses(self) -> set[str]:
        return {*self.client.addresses("2001"), *self.client.addresses("fd83")}


@pytest.fixture
def guest(guarded):
    return Guest(guarded)


def test_rebuilt_guest_is_registered_with_its_new_addresses_and_with_its_older_ones_when_it_goes_back(guest):
    before = guest.addresses()
    process = guest.boot("b", guest.process)
    assert not before & guest.addresses()
    guest.boot("a", process)
    assert guest.addresses() == before


def test_reminders_of_an_older_lease_do_not_undo_news(guest):
    guest.boot("b", guest.process)
    host, registry, log = guest.host, guest.host.registry(), guest.host.log

    def told(after):  # of each of the two older leases, whose order is not ours to know
        return log.read_text()[after:].count(f"warning: {guest.client.mac} keeps ") >= 2

    # SIGHUP tells each lease again
    size = len(log.read_text())
    host.dnsmasq.send_signal(signal.SIGHUP)
    wait_for(lambda: told(size), "reminders of the older leases")
    assert host.registry() == registry
    guest.client.wait_pings(*HOSTS)
    # A restart does, too, but of IPv6 leases it no longer knows the MAC address: here of a former IPv4 lease
    host.stop(host.dnsmasq)
    with open(host.folder / "dnsmasq.br0.leases", "r+") as leases:
        lines = leases.readlines()
        leases.seek(0)
        leases.writelines([f"{int(time.time()) + 600} {guest.client.mac} 10.83.0.199 web *\n", *lines])
    host.start_dnsmasq(config=host.folder / "br0.conf")
    keeps = f"{guest.client.mac} keeps {registry[guest.client.mac]['ipv4']}: 10.83.0.199"
    wait_for(lambda: keeps in log.read_text(), "a reminder of the former lease")
    assert host.registry() == registry
    guest.client.wait_pings(*HOSTS)
