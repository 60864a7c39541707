"""The example cluster."""

import re
import sys
from pathlib import Path

import pytest
from conftest import PROGRAMS, need
from lab import DNSMASQ, EXAMPLES, PROCESS, UPDATE, Host, block, environment, wait_for

pytestmark = pytest.mark.slow


def run_readme(host: Host, commands: str) -> None:
    """Run commands of the README on host a, or what they are on host b, with paths below the host's folder."""
    if host.folder.name == "b":
        for here, there in (("a.conf", "b.conf"), (".a.", ".b."), ("10.84.2.", "10.84.1."), ("fd84:2:", "fd84:1:")):
            commands = commands.replace(here, there)
    other = 1 if host.folder.name == "b" else 2
    for word, address in (("IPV4-ADDRESS-OF-B", f"192.0.2.{other}"), ("IPV6-ADDRESS-OF-B", f"2001:db8::{other}")):
        commands = commands.replace(word, address)
    commands = re.sub(r"/(?:var/lib/misc|etc/\w+(?:\.d)?)(?=/)", str(host.folder), commands)
    commands = "systemctl() { :; }\n" + commands  # the test starts and stops dnsmasq
    host.run("sh", "-euc", commands, cwd=EXAMPLES / "cluster", env=environment(host.base))


def start_dnsmasq(host: Host) -> None:
    """Start dnsmasq by the host's configuration, with a resolver that it would ask for what is not here."""
    text = (host.folder / "br0.conf").read_text().replace("/usr/local/sbin", str(UPDATE.parent))
    (host.folder / "here.conf").write_text(text.replace("/var/lib/misc", str(host.folder)) + "server=127.0.0.1#5300\n")
    host.start_dnsmasq(config=host.folder / "here.conf")


def hand_over(host: Host) -> None:
    """Do what the service does on an update: make the names and give them to dnsmasq."""
    settings = dict(line.split("=") for line in (host.folder / "instances").read_text().splitlines())
    host.run(sys.executable, PROCESS, env=environment(host.base, **settings))
    Path(f"{host.base}.hosts").rename(host.folder / "instances.hosts.d" / "instances.hosts")


def join(host: Host, mac: str, name: str, both: bool = True):
    """Return a new guest with a lease, or with one of both kinds and a default route of each."""
    guest = host.client(name, mac, port=name)
    guest.start_dhcp4(name)
    guest.wait_registered("bound 10.84")
    if both:
        guest.start_dhcp6(name)
        guest.wait_registered("BOUND6 fd84")
        guest.ip(f"route add default via {host.address}")
        wait_for(lambda: "default" in guest.run("ip", "-6", "route").stdout, "the router advertisement's route")
    hand_over(host)
    return guest


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Hosts a and b after the README's commands, run twice."""
    need("sysctl", *PROGRAMS)
    hosts = []
    for number, letter in enumerate("ab", 1):
        folder = tmp_path_factory.mktemp("cluster") / letter
        folder.mkdir()
        hosts.append(Host(folder, (f"10.84.{number}.1/24", f"fd84:{number}::1/80"), f"10:66:6a:4c:a{number}:fe"))
        hosts[-1].address = f"10.84.{number}.1"
    hosts[0].ip(f"link add routed type veth peer name routed netns {hosts[1].name}")
    for number, host in enumerate(hosts, 1):
        host.ip(f"address add 192.0.2.{number}/24 dev routed", f"address add 2001:db8::{number}/64 dev routed nodad")
        host.ip("link set routed up")
        run_readme(host, 2 * block("examples/cluster/README.md", "cp a.conf"))
        upstream = ["--port=5300", "--log-queries", "--address=/#/192.0.2.99", "--interface=lo", "--bind-interfaces"]
        with open(host.folder / "upstream.log", "w") as log:
            host.start(*DNSMASQ, *upstream, stdout=log, stderr=log)
        start_dnsmasq(host)
        hand_over(host)
    yield hosts
    for host in hosts:
        host.close()


def ask(client, *question) -> list[str]:
    """Return host a's answers to a question of one of its guests."""
    return client.run("dig", "+short", "+timeout=5", "+tries=1", "@10.84.1.1", *question, check=False).stdout.split()


def test_names_resolve_and_guests_reach_each_other_across_hosts(cluster):
    a, b = cluster
    asks, web = join(a, "10:66:6a:4c:a1:11", "asks"), join(b, "10:66:6a:4c:a2:11", "web")
    address, address6 = (b.registry()[web.mac][field] for field in ("ipv4", "ipv6_ula"))
    wait_for(lambda: ask(asks, "web.b.instance.internal", "A") == [address], "a name of the other host")
    assert ask(asks, "web.b.instance.internal", "AAAA") == [address6]
    assert ask(asks, "asks.v4.a.instance.internal", "A") == [a.registry()[asks.mac]["ipv4"]]
    for reverse in (address, address6):  # dnsmasq answers with web.v4 as well, where the lease has a name too
        assert "web.b.instance.internal." in ask(asks, "-x", reverse)
    assert ask(asks, "-x", "10.84.1.1") == ask(asks, "-x", "fd84:1::1") == ["host.a.instance.internal."]
    assert ask(asks, "-x", "fd84:2::1") == ["host.b.instance.internal."]
    asks.wait_pings(address, address6, "10.84.2.1", "fd84:2::1")
    b.stop(b.dnsmasq)
    assert ask(asks, "host.a.instance.internal", "A") == ["10.84.1.1"]
    assert address not in ask(asks, "web.b.instance.internal", "A")
    start_dnsmasq(b)


def test_own_and_unknown_names_and_addresses_are_not_asked_upstream(cluster):
    a, _ = cluster
    for name in ("nobody.a", "nobody", "host.c", "lease", "nobody.lease.a"):
        assert ask(a, f"{name}.instance.internal", "A") == ask(a, f"{name}.instance.internal", "AAAA") == []
    for address in ("10.84.1.77", "fd84:1::77", "fd84:1::7fff:ffff:ffff"):
        assert ask(a, "-x", address) == []
    assert ask(a, "elsewhere.example", "A") == ["192.0.2.99"]
    assert re.findall(r"query\[\w+\] (\S+)", (a.folder / "upstream.log").read_text()) == ["elsewhere.example"]


def test_names_that_clients_choose_are_only_below_lease(cluster):
    a, _ = cluster
    guest = join(a, "10:66:6a:4c:a1:31", "chosen", both=False)
    assert re.search(r"option: *15 domain-name +a\.instance\.internal\n", a.log.read_text())
    address = a.registry()[guest.mac]["ipv4"]
    a.update("--rename", guest.mac, "given")
    hand_over(a)
    wait_for(lambda: ask(guest, "given.a.instance.internal", "A") == [address], "the given name")
    assert ask(guest, "chosen.lease.a.instance.internal", "A") == [address]
    for name in ("chosen", "chosen.instance.internal", "chosen.a.instance.internal", "given"):
        assert ask(guest, name, "A") in ([], ["192.0.2.99"])
    unwanted = join(a, "10:66:6a:4c:a1:32", "wpad", both=False)
    assert a.registry()[unwanted.mac]["name"] == "" and ask(guest, "wpad.lease.a.instance.internal", "A") == []


def test_moved_guest_is_taken_out_of_its_old_host_and_does_not_come_back(cluster):
    a, b = cluster
    others = [join(a, "10:66:6a:4c:a1:41", "early", both=False)]
    guest = join(a, "10:66:6a:4c:a1:12", "app")
    others.append(join(a, "10:66:6a:4c:a1:42", "late", both=False))
    addresses = [a.registry()[guest.mac][field] for field in ("ipv4", "ipv6_ula")]
    a.clients.remove(guest)
    guest.close()
    there = join(b, guest.mac, "app", both=False).addresses("10.84")[0]
    wait_for(lambda: ask(a, "app.b.instance.internal", "A") == [there], "the name on b")
    assert ask(a, "app.a.instance.internal", "A") == addresses[:1]

    def restart(*commands):
        a.stop(a.dnsmasq)
        run_readme(a, "\n".join(commands))
        for other in others:
            a.update("--remove", other.mac)
        start_dnsmasq(a)  # it tells of all leases, those before the guest's and those after it
        wait_for(lambda: all(other.mac in a.registry() for other in others), "all leases told")
        hand_over(a)
        wait_for(lambda: ask(a, "host.a.instance.internal", "A") == ["10.84.1.1"], "the names on a")

    commands = block("examples/cluster/README.md", "--remove MAC").replace(" MAC", f" {guest.mac}")
    stop, sed, remove, start = commands.splitlines()
    assert (stop, start) == ("systemctl stop dnsmasq", "systemctl start dnsmasq")
    restart(remove)
    assert guest.mac in a.registry()  # so the leases must go as well
    restart(*(sed.replace("ADDRESS", address) for address in addresses), remove)
    assert guest.mac not in a.registry() and ask(a, "app.a.instance.internal", "A") == []
    assert ask(a, "app.b.instance.internal", "A") == [there]


def test_lease_is_the_mac_addresss_whatever_client_identifier_is_sent(cluster):
    a, _ = cluster
    holder = join(a, "10:66:6a:4c:a1:51", "holder", both=False)
    address = a.registry()[holder.mac]["ipv4"]
    thief, identifier = a.client("thief", "10:66:6a:4c:a1:52", port="thief"), f"0x3d:01{holder.mac.replace(':', '')}"
    thief.start("udhcpc", "-f", "-i", "eth0", "-C", "-x", identifier, "-s", thief.script, "-A", "1")
    thief.wait_registered("bound 10.84")
    assert a.registry()[thief.mac]["ipv4"] != address == a.registry()[holder.mac]["ipv4"]


def test_configurations_differ_only_by_host():
    a, b = ((EXAMPLES / "cluster" / f"{letter}.conf").read_text() for letter in "ab")
    pattern = r"(?<=host )[ab]\b|(?<=web\.)b|(?<![a-z])[ab](?=\.instance)|(?<=84\.)[12](?=\.)|(?<=fd84:)[12](?=:)"
    assert re.sub(pattern, lambda found: found[0].translate(str.maketrans("ab12", "ba21")), a) == b
