"""The example zone."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import need
from lab import EXAMPLES, environment, run, wait_for

pytestmark = pytest.mark.slow


ZONE_REGISTRY = {
    "10:66:6a:4c:a1:11": {
        "name": "web",
        "ipv4": "10.83.0.11",
        "ipv6_gua": "2001:67c:83::11",
        "ipv6_ula": "fd83:5eed::11",
    },
    "10:66:6a:4c:a1:12": {"name": "mail", "ipv4": "203.0.113.9", "ipv6_gua": "2001:67c:83:1:2:3:4:5"},
    "10:66:6a:4c:a1:13": {"name": "", "ipv4": "10.83.0.13"},
    "10:66:6a:4c:a1:14": {"name": "hand\n", "ipv4": "10.83.0.14"},
    "10:66:6a:4c:a1:15": {"name": "edited", "ipv4": "10.83.0.15\n+evil.instance.example:1.2.3.4"},
}


def zone(program: str, folder: Path, **arguments: str) -> str:
    """Return what one of the zone example's programs makes of a registry."""
    (folder / "registry.json").write_text(json.dumps(ZONE_REGISTRY))
    options = [word for name, value in arguments.items() for word in ("--arg", name, value)]
    options += ["--argjson", "serial", "7"]
    folder_of = EXAMPLES / "zone"
    return run("jq", "-r", "-L", folder_of, *options, "-f", folder_of / program, folder / "registry.json").stdout


@pytest.fixture
def two_sides(host):
    """Return the host and two clients: one inside, one with an address from outside; and a way to ask the host."""
    inside, outside = host.client("inside", "10:66:6a:4c:a1:21"), host.client("outside", "10:66:6a:4c:a1:22")
    host.run("ip", "address", "add", "192.0.2.53/24", "dev", "br0")
    inside.run("ip", "address", "add", "10.83.0.21/24", "dev", "eth0")
    outside.run("ip", "address", "add", "192.0.2.22/24", "dev", "eth0")

    def ask(name, kind):
        answers = []
        for client, server in ((inside, "10.83.0.1"), (outside, "192.0.2.53")):
            command = ["dig", "+short", "+norecurse", "+timeout=1", "+tries=1", f"@{server}", name, kind]
            answers.append(client.run(*command, check=False).stdout.split())
        return answers

    return host, ask


def test_zone_example_passes_the_checker_and_is_served(two_sides):
    need("nsd", "nsd-checkzone", "jq")
    host, ask = two_sides
    file = host.folder / "zone"
    file.write_text(zone("zone.jq", host.folder, domain="instance.example", server="ns.instance.example"))
    assert "ok" in run("nsd-checkzone", "instance.example", file).stdout and "evil" not in file.read_text()
    config = host.folder / "nsd.conf"
    places = ("database", "pidfile", "xfrdfile", "zonelistfile")
    lines = ["server:", "ip-address: 10.83.0.1", "ip-address: 192.0.2.53", 'username: ""', 'zonesdir: "/"']
    lines += [f'{name}: "{host.folder}/nsd.{name}"' for name in places]
    lines += ["remote-control:", "control-enable: no", "zone:", "name: instance.example", f'zonefile: "{file}"']
    config.write_text("\n".join(lines) + "\n")
    host.start("nsd", "-d", "-c", config, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: ask("web.lan.instance.example", "A") == 2 * [["10.83.0.11"]], "nsd")
    assert ask("web.wan.instance.example", "AAAA") == 2 * [["2001:67c:83::11"]]
    assert ask("web.lan.instance.example", "AAAA") == 2 * [["fd83:5eed::11"]]
    assert ask("mail.wan.instance.example", "A") == 2 * [["203.0.113.9"]]
    assert ask("web.wan.instance.example", "A") == 2 * [[]] and ask("hand.lan.instance.example", "A") == 2 * [[]]
    assert "7" in ask("instance.example", "SOA")[0]


def test_tinydns_example_answers_by_where_the_client_is(two_sides):
    need("tinydns", "tinydns-data", "jq")
    host, ask = two_sides
    root = host.folder / "tinydns"
    root.mkdir()
    text = zone(
        "tinydns.jq", host.folder, domain="instance.example", server="ns.instance.example", address="192.0.2.53"
    )
    assert "evil" not in text
    (root / "data").write_text(text)
    run("tinydns-data", cwd=root)
    env = environment(host.base) | {"ROOT": str(root), "UID": "0", "GID": "0"}
    for address in ("10.83.0.1", "192.0.2.53"):
        host.start("tinydns", env=env | {"IP": address}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: ask("web.lan.instance.example", "A") == 2 * [["10.83.0.11"]], "tinydns")
    assert ask("web.instance.example", "A") == [["10.83.0.11"], []]
    assert ask("web.instance.example", "AAAA") == [["fd83:5eed::11"], ["2001:67c:83::11"]]
    assert ask("mail.instance.example", "A") == [[], ["203.0.113.9"]]
    assert ask("mail.wan.instance.example", "AAAA") == 2 * [["2001:67c:83:1:2:3:4:5"]]


def test_avahi_example_answers_on_the_bridge(host):
    need("avahi-daemon", "unshare", "jq")
    client, etc = host.client("asks", "10:66:6a:4c:a1:21"), host.folder / "avahi"
    client.run("ip", "address", "add", "10.83.0.21/24", "dev", "eth0")
    etc.mkdir()
    (etc / "hosts").write_text(zone("avahi.jq", host.folder))
    (etc / "avahi-daemon.conf").write_text("[server]\nenable-dbus=no\nallow-interfaces=br0\n")
    places = 'mount --bind "$1" /etc/avahi; mount -t tmpfs tmpfs /run; '
    avahi = places + "exec avahi-daemon --no-drop-root --no-chroot --no-rlimits"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    host.start("unshare", "-m", "sh", "-c", avahi, "sh", etc, **quiet)

    def ask(name, kind):
        command = ["dig", "+short", "+norecurse", "+timeout=1", "+tries=1", "-p", "5353", "@10.83.0.1", name, kind]
        return sorted(client.run(*command, check=False).stdout.split())

    wait_for(lambda: ask("web.local", "A") == ["10.83.0.11"], "avahi")
    wait_for(lambda: ask("web.local", "AAAA") == ["2001:67c:83::11", "fd83:5eed::11"], "avahi's IPv6 addresses")
    wait_for(lambda: ask("mail.local", "A") == ["203.0.113.9"], "avahi's other name")
