"""The example zone."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import need
from lab import EXAMPLES, PROCESS, block, environment, mounted, run, run_script, wait_for

pytestmark = pytest.mark.slow

ZONE = EXAMPLES / "zone" / "instances-zone.py"
SERVER = ("instance.example", "ns.instance.example=192.0.2.53")
HOSTS = "instances.hosts"
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
REGISTRY = {
    "10:66:6a:4c:a1:11": {"name": "web", "ipv4": "10.83.0.11"}
    | {"ipv6_gua": "2001:67c:83::11", "ipv6_ula": "fd83:5eed::11", "ipv6_lla": "fe80::1266:6aff:fe4c:a111"},
    "10:66:6a:4c:a1:12": {"name": "mail", "ipv4": "198.20.0.9", "ipv6_gua": "2001:67c:83:1:2:3:4:5"},
    "10:66:6a:4c:a1:13": {"name": "", "ipv4": "10.83.0.13"},
    "10:66:6a:4c:a1:14": {"name": "ns", "ipv4": "198.20.0.14", "ipv6_ula": "fd83:5eed::14"},
    "10:66:6a:4c:a1:15": {"name": "lan", "ipv4": "10.83.0.15"},
}
BAD_VALUES = {  # each alone made a zone that no server loads, or that says what the registry does not
    "10:66:6a:4c:a1:21": {"name": "hand\n", "ipv4": "10.83.0.21"},
    "10:66:6a:4c:a1:22": {"name": "edited", "ipv4": "10.83.0.22\n+evil.instance.example:1.2.3.4"},
    "10:66:6a:4c:a1:23": {"name": "large", "ipv4": "10.83.0.256", "ipv6_gua": "2001:67c:83::12345"},
    "10:66:6a:4c:a1:24": {"name": "short", "ipv4": "10.83", "ipv6_ula": "fd83:5eed:1"},
    "10:66:6a:4c:a1:25": {"name": "swapped", "ipv4": "2001:67c:83::25", "ipv6_gua": "10.83.0.25"},
    "10:66:6a:4c:a1:26": {"name": "kinds", "ipv6_gua": "fd83:5eed::26", "ipv6_ula": "2001:67c:83::26"},
    "10:66:6a:4c:a1:27": {"name": "forms", "ipv4": "010.083.0.27", "ipv6_gua": "2001:067c:83::27"},
    "10:66:6a:4c:a1:28": {"name": "types", "ipv4": 7, "ipv6_gua": ["2001:67c:83::28"], "ipv6_ula": None},
    "10:66:6A:4C:A1:29": {"name": "upper", "ipv4": "10.83.0.29"},
    "10:66:6a:4c:a1:2a": {"name": ["list"], "ipv4": "10.83.0.42"},
    "10:66:6a:4c:a1:2b": {"name": "a" * 64, "ipv4": "10.83.0.43"},
}
SERVED = {
    "ns.instance.example. A 192.0.2.53",
    "web.lan.instance.example. A 10.83.0.11",
    "web.lan.instance.example. AAAA fd83:5eed::11",
    "web.wan.instance.example. AAAA 2001:67c:83::11",
    "mail.wan.instance.example. A 198.20.0.9",
    "mail.wan.instance.example. AAAA 2001:67c:83:1:2:3:4:5",
    "ns.wan.instance.example. A 198.20.0.14",
    "ns.lan.instance.example. AAAA fd83:5eed::14",
    "lan.lan.instance.example. A 10.83.0.15",
}


def make_hosts(folder: Path, registry: dict = REGISTRY) -> str:
    """Have the processor make its files of a registry; return the hosts file's text."""
    base = folder / "instances"
    base.with_suffix(".json").write_text(json.dumps(registry))
    run(sys.executable, PROCESS, "--force", env=environment(base, INSTANCES_HOSTS_DOMAIN=".a.internal,.b.internal"))
    return (folder / HOSTS).read_text()


def zone(kind: str, folder: Path, *arguments: str, file: str = "made") -> subprocess.CompletedProcess:
    """Run the program on the hosts file of a folder; what it makes is in a file there."""
    return run_script(ZONE, kind, folder / HOSTS, folder / file, *arguments, base=folder / "instances")


def made(kind: str, folder: Path, *arguments: str) -> str:
    """Return what the program makes."""
    result = zone(kind, folder, *arguments)
    assert result.returncode == 0, result.stderr
    return (folder / "made").read_text()


def serial(folder: Path, file: str = "made") -> int:
    """Return the serial of the zone or the data there."""
    return int(re.search(r"(\d+)[ :]3600[ :]600[ :]", (folder / file).read_text())[1])


def checked(file: Path, name: str = "instance.example") -> None:
    """Have the servers' own checkers read a zone."""
    for checker in ("named-checkzone", "nsd-checkzone"):
        run(checker, name, file)


def run_commands(commands: str, folder: Path) -> None:
    """Run commands of the page, with their paths below a folder."""
    for place in re.findall(r"/(?:var|etc|usr)/[^ \n]*/", commands):
        (folder / place[1:]).mkdir(parents=True, exist_ok=True)
    commands = re.sub(r"/var/lib/misc(?=/)|(?=/(?:var|etc|usr)/)", str(folder), commands)
    env = environment(folder / "instances")
    env["PATH"] = f"{folder}/usr/local/sbin:{ZONE.parent}:{env['PATH']}"
    run("sh", "-euc", commands, cwd=ZONE.parent, env=env)


def ask(client, server: str, *question: str) -> list[str]:
    """Return what a server answers to a client."""
    command = ("dig", "+short", "+norecurse", "+timeout=9", "+tries=1", f"@{server}", *question)
    return sorted(client.run(*command, check=False).stdout.split())


def listening(server: str, address: str) -> str:
    """Return how the page has a server listen on an address only."""
    page = (ZONE.parent / "README.md").read_text()
    [text] = re.findall(rf"^\| {server} \|.*?`((?:listen|ip-address)[^`]*)`", page, re.MULTILINE)
    return text.replace("192.0.2.53", address)


def start_bind(host, address: str, zones: dict[str, Path], second: str = "") -> subprocess.Popen:
    """Start BIND as the primary server of zones' files, which tells the second servers of a change."""
    folder = host.folder / "bind"
    folder.mkdir()
    options = f'directory "{folder}"; pid-file none; recursion no; {listening("BIND", address)}'
    text = f"options {{ {options} notify-source {address}; allow-transfer {{ any; }}; }};\ncontrols {{ }};\n"
    for name, file in zones.items():
        lines = f'type primary; file "{file}"; notify explicit; notify-delay 0; also-notify {{ {second} }};'
        text += f'zone "{name}" {{ {lines} }};\n'
    (folder / "named.conf").write_text(text)
    return host.start("named", "-f", "-c", folder / "named.conf", **QUIET)


def start_nsd(host, address: str, file: Path | str, *zone: str) -> None:
    """Start nsd with a zone's file, and a line for each of the zone's other options."""
    config = host.folder / "nsd.conf"
    lines = ["server:", listening("nsd", address), 'username: ""']
    lines += [f'{name}: "{host.folder}"' for name in ("zonesdir", "xfrdir")]
    lines += [f'{name}: "{host.folder}/nsd.{name}"' for name in ("database", "pidfile", "xfrdfile", "zonelistfile")]
    lines += ["remote-control:", "control-enable: no", "zone:", "name: instance.example", f'zonefile: "{file}"']
    config.write_text("\n".join([*lines, "provide-xfr: 0.0.0.0/0 NOKEY", *zone, ""]))
    host.start("nsd", "-d", "-c", config, **QUIET)


def start_knot(host, address: str, file: Path | str, zone: str = "", rest: str = "") -> None:
    """Start Knot with a zone's file, another line for that zone, and what the rest of its configuration needs."""
    folder = host.folder / "knot"
    folder.mkdir()
    text = f"server:\n    {listening('Knot', address)}\n    rundir: {folder}\ndatabase:\n    storage: {folder}\n"
    text += f"{rest}acl:\n  - id: all\n    action: [notify, transfer]\n"
    text += f"zone:\n  - domain: instance.example\n    storage: {folder}\n    file: {file}\n    acl: all\n"
    (folder / "knot.conf").write_text(text + (f"    {zone}\n" if zone else ""))
    host.start("knotd", "-c", folder / "knot.conf", **QUIET)


def transfer(host, address: str) -> set[str]:
    """Return all address records of a server's zone, "NAME TYPE ADDRESS"."""
    command = ["dig", "+noall", "+answer", "+timeout=9", "+tries=1", f"@{address}", "instance.example", "AXFR"]
    rows = [line.split() for line in host.run(*command, check=False).stdout.splitlines()]
    return {f"{row[0]} {row[3]} {row[4]}" for row in rows if len(row) == 5 and row[3] in ("A", "AAAA")}


def test_readme_zone_is_loaded_by_bind_knot_and_nsd_which_leave_the_bridge_to_dnsmasq(host):
    need("named", "named-checkzone", "nsd", "nsd-checkzone", "knotd")
    make_hosts(host.folder, REGISTRY | BAD_VALUES)
    run_commands(block("examples/zone/README.md", "install -m 755"), host.folder)
    file = host.folder / "var/lib/bind/instance.example.zone"
    text = file.read_text()
    checked(file)
    servers = ("192.0.2.53", "192.0.2.54", "192.0.2.55")
    host.ip(*(f"address add {server}/24 dev lo" for server in servers))
    (host.folder / "instances.hosts.d").mkdir()
    (host.folder / "instances.hosts.d" / "names").write_text("10.83.0.1 host.instance.internal\n")
    host.start_dnsmasq(config=host.example("dnsmasq/br0.conf"))
    start_bind(host, servers[0], {"instance.example": file})
    start_nsd(host, servers[1], file)
    start_knot(host, servers[2], file)
    for address in servers:
        wait_for(lambda a=address: transfer(host, a), f"the zone of {address}")
        assert transfer(host, address) == SERVED
        question = ["dig", "+norecurse", "+noall", "+answer", "+additional", f"@{address}", "instance.example", "NS"]
        answer = host.run(*question).stdout.split()
        assert "ns.instance.example." in answer and "192.0.2.53" in answer
    assert file.read_text() == text
    guest = host.client("web", "10:66:6a:4c:a1:11")
    guest.ip("address add 10.83.0.11/24 dev eth0")
    assert [guest.resolve("host.instance.internal", "A") for _ in range(3)] == 3 * [["10.83.0.1"]]


def test_second_server_follows_a_change_by_notify_and_axfr(host):
    need("named", "nsd", "knotd")
    make_hosts(host.folder)
    made("zone", host.folder, *SERVER)
    primary = start_bind(host, "127.0.0.1", {"instance.example": host.folder / "made"}, "127.0.0.2; 127.0.0.3;")
    start_nsd(host, "127.0.0.2", "second", "allow-notify: 127.0.0.1 NOKEY", "request-xfr: AXFR 127.0.0.1 NOKEY")
    start_knot(host, "127.0.0.3", "second", "master: first", "remote:\n  - id: first\n    address: 127.0.0.1\n")
    seconds = ("127.0.0.2", "127.0.0.3")
    for address in seconds:
        wait_for(lambda a=address: transfer(host, a) == SERVED, f"the first transfer to {address}")
    for name in ("renamed", "again"):  # two changes, of which a serial of whole seconds could hide the second
        mail = REGISTRY["10:66:6a:4c:a1:12"]
        make_hosts(host.folder, REGISTRY | {"10:66:6a:4c:a1:12": mail | {"name": name}})
        made("zone", host.folder, *SERVER)
        primary.send_signal(signal.SIGHUP)
        for address in seconds:
            record = f"{name}.wan.instance.example. A 198.20.0.9"
            wait_for(lambda a=address, r=record: r in transfer(host, a), f"{name} on {address}")
            assert not [row for row in transfer(host, address) if row.startswith("mail.")]


REVERSE = {  # networks, and the pointers in their zones
    "10.83.0.0/24=rev.example.net": {"11": "web.lan", "15": "lan.lan"},
    "10.83.0.0/16": {"11.0": "web.lan", "15.0": "lan.lan"},
    "10.0.0.0/8": {"11.0.83": "web.lan", "15.0.83": "lan.lan"},
    "198.20.0.0/28": {"9": "mail.wan", "14": "ns.wan"},
    "198.20.0.0/28=0-15.0.20.198.in-addr.arpa": {"9": "mail.wan", "14": "ns.wan"},
    "198.20.0.9/32": {"9": "mail.wan"},
    "2001:67c:83::/48": {".".join(f"{'11':0>20}"[::-1]): "web.wan", ".".join("00010002000300040005"[::-1]): "mail.wan"},
    "fd83:5eed::/124": {},
    "fd83:5eed::10/124": {"1": "web.lan", "4": "ns.lan"},
}


def test_reverse_zones_of_all_sizes_have_each_address_once_and_are_loaded(host):
    need("named", "named-checkzone", "nsd-checkzone", "tinydns", "tinydns-data")
    make_hosts(host.folder, REGISTRY | BAD_VALUES)
    zones = {}
    for network, expected in REVERSE.items():
        assert zone("zone", host.folder, network, *SERVER[:1], "ns.instance.example", file="part").returncode == 0
        text = (host.folder / "part").read_text()
        name = re.search(r"^(\S+)\. SOA", text, re.MULTILINE)[1]
        zones[name] = (host.folder / "part").rename(host.folder / f"reverse-{len(zones)}")
        checked(zones[name], name)
        pointers = {f"{labels}.{name}.": f"{target}.instance.example." for labels, target in expected.items()}
        assert dict(re.findall(r"^(\S+) PTR (\S+)$", text, re.MULTILINE)) == pointers
    # The page's zone, and the parent of a part as RFC 2317 has it: asked for an address, a server finds the pointer.
    run_commands(block("examples/zone/README.md", "10.83.0.0/24"), host.folder)
    parent = host.folder / "parent"
    part = "0-15.0.20.198.in-addr.arpa"
    parent.write_text(f"$TTL 60\n@ SOA ns.x. a.x. 1 1 1 1 1\n@ NS ns.x.\n$GENERATE 0-15 $ CNAME $.{part}.\n")
    zones |= {"0.20.198.in-addr.arpa": parent, "0.83.10.in-addr.arpa": host.folder / "var/lib/bind/10.83.0.zone"}
    start_bind(host, "10.83.0.1", zones)

    def pointed(*question):
        found = "".join(ask(host, "10.83.0.1", *question))
        return pointed(found, "PTR") if found.endswith("arpa.") else found  # a resolver follows a CNAME itself

    for address, name in {"10.83.0.11": "web.lan", "198.20.0.9": "mail.wan", "2001:67c:83::11": "web.wan"}.items():
        wait_for(lambda a=address, n=name: pointed("-x", a) == f"{n}.instance.example.", f"the name of {address}")


OWN = {
    "zone": '; mine\n\n@ MX 10 mail.wan\n* 300 IN A 192.0.2.80\nweb.wan TXT "of (web); "\nWWW.wan CNAME web.wan\n'
    "lan.lan.Instance.example. IN 60 A 10.83.0.99\n",
    "tinydns": "# mine\n\n@instance.example::mail.wan.instance.example:10\n+*.instance.example:192.0.2.80\n"
    "'web.wan.instance.example:of web\nCwww.wan.instance.example:web.wan.instance.example\n"
    "+www.instance.example:192.0.2.81\n=lan.lan.instance.example:10.83.0.99\n",
}


@pytest.mark.parametrize("kind", ["zone", "tinydns"])
def test_own_records_stand_beside_the_instances_and_no_instance_takes_their_names(tmp_path, kind):
    need("named-checkzone", "nsd-checkzone", "tinydns-data")
    make_hosts(tmp_path, REGISTRY | {"10:66:6a:4c:a1:16": {"name": "www", "ipv4": "198.20.0.16"}})
    (tmp_path / "made.own").write_text(OWN[kind])
    result = zone(kind, tmp_path, *SERVER)
    assert result.returncode == 0 and "www.wan.instance.example is" in result.stderr
    text = (tmp_path / "made").read_text()
    assert text.endswith("\n" + OWN[kind].partition("\n\n")[2])
    assert "198.20.0.16" not in text and not re.search(r"lan\.lan.*10\.83\.0\.15", text)
    assert re.search(r"^:?web\.wan.*(2001:67c:83::11|:28:)", text, re.MULTILINE)
    (tmp_path / "data").write_text(text)
    checked(tmp_path / "made") if kind == "zone" else run("tinydns-data", cwd=tmp_path)
    before = serial(tmp_path)
    (tmp_path / "made.own").unlink()
    assert "198.20.0.16" in made(kind, tmp_path, *SERVER) and serial(tmp_path) > before


def test_own_record_that_is_none_is_told_and_changes_nothing(tmp_path):
    make_hosts(tmp_path)
    before = made("zone", tmp_path, *SERVER)
    lines = ["x SOA n.x. a.x. 1 1 1 1 1", " A 1.1.1.1", "web 1.1.1.1", "web A", "web A ;", "$TTL 5 a b", "ü A 1.1.1.1"]
    for line in (*lines, ")"):
        (tmp_path / "made.own").write_text(f"www CNAME web.wan\n{line}\n")
        result = zone("zone", tmp_path, *SERVER)
        assert result.returncode == 1 and "made.own: not a record" in result.stderr and result.stderr.count("\n") == 1
        assert (tmp_path / "made").read_text() == before


def test_tinydns_answers_by_where_the_client_is_and_no_instance_is_the_name_server(host):
    need("tinydns", "tinydns-data")
    inside, outside = host.client("inside", "10:66:6a:4c:a1:e1"), host.client("outside", "10:66:6a:4c:a1:e2")
    host.ip("address add 192.0.2.53/24 dev br0")
    inside.ip("address add 10.83.0.21/24 dev eth0")
    outside.ip("address add 192.0.2.22/24 dev eth0")
    make_hosts(host.folder, REGISTRY | BAD_VALUES)
    run_commands(block("examples/zone/README.md", ".py tinydns "), host.folder)
    root = host.folder / "etc/tinydns/root"
    run("tinydns-data", cwd=root)
    env = environment(host.base) | {"ROOT": str(root), "UID": "0", "GID": "0"}
    for address in ("10.83.0.1", "192.0.2.53"):
        host.start("tinydns", env=env | {"IP": address}, **QUIET)

    def answers(*question):
        """Return what is answered inside, and outside."""
        return [ask(inside, "10.83.0.1", *question), ask(outside, "192.0.2.53", *question)]

    wait_for(lambda: answers("web.lan.instance.example", "A") == 2 * [["10.83.0.11"]], "tinydns")
    assert answers("web.instance.example", "A") == [["10.83.0.11"], []]
    assert answers("web.instance.example", "AAAA") == [["fd83:5eed::11"], ["2001:67c:83::11"]]
    assert answers("mail.instance.example", "A") == [[], ["198.20.0.9"]]
    assert answers("mail.wan.instance.example", "AAAA") == 2 * [["2001:67c:83:1:2:3:4:5"]]
    assert answers("ns.instance.example", "A") == 2 * [["192.0.2.53"]]
    assert answers("ns.instance.example", "AAAA") == 2 * [[]]
    assert answers("ns.wan.instance.example", "A") == 2 * [["198.20.0.14"]]
    assert answers("instance.example", "NS") == 2 * [["ns.instance.example."]]
    assert str(serial(root, "data")) in answers("instance.example", "SOA")[0]
    names = set(re.findall(r"^[+:]([^.]*)\.", (root / "data").read_text(), re.MULTILINE))
    assert names == {"web", "mail", "ns", "lan"}


def test_avahi_answers_on_the_bridge_and_follows_a_change(host):
    need("avahi-daemon", "unshare")
    client, etc = host.client("asks", "10:66:6a:4c:a1:e1"), host.folder / "etc/avahi"
    client.ip("address add 10.83.0.21/24 dev eth0")
    etc.mkdir(parents=True)
    (etc / "hosts").write_text("# avahi's own\n192.0.2.7 printer.local\n")
    (etc / "avahi-daemon.conf").write_text("[server]\nenable-dbus=no\nallow-interfaces=br0\n")
    make_hosts(host.folder, REGISTRY | BAD_VALUES)
    run_commands(block("examples/zone/README.md", ".py avahi "), host.folder)
    (host.folder / "run").mkdir()
    places = mounted({"/etc/avahi": etc, "/run": host.folder / "run"})
    daemon = host.start(*places, "avahi-daemon", "--no-drop-root", "--no-chroot", "--no-rlimits", **QUIET)

    def is_answered(name, kind, *addresses):
        asked = ("-p", "5353", f"{name}.local", kind)
        wait_for(lambda: ask(client, "10.83.0.1", *asked) == sorted(addresses), f"{name}: {addresses}")

    is_answered("web", "A", "10.83.0.11")
    is_answered("web", "AAAA", "2001:67c:83::11", "fd83:5eed::11")
    is_answered("mail", "A", "198.20.0.9")
    is_answered("printer", "A", "192.0.2.7")
    make_hosts(host.folder, REGISTRY | {"10:66:6a:4c:a1:12": {"name": "post", "ipv4": "198.20.0.9"}})
    zone("avahi", host.folder, "local", file="etc/avahi/hosts")
    daemon.send_signal(signal.SIGHUP)
    is_answered("post", "A", "198.20.0.9")
    wait_for(lambda: "198.20.0.9" not in ask(client, "10.83.0.1", "-p", "5353", "mail.local", "A"), "no old name")


SPECIAL = """0.0.0.1 100.64.0.1 100.127.255.254 127.0.0.1 169.254.0.1 192.0.0.1 192.0.2.1 192.88.99.1 198.18.0.1
198.19.255.254 198.51.100.1 203.0.113.1 224.0.0.1 240.0.0.1 255.255.255.255
2001::1 2001:1ff::1 2001:10::1 2002:a53:1::1"""
PRIVATE = "10.0.0.1 10.255.255.254 172.16.0.1 172.31.255.254 192.168.0.1 192.168.255.254 fd00::1 fc00::1"
GLOBAL = """1.0.0.1 9.255.255.254 11.0.0.1 100.63.255.254 100.128.0.1 126.0.0.1 128.0.0.1 169.253.0.1 169.255.0.1
172.15.0.1 172.32.0.1 192.0.1.1 192.0.3.1 192.167.0.1 192.169.0.1 198.17.0.1 198.20.0.1 198.51.99.1 203.0.112.1
223.255.255.254 2000::1 2001:200::1 2001:67c::1 2003::1 2a00::1 3ffe::1"""


def test_only_global_addresses_are_published_as_wan_and_private_ones_as_lan(tmp_path):
    special, private, usual = SPECIAL.split(), PRIVATE.split(), GLOBAL.split()
    lines = [f"{address} n{number}.a.internal\n" for number, address in enumerate([*special, *private, *usual])]
    (tmp_path / HOSTS).write_text("".join(lines))
    rows = [line.split() for line in made("zone", tmp_path, *SERVER).splitlines()]
    found = {side: [row[2] for row in rows if f".{side}" in row[0]] for side in ("wan", "lan")}
    assert found == {"wan": usual, "lan": private}


@pytest.mark.parametrize("kind", ["zone", "tinydns"])
def test_each_change_has_a_higher_serial_and_what_did_not_change_keeps_it(tmp_path, kind):
    serials = []
    start = time.time()
    for number in range(8):  # more than one a second
        (tmp_path / HOSTS).write_text(f"10.83.0.11 web{number}.a.internal\n")
        os.utime(tmp_path / HOSTS, (1, 1))  # as a backup that was restored
        made(kind, tmp_path, *SERVER)
        serials.append(serial(tmp_path))
        before = os.stat(tmp_path / "made")
        assert zone(kind, tmp_path, *SERVER).stderr == "" and os.stat(tmp_path / "made") == before
    assert len(set(serials)) == 8 and serials == sorted(serials) and serials[0] >= int(start)


@pytest.mark.parametrize(("last", "following"), [(2026112201, 2026112202), (2**32 - 1, None), (2**31 + 5, 2**31 + 6)])
def test_serial_goes_on_from_the_one_in_the_file(tmp_path, last, following):
    (tmp_path / HOSTS).write_text("10.83.0.11 web.a.internal\n")
    (tmp_path / "made").write_text(re.sub(r"\d+ 3600", f"{last} 3600", made("zone", tmp_path, *SERVER)))
    assert zone("zone", tmp_path, *SERVER).stderr == ""
    (tmp_path / HOSTS).write_text("")
    made("zone", tmp_path, *SERVER)
    assert serial(tmp_path) == following if following else abs(serial(tmp_path) - time.time()) < 60
    assert 0 < (serial(tmp_path) - last) % 2**32 < 2**31  # RFC 1982, section 3.2


def test_name_servers_have_all_their_addresses_and_no_instance_adds_to_them(tmp_path):
    need("named-checkzone", "nsd-checkzone", "tinydns-data")
    make_hosts(tmp_path)
    addresses = ["NS.wan.instance.example=192.0.2.53", "NS.wan.instance.example=2001:67c:83::53"]
    words = ("Instance.Example", *addresses, "instance.example=192.0.2.54", "ns.example.net")
    assert "ns.wan.instance.example is the name server" in zone("zone", tmp_path, *words).stderr
    checked(tmp_path / "made")
    text = (tmp_path / "made").read_text()
    assert re.findall(r"^ns\.wan\S* \S* (.*)", text, re.MULTILINE) == ["192.0.2.53", "2001:67c:83::53"]
    assert "\ninstance.example. A 192.0.2.54\n" in text
    assert "NS ns.example.net.\n" in text and "\nns.example.net" not in text
    assert zone("tinydns", tmp_path, *words, file="data").returncode == 0
    run("tinydns-data", cwd=tmp_path)


REFUSED = [  # name servers of a zone, zones, networks before a zone, and others
    *[("instance.example", "ns.instance.example" + address) for address in ("", "=192.0.2.256", "=fe80::1%eth0")],
    *[("instance.example", "ns.instance.example" + address) for address in ("=127.0.0.1", "=::", "=ff02::1")],
    *[("instance.example", server) for server in ("instance.example", "ns.example.net=192.0.2.53", "192.0.2.53")],
    ("instance.example", "ns.example.net\n@ A 192.0.2.1"),
    *[(zone, "ns.example.net") for zone in ("0.83.10.in-addr.arpa", "3.8.0.0.c.7.6.0.1.0.0.2.IP6.arpa", "")],
    *[(zone, "ns.example.net") for zone in ("instance.example:x", "instance.example.", ".instance.example")],
    (f"{'a' * 63}.{'b' * 63}.{'c' * 63}", "ns.example.net"),
    *[(network, "instance.example", "ns.example.net") for network in ("10.83.0.0/22", "2001:67c:83::/62")],
    *[(network, "instance.example", "ns.example.net") for network in ("10.83.0.1/24", "0.0.0.0/0", "169.254.0.0/16")],
    ("10.83.0.0/24=x y.arpa", "instance.example", "ns.example.net"),
    ("10.83.0.0/24", "0.83.10.in-addr.arpa", "ns.example.net"),
    ("10.83.0.0/24=rev.example.net", "instance.example", "ns.rev.example.net"),
]


def test_what_no_server_would_load_is_refused_in_one_line_and_changes_nothing(tmp_path):
    make_hosts(tmp_path)
    made("zone", tmp_path, *SERVER)
    (tmp_path / HOSTS).write_text("")
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    for words in REFUSED:
        result = zone("zone", tmp_path, *words, file="new" if "/" in words[0] else "made")
        assert result.returncode == 1 and re.fullmatch("instances-zone.py: error: .*\n", result.stderr), words
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_file_of_somebody_else_is_not_replaced(tmp_path):
    make_hosts(tmp_path)
    kinds = {"zone": SERVER, "tinydns": SERVER, "avahi": ("local",)}
    for of, words in kinds.items():
        assert zone(of, tmp_path, *words, file=of).returncode == 0
    edited = re.sub(r"(\d+) 3600", "(\n\\1 ; serial\n) 3600", (tmp_path / "zone").read_text())
    texts = {of: (tmp_path / of).read_text() for of in kinds}
    texts |= {"own": "; my own zone\n", "edited": edited, "not ASCII": "; of the one in Köln\n"}
    for of, text in texts.items():
        (tmp_path / "made").write_text(text)
        for kind in kinds.keys() - {of}:
            result = zone(kind, tmp_path, *kinds[kind])
            assert result.returncode == 1
            assert f"{tmp_path}/made: not as this program makes it for {kind}: move it away" in result.stderr
        assert (tmp_path / "made").read_text() == text
    texts = ("::1 web.internal\nnonsense\n", "::1 -x.internal\n", "::1 1.internal\n", "::1 wüb.internal\n")
    told = dict.fromkeys(texts, "not a file of instances-process.py")
    for text, why in (told | {"10.83.0 web.internal\n": "'10.83.0'", None: "No such file"}).items():
        (tmp_path / HOSTS).write_text(text) if text else (tmp_path / HOSTS).unlink()
        result = zone("zone", tmp_path, *SERVER, file="new")
        assert result.returncode == 1 and why in result.stderr and not (tmp_path / "new").exists()


def test_wrong_usage_is_told(tmp_path):
    no_server = ("zone h f instance.example", "zone h f 10.83.0.0/24 instance.example")
    for words in ("", "zone", *no_server, "bind h f instance.example ns.example.net", "avahi h f local more"):
        result = run_script(ZONE, *words.split(), base=tmp_path)
        assert result.returncode == 2 and ": no such usage: " in result.stderr, words


def test_many_at_once_write_a_whole_file_each_and_no_serial_twice(tmp_path):
    make_hosts(tmp_path)
    ahead = 3 * 10**9  # of the time, so that each change has one more
    (tmp_path / "made").write_text(re.sub(r"\d+ 3600", f"{ahead} 3600", made("zone", tmp_path, *SERVER)))
    before = ahead
    command = [sys.executable, ZONE, "zone", tmp_path / HOSTS, tmp_path / "made", "instance.example"]
    running = [subprocess.Popen([*command, f"ns{number}.example.net"], **QUIET) for number in range(8)]
    while any(process.poll() is None for process in running):
        text = (tmp_path / "made").read_text()
        assert text.startswith("; zone made by") and text.endswith("lan.lan.instance.example. A 10.83.0.15\n")
        assert before <= (before := serial(tmp_path))
    assert [process.returncode for process in running] == 8 * [0] and serial(tmp_path) == ahead + 8


def test_mode_owner_and_link_are_kept_and_what_a_killed_run_left_is_not_followed(tmp_path):
    make_hosts(tmp_path)
    (tmp_path / "real").write_text("")
    (tmp_path / "real").chmod(0o640)
    owner = os.geteuid() or 4321
    os.chown(tmp_path / "real", owner, -1)
    (tmp_path / "made").symlink_to("real")
    (tmp_path / "other").write_text("other")
    (tmp_path / "real.new").symlink_to("other")
    made("zone", tmp_path, *SERVER)
    status = os.stat(tmp_path / "real")
    assert (tmp_path / "made").is_symlink() and (status.st_mode & 0o777, status.st_uid) == (0o640, owner)
    assert (tmp_path / "other").read_text() == "other" and not os.path.lexists(tmp_path / "real.new")


def test_cost_grows_no_faster_than_the_number_of_instances(tmp_path):
    costs = []
    for count in (1000, 10000):
        lines = []
        for n in range(count):
            addresses = (f"10.83.{n >> 8}.{n & 255}", f"2001:67c:83::{n + 1:x}", f"fd83:5eed::{n + 1:x}")
            lines += [f"{address} guest-{n}.a.internal\n" for address in addresses]
        (tmp_path / HOSTS).write_text("".join(lines))
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        assert made("tinydns", tmp_path, *SERVER).count(f"guest-{count - 1}.") == 6
        costs.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert costs[1] < 15 * costs[0], costs
