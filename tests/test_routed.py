"""The example routed."""

import re
import subprocess
from pathlib import Path

import pytest
from lab import EXAMPLES, Client, Host, environment, wait_for

pytestmark = pytest.mark.slow


class Routed:
    """A host with the routed example, and guests whose devices are veth pairs."""

    def __init__(self, host: Host):
        self.host, self.state = host, host.folder / "routed"
        for name in ("hosts", "options", "bindings"):
            (self.state / name).mkdir(parents=True)
        (host.folder / "instances.hosts.d").mkdir()
        for command in (
            "link add gw0 type bridge",
            "link set gw0 up",
            "address add 10.85.0.1/24 dev gw0",
            "address add 2001:67c:85::1/64 dev gw0 nodad",
        ):
            host.run("ip", *command.split())
        for variable in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
            host.set(variable, "1")
        host.run("nft", "-f", EXAMPLES / "routed" / "routed.nft")
        config = host.example("routed/gw0.conf")
        config.write_text(config.read_text().replace("/run/dnsmasq", f"{host.folder}/dnsmasq"))
        self.env = environment(host.base, ROUTED_STATE=str(self.state), ROUTED_PID=f"{host.folder}/dnsmasq.gw0.pid")
        with open(host.log, "a") as log:
            dnsmasq = ["dnsmasq", f"--conf-file={config}", "--keep-in-foreground", "--user=root", "--no-resolv"]
            host.start(*dnsmasq, "--log-facility=-", "--log-dhcp", env=self.env, stdout=log, stderr=log)
        wait_for(lambda: "started, version" in host.log.read_text(), "dnsmasq")

    def guest(self, number: int) -> Client:
        """Add a guest on the device tapNUMBER, which has no binding yet."""
        return self.host.client(f"guest{number}", f"10:66:6a:4c:a1:1{number}", port=f"tap{number}", bridge="")

    def binding(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run binding.sh."""
        return self.host.run(EXAMPLES / "routed" / "binding.sh", *arguments, env=self.env, check=False)

    def file(self, number: int, *lines: str, **changes: str) -> Path:
        """Write a binding file."""
        values = {"INDEV": f"tap{number}", "MAC": f"10:66:6A:4C:A1:1{number}", "IP": f'"10.85.0.1{number}"'}
        values |= {"HOSTNAME": f"'guest{number}'", "SUBNET6": "2001:67c:85::/64", "GATEWAY6": "2001:67c:85::1"}
        values |= {"GATEWAY": "10.85.0.1", "SUBNET": "10.85.0.0/24", "MTU": "1400", "UNKNOWN": "$(reboot)"} | changes
        path = self.host.folder / f"binding{number}"
        path.write_text("\n".join([f"{key}={value}" for key, value in values.items() if value] + list(lines)) + "\n")
        return path


@pytest.fixture
def routed(host):
    return Routed(host)


def test_routed_example_binds_guests_to_their_devices(routed):
    host = routed.host
    guests = [routed.guest(number) for number in range(3)]
    for number in range(2):
        result = routed.binding("add", routed.file(number))
        assert result.returncode == 0, result.stderr
        guests[number].dhcp4()
        assert guests[number].addresses("10") == [f"10.85.0.1{number}"] and "mtu=1400" in guests[number].events()
        guests[number].run("ip", "route", "add", "default", "via", "10.85.0.1")
        wait_for(lambda n=number: guests[n].addresses("2001"), "an address by SLAAC")
    assert routed.binding("list").stdout.count("\n") == 2
    assert {i["name"]: i["ipv4"] for i in host.registry().values()} == {"guest0": "10.85.0.10", "guest1": "10.85.0.11"}
    one, two = guests[:2]
    assert two.addresses("2001") == ["2001:67c:85::1266:6aff:fe4c:a111"] or two.addresses("2001")[0].endswith(
        "fe4c:a111"
    )
    for address in ("10.85.0.1", "2001:67c:85::1", *two.addresses("10"), *two.addresses("2001")):
        wait_for(lambda a=address: one.pings(a), f"a ping of {address}")
    reply = one.run("dig", "+short", "@10.85.0.1", "guest1.instance.internal", "A", check=False).stdout
    assert reply.split() == ["10.85.0.11"]

    # A guest without a binding gets nothing
    def dropped():
        listing = host.run("nft", "list", "chain", "inet", "routed", "prerouting").stdout
        return int(re.search(r"bound counter packets (\d+)", listing)[1])

    before = dropped()
    guests[2].start_dhcp4()
    wait_for(lambda: dropped() >= before + 2, "the drop of its requests")
    assert "bound" not in guests[2].events() and guests[2].mac not in host.registry()
    assert not guests[2].addresses("2001")

    # A guest can't use another's address
    one.run("ip", "address", "add", "10.85.0.11/24", "dev", "eth0")
    assert one.pings("10.85.0.1")
    forged = one.run("ping", "-n", "-c", "1", "-W", "2", "-I", "10.85.0.11", "10.85.0.1", check=False)
    assert forged.returncode == 1
    assert re.search(r"counter packets [1-9]", host.run("nft", "list", "chain", "inet", "routed", "prerouting").stdout)

    one.run("ip", "address", "delete", "10.85.0.11/24", "dev", "eth0")
    assert routed.binding("remove", host.folder / "binding1").returncode == 0
    assert not one.pings("10.85.0.11") and "tap1" not in routed.binding("list").stdout
    assert (
        "10.85.0.11" not in host.run("ip", "route").stdout + host.run("nft", "list", "table", "inet", "routed").stdout
    )
    assert routed.binding("remove", host.folder / "binding1").returncode == 1


def test_routed_example_makes_and_deletes_a_tap(routed):
    binding = routed.file(7)
    assert routed.binding("add", binding).returncode == 0
    assert "tun type tap" in routed.host.run("ip", "-details", "link", "show", "tap7").stdout
    assert routed.binding("add", binding).returncode == 1
    assert routed.binding("remove", binding).returncode == 0
    assert (
        not Path("/sys/class/net/tap7").exists()
        and routed.host.run("ip", "link", "show", "tap7", check=False).returncode
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"INDEV": ""},
        {"MAC": ""},
        {"IP": ""},
        {"INDEV": "eth0"},
        {"INDEV": "tap0/../x"},
        {"MAC": "06-10:66:6a:4c:a1:11"},
        {"IP": "10.85.0.300"},
        {"HOSTNAME": "3cx"},
        {"HOSTNAME": "a,b"},
        {"MTU": "9"},
        {"SUBNET6": "2001:67c:85::/80"},
        {"GATEWAY6": "2001::67c::1"},
    ],
)
def test_routed_example_refuses_a_bad_binding_and_does_nothing(routed, changes):
    before = routed.host.run("ip", "-details", "link").stdout
    result = routed.binding("add", routed.file(5, **changes))
    assert (
        result.returncode != 0
        and result.stderr
        and "binding" in result.stderr
        or changes == {"GATEWAY6": "2001::67c::1"}
    )
    assert routed.binding("list").stdout == "" and not list((routed.state / "hosts").iterdir())
    assert "10.85.0.15" not in routed.host.run("nft", "list", "ruleset").stdout
    assert routed.host.run("ip", "-details", "link").stdout.count("tap") == before.count("tap")
