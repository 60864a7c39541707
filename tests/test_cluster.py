"""The example cluster."""

import sys
from pathlib import Path

import pytest
from conftest import PROGRAMS, need
from lab import PROCESS, Host, environment, wait_for

pytestmark = pytest.mark.slow


def test_cluster_example_resolves_names_across_hosts(tmp_path):
    need(*PROGRAMS)
    hosts = []
    try:
        for number, letter in ((1, "a"), (2, "b")):
            folder = tmp_path / letter
            folder.mkdir()
            addresses = (f"10.84.{number}.1/24", f"fd84:{number}::1/80")
            hosts.append(Host(folder, addresses, f"10:66:6a:4c:a{number}:fe"))
        a, b = hosts
        a.run("ip", "link", "add", "routed", "type", "veth", "peer", "name", "routed", "netns", b.name)
        for host, number, other in ((a, 1, 2), (b, 2, 1)):
            host.run("ip", "address", "add", f"192.0.2.{number}/24", "dev", "routed")
            host.run("ip", "link", "set", "routed", "up")
            host.run("ip", "route", "add", f"10.84.{other}.0/24", "via", f"192.0.2.{other}")
            host.set("net/ipv4/ip_forward", "1")
            host.update("--initialize", "br0", "host")
            (host.folder / "instances.hosts.d").mkdir()
            host.start_dnsmasq(config=host.example(f"cluster/{host.folder.name}.conf"))
            host.update("add", f"10:66:6a:4c:a{number}:11", f"10.84.{number}.11", "web")
            domain = {"INSTANCES_HOSTS_DOMAIN": f".{host.folder.name}.instance.internal"}
            host.run(sys.executable, PROCESS, env=environment(host.base, **domain))
            Path(f"{host.base}.hosts").rename(host.folder / "instances.hosts.d" / "instances.hosts")
        client = a.client("client", "10:66:6a:4c:a1:12")
        client.run("ip", "address", "add", "10.84.1.12/24", "dev", "eth0")

        def ask(*question):
            return client.run(
                "dig", "+short", "+timeout=1", "+tries=1", "@10.84.1.1", *question, check=False
            ).stdout.split()

        wait_for(lambda: ask("web.b.instance.internal", "A") == ["10.84.2.11"], "a name of the other host")
        assert ask("web.v4.a.instance.internal", "A") == ["10.84.1.11"]
        assert ask("-x", "10.84.2.11") == ["web.b.instance.internal."] and ask("-x", "10.84.1.11") == [
            "web.a.instance.internal."
        ]
        assert ask("-x", "fd84:2::1") == ["host.b.instance.internal."]
        b.stop(b.dnsmasq)
        assert ask("web.a.instance.internal", "A") == ["10.84.1.11"]
        assert "10.84.2.11" not in ask("web.b.instance.internal", "A")
    finally:
        for host in hosts:
            host.close()
