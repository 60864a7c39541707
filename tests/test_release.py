"""instances-release of the example dnsmasq, with a real dnsmasq."""

import json
import signal
import subprocess
import sys
from runpy import run_path

import pytest
from conftest import need
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
    host.stop_dnsmasq()
    host.start_dnsmasq(config=config)
    return file


class Managed:
    """A host with br0, which dnsmasq serves, a registry, and programs in a folder that is the first on the PATH."""

    def __init__(self, host, registry, **programs):
        self.host, self.folder, self.registry = host, host.folder / "bin", host.folder / "instances.json"
        self.folder.mkdir()
        self.registry.write_text(json.dumps(registry))
        for name, text in programs.items():
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)
        serve(host)
        self.env = environment(host.base)
        self.env["PATH"] = f"{self.folder}:{EXAMPLES}/dnsmasq:{self.env['PATH']}"

    def entries(self):
        return json.loads(self.registry.read_text())

    def names(self):
        """Return {MAC address: name} of the registry."""
        return {mac: instance["name"] for mac, instance in self.entries().items()}


def release(host, *macs):
    """Run the program; return what it says has no lease, and its exit status and errors."""
    result = host.run(sys.executable, RELEASE, *macs, env=environment(host.base), check=False)
    return result.stdout.split(), result.returncode, result.stderr


@pytest.fixture
def bridged(host):
    """A host of which br0 is registered."""
    host.update("--initialize", "br0", "host")
    return host


def test_lease_is_ended_in_whatever_file_dnsmasq_has_it(bridged):
    file = serve(bridged, f"{OLD} 10.83.0.112 ubuntu 01:{OLD}", f"{WEB} 10.83.0.111 web *")
    assert release(bridged, OLD.upper(), OTHER) == ([OLD, OTHER], 0, "")
    assert WEB in file.read_text() and OLD not in file.read_text()
    bridged.update("add", WEB, "10.83.0.111", "web")
    assert release(bridged, "nobody")[2] == "instances-release: error: nobody: no such instance\n"
    for arguments in ((), ("web x",)):
        assert release(bridged, *arguments)[1] == 2
    assert release(bridged, "Web")[0] == [WEB] and file.read_text() == ""


def test_lease_is_ended_on_the_bridge_that_it_is_of_and_is_not_said_to_be_where_no_dnsmasq_serves_it(bridged):
    """As while it is stopped, though there are others. What was never on that bridge has no lease there."""
    bridged.ip("link add br1 type bridge", "address add 10.84.0.1/24 dev br1", "link set br1 up")
    bridged.update("--initialize", "br1", "other")
    bridged.update("add", OLD, "10.83.0.112")
    bridged.update("add", WEB, "10.84.0.111")
    for mac in (OLD, OTHER):
        ended, status, told = release(bridged, mac)
        assert (ended, status) == ([], 1) and "no dnsmasq with a lease file serves br0" in told
    serve(bridged)
    ended, status, told = release(bridged, OLD, WEB, OTHER)
    assert (ended, status) == ([OLD, OTHER], 1)
    assert f"{WEB}: its leases are not known: no dnsmasq with a lease file serves br1" in told
    file = serve(bridged, f"{OLD} 10.83.0.112 ubuntu *", f"{WEB} 10.84.0.111 web 01:{WEB}", interfaces="br0,br1")
    assert release(bridged, OLD, WEB)[0] == [OLD, WEB] and file.read_text() == ""  # one dnsmasq for two bridges


def test_lease_that_dnsmasq_does_not_end_is_named(bridged):
    """Of a network that the bridge no longer has; and of a dnsmasq that does not answer."""
    serve(bridged, f"{OLD} 10.99.0.112 ubuntu *", f"{WEB} 10.83.0.111 web *")
    bridged.dnsmasq.send_signal(signal.SIGSTOP)
    ended, status, told = release(bridged, OLD, WEB)
    assert (ended, status) == ([], 1)
    for mac, address in ((OLD, "10.99.0.112"), (WEB, "10.83.0.111")):
        assert f"{mac}: dnsmasq still has its lease: {address}" in told
    bridged.dnsmasq.send_signal(signal.SIGCONT)
    assert release(bridged, WEB)[0] == [WEB]


def test_leases_of_what_is_gone_are_found_and_no_others_wherever_the_file_is_cut(monkeypatch):
    monkeypatch.setenv("PATH", str(TOP))
    leases_of = run_path(str(RELEASE))["leases_of"]
    registry = {OLD: {"name": "web", "ipv6_ula": "fd83:5eed::12"}, WEB: {"ipv6_ula": "fd83:5eed::11"}}
    found, server = leases_of({OLD}, registry, LEASES)
    assert [lease[2] for lease in found] == ["10.83.0.12", "2001:67c:83::12", "fd83:5eed::12", "fd83:5eed::99"]
    assert server.endswith("a1:fe")
    for end in range(len(LEASES)):
        found, _ = leases_of({OLD}, registry, LEASES[:end] + "\n\n")
        assert {lease[0] for lease in found} <= {OLD}


def test_lease_file_that_is_written_anew_is_not_one_without_leases(bridged):
    """dnsmasq empties the file first; the reading after the first one comes when all is there again."""
    need("strace")
    leases, log = serve(bridged), bridged.folder / "strace"
    traced = ["strace", "-qq", "-o", log, "-e", "inject=clock_nanosleep:delay_exit=2000000:when=1"]
    command = [*traced, sys.executable, RELEASE, OLD]
    bridged.dnsmasq.send_signal(signal.SIGSTOP)
    running = bridged.start(*command, env=environment(bridged.base), stdout=subprocess.PIPE, text=True)
    wait_for(lambda: log.exists() and "clock_nanosleep" in log.read_text(), "the first reading")
    leases.write_text(f"4000000000 {OLD} 10.83.0.112 ubuntu *\n")
    assert running.communicate(timeout=30)[0].split() == [] and running.returncode == 1


def test_leases_are_ended_by_a_real_dnsmasq(host):
    """With a guest that has leases of both versions, and another one that keeps its own."""
    host.start_guarded()
    for client in (host.client("web", OLD), host.client("db", OTHER)):
        client.dhcp4("ubuntu")
        client.dhcp6("ubuntu")
    leases = host.folder / "dnsmasq.br0.leases"
    lines = leases.read_text().splitlines()
    kept = {line for line in lines if not set(line.split()) & {OLD, *host.registry()[OLD].values()} - {"ubuntu"}}
    host.run("ip", "link", "delete", "veth0")
    assert release(host, OLD)[0] == [OLD]
    assert set(leases.read_text().splitlines()) == kept and len(kept) == len(lines) - 3
