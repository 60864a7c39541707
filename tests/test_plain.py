"""The example plain: a port's MAC address, held by rules and by the bridge; incus.sh has the guests themselves."""

import pytest
from conftest import need
from lab import EXAMPLES, block, wait_for

pytestmark = pytest.mark.slow
PORTS = {name: f"10:66:6a:00:00:{number}" for number, name in enumerate(("lxc-web", "vb-db", "vm-mail", "other"), 21)}


def become(client, mac):
    """Give a client another MAC address, with its interface up, so that the bridge forgets nothing; the host does."""
    client.run("ip", "link", "set", "eth0", "address", mac)
    client.host.run("ip", "neighbour", "flush", "dev", "br0")


def reaches(client, *others):
    """Tell whether a client reaches the host and these others, or none of them: it must not be some."""
    addresses = ["10.83.0.1", *(f"10.83.0.{other.number}" for other in others)]
    reached = [client.pings(address, "-W0.5") for address in addresses]
    assert len(set(reached)) == 1, dict(zip(addresses, reached))
    return reached[0]


@pytest.fixture
def guests(host):
    """The page's three guests and one that has a port of another name."""
    found = [host.client(port, mac, port=port) for port, mac in PORTS.items()]
    for client in found:
        client.number = int(client.mac[-2:])
        client.run("ip", "address", "add", f"10.83.0.{client.number}/24", "dev", "eth0")
    for client in found:
        wait_for(lambda c=client: reaches(c, *found), client.label)
    return found


def test_plain_rules_hold_each_port_to_its_mac_address(guests, host):
    web, db, mail, other = guests
    rules = host.example("plain/ports.nft")
    for _ in range(2):  # as instances-apply loads it again
        host.run("nft", "-f", rules)
    assert reaches(web, db, mail) and reaches(mail, web) and not reaches(other, web)
    for mac in (db.mac, host.mac):
        become(web, mac)
        assert not reaches(web, mail)
        assert f"{mac} dev lxc-web" not in host.run("bridge", "fdb", "show", "br", "br0").stdout
    become(web, web.mac)
    wait_for(lambda: reaches(web, db, mail), "its own MAC address")
    host.run("nft", "-f", "-", input=rules.read_text().replace('open = "none"', 'open = "other"'))
    wait_for(lambda: reaches(other, web), "an uplink")


def test_bridge_holds_a_locked_port_to_its_mac_address(guests, host):
    """Also if it had another one, which the bridge has learned, a moment before."""
    web, db, mail, _ = guests
    before = "02:00:00:00:00:01"
    for mac in (before, mail.mac):
        become(mail, mac)
        wait_for(lambda: reaches(mail, db), "before it is locked")
    host.run("sh", "-euc", block("examples/plain/README.md", "locked on"))
    wait_for(lambda: reaches(mail, web, db), "its own MAC address")
    for mac in (before, web.mac, host.mac):
        become(mail, mac)
        assert not reaches(mail, db)
    become(mail, mail.mac)
    wait_for(lambda: reaches(mail, web, db), "its own MAC address again")


@pytest.mark.parametrize("fixed", [True, False])
def test_bridge_by_ifupdown_keeps_its_mac_address_whoever_joins(host, fixed):
    """Without the address in the stanza it has that of its lowest port."""
    need("ifup")
    host.run("ip", "link", "delete", "br0")
    stanza, copy = (EXAMPLES / "plain" / "br0").read_text(), host.folder / "br0"
    copy.write_text(stanza if fixed else stanza.replace("address 10:66:6a:4c:a1:fe ", ""))
    command = ["-i", copy, "--state-dir", host.folder, "br0"]
    host.run("ifup", *command)
    host.ip("link add port address 02:00:00:00:00:01 type veth peer name peer", "link set port master br0 up")
    assert ("10:66:6a:4c:a1:fe" in host.run("ip", "link", "show", "br0").stdout) == fixed
    assert host.run("ip", "address", "show", "br0").stdout.count("scope global") == 3
    host.run("ifdown", *command)
    assert host.run("ip", "link", "show", "br0", check=False).returncode
