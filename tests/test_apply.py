"""instances-apply, and what it hands over: the examples dnsmasq, nftables, systemd and cron."""

import json
import re
import subprocess

import pytest
from conftest import need
from lab import EXAMPLES, Host, environment, run, wait_for

pytestmark = pytest.mark.slow


class Applied:
    """A host with the examples' files in its folder, and instances-apply."""

    def __init__(self, host: Host):
        self.host, self.rules = host, host.folder / "rules"
        self.rules.mkdir()
        for name in ("bridge.nft", "firewall.nft"):
            host.example(f"nftables/{name}").rename(self.rules / name)
        self.variables = {"INSTANCES_SETTINGS": "/dev/null", "INSTANCES_RULES": str(self.rules)}
        self.variables |= {"RUNTIME_DIRECTORY": str(host.folder / "run"), "INSTANCES_ADDRESS_SETS": "host,web"}

    def apply(self, **options) -> subprocess.CompletedProcess:
        env = environment(self.host.base, **self.variables)
        return self.host.run(EXAMPLES / "systemd" / "instances-apply", env=env, **options)


@pytest.fixture
def applied(host):
    return Applied(host)


def test_dnsmasq_example_leads_from_a_lease_to_a_name_and_a_guard(applied):
    host = applied.host
    host.update("--initialize", "br0", "host")
    (host.folder / "instances.hosts.d").mkdir()
    host.start_dnsmasq(config=host.example("dnsmasq/br0.conf"))
    web, wpad = host.client("web", "10:66:6a:4c:a1:11"), host.client("wpad", "10:66:6a:4c:a1:12")
    web.dhcp4("web")
    web.dhcp6("web")
    wpad.dhcp4("wpad")
    assert host.registry()[wpad.mac]["name"] == ""
    assert "3 instances" in applied.apply().stderr
    wait_for(lambda: web.resolve("web.v4.instance.internal", "A") == web.addresses("10"), "the name")
    assert sorted(web.resolve("web.v6.instance.internal", "AAAA")) == sorted(
        web.addresses("2001") + web.addresses("fd83")
    )
    wait_for(lambda: web.pings("10.83.0.1"), "the host behind the guard")
    tables = host.run("nft", "list", "tables").stdout
    assert "table bridge instances" in tables and "table inet instances" in tables
    assert web.addresses("10")[0] in host.run("nft", "list", "set", "inet", "instances", "web.v4.instance").stdout
    assert (applied.apply().stdout, applied.apply().stderr) == ("", "")


@pytest.mark.parametrize("tag", ["VLAN tag", "other protocol"])
def test_nftables_example_drops_tags_and_other_protocols(applied, tag):
    host = applied.host
    host.update("--initialize", "br0", "host")
    client, other = host.client("web", "10:66:6a:4c:a1:11"), host.client("db", "10:66:6a:4c:a1:12")
    host.update("add", client.mac, "10.83.0.11", "web")
    applied.apply()
    header = "ffffffffffff" + client.mac.replace(":", "")
    arp = "08060001080006040001" + client.mac.replace(":", "") + "0a53000b" + 6 * "00" + "0a530001" + 18 * "00"
    frame = header + ("81000005" + arp if tag == "VLAN tag" else "88b5" + 46 * "00")

    def received():
        counters = other.run("ip", "-json", "-statistics", "link", "show", "dev", "eth0").stdout
        return json.loads(counters)[0]["stats64"]["rx"]["packets"]

    def dropped():
        listing = host.run("nft", "list", "chain", "bridge", "instances", "guard").stdout
        return int(re.search(rf'packets (\d+) .*"{tag}"', listing)[1])

    before = received()
    client.send(*5 * [bytes.fromhex(frame)])
    wait_for(lambda: dropped() >= 5, f"five drops of a frame with {tag}")
    assert received() - before < 5


def test_nftables_examples_load_again_and_again_and_touch_no_other_table(applied):
    host = applied.host
    host.update("--initialize", "br0", "host")
    host.run("nft", "add", "table", "inet", "mine")
    applied.apply()
    first = host.run("nft", "list", "ruleset").stdout
    (host.folder / "run" / "instances.applied").unlink()
    applied.apply()
    assert host.run("nft", "list", "ruleset").stdout == first and "table inet mine" in first


def test_broken_rules_keep_the_old_ones_and_the_update_arrives_when_they_are_mended(applied):
    host = applied.host
    host.update("--initialize", "br0", "host")
    applied.apply()
    (applied.rules / "broken.nft").write_text("table inet broken {")
    host.update("add", "10:66:6a:4c:a1:11", "10.83.0.11", "web")
    for _ in range(2):  # the first takes the marker away
        result = applied.apply(check=False)
        assert result.returncode == 1 and "syntax error" in result.stderr
        assert "10.83.0.11" not in host.run("nft", "list", "ruleset").stdout
    (applied.rules / "broken.nft").unlink()
    assert applied.apply().returncode == 0
    assert "10.83.0.11" in host.run("nft", "list", "ruleset").stdout
    hosts = (host.folder / "instances.hosts.d" / "instances.hosts").read_text()
    assert "10.83.0.11 web.instance.internal" in hosts


def test_broken_registry_is_told_and_tried_again(applied):
    host = applied.host
    host.update("--initialize", "br0", "host")
    applied.apply()
    registry = (host.folder / "instances.json").read_bytes()
    (host.folder / "instances.json").write_bytes(registry[:-9])
    (host.folder / "instances.updated").touch()
    assert applied.apply(check=False).returncode == 1
    (host.folder / "instances.json").write_bytes(registry)
    assert applied.apply().returncode == 0


def test_rules_are_loaded_again_after_a_flush_and_a_boot(applied):
    host = applied.host
    host.update("--initialize", "br0", "host")
    applied.apply()
    first = host.run("nft", "list", "ruleset").stdout
    host.run("nft", "flush", "ruleset")
    applied.apply()
    assert host.run("nft", "list", "ruleset").stdout == first
    host.run("nft", "delete", "table", "inet", "instances")
    applied.apply()
    assert host.run("nft", "list", "ruleset").stdout == first
    (host.folder / "run" / "instances.applied").unlink()  # what a boot does
    (host.folder / "instances.hosts.d" / "instances.hosts").unlink()
    applied.apply()
    assert (host.folder / "instances.hosts.d" / "instances.hosts").exists()


def test_systemd_units_are_valid_and_hardened(tmp_path):
    need("systemd-analyze")
    units = [EXAMPLES / "systemd" / f"instances.{kind}" for kind in ("path", "service", "timer")]
    for unit in units:
        command = "/usr/local/sbin/instances-apply"
        (tmp_path / unit.name).write_text(
            unit.read_text().replace(command, str(EXAMPLES / "systemd" / "instances-apply"))
        )
    result = run("systemd-analyze", "verify", *[tmp_path / unit.name for unit in units])
    assert (result.stdout, result.stderr) == ("", "")
    exposure = run("systemd-analyze", "security", "--offline=true", tmp_path / "instances.service", check=False).stdout
    assert float(re.search(r"Overall exposure level.*: ([0-9.]+)", exposure)[1]) < 3


def test_cron_example_is_a_line_a_minute_for_root():
    lines = [line for line in (EXAMPLES / "cron" / "instances").read_text().splitlines() if line[:1] == "*"]
    assert len(lines) == 1 and lines[0].startswith("* * * * * root ")
    assert run("sh", "-n", "-c", lines[0].removeprefix("* * * * * root ")).returncode == 0
