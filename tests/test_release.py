"""instances-release of the example dnsmasq, with a real dnsmasq."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import load, need
from lab import EXAMPLES, TOP, environment, wait_for

RELEASE = EXAMPLES / "dnsmasq" / "instances-release"
WEB, OLD, OTHER = (f"10:66:6a:00:00:0{number}" for number in (1, 2, 3))
SERVING = """\
interface={}
bind-dynamic
except-interface=lo
dhcp-range=10.83.0.100,10.83.0.199
dhcp-range=10.84.0.100,10.84.0.199
dhcp-leasefile={}
"""
LEASES = f"""\
1795629618 {WEB} 10.83.0.11 ubuntu *
1795629618 {OLD} 10.83.0.12 ubuntu 01:10:66:6a:00:00:02
duid 00:01:00:01:32:99:33:9a:10:66:6a:4c:a1:fe
1795629619 11 2001:67c:83::12 ubuntu 00:04:aa
1795629619 T11 fd83:5eed::12 ubuntu 00:04:aa
1795629620 12 fd83:5eed::99 * 00:04:aa
1795629620 13 fd83:5eed::11 * 00:04:aa
1795629620 13 fd83:5eed::13 * 00:04:bb
"""


def serve(host, *leases, interfaces="br0"):
    """Have a dnsmasq serve bridges that has these leases in a file of a name that nobody guesses; return the file."""
    file, config = host.folder / "who has what", host.folder / "serving.conf"
    file.write_text("".join(f"4000000000 {lease}\n" for lease in leases))
    config.write_text(SERVING.format(interfaces, file))
    host.start_dnsmasq(config=config)
    return file


def release(host, *macs):
    """Run the program; return what it says has no lease, and its result."""
    environ = environment(host.base)
    result = host.run(sys.executable, RELEASE, *macs, env=environ, check=False)
    return result.stdout.split(), result


def test_lease_is_ended_in_whatever_file_dnsmasq_has_it(host):
    host.update("--initialize", "br0", "host")
    file = serve(host, f"{OLD} 10.83.0.112 ubuntu 01:{OLD}", f"{WEB} 10.83.0.111 web *")
    ended, result = release(host, OLD.upper(), OTHER)
    assert (ended, result.returncode, result.stderr) == ([OLD, OTHER], 0, "")
    assert WEB in file.read_text() and OLD not in file.read_text()
    host.update("add", WEB, "10.83.0.111", "web")
    assert release(host, "nobody")[1].stderr == "instances-release: error: nobody: no such instance\n"
    assert release(host, "Web")[0] == [WEB] and file.read_text() == ""


def test_lease_is_ended_on_the_bridge_that_it_is_of(host):
    """One dnsmasq, and so one file, for two bridges."""
    host.run("ip", "link", "add", "br1", "type", "bridge")
    host.run("ip", "address", "add", "10.84.0.1/24", "dev", "br1")
    host.run("ip", "link", "set", "br1", "up")
    for bridge, name in (("br0", "host"), ("br1", "other")):
        host.update("--initialize", bridge, name)
    file = serve(host, f"{OLD} 10.83.0.112 ubuntu *", f"{WEB} 10.84.0.111 web 01:{WEB}", interfaces="br0,br1")
    assert release(host, OLD, WEB)[0] == [OLD, WEB] and file.read_text() == ""


def test_lease_of_a_bridge_that_no_dnsmasq_serves_is_not_said_to_be_ended(host):
    """As while it is stopped, though there are others. What was never on that bridge has no lease there."""
    host.run("ip", "link", "add", "br1", "type", "bridge")
    host.run("ip", "address", "add", "10.84.0.1/24", "dev", "br1")
    for bridge, name in (("br0", "host"), ("br1", "other")):
        host.update("--initialize", bridge, name)
    host.update("add", OLD, "10.83.0.112")
    host.update("add", WEB, "10.84.0.111")
    for macs in ([OLD], [OTHER]):
        ended, result = release(host, *macs)
        assert (ended, result.returncode) == ([], 1) and "no dnsmasq with a lease file serves br0" in result.stderr
    serve(host)
    ended, result = release(host, OLD, WEB, OTHER)
    assert (ended, result.returncode) == ([OLD, OTHER], 1)
    assert f"{WEB}: its leases are not known: no dnsmasq with a lease file serves br1" in result.stderr


def test_lease_that_dnsmasq_does_not_end_is_named(host):
    """Of a network that the bridge no longer has; and of a dnsmasq that does not answer."""
    host.update("--initialize", "br0", "host")
    serve(host, f"{OLD} 10.99.0.112 ubuntu *", f"{WEB} 10.83.0.111 web *")
    host.dnsmasq.send_signal(signal.SIGSTOP)
    ended, result = release(host, OLD, WEB)
    assert (ended, result.returncode) == ([], 1)
    assert f"{OLD}: dnsmasq still has its lease: 10.99.0.112" in result.stderr
    assert f"{WEB}: dnsmasq still has its lease: 10.83.0.111" in result.stderr
    host.dnsmasq.send_signal(signal.SIGCONT)
    assert release(host, WEB)[0] == [WEB]


@pytest.mark.parametrize("arguments", [(), ("web x",), ("--force",)])
def test_release_refuses_what_is_no_mac_address(host, arguments):
    result = release(host, *arguments)[1]
    assert result.returncode == 2 and ": no such usage: " in result.stderr, result.stderr


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The program as a module."""
    monkeypatch.setenv("PATH", f"{TOP}:{os.environ['PATH']}")
    shutil.copy(RELEASE, tmp_path / "release.py")
    return load(tmp_path / "release.py")


def test_leases_of_what_is_gone_are_found_and_no_others(module):
    registry = {OLD: {"name": "web", "ipv6_ula": "fd83:5eed::12"}, WEB: {"ipv6_ula": "fd83:5eed::11"}}
    found, server = module.leases_of({OLD}, registry, LEASES)
    assert [lease[2] for lease in found] == ["10.83.0.12", "2001:67c:83::12", "fd83:5eed::12", "fd83:5eed::99"]
    assert server.endswith("a1:fe") and {lease[0] for lease in found} == {OLD}


def test_lease_file_that_is_cut_anywhere_is_read_without_an_error(module):
    for end in range(len(LEASES)):
        found, _ = module.leases_of({OLD}, {OLD: {"ipv6_ula": "fd83:5eed::12"}}, LEASES[:end] + "\n\n")
        assert {lease[0] for lease in found} <= {OLD}


def test_lease_file_that_is_written_anew_is_not_one_without_leases(host):
    """dnsmasq empties the file first; the reading after the first one comes when all is there again."""
    need("strace")
    host.update("--initialize", "br0", "host")
    leases, log = serve(host), host.folder / "strace"
    traced = ["strace", "-qq", "-o", log, "-e", "inject=clock_nanosleep:delay_exit=2000000:when=1"]
    command = [*traced, sys.executable, RELEASE, OLD]
    host.dnsmasq.send_signal(signal.SIGSTOP)
    running = host.start(*command, env=environment(host.base), stdout=subprocess.PIPE, text=True)
    wait_for(lambda: log.exists() and "clock_nanosleep" in log.read_text(), "the first reading")
    leases.write_text(f"4000000000 {OLD} 10.83.0.112 ubuntu *\n")
    assert running.communicate(timeout=30)[0].split() == [] and running.returncode == 1


def test_leases_are_ended_by_a_real_dnsmasq(host):
    """With a guest that has leases of both versions, and another one that keeps its own."""
    host.start_guarded()
    web, db = host.client("web", OLD), host.client("db", OTHER)
    for client in (web, db):
        client.dhcp4("ubuntu")
        client.dhcp6("ubuntu")
    leases = host.folder / "dnsmasq.br0.leases"
    lines = leases.read_text().splitlines()
    kept = {line for line in lines if not set(line.split()) & {OLD, *host.registry()[OLD].values()} - {"ubuntu"}}
    host.run("ip", "link", "delete", "veth0")
    assert release(host, OLD)[0] == [OLD]
    assert set(leases.read_text().splitlines()) == kept and len(kept) == len(lines) - 3
