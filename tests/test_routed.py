"""The example routed."""

import contextlib
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from attacks import bootp, octets
from conftest import PROGRAMS, need
from lab import EXAMPLES, TOP, Client, Host, Namespace, environment, mounted, wait_for

scapy = pytest.importorskip("scapy.all")
pytestmark = pytest.mark.slow
BINDING = EXAMPLES / "routed" / "instances-binding"
RULES = EXAMPLES / "routed" / "routed.nft"


class Routed:
    """A host with the routed example, where all that it writes to is ours, and guests whose devices are veth pairs."""

    def __init__(self, host: Host):
        self.host, self.state, self.env = host, host.folder / "routed", environment(host.base)
        for name in ("instances.hosts.d", "run"):
            (host.folder / name).mkdir()
        self.mounted = mounted({"/var/lib/misc": host.folder, "/run": host.folder / "run", "/usr/local/sbin": TOP})
        self.binding("restore")
        self.boot()

    def boot(self) -> None:
        """Do what README has for each boot, but for the bindings."""
        self.host.ip("link add gw0 type bridge", "link set gw0 up")
        self.host.ip("address add 10.85.0.1/24 dev gw0", "address add 2001:67c:85::1/64 dev gw0 nodad")
        for variable in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
            self.host.set(variable, "1")
        self.host.run("nft", "-f", RULES)
        self.start_dnsmasq()

    def start_dnsmasq(self) -> None:
        """Start the example's dnsmasq, beside a resolver on loopback; return when it answers."""
        log = self.host.log
        started = log.read_text().count("started, version") if log.exists() else 0
        options = ("--keep-in-foreground", "--user=root", "--no-resolv", "--log-facility=-", "--log-dhcp")
        command = ("dnsmasq", f"--conf-file={BINDING.parent}/gw0.conf", *options, "--server=127.0.0.1")
        with open(log, "a") as file:
            self.dnsmasq = self.host.start(*self.mounted, *command, env=self.env, stdout=file, stderr=file)
        wait_for(lambda: log.read_text().count("started, version") > started, "dnsmasq")

    def guest(self, number: int, device: str = "") -> Client:
        """Add a guest on the device tapNUMBER, or another, that has no binding yet."""
        return self.host.client(f"guest{number}", f"10:66:6a:4c:a1:1{number}", device or f"tap{number}", bridge="")

    def bound(self, number: int, **changes: str) -> Client:
        """Add a guest and its binding."""
        guest = self.guest(number)
        self.add(number, **changes)
        return guest

    def send(self, guest: Client, *packets) -> None:
        """Have a guest send packets to its router."""
        router = self.host.run("cat", f"/sys/class/net/{guest.port}/address").stdout.strip()
        guest.send(*(bytes(scapy.Ether(src=guest.mac, dst=router) / packet) for packet in packets))

    def solicit(self, guest: Client) -> list[str]:
        """Have a guest ask for a router once more, as kernels do, too; return its addresses by SLAAC."""
        ip = scapy.IPv6(src=guest.addresses("fe80")[0], dst="ff02::2", hlim=255)
        self.send(guest, ip / scapy.ICMPv6ND_RS())
        return guest.addresses("2001")

    def slaac(self, guest: Client) -> str:
        """Wait until a guest has an address by SLAAC; return it."""
        return wait_for(lambda: self.solicit(guest), "an address by SLAAC")[0]

    def gets_no_lease(self, guest: Client) -> None:
        """Check that a guest's DHCP requests are dropped."""
        before, process = self.drops(), guest.start_dhcp4()
        wait_for(lambda: self.drops() >= before + 2, "the drop of its requests")
        guest.stop(process)
        assert "bound" not in guest.events()

    def binding(self, *arguments, by: tuple = (), check: bool = True, **variables: str) -> subprocess.CompletedProcess:
        """Run instances-binding, by another command if one is given."""
        return self.host.run(*self.mounted, *by, BINDING, *arguments, env=self.env | variables, check=check)

    def refuses(self, *arguments, why: str) -> str:
        """Check that instances-binding does not do that, and says why in a line; return that."""
        result = self.binding(*arguments, check=False)
        assert result.returncode == 1 and result.stderr.count("\n") == 1 and why in result.stderr, result
        return result.stderr

    def path_with(self, folder: Path, program: str, line: str) -> str:
        """Return a PATH on which a program runs a line of a shell before it does its work."""
        (folder / program).write_text(f'#!/bin/sh\n{line}\nexec {shutil.which(program, path=self.env["PATH"])} "$@"\n')
        (folder / program).chmod(0o755)
        return f"{folder}:{self.env['PATH']}"

    def add(self, number: int, **changes: str) -> str:
        """Add a binding; return what was said."""
        return self.binding("add", self.file(number, **changes)).stderr

    def remove(self, *arguments) -> None:
        for argument in arguments:
            self.binding("remove", argument)

    def file(self, number: int, **changes: str) -> Path:
        values = {"INDEV": f"tap{number}", "MAC": f"10:66:6A:4C:A1:1{number}", "IP": f'"10.85.0.1{number}"'}
        values |= {"HOSTNAME": f"'guest{number}'", "SUBNET6": "2001:67c:85::/64", "GATEWAY6": "2001:67c:85::1"}
        values |= {"GATEWAY": "10.85.0.1", "SUBNET": "10.85.0.0/24", "MTU": "1400", "UNKNOWN": "$(reboot)"} | changes
        path = self.host.folder / f"guest {number}'s $(reboot)"
        path.write_text("".join(f"{key}={value}\n" for key, value in values.items() if value))
        return path

    def listing(self) -> str:
        """Return the guard's table, the counters apart."""
        return self.host.run("nft", "-s", "list", "table", "inet", "routed").stdout

    def kernel(self) -> str:
        """Return what the kernel has of devices, addresses, routes and rules, but for what it makes by itself."""
        commands = "link show\naddress show scope global\nneighbour show proxy\nroute show table all\n"
        texts = [self.host.run("ip", version, "-batch", "-", input=commands).stdout for version in ("-4", "-6")]
        texts += [self.host.run("sh", "-c", "grep . /proc/sys/net/ipv4/conf/*/proxy_arp").stdout, self.listing()]
        lines = "".join(texts).splitlines(keepends=True)
        return "".join(line for line in lines if not re.search("fe80|ff00|table local", line))

    def drops(self) -> int:
        """Return how many packets the guard has dropped."""
        listing = self.host.run("nft", "list", "table", "inet", "routed").stdout
        return sum(map(int, re.findall(r"counter packets (\d+)", listing)))

    def leases(self) -> str:
        return (self.state / "leases").read_text()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory):
    need(*PROGRAMS, "unshare", "dhcp_release")
    with contextlib.closing(Host(tmp_path_factory.mktemp("routed"))) as host:
        yield Routed(host)


@pytest.fixture
def routed(lasting):
    """The host of all tests, with its rules, and without bindings and guests."""
    lasting.host.run("nft", "-f", RULES)
    yield lasting
    lasting.remove(*(line.split()[0] for line in lasting.binding("list").stdout.splitlines()))
    for client in lasting.host.clients:
        lasting.host.run("ip", "link", "delete", client.port, check=False)  # a namespace takes its devices away later
        client.close()
    lasting.host.clients.clear()


def test_dnsmasq_leaves_loopback_to_another_resolver_and_does_not_ask_it_about_its_own_networks(routed):
    host, log = routed.host, routed.host.folder / "asked"
    host.hear(log, "::ffff:127.0.0.1", 53)
    ask = ("dig", "+tries=1", "@10.85.0.1")
    for address in ("10.85.0.99", "2001:67c:85::99"):
        assert "NXDOMAIN" in host.run(*ask, "-x", address).stdout
    host.run(*ask, "+timeout=1", "-x", "192.0.2.99", check=False)
    wait_for(lambda: "\\x0299\\x012\\x010\\x03192" in log.read_text(), "a question about another network")
    assert log.read_text().count("in-addr") == 1 and "ip6" not in log.read_text()


def test_routed_example_binds_guests_to_their_devices(routed):
    one, two = guests = [routed.bound(number) for number in range(2)]
    for number, guest in enumerate(guests):
        guest.dhcp4("wpad")
        assert guest.addresses("10") == [f"10.85.0.1{number}"] and "mtu=1400" in guest.events()
        guest.ip("route add default via 10.85.0.1")
        routed.slaac(guest)
        assert guest.run("cat", "/proc/sys/net/ipv6/conf/eth0/mtu").stdout == "1400\n"
        entry = routed.host.registry()[guest.mac]
        assert (entry["name"], entry["ipv4"]) == (f"guest{number}", f"10.85.0.1{number}")
    listed = [line.split() for line in routed.binding("list").stdout.splitlines()]
    assert [(line[0], line[2]) for line in listed] == [("tap0", "10.85.0.10"), ("tap1", "10.85.0.11")]
    assert two.addresses("2001") == ["2001:67c:85:0:1266:6aff:fe4c:a111"]
    one.wait_pings("10.85.0.1", "2001:67c:85::1", *two.addresses("10"), *two.addresses("2001"))
    reply = one.run("dig", "+short", "@10.85.0.1", "guest1.lease.instance.internal", "A", check=False).stdout
    assert reply.split() == ["10.85.0.11"]

    file = routed.file(1)
    routed.remove(file)
    assert not one.pings("10.85.0.11") and "tap1" not in routed.binding("list").stdout
    assert "10.85.0.11" not in routed.kernel()
    routed.refuses("remove", file, why="has no binding")


def test_guest_without_a_binding_gets_nothing(routed):
    one, two = routed.bound(0), routed.guest(1)
    before = routed.host.registry()
    routed.gets_no_lease(two)
    assert not two.addresses("2001") and not two.run("ip", "-6", "route", "show", "default").stdout
    assert routed.host.registry() == before
    one.wait_pings("ff02::2%eth0")
    addresses = ("ip", "address", "show", "dev", "tap1")
    wait_for(lambda: "tentative" not in routed.host.run(*addresses).stdout, "an address that would answer")
    assert not two.pings("ff02::2%eth0")


def test_no_guest_uses_an_address_of_another(routed):
    one, _ = routed.bound(0), routed.bound(1)
    one.ip("address add 10.85.0.10/24 dev eth0", "address add 10.85.0.11/24 dev eth0")
    one.wait_pings("10.85.0.1")
    before = routed.drops()
    assert not one.pings("10.85.0.1", "-I", "10.85.0.11") and routed.drops() > before


def test_dnsmasq_lives_on_and_the_address_of_a_removed_guest_is_free_at_once(routed):
    one, two = routed.guest(0), routed.guest(1)
    routed.add(0)
    one.dhcp4()
    routed.remove("tap0")
    wait_for(lambda: one.mac not in routed.leases(), "the end of the lease")
    for mtu in ("1300", ""):  # what a former binding of the device had is forgotten
        routed.add(1, MTU=mtu)
        routed.remove("tap1")
    routed.add(1, IP="10.85.0.10")
    two.dhcp4()
    assert two.addresses("10") == ["10.85.0.10"] and "mtu=1400" in two.events()
    routed.remove("tap1")
    routed.add(1, IP="10.85.0.10", MTU="")
    before = two.events()
    two.start_dhcp4()
    wait_for(lambda: "bound 10.85.0.10" in two.events()[len(before) :], "its lease again")
    assert "mtu=1" not in two.events()[len(before) :]
    for _ in range(2):  # a lease with an option of its own, and configuration read again
        read = routed.host.log.read_text().count("cleared cache")
        routed.dnsmasq.send_signal(signal.SIGHUP)
        wait_for(lambda n=read: routed.host.log.read_text().count("cleared cache") > n, "SIGHUP")

    # While dnsmasq is down, too
    routed.host.stop(routed.dnsmasq)
    routed.remove("tap1")
    routed.add(0)
    routed.start_dnsmasq()
    events = one.events().count("bound")
    one.start_dhcp4()
    wait_for(lambda: one.events().count("bound 10.85.0.10") > events, "the address for its first holder")


def test_remove_undoes_what_was_done_whatever_the_file_says_now(routed):
    routed.guest(5, "vif5")
    before = routed.kernel()
    for edit in ("", "INDEV=tap9\nIP=10.85.0.99\nMAC=10:66:6a:4c:a1:99\nSUBNET6=", None):
        file = routed.file(5, INDEV="vif5")
        routed.binding("add", file)
        assert "10.85.0.15" in routed.kernel() and "2001:67c:85:0:1266:6aff:fe4c:a115" in routed.kernel()
        if edit is None:
            file.unlink()
        else:
            file.write_text(f"{file.read_text()}{edit}\n")
        routed.remove(file)
        assert routed.kernel() == before, edit
        assert not [path for name in ("hosts", "options", "bindings") for path in (routed.state / name).iterdir()]


def test_restore_brings_all_back_after_a_boot(routed):
    host = routed.host
    routed.guest(5, "vif5")
    routed.add(5, INDEV="vif5")
    routed.add(7)
    # A boot: the kernel forgets all, the files stay
    host.stop(routed.dnsmasq)
    host.ip("link delete tap7", "link delete vif5", "link delete gw0")
    host.run("nft", "flush", "ruleset")
    routed.boot()
    said = routed.binding("restore").stderr
    assert "tap7: restored" in said and "vif5: not there yet" in said
    assert "tun type tap" in host.run("ip", "-details", "link", "show", "tap7").stdout
    guest = routed.guest(5, "vif5")
    assert "not there" not in routed.binding("restore", "vif5").stderr
    guest.dhcp4()
    assert guest.pings("10.85.0.1")
    routed.slaac(guest)
    guest.wait_pings("2001:67c:85::1")
    state = routed.kernel()
    routed.binding("restore")
    assert routed.kernel() == state
    routed.remove("vif5", "tap7")
    assert "tap7" not in routed.kernel()
    routed.refuses("restore", "tap7", why="tap7 has no binding")


def test_restore_goes_on_after_a_binding_that_it_can_not_bring_back_and_a_record_that_is_damaged(routed):
    routed.add(6)
    routed.add(7)
    routed.host.ip("link delete tap6", "link delete tap7", "link add tap6 type bridge")  # with no room for the MTU
    record = routed.state / "bindings" / "tap6"
    record.write_text(record.read_text().replace("mtu=1400", "mtu=9999999"))
    result = routed.binding("restore", check=False)
    assert result.returncode == 1 and "tap7: restored" in result.stderr and "tap6: restored" not in result.stderr
    for text in ("", "\0" * 100, "device=tap6\nmac='10:66"):
        record.write_text(text)
        assert re.fullmatch(r".*tap6 is damaged.*\n.*tap7: restored\n", routed.binding("restore").stderr)
    routed.host.ip("link delete tap6")
    routed.add(6)


def test_add_that_was_killed_half_way_is_undone_or_finished(routed, tmp_path):
    path = routed.path_with(tmp_path, "ip", 'case "$*" in "route replace"*) kill -9 "$PPID" ;; esac')

    def is_killed():
        return routed.binding("add", routed.file(7), check=False, PATH=path).returncode == -signal.SIGKILL

    before = routed.kernel()
    assert is_killed()
    routed.refuses("add", routed.file(7), why="remove it first")
    routed.remove("tap7")
    assert routed.kernel() == before and is_killed()
    routed.binding("restore")
    killed = routed.kernel()
    routed.remove("tap7")
    routed.add(7)
    assert without_numbers(routed.kernel()) == without_numbers(killed)


def without_numbers(kernel: str) -> str:
    """Return the text without what is another for each new device: its index and its own hardware address."""
    return re.sub(r"^\d+:|link/ether \S+", "", kernel, flags=re.MULTILINE)


def test_no_guest_ends_anothers_lease_by_its_hardware_address(routed):
    one, two = routed.bound(0), routed.bound(1)
    client = one.dhcp4()
    two.dhcp4()
    router = routed.host.run("cat", f"/sys/class/net/{two.port}/address").stdout.strip()

    def message(kind, victim, sender=two.mac, **fields):
        address = "10.85.0.10" if victim is one else "10.85.0.11"
        options = [("server_id", "10.85.0.1"), *([("requested_addr", address)] if kind == "decline" else [])]
        frame = bootp(two, kind, *options, chaddr=victim.mac, ciaddr=address, **fields)
        frame.src = sender
        if kind == "release":
            frame.dst, frame[scapy.IP].src, frame[scapy.IP].dst = router, "10.85.0.11", "10.85.0.1"
        return bytes(frame)

    frames = [message(kind, one, sender) for kind in ("decline", "release") for sender in (two.mac, one.mac)]
    frames += [message("release", two, **fields) for fields in ({"giaddr": "10.85.0.10"}, {"htype": 6}, {"hlen": 5})]
    before = routed.drops()
    two.send(*frames)
    wait_for(lambda: routed.drops() >= before + len(frames), "the drop of all of them")
    assert two.mac in routed.leases()
    # Its own release comes after them: they are through when that has been heard
    two.send(message("release", two))
    # dnsmasq writes the file anew, so that for a moment it is empty
    wait_for(lambda: (leases := routed.leases()) and two.mac not in leases, "its own release")
    assert one.mac in routed.leases()
    client.send_signal(signal.SIGUSR1)
    wait_for(lambda: "renew 10.85.0.10" in one.events(), "a renewal")


def fragments(source: str, target: str, payload: bytes, at: int, number: int, protocol: int = 17, label: int = 0):
    """Return a datagram in two fragments, the first as long as said."""
    for offset, data in ((0, payload[:at]), (at // 8, payload[at:])):
        more = 1 if offset == 0 else 0
        if ":" in source:
            header = bytes([protocol, 0]) + (offset << 3 | more).to_bytes(2, "big") + number.to_bytes(4, "big")
            yield scapy.IPv6(src=source, dst=target, nh=44, fl=label if offset else 0) / (header + data)
        else:
            yield scapy.IP(src=source, dst=target, proto=protocol, id=number, flags=more, frag=offset) / data


def test_later_fragments_get_through_whatever_their_data_looks_like(routed):
    guest, log = routed.bound(6), routed.host.folder / "received"
    guest.dhcp4()
    source6 = routed.slaac(guest)
    routed.host.hear(log, "::", 5000)
    before = routed.drops()
    for source, target in (("10.85.0.16", "10.85.0.1"), (source6, "2001:67c:85::1")):
        for port in (67, 68, 546, 547):
            data = b"port %03d" % port + 8 * b"." + 4 * port.to_bytes(2, "big")
            ip = scapy.IPv6(src=source, dst=target) if ":" in source else scapy.IP(src=source, dst=target)
            udp = bytes(ip / scapy.UDP(sport=5000, dport=5000) / data)[-8 - len(data) :]
            routed.send(guest, *fragments(source, target, udp, 24, port, label=port))
            wait_for(lambda s=source, p=port: re.search(rf"port {p:03}.*{s}", log.read_text()), f"{source} {port}")
    assert routed.drops() == before


def test_no_guest_asks_a_server_elsewhere_or_is_one_not_even_in_fragments(routed):
    guest, outside = routed.bound(2), Namespace("outside")
    routed.host.ip(f"link add cable type veth peer name eth0 netns {outside.name}", "link set cable up")
    routed.host.ip("address add 192.0.2.1/24 dev cable", "address add 2001:67c:99::1/64 dev cable nodad")
    outside.ip("link set eth0 up", "address add 192.0.2.9/24 dev eth0", "address add 2001:67c:99::9/64 dev eth0 nodad")
    hook = "type filter hook prerouting priority -500"
    outside.run("nft", f"table ip6 seen {{ chain c {{ {hook}; exthdr frag exists counter; }}; }}")
    heard = {port: routed.host.folder / f"heard{port}" for port in (67, 68, 547, 5000)}
    for port, log in heard.items():
        outside.hear(log, "::", port)
    addresses = routed.slaac(guest), "2001:67c:99::9"
    ip, message = scapy.IP(src="10.85.0.12", dst="192.0.2.9"), scapy.BOOTP(chaddr=octets(guest.mac))
    routed.send(guest, scapy.IPv6(src=addresses[0], dst=addresses[1]) / scapy.UDP(sport=546, dport=547))
    for sport, dport in ((68, 67), (67, 68), (68, 5000)):
        routed.send(guest, ip / scapy.UDP(sport=sport, dport=dport) / message)
    wait_for(lambda: "10.85.0.12" in heard[5000].read_text(), "what else it sends")

    options = bytes([17, 1, 1, 12]) + bytes(12)  # Destination Options with padding, and UDP behind
    request = bytes(scapy.UDP(sport=546, dport=547) / scapy.DHCP6_Solicit(trid=7)) + bytes(40)
    other = bytes(scapy.UDP(sport=5000, dport=5000)) + bytes(40)
    routed.send(guest, *fragments(*addresses, other, 16, 1))
    for at in (8, 16, 24):  # the UDP header in the second fragment, or behind other headers
        routed.send(guest, *fragments(*addresses, options + request, at, at, 60))
    routed.send(guest, *fragments(*addresses, other, 16, 2))

    def seen():
        return int(re.search(r"packets (\d+)", outside.run("nft", "list", "table", "ip6", "seen").stdout)[1])

    wait_for(lambda: seen() >= 2 + 3 + 2, "other fragments, and the second ones of requests")
    assert seen() == 2 + 3 + 2, "the first ones are dropped"
    assert [heard[port].read_text() for port in (67, 68, 547)] == 3 * ["listens\n"]
    outside.close()


def test_guest_is_no_router_for_the_host(routed):
    guest = routed.bound(9)
    routed.host.set("net/ipv6/conf/tap9/accept_ra", "2")
    own = guest.addresses("fe80")[0]
    advertisement = scapy.IPv6(src=own, dst="ff02::1", hlim=255) / scapy.ICMPv6ND_RA(routerlifetime=600)
    before = routed.drops()
    routed.send(guest, advertisement, advertisement)
    wait_for(lambda: routed.drops() >= before + 2, "the drop of its advertisements")
    assert own not in routed.host.run("ip", "-6", "route").stdout


@pytest.mark.parametrize("changes", [{}, {"EUI64": "2001:67c:85::13"}])
def test_binding_without_subnet6_gets_no_address_and_no_default_route(routed, changes):
    solicited = routed.host.log.read_text().count("RTR-ADVERT(tap3)")
    guest = routed.bound(3, SUBNET6="", **changes)
    routed.solicit(guest)
    guest.dhcp4()  # what dnsmasq did before it has been done
    assert not guest.addresses("2001") and not guest.run("ip", "-6", "route", "show", "default").stdout
    assert routed.host.log.read_text().count("RTR-ADVERT(tap3)") == solicited


def test_binding_without_ip_has_ipv6_only(routed):
    guest = routed.bound(4, IP="", MTU="")
    routed.slaac(guest)
    guest.wait_pings("2001:67c:85::1")
    ip = scapy.IPv6(src=guest.addresses("fe80")[0], dst="ff02::1:2") / scapy.UDP(sport=546, dport=547)
    request = scapy.DHCP6_InfoRequest(trid=7) / scapy.DHCP6OptClientId(duid=scapy.DUID_LL(lladdr=guest.mac))
    routed.send(guest, ip / request)
    wait_for(lambda: "DHCPINFORMATION-REQUEST(tap4)" in routed.host.log.read_text(), "stateless DHCPv6")
    routed.gets_no_lease(guest)


def test_two_adds_of_one_address_at_once_are_one(routed, tmp_path):
    before = routed.kernel()
    path = routed.path_with(tmp_path, "nft", '[ "$1" != get ] || sleep 0.5')  # after the check, before the record
    files = [routed.file(number, IP="10.85.0.77", SUBNET6="") for number in range(6, 10)]
    at_once = ("sh", "-c", 'for file; do "$0" add "$file" & done; wait', BINDING, *files)
    said = routed.host.run(*routed.mounted, *at_once, env=routed.env | {"PATH": path}).stderr
    assert said.count("10.85.0.77 has a binding already") == 3 and said.count(" has 10.85.0.77\n") == 1
    assert len(re.findall(r'bindings4|"tap\d" . \S+ . 10.85.0.77', routed.listing())) == 3  # set, rule, element
    routed.remove(routed.binding("list").stdout.split()[0])
    assert routed.kernel() == before


def test_rules_loaded_again_are_the_same_and_keep_the_bindings(routed):
    routed.add(7)
    before = routed.listing()
    routed.host.run("nft", "-f", RULES)
    assert routed.listing() == before and "10.85.0.17" in before
    saved = routed.host.run("nft", "list", "ruleset").stdout  # people save it so
    routed.host.run("nft", "flush", "ruleset")
    routed.host.run("nft", "-f", "-", input=saved)
    assert routed.listing() == before


def test_host_name_is_the_first_label_or_none_with_a_warning(routed):
    guest, names = routed.guest(8), {"web.example.org": "web", "3cx": "", "a,b": "", "my_host.example.org": ""}
    for number, (said, name) in enumerate(names.items(), 5):
        text = routed.add(number, HOSTNAME=said)
        lease = (routed.state / "hosts" / f"tap{number}").read_text().strip().split(",")
        assert lease[2:] == ([name] if name else []) and ("can't be a host name" in text) == (not name), said
    guest.dhcp4("chosen")
    assert routed.host.registry()[guest.mac]["name"] == ""


def test_prefix_and_addresses_written_out_are_the_same(routed):
    texts = []
    long = {"SUBNET6": "2001:067C:0085:0000:0000:0000:0000:0000/64", "GATEWAY6": "2001:67c:85:0:0:0:0:1"}
    for changes in ({}, long, {"EUI64": "2001:67c:85:0:1266:6AFF:FE4C:A117"} | long):
        routed.add(7, **changes)
        texts.append(without_numbers(routed.kernel()))
        routed.remove("tap7")
    assert texts[0] == texts[1] == texts[2] and "2001:67c:85:0:1266:6aff:fe4c:a117" in texts[0]


REFUSED = {
    "INDEV": ["", "eth0", "gw0", "uap0", "vif9", "tap0/../x", "tap4567890123456"],
    "MAC": ["", "06-10:66:6a:4c:a1:11", "11:66:6a:4c:a1:11", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"],
    "IP": ["10.85.0.300", "10.85.0.1", "10.85.0.0", "10.85.0.255", "10.85.1.5", "127.0.0.1", "255.255.255.255"]
    + ["10.83.0.5", "2001:67c:85::15"],  # the first is in br0's network
    "MTU": ["9", "1400x", "70000"],
    "SUBNET6": ["2001:67c:85::/80", "2001:67c:85::85::/64", "2001:67c:86::/64", "2001:67c:85::1/64", "10.85.0.0/24"],
    "GATEWAY6": ["2001::67c::1", "2001:67c:85::2"],
    "EUI64": ["2001:67c:85::1", "2001:67c:85::", "2001:67c:86::15", "2001:67c:85::15%gw0", "10.85.0.15"],
}


def test_what_can_not_be_is_refused_in_a_line_and_changes_nothing(routed):
    before = routed.kernel()
    for key, value in [(key, value) for key, values in REFUSED.items() for value in values]:
        file = routed.file(5, **{key: value})
        said = routed.refuses("add", file, why=f"instances-binding: error: {file}: ")  # by us, before anything is tried
        said = said.replace(str(file), "")
        assert key in said or value and value in said, (key, value)
    routed.refuses("add", routed.file(5, IP="", SUBNET6=""), why="neither IP nor SUBNET6")
    routed.refuses("add", routed.host.folder / "missing", why="No such file or directory: ")
    routed.refuses("add", routed.file(5, MTU="65535"), why="mtu greater than device maximum")  # by the kernel
    routed.host.run("nft", "delete", "table", "inet", "routed")
    routed.refuses("add", routed.file(5), why="nft -f routed.nft")
    routed.host.run("nft", "-f", RULES)
    assert routed.kernel() == before and routed.binding("list").stdout == ""
    assert not list((routed.state / "hosts").iterdir())


def test_device_in_a_bridge_gets_no_binding(routed):
    routed.guest(4, "vif4")
    routed.add(4, INDEV="vif4")
    routed.host.ip("link add br1 type bridge", "link set vif4 master br1")
    routed.refuses("restore", "vif4", why="vif4 is in a bridge")
    routed.remove("vif4")
    before = routed.kernel()
    routed.refuses("add", routed.file(4, INDEV="vif4"), why="vif4 is in a bridge")
    assert routed.kernel() == before
    routed.host.ip("link delete br1")


def test_binding_of_what_another_has_is_refused(routed):
    routed.add(7)
    same = {"INDEV": "tap7", "MAC": "10:66:6a:4c:a1:17", "IP": "10.85.0.17"}
    same |= {"EUI64": "2001:67c:85:0:1266:6aff:fe4c:a117"}
    for key, value in same.items():
        routed.refuses("add", routed.file(8, **{key: value}), why=f"{value} has a binding already, on tap7: remove it")
    file = routed.file(7, INDEV="tap8", MAC="10:66:6a:4c:a1:18", IP="10.85.0.18")
    routed.refuses("add", file, why=f"{file} has a binding already, on tap7: remove it first")


def test_record_is_on_disk_before_it_is_in_place(routed, tmp_path):
    need("strace")
    log = tmp_path / "strace"
    traced = ("strace", "-f", "-y", "-qq", "-e", "trace=fsync,rename", "-o", log)
    routed.binding("add", routed.file(7), by=traced)
    calls = re.findall(r"(fsync|rename)\(", log.read_text())
    assert calls == ["fsync", "rename"] * 3  # the record, the option and the lease


def test_device_is_meant_where_another_binding_has_a_file_of_that_name(routed):
    file = routed.file(7)
    file.rename(routed.host.folder / "tap8")
    for path in (routed.host.folder / "tap8", routed.file(8)):
        routed.binding("add", path)
    inside = ("sh", "-c", 'cd "$1" && exec "$2" remove tap8', "sh", routed.host.folder, BINDING)
    routed.host.run(*routed.mounted, *inside, env=routed.env)
    assert routed.binding("list").stdout.split()[0] == "tap7"


def test_it_runs_where_the_environment_has_no_path(routed):
    assert routed.binding("list", by=("env", "-i")).stderr == ""
