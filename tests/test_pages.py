"""The commands of the pages: which test runs each block, and those that no other file runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROGRAMS, need
from lab import EXAMPLES, TOP, Host, block, has_ibrname, make_etc, mounted, wait_for

pytestmark = pytest.mark.slow
# A test gets a block by block, block.sh or follow, and in no other way: so these calls say which blocks are run.
CALL = re.compile(r"""\b(?:block|block\.sh|follow)[ (]["']?([\w/.]*README\.md)["']?,? ["']([^"'\n]+)["']""")
PAGES = ["README.md", "tests/README.md", *(str(path.relative_to(TOP)) for path in sorted(EXAMPLES.glob("**/*.md")))]
# Blocks that are not run, {page: {words of the block: why}}
NOT_RUN = {
    "README.md": {
        "DHCP client": "a drawing",
        "with the guard, the same attack again": "what the demonstration prints",
        "add|old MAC": "usage",
    },
    "tests/README.md": {"a guest's frame": "a drawing", "-m pytest": "tests, and demo.py, which has tests"},
    "examples/libvirt/README.md": {"<interface": "a part of a definition; libvirt.py has domains with such a one"},
    "examples/show/README.md": {"AND + WHAT": "what it prints", "it sends from": "what it prints"},
    "examples/systemd/README.md": {"ExecStartPost": "a drop-in; boot.sh has such a one"},
}


def fenced(page: Path) -> list[str]:
    """Return the fenced blocks of a page."""
    return re.findall("^```.*\n((?s:.*?))^```$", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_each_block_is_run_or_has_a_reason_why_not(page):
    sources = [TOP / ".ci" / "run", *(TOP / "tests").glob("**/*.sh"), *(TOP / "tests").glob("**/*.py")]
    calls = [words for path in sources for called, words in CALL.findall(path.read_text()) if called == page]
    calls = {words.replace("\\n", "\n") for words in calls}
    reasons = NOT_RUN.get(page, {})
    for text in fenced(TOP / page):
        run, excused = (any(words in text for words in which) for which in (calls, reasons))
        assert run != excused, f"{page}: no test, or a test and a reason: {text}"
    assert all(any(words in text for text in fenced(TOP / page)) for words in reasons), "a reason for no block"


# ---- Blocks that no other test runs ----

# In place of systemd, which does not work in a namespace (boot.sh has it): starts dnsmasq, and does the service's work
SYSTEMCTL = """\
#!/bin/sh
set -eu
case "$*" in
"restart dnsmasq")
    pid=$(cat /run/dnsmasq.pid 2>/dev/null) || pid=''
    [ -z "$pid" ] || kill "$pid"
    while [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
    dnsmasq --conf-file=/dev/null --conf-dir=/etc/dnsmasq.d --pid-file=/run/dnsmasq.pid --user=root --no-resolv
    ;;
"enable --now instances.path instances.timer instances.service") instances-apply ;;
esac
"""


class Machine(Host):
    """A host whose /etc, /run, /usr/local/sbin and /var/lib/misc are its own, with a copy of this project."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        folder.chmod(0o755)  # dnsmasq's user reads /var/lib/misc
        self.etc, self.sbin, self.top = make_etc(folder / "etc"), folder / "sbin", folder / "top"
        for place in ("etc/dnsmasq.d", "etc/default", "etc/systemd/system", "etc/cron.d", "run", "sbin"):
            (folder / place).mkdir(parents=True)
        self.mounts = {"/etc": self.etc, "/run": folder / "run", "/usr/local/sbin": self.sbin, "/var/lib/misc": folder}
        for name, text in (("systemctl", SYSTEMCTL), ("apt-get", "#!/bin/sh\n")):  # what it needs is installed
            (self.sbin / name).write_text(text)
            (self.sbin / name).chmod(0o755)
        shutil.copytree(TOP, self.top, ignore=shutil.ignore_patterns(".git", "tests"))
        if not has_ibrname():
            take_out = block("examples/nftables/README.md", "brname/d")
            self.shell(take_out.replace("/etc/instances", "examples/nftables"))

    def shell(self, commands: str, page: str = "README.md") -> str:
        """Run commands as root in the folder of a page; return what they print."""
        env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        folder = (self.top / page).parent
        return self.run(*mounted(self.mounts), "sh", "-euc", f"cd {folder}\n{commands}", env=env).stdout

    def serve(self, config: str) -> None:
        """Have dnsmasq serve the bridge by a configuration."""
        shutil.copy(TOP / "instances-update.py", self.sbin)
        (self.etc / "dnsmasq.d" / "x.conf").write_text(config)
        self.shell("mkdir -p /var/lib/misc/instances.hosts.d; systemctl restart dnsmasq")

    def follow(self, page: str, words: str) -> str:
        """Run a block of a page; return what it prints."""
        return self.shell(block(page, words), page)


@pytest.fixture
def bare(tmp_path):
    """A host with the bridge br0, and nothing installed."""
    need(*PROGRAMS)
    machine = Machine(tmp_path)
    yield machine
    machine.close()


@pytest.fixture
def machine(bare):
    """A host on which the first page was followed."""
    bare.follow("README.md", "install -m 755")
    return bare


def test_dnsmasq_page_gives_names_and_leases_and_has_a_lan_find_names_by_its_router_and_nothing_else(bare):
    shutil.copy(TOP / "instances-update.py", bare.sbin)
    bare.follow("examples/dnsmasq/README.md", "cp br0.conf")
    guest = bare.client("web", "10:66:6a:4c:a1:11")
    guest.dhcp4("web")
    assert bare.registry()[guest.mac]["name"] == "web"
    (bare.folder / "instances.hosts.d" / "names").write_text("10.83.0.1 host.instance.internal\n")
    wait_for(lambda: guest.resolve("host.instance.internal", "A") == ["10.83.0.1"], "a name")
    lan = bare.client("lan", "10:66:6a:4c:b0:01", "eth0", bridge="", wait=False)
    for node, address in ((bare, "192.0.2.1/24"), (lan, "192.0.2.7/24")):
        node.run("ip", "address", "add", address, "dev", "eth0")
    lines = re.findall("`((?:server|rebind-domain-ok)=[^`]*)`", (EXAMPLES / "dnsmasq/README.md").read_text())
    router = ("dnsmasq", "-d", "-R", "-C", "/dev/null", "--listen-address=127.0.0.1", "--bind-interfaces")
    lan.start(*router, "--stop-dns-rebind", *(f"--{line}" for line in lines), stderr=subprocess.DEVNULL)
    ask = ("dig", "+short", "+timeout=1", "+tries=1", "@127.0.0.1", "host.instance.internal")
    assert lan.run(*ask, check=False).stdout.startswith(";")
    (bare.etc / "dnsmasq.d" / "lan.conf").write_text(block("examples/dnsmasq/README.md", "auth-zone"))
    bare.shell("systemctl restart dnsmasq")
    wait_for(lambda: lan.run(*ask, check=False).stdout == "10.83.0.1\n", "the name")
    assert "REFUSED" in lan.run("dig", "+timeout=1", "@192.0.2.1", "-x", "10.83.0.1").stdout
    assert guest.resolve("host.instance.internal", "A") == ["10.83.0.1"]


# Asks for a router advertisement, and prints it
SOLICITATION = """\
import socket
asked = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
asked.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
asked.settimeout(10)
asked.sendto(bytes([133]) + bytes(7), ("ff02::2", 0, 0, socket.if_nametoindex("eth0")))
while (heard := asked.recv(1500))[0] != 134:
    pass
print(heard.hex())
"""


@pytest.mark.parametrize("config", ["dnsmasq/br0.conf", "adopting/instances.conf", "network/gateway.conf"])
def test_no_configuration_gives_a_guest_a_name_that_others_look_for_services_by(bare, config):
    text = (EXAMPLES / config).read_text().replace("=gw0", "=br0")
    if config == "adopting/instances.conf":  # what was there before it
        text += "interface=br0\nexcept-interface=lo\nbind-interfaces\nno-ping\ndhcp-range=10.83.0.100,10.83.0.199\n"
    bare.serve(text)
    options = ("-xhostname:WPAD", "-xhostname:wpad.x", "-Fisatap.instance.internal", "-Flocalhost", "-xhostname:web.x")
    names = []
    for number, option in enumerate(options):
        guest = bare.client(f"g{number}", f"10:66:6a:4c:a1:2{number}", wait=False)
        guest.run("udhcpc", "-qfn", "-i", "eth0", "-s", "/bin/true", "-T", "1", option)
        names.append(wait_for(lambda g=guest: bare.registry().get(g.mac), option)["name"])
    assert names == ["", "", "", "", "web"]


def test_br0_conf_tells_guests_the_search_domain_the_mtu_and_servers_that_all_may_ask(bare):
    config = (EXAMPLES / "dnsmasq/br0.conf").read_text()
    bare.serve(config.replace("#dhcp-option=option:mtu", "dhcp-option=option:mtu"))
    guest = bare.client("web", "10:66:6a:4c:a1:11")
    guest.script.write_text(guest.script.read_text() + 'echo "servers ${new_dhcp6_name_servers-}" >>"$0.log"\n')
    guest.dhcp4("web")
    guest.dhcp6("web")
    guest.script.write_text('#!/bin/sh\necho "domain ${domain-} search ${search-}" >>"$0.log"\n')
    guest.run("udhcpc", "-qfno", "-i", "eth0", "-s", guest.script)  # asks for no option
    told = guest.events()
    assert "domain instance.internal search instance.internal\n" in told
    assert "mtu=1400" in told and "servers fd83:5eed::1 2001:67c:83::1" in told and not re.search("servers.*fe80", told)
    advertisement = guest.run(sys.executable, "-c", SOLICITATION).stdout
    assert re.search("1905.{12}fd835eed0{23}12001067c00830{19}1", advertisement)


def test_nftables_and_systemd_pages_load_their_tables_also_where_a_kernel_does_not_know_a_frames_bridge(machine):
    (machine.etc / "instances" / "mine.nft").write_text(block("examples/systemd/README.md", "table inet mine"))
    machine.follow("examples/nftables/README.md", "cp bridge.nft firewall.nft")
    tables = machine.run("nft", "list", "tables").stdout
    assert {"table bridge instances", "table inet instances", "table inet mine"} <= {*tables.splitlines()}
    shutil.copy(EXAMPLES / "nftables" / "bridge.nft", machine.etc / "instances")
    machine.follow("examples/nftables/README.md", "brname/d")
    machine.shell("nft -f /etc/instances/bridge.nft")
    assert "ibrname" not in machine.run("nft", "list", "ruleset").stdout


def test_nftables_recipes_tell_who_was_dropped_and_let_in_addresses_and_networks_and_all_of_ipv6(machine):
    host4, host6, numbers = "10.83.0.1", "2001:67c:83::1", {"web": 11, "db": 12, "mail": 20}
    web, db, mail = guests = [machine.client(name, f"10:66:6a:4c:a1:{n}") for name, n in numbers.items()]

    def change(guest, what, *addresses):
        guest.ip(*(f"address {what} {address} nodad" for address in addresses))

    for guest, n in zip(guests, numbers.values()):
        change(guest, "add", f"10.83.0.{n}/24 dev eth0", f"2001:67c:83::{n}/80 dev eth0")
    for guest, address in ((web, "10.83.0.11"), (web, "2001:67c:83::11"), (db, "10.83.0.12")):
        machine.shell(f"DNSMASQ_MAC={guest.mac} instances-update.py add {guest.mac} {address}; instances-apply")
    web.wait_pings(host4, host6)

    assert not mail.pings(host4) and not mail.pings(host6)
    told = machine.follow("examples/nftables/README.md", "nft list set")
    assert re.search(f"{mail.mac} . .*. counter packets [1-9]", told)
    machine.follow("examples/nftables/README.md", "mail")
    machine.shell("instances-apply")
    mail.wait_pings(host4, host6)
    wait_for(lambda: mail.resolve("mail.instance.internal", "AAAA") == ["2001:67c:83::20"], "its name")

    for allowed in (False, True):  # an address of several guests
        for guest in (web, db):
            change(guest, "add", "10.83.0.50/24 dev eth0", "2001:67c:83::50/80 dev eth0")
            machine.run("ip", "neighbour", "flush", "dev", "br0")
            answered = [guest.pings(host4, "-I", "10.83.0.50"), guest.pings(host6, "-I", "2001:67c:83::50")]
            assert answered == [allowed, allowed]
            change(guest, "delete", "10.83.0.50/24 dev eth0", "2001:67c:83::50/80 dev eth0")
        machine.follow("examples/nftables/README.md", "--allow 10:66:6a:4c:a1:12")
        machine.shell("instances-apply")

    change(web, "add", "10.99.0.1/24 dev lo", "2001:67c:99::1/64 dev lo")
    assert not web.pings(host4, "-I", "10.99.0.1") and not web.pings(host6, "-I", "2001:67c:99::1")
    machine.follow("examples/nftables/README.md", "10.99.0.0/24")
    machine.shell("instances-apply")
    assert web.pings(host4, "-I", "10.99.0.1") and web.pings(host6, "-I", "2001:67c:99::1")

    assert not db.pings(host6)
    rules, last = machine.etc / "instances" / "bridge.nft", "        goto instances_guard\n"
    line = block("examples/nftables/README.md", "ether type ip6 accept")
    rules.write_text(rules.read_text().replace(last, line + last))
    machine.shell("instances-apply")
    db.wait_pings(host4, host6)


def test_nftables_recipe_for_a_64_leases_addresses_to_guests_that_make_none(bare):
    bare.run("ip", "address", "flush", "dev", "br0", "to", "2000::/3")
    bare.run("ip", "address", "add", "2001:67c:83::1/64", "dev", "br0", "nodad")
    config = re.sub("(?m)^(dhcp-range=.*:|rev-server=).*\n", "", (EXAMPLES / "dnsmasq/br0.conf").read_text())
    bare.serve(config + block("examples/nftables/README.md", "enable-ra"))
    guest = bare.client("web", "10:66:6a:4c:a1:11")
    guest.start_dhcp6("web")
    guest.wait_registered("BOUND6 2001")
    wait_for(lambda: "default" in guest.run("ip", "-6", "route").stdout, "the router advertisement's route")
    assert guest.addresses("2001") == [bare.registry()[guest.mac]["ipv6_gua"]]


def test_nftables_recipes_for_several_bridges(machine):
    machine.run("ip", "link", "add", "br1", "type", "bridge")
    machine.follow("examples/nftables/README.md", "--initialize br1")
    assert {"host", "host-br1"} <= {instance["name"] for instance in machine.registry().values()}
    machine.follow("examples/nftables/README.md", "misc.instances")
    machine.shell("instances-process.py --force; nft -f examples/nftables/bridge.nft")
    machine.shell("INSTANCES_BASE_ID=br1 instances-process.py --force; nft -f /etc/instances-br1/bridge.nft")
    tables = {"bridge instances", "inet instances_group", "arp instances_group"}
    tables |= {"bridge instances-br1", "inet instances-br1_group", "arp instances-br1_group"}
    assert tables == {line.removeprefix("table ") for line in machine.run("nft", "list", "tables").stdout.splitlines()}


def test_cron_page_gives_a_lease_its_name_and_guard_at_once_and_undoes_all(machine):
    machine.follow("examples/cron/README.md", "install -m 644 instances")
    assert "instances-apply" in (machine.etc / "cron.d" / "instances").read_text()
    machine.follow("examples/cron/README.md", "instances-lease <<")
    web = machine.client("web", "10:66:6a:4c:a1:11")
    web.dhcp4("web")
    wait_for(lambda: web.resolve("web.instance.internal", "A") == web.addresses("10"), "its name")
    guard = ("nft", "list", "table", "bridge", "instances")  # after the names
    wait_for(lambda: web.addresses("10")[0] in machine.run(*guard).stdout, "its guard")
    machine.follow("examples/cron/README.md", "instances-apply --remove")
    assert not machine.run("nft", "list", "tables").stdout and (machine.etc / "instances" / "bridge.nft").exists()
    left = [path for place in ("etc", "run", "sbin") for path in (machine.folder / place).rglob("instances*")]
    assert {path.suffix for path in left} <= {".py", ".path", ".service", ".timer", ""} and len(left) == 10, left


def test_show_page_shows_the_host_and_undoes_all(machine):
    lines = machine.follow("examples/show/README.md", "install -m 755").splitlines()
    assert lines[0].startswith("NAME  MAC ADDRESS ") and lines[-1] == "  port: br0" and "host: 10:66:" in lines[2]
    machine.follow("examples/show/README.md", "systemctl enable --now instances-metrics.timer")
    assert (machine.etc / "systemd" / "system" / "instances-metrics.timer").exists()
    machine.follow("examples/show/README.md", "systemctl disable --now instances-metrics.timer")
    assert not list(machine.sbin.glob("instances-show")) and list(machine.sbin.glob("instances-apply"))
    assert not list((machine.etc / "systemd" / "system").glob("instances-metrics*"))


def test_egress_page_has_its_domains_in_dnsmasq_and_its_rules_in_force_until_it_is_undone(machine):
    machine.follow("examples/egress/README.md", "instances-egress allow")
    config = (machine.etc / "dnsmasq.d" / "egress.conf").read_text()
    assert "nftset=/debian.org/" in config and "nftset=/pypi.org/" in config
    assert "10:66:6a:4c:a1:11" in machine.run("nft", "list", "table", "inet", "egress").stdout
    assert machine.run("dig", "+short", "@10.83.0.1", "host.instance.internal").stdout == "10.83.0.1\n"
    machine.follow("examples/egress/README.md", "rm -r /etc/instances/egress.nft")
    assert "egress" not in machine.run("nft", "list", "tables").stdout and not list(machine.etc.rglob("*egress*"))


def test_routed_page_gives_the_guest_of_a_binding_its_lease_and_undoes_all(bare):
    need("dhcp_release")
    bare.run("ip", "link", "delete", "br0")
    links = bare.run("ip", "-br", "link").stdout
    bare.follow("examples/routed/README.md", "mkdir -p /etc/routed")
    bare.follow("examples/routed/README.md", "ip link add gw0")
    (bare.etc / "routed" / "web").write_text(block("examples/routed/README.md", "INDEV="))
    guest = bare.client("web", "10:66:6a:4c:a1:11", "tap0", bridge="")
    bare.shell("instances-binding add /etc/routed/web")
    guest.dhcp4()
    assert guest.addresses("10.85") == ["10.85.0.11"] and bare.registry()[guest.mac]["name"] == "web"
    bare.shell("instances-binding remove /etc/routed/web")
    bare.follow("examples/routed/README.md", "ip link delete gw0")
    bare.run("ip", "link", "delete", "tap0")
    assert bare.run("ip", "-br", "link").stdout == links and not bare.run("nft", "list", "tables").stdout
    assert not (bare.folder / "routed").exists() and not (bare.sbin / "instances-binding").exists()


def test_bridge_page_brings_its_bridge_up(bare):
    need("ifup", "sysctl")
    bare.run("ip", "link", "delete", "br0")
    network = bare.etc / "network"
    for folder in ("interfaces.d", "if-pre-up.d", "if-up.d", "if-down.d", "if-post-down.d"):
        (network / folder).mkdir(parents=True)
    (network / "interfaces").write_text("source /etc/network/interfaces.d/*\n")  # as Debian has it
    bare.follow("examples/bridge/README.md", "ifup vmbr0")
    bare.client("web", "10:66:6a:4c:a1:11", bridge="vmbr0").dhcp4("web")
    assert bare.registry()["10:66:6a:4c:a1:11"]["ipv4"].startswith("10.83.1.")
    bare.shell("ifdown vmbr0")  # the bridge stays, having a guest's port
    bare.run("ip", "link", "delete", "vmbr0")
    assert not bare.run("nft", "list", "tables").stdout
