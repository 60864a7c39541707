"""Guests with the DHCP clients that people have, on a bridge whose guard was there first, as after every boot."""

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import PROGRAMS, need
from lab import Host, run, wait_for

pytestmark = pytest.mark.slow
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NETWORKD = "/lib/systemd/systemd-networkd"
LEASE = 120  # seconds: the shortest time that dnsmasq gives
HOST_ADDRESSES = ("10.83.0.1", "2001:67c:83::1", "fd83:5eed::1", "fe80::1266:6aff:fe4c:a1fe%eth0")
BOTH, IPV4, IPV6 = ("10.8", "2001", "fd83", "fe80"), ("10.8", "fe80"), ("2001", "fd83", "fe80")
STABLE = ("10.8", "2001", "fd83")  # with a link-local address that is not made from the MAC address, and not registered

# A guest's start: files of its own where clients and their hooks write, its own host name, and /sys read-only as in a
# container, where networkd does not wait for udev. The shell stays, so that all processes end with it.
BOOT = """\
set -e
for folder in etc run var/lib; do
    mount --bind "$0/$folder" "/$folder"
done
mount -o remount,bind,ro /sys
echo "${0##*-}" >/proc/sys/kernel/hostname
mkdir -p /run/systemd
{
%s
} &
wait
"""

# DHCPv6 needs a link-local address that is no longer tentative: all but dhclient wait for it themselves.
DHCLIENT6 = """\
ip link set eth0 up
until ip address show dev eth0 scope link -tentative | grep -q fe80; do
    sleep 0.1
done
dhclient -6 -d eth0"""
FQDN = {"dhcp/dhclient.conf": "send fqdn.fqdn = gethostname();\n"}


def networkd(family: str) -> tuple[str, str, dict]:
    """Return networkd's program, command and file, with IPv4 conflict detection."""
    text = f"[Match]\nName=eth0\n[Network]\nDHCP={family}\n[DHCPv4]\nSendDecline=yes\n"
    return NETWORKD, f"SYSTEMD_LOG_TARGET=console {NETWORKD}", {"systemd/network/eth0.network": text}


DHCPCD = {"dhcpcd.conf": "hostname\nduid\nslaac hwaddr\nnoipv4ll\n"}  # 169.254.0.0/16 is no guest's
# As nmcli makes a connection; all else is as Debian has it. It needs a D-Bus of its own.
NETWORK_MANAGER = """\
mkdir -p /run/dbus
dbus-daemon --system --nofork --nopidfile &
until [ -S /run/dbus/system_bus_socket ]; do
    sleep 0.1
done
NetworkManager --no-daemon"""
CONNECTION = "[connection]\nid=eth0\ntype=ethernet\ninterface-name=eth0\n[ipv4]\nmethod=auto\n"
CONNECTION += "[ipv6]\naddr-gen-mode=default\nmethod=auto\n"
CONNECTION = {"NetworkManager/system-connections/eth0.nmconnection": CONNECTION, "hostname": "manager\n"}

# Each client for the versions that it has, and for IPv6 only, where nothing else registers a guest before its DHCPv6
# messages: the kinds of addresses that its guest has, its program, its command, and what it needs in /etc.
CLIENTS = {
    "dhclient": (BOTH, "dhclient", f"dhclient -4 -d eth0 & {DHCLIENT6}", {}),
    "dhclient6": (IPV6, "dhclient", DHCLIENT6, FQDN),
    "udhcpc": (IPV4, "udhcpc", 'udhcpc -f -i eth0 -x "hostname:$(hostname)"', {}),
    "dhcpcd": (BOTH, "dhcpcd", "dhcpcd -B eth0", DHCPCD),
    "dhcpcd6": (IPV6, "dhcpcd", "dhcpcd -B -6 eth0", DHCPCD),
    "stock": (STABLE, "dhcpcd", "dhcpcd -B eth0", {}),
    "manager": (STABLE, "NetworkManager", NETWORK_MANAGER, CONNECTION),
    "networkd": (BOTH, *networkd("yes")),
    "networkd6": (IPV6, *networkd("ipv6")),
}

# What reaches the host's bridge before the guard and what is left of it for the DHCP server, by the sender, and IPv4
# probes: an ARP request of nobody's, RFC 5227, section 1.1.
COUNT = """\
table bridge count {
    set probed { type ether_addr; size 100; flags dynamic; }
    set asked { type ether_addr; size 100; flags dynamic; }
    set answered { type ether_addr; size 100; flags dynamic; }
    chain before {
        type filter hook prerouting priority -250;
        arp operation request arp saddr ip 0.0.0.0 update @probed { ether saddr counter }
        udp dport { 67, 547 } update @asked { ether saddr counter }
    }
    chain after {
        type filter hook input priority 20;
        udp dport { 67, 547 } update @answered { ether saddr counter }
    }
}
"""


class Guest:
    """A guest that one of the clients configures."""

    def __init__(self, host: Host, name: str):
        self.kinds, _, self.command, files = CLIENTS[name]
        self.client = host.client(name, f"10:66:6a:4c:a1:1{list(CLIENTS).index(name)}", wait=False)
        self.client.run("ip", "link", "set", "eth0", "down")
        self.root = self.client.folder
        for folder in ("run", "var/lib/dhcp", "var/lib/dhcpcd", "var/lib/NetworkManager"):
            (self.root / folder).mkdir(parents=True)
        shutil.copytree("/etc", self.root / "etc", symlinks=True)
        # dhcpcd as it is tells its name from Debian 13 on
        silent = name == "stock" and "\nhostname\n" not in (self.root / "etc" / "dhcpcd.conf").read_text()
        self.name = "" if silent else name
        for path, text in {"machine-id": os.urandom(16).hex() + "\n", "resolv.conf": "", **files}.items():
            (self.root / "etc" / path).unlink(missing_ok=True)
            (self.root / "etc" / path).write_text(text)
            (self.root / "etc" / path).chmod(0o600 if path.endswith("nmconnection") else 0o644)

    def start(self) -> None:
        """Start the system: its client runs, behind mounts of its own, and brings the interface up."""
        own = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with open(self.root / "log", "a") as log:
            command = [*own, "sh", "-c", BOOT % self.command, self.root]
            self.process = self.client.start(*command, stdout=log, stderr=log)
        self.started = time.time()

    def cut_power(self) -> None:
        """End the system without a word to anybody: its files stay, except /run, and its addresses are gone."""
        self.client.stop(self.process, signal.SIGKILL)
        wait_for(lambda: not run("ip", "netns", "pids", self.client.name).stdout, "the end of the guest's processes")
        shutil.rmtree(self.root / "run")
        (self.root / "run").mkdir()
        self.client.run("ip", "link", "set", "eth0", "down")
        self.client.run("ip", "address", "flush", "dev", "eth0")

    def wait_in_use(self) -> list[str]:
        """Wait for an address of each kind, registered with the guest's name, and for the host's answers to pings."""
        what, link_local = f"{self.kinds} in {self.root}", self.entry().get("ipv6_lla")

        def addresses():
            return [a for a in self.client.addresses() if self.kinds != STABLE or not a.startswith("fe80")]

        def registered():
            return {value for field, value in self.entry().items() if self.kinds != STABLE or field != "ipv6_lla"}

        wait_for(lambda: sorted(address[:4] for address in addresses()) == sorted(self.kinds), what)
        wait_for(lambda: {self.name, *addresses()} == registered(), f"{what} registered")
        assert self.kinds != STABLE or link_local not in self.client.addresses("fe80")
        self.client.wait_pings(*(address for address in HOST_ADDRESSES if address.startswith(self.kinds)))
        return sorted(addresses())

    def entry(self) -> dict:
        """Return what is registered of the guest."""
        return self.client.host.registry().get(self.client.mac, {})

    def has_renewed(self) -> bool:
        """Tell whether its leases expire later than any that were given in half a minute from its start."""
        leases = (self.client.host.folder / "dnsmasq.br0.leases").read_text().splitlines()
        expiry = {fields[2]: int(fields[0]) for fields in map(str.split, leases) if len(fields) > 2}
        late = self.started + LEASE + 30
        return all(expiry.get(a, 0) > late for a in self.client.addresses() if not a.startswith("fe80"))

    def counted(self) -> dict[str, int]:
        """Return how many of its frames each of the sets has counted."""
        listing = json.loads(self.client.host.run("nft", "-j", "list", "table", "bridge", "count").stdout)["nftables"]
        found = dict.fromkeys(("probed", "asked", "answered"), 0)
        for entry in (item["set"] for item in listing if "set" in item):
            for element in (member["elem"] for member in entry.get("elem", [])):
                found[entry["name"]] += element["counter"]["packets"] if element["val"] == self.client.mac else 0
        return found


@pytest.fixture(scope="module")
def guests(tmp_path_factory):
    """The guests whose clients this machine has, all started at once, by their clients' names."""
    need(*PROGRAMS, "unshare")
    machine = Path("/etc/resolv.conf").read_bytes()
    with contextlib.closing(Host(tmp_path_factory.mktemp("clients"))) as host:
        host.start_guarded()
        host.stop_dnsmasq()
        config = host.folder / "br0.conf"
        config.write_text(config.read_text().replace(",12h\n", f",{LEASE}\n"))
        host.start_dnsmasq(config=config)
        host.run("nft", "-f", "-", input=COUNT)
        guests = {name: Guest(host, name) for name in CLIENTS if shutil.which(CLIENTS[name][1], path=PATH)}
        for guest in guests.values():
            guest.start()
        yield guests
    assert Path("/etc/resolv.conf").read_bytes() == machine


@pytest.fixture(scope="module")
def first_start(guests):
    """All guests started again; by their names, the addresses and the counts of frames that they had before."""
    before = {name: (guest.wait_in_use(), guest.counted()) for name, guest in guests.items()}
    for guest in guests.values():
        guest.cut_power()
        assert not guest.client.addresses()
    for guest in guests.values():
        guest.start()
    return before


@pytest.fixture(params=CLIENTS)
def guest(request, guests):
    need(CLIENTS[request.param][1])
    return guests[request.param]


def test_client_gets_registered_addresses_with_which_it_reaches_the_host_and_nothing_is_dropped(guest):
    guest.wait_in_use()
    print(guest.client.label, "at its first start:", guest.counted())
    assert not guest.client.host.dropped(guest.client.mac)


def test_clients_reach_each_other(guests):
    for guest in guests.values():
        guest.wait_in_use()
    for guest, other in zip(guests.values(), [*guests.values()][1:] + [*guests.values()][:1]):
        for kind in {*guest.kinds} & {*other.kinds} - {"fe80"}:
            guest.client.wait_pings(other.client.addresses(kind)[0])


@pytest.mark.parametrize("guest", ["dhcpcd", "networkd"], indirect=True)
def test_client_with_conflict_detection_probes_its_address(guest):
    guest.wait_in_use()
    assert guest.counted()["probed"]


def test_client_renews_and_keeps_its_addresses(guest):
    addresses = guest.wait_in_use()
    wait_for(guest.has_renewed, f"later leases in {guest.root}", 75)  # they would be rebound after 98 s
    assert guest.wait_in_use() == addresses


def test_client_starts_again_with_the_same_addresses_and_no_request_is_dropped(guest, first_start):
    addresses, before = first_start[guest.client.label]
    assert guest.wait_in_use() == addresses
    after = guest.counted()
    print(guest.client.label, "at its second start:", {name: after[name] - before[name] for name in after})
    assert after["answered"] == after["asked"] > before["asked"]
