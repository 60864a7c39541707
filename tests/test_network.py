"""The example of one network on several hosts: one host writes, all follow."""

import base64
import contextlib
import itertools
import os
import re
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import pytest
from attacks import SNIFFER, advertised, arp, bootp, datagram, hearing, octets, rarp, scapy
from conftest import PROGRAMS, load, need
from lab import BRIDGE_ADDRESSES, UPDATE, environment, wait_for
from network_lab import (
    FOLDER,
    Pinger,
    Site,
    check_nothing_is_written,
    copy_programs,
    equal,
    fault,
    fill,
    in_force,
    join,
    known,
    leave,
    make_certificates,
    report,
    write,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def followers(tmp_path_factory):
    """Three hosts with etcd, the guard, names and a guest: host a has dnsmasq and writes, b and c follow."""
    need(*PROGRAMS, "etcd", "etcdctl", "openssl", "prlimit")
    with contextlib.closing(Site(tmp_path_factory.mktemp("network"))) as site:
        a = site.hosts[0]
        a.ip(*(f"address add {address} dev br0 nodad" for address in BRIDGE_ADDRESSES))
        for host in site.hosts:
            host.guard()
            host.start_names()
            host.start_follow("a")
        initialize = (sys.executable, UPDATE, "--initialize", "br0", "host")  # refused until etcd was asked
        wait_for(lambda: a.run(*initialize, env=environment(a.base), check=False).returncode == 0, "the host's entry")
        a.start_dnsmasq(config=a.example("dnsmasq/br0.conf"))
        join(site)
        yield site


def test_guests_of_all_hosts_are_registered_on_all_and_reach_each_other(followers):
    wait_for(lambda: equal(followers), "equal registries")
    for one, other in itertools.permutations(followers.guests, 2):
        entry = one.host.registry()[other.mac]
        for field in ("ipv4", "ipv6_gua", "ipv6_ula"):
            assert one.pings(entry[field]), f"{one.label} {other.label} {field}"


def test_each_host_answers_its_own_guests_for_names(followers):
    address = followers.hosts[0].registry()[followers.guests[0].mac]["ipv4"]

    def asks(guest, server, *options):
        return guest.run("dig", "+short", *options, f"@{server}", "guest-a.instance.internal", "A", check=False)

    for case in itertools.product(followers.guests, ("10.83.0.2", "fd83:5eed::2"), ("+notcp", "+tcp")):
        wait_for(lambda case=case: asks(*case).stdout.split() == [address], f"a name for {case[0].label}, {case[1:]}")
    followers.hosts[2].names.send_signal(signal.SIGSTOP)  # only its own guest is without
    answers = [asks(guest, "10.83.0.2", "+timeout=5", "+tries=1").returncode for guest in followers.guests]
    followers.hosts[2].names.send_signal(signal.SIGCONT)
    assert answers == [0, 0, 9]


def test_moved_guest_is_reached_at_once(followers):
    a, b, c = followers.hosts
    guest = a.client("mover", "10:66:6a:4c:b0:21", port="mover")
    guest.dhcp4("mover")
    guest.dhcp6("mover")
    known(followers, guest.mac)
    entry = a.registry()[guest.mac]
    pingers = [Pinger(followers.guests[n], entry[field]) for n in (1, 2) for field in ("ipv4", "ipv6_ula")]
    wait_for(lambda: all(p.answered() for p in pingers), "answers before the move")
    for host, announced in ((b, False), (c, True), (a, False), (b, True)):
        before = host.dropped() - host.dropped(reason="DHCP too often")
        guest.host.run("ip", "link", "set", "mover", "netns", host.name)
        host.run("ip", "link", "set", "mover", "master", "br0", "up")
        guest.host.clients.remove(guest)
        host.clients.append(guest)
        guest.host = host
        if announced:
            seen = followers.rarps()  # sent again, as QEMU does: the port may not be up yet
            wait_for(lambda n=seen: guest.send(bytes(rarp(guest))) or followers.rarps() > n, "the switch hears it")
        now = time.time()
        wait_for(lambda now=now: all(p.answered(now) for p in pingers), f"answers on {host.letter}")
        assert host.dropped() - host.dropped(reason="DHCP too often") == before
    report(f"four moves: pings lost, of ten a second by two guests of each version: {[p.lost() for p in pingers]}")


@contextlib.contextmanager
def listening(guest):
    """Have a guest listen; give a function that returns the frames so far, with all that were sent before."""
    with hearing(guest, SNIFFER) as heard:

        def all_heard():
            mark = os.urandom(4).hex()
            guest.run("ping", "-n", "-c", "1", "-p", mark, "10.83.0.1")
            wait_for(lambda: sum(mark * 2 in line for line in heard().splitlines()) > 1, "the answer to the mark")
            return heard().splitlines()

        yield all_heard


def test_nobody_on_any_host_may_speak_for_a_guest_of_another(followers):
    victim = followers.guests[0]
    four, six = (victim.host.registry()[victim.mac][field] for field in ("ipv4", "ipv6_ula"))
    for number, host in enumerate(followers.hosts):
        attacker = host.client("attacker", f"10:66:6a:4c:b{number}:31", port="attacker", wait=False)
        frames = {  # by the reasons to drop them
            "ARP address": arp(attacker, four, four, 2),
            "NDP target": advertised(attacker, six),
            "IPv4 source": datagram(attacker, four, "255.255.255.255"),
            "IPv6 source": datagram(attacker, six, "ff02::1"),
            "DHCP message": bootp(attacker, "discover", chaddr=victim.mac),
        }

        def arrived(attacker=attacker, frames=frames, listener=followers.guests[1 + number % 2]):
            with listening(listener) as heard:
                attacker.send(*map(bytes, frames.values()))
                found = heard()
            return [why for why, f in frames.items() if any(bytes(f)[6:30].hex() in line for line in found)]

        def unguarded(host=host, arrived=arrived):  # its service may load the guard once more, for a change before this
            host.run("nft", "delete", "table", "bridge", "instances", check=False)
            return arrived()

        wanted = [reason for reason in frames if reason != "DHCP message"]  # the other's guard keeps it out
        wait_for(lambda unguarded=unguarded, wanted=wanted: unguarded() == wanted, "frames without the guard")
        host.run("nft", "-f", host.rules / "network.nft")
        before = {reason: host.dropped(attacker.mac, reason) for reason in frames}
        assert arrived() == []
        assert all(host.dropped(attacker.mac, reason) > before[reason] for reason in frames)
        leave(attacker)
    for node in (*followers.hosts, *followers.guests):  # what they believed without the guard
        node.run("ip", "neighbour", "flush", "all")


def test_dhcp_of_guests_goes_to_the_server_and_to_no_guest(followers):
    b = followers.hosts[1]
    guest = b.client("asks", "10:66:6a:4c:b1:41", port="asks", wait=False)
    with contextlib.ExitStack() as stack:
        heard = [stack.enter_context(listening(listener)) for listener in followers.guests]
        guest.dhcp4("asks")
        own, udp = guest.mac.replace(":", ""), "11"
        assert not [line for each in heard for line in each() if own in line and line[46:48] == udp]
    address = b.registry()[guest.mac]["ipv4"]
    wait_for(lambda: in_force(b, guest.mac, address), "its own address")
    before = b.dropped(guest.mac, "DHCP server")
    ip = datagram(guest, address, "255.255.255.255", 67, 68)
    guest.send(bytes(ip / scapy.BOOTP(op=2, chaddr=octets(guest.mac))))
    wait_for(lambda: b.dropped(guest.mac, "DHCP server") > before, "a reply of its own dropped")


def test_change_on_a_follower_is_refused_with_the_name_of_the_host_to_make_it_on(followers):
    b = followers.hosts[1]
    file, mac = Path(f"{b.base}.json"), followers.guests[1].mac
    before = file.read_bytes()
    for arguments in (["--rename", mac, "x"], ["--remove", mac]):
        assert b.refusal(*arguments).endswith(": a writes it\n") and file.read_bytes() == before
    file.write_text("{}\n")  # by hand: it does not last
    wait_for(lambda: file.read_bytes() == before, "what etcd has")


def told(host):
    """Return the lines of what has failed."""
    return [line for line in host.said("follow.log").splitlines() if not line.endswith(": goes on")]


@contextlib.contextmanager
def one_line(site, host, words):
    """Wait until a host says that something fails: in one line, with these words, and nothing is taken meanwhile."""
    before, lines = site.hosts[2].registry(), len(told(host))
    yield
    found = wait_for(lambda: told(host)[lines:], f"a line of {words}", 60)
    assert len(found) == 1 and words in found[0] and site.hosts[2].registry() == before


def test_value_that_is_no_history_is_invalid(monkeypatch):
    monkeypatch.setenv("PATH", f"{UPDATE.parent}:{os.environ['PATH']}")
    etcd = load(FOLDER / "instances-etcd.py")
    texts = (b"{", b"[]", b"{}", b'{"changes": {}}', b"[" * 100000)
    for value in (b"", b"{", *map(zlib.compress, texts)):
        entry = {"key": etcd.encoded("/instances/history"), "value": base64.b64encode(value).decode()}
        with pytest.raises(etcd.Invalid):
            etcd.checked(entry)


@pytest.mark.parametrize("number, value", [(1, b"{"), (2, zlib.compress(b'{"changes": {"a": 1}}'))], ids="12")
def test_history_that_is_none_is_not_taken_and_the_writer_replaces_it(followers, number, value):
    a, _, c = followers.hosts
    (c.folder / "value").write_bytes(value)
    a.program.send_signal(signal.SIGSTOP)
    with one_line(followers, c, "not taken"), open(c.folder / "value") as file:
        c.etcdctl("put", "/instances/history", stdin=file)
    assert followers.guests[2].pings(c.registry()[followers.guests[1].mac]["ipv4"])
    a.program.send_signal(signal.SIGCONT)
    known(followers, a.enter(number))


def test_registry_too_large_for_etcd_is_told_in_one_line_and_all_goes_on(followers):
    a = followers.hosts[0]
    before = a.registry()
    large = {f"02:00:00:01:00:{n:02x}": {"name": "", "note": os.urandom(40000).hex()} for n in range(220)}
    with one_line(followers, a, "larger than max"):
        write(a, before | large)
    write(a, before)
    known(followers, a.enter(3))


def test_full_disk_is_told_in_one_line_and_what_was_missed_comes_later(followers):
    a, _, c = followers.hosts
    fill(a, 100)  # larger than the log
    wait_for(lambda: equal(followers), "equal registries")
    with one_line(followers, c, "File too large"):
        c.run("prlimit", "--pid", str(c.program.pid), "--fsize=10000:")
        mac = a.enter(4)
    c.run("prlimit", "--pid", str(c.program.pid), "--fsize=unlimited:")
    known(followers, mac)


@pytest.mark.parametrize("what", ["stop etcd", "kill etcd"])
def test_host_whose_etcd_is_gone_goes_on_and_follows_when_it_is_back(followers, what):
    a, b, c = followers.hosts
    lines = len(told(c))
    with one_line(followers, c, "etcd "):
        heal = fault(c, what)
        mac = a.enter(0x10 + (what == "kill etcd"))
        wait_for(lambda: mac in b.registry(), "the change on b")
    assert followers.guests[2].pings(c.registry()[followers.guests[1].mac]["ipv4"])
    heal()
    known(followers, mac)
    assert len(told(c)) - lines <= 3  # a line for each thing that failed, and one at its end


def test_without_a_majority_guests_go_on_and_changes_wait(followers):
    a, b, c = followers.hosts
    before = b.registry()
    pinger = Pinger(followers.guests[0], before[followers.guests[2].mac]["ipv4"])
    guest = a.client("alone", "10:66:6a:4c:b0:51", port="alone", wait=False)
    with one_line(followers, a, "etcd at"):
        heal = [fault(host, "cut management") for host in (b, c)]
        guest.dhcp4("alone")  # registered on a
    time.sleep(2)
    assert b.registry() == c.registry() == before
    for each in heal:
        each()
    known(followers, guest.mac)
    report(f"without a majority: pings lost between guests {pinger.lost()}")


def test_wrong_certificate_is_told_in_one_line_and_nothing_is_taken(followers):
    a, b, c = followers.hosts
    make_certificates(followers.folder / "other")
    c.take_certificate(followers.folder / "other", "wrong")
    for number, words in ((5, "certificate verify failed"), (7, "etcd at 127.0.0.1:2379")):
        with one_line(followers, c, words):
            c.stop(c.program)
            c.start_follow("a", INSTANCES_TLS=f"{c.folder}/wrong")
            mac = a.enter(number)
            wait_for(lambda mac=mac: mac in b.registry(), "the change on b")
        shutil.copy(c.folder / "tls" / "ca.crt", c.folder / "wrong")  # now it is etcd that does not believe
    c.stop(c.program)
    c.start_follow("a")
    known(followers, mac)


def test_nothing_is_written_to_etcd_while_nothing_changes(followers):
    check_nothing_is_written(followers, 6)


def test_new_writer_begins_with_the_registry_of_the_others(followers):
    a, b, c = followers.hosts
    before = a.registry()

    def have_write(writer):
        for host in followers.hosts:
            host.stop(host.program)
            if host is writer:
                Path(f"{host.base}.json").unlink()  # even if its own is lost
            host.start_follow(writer.letter)
        wanted = ["" if host is writer else f"{writer.letter} writes it" for host in followers.hosts]
        wait_for(lambda: [host.follows() for host in followers.hosts] == wanted, "a writer")

    have_write(b)
    assert b.registry() == before
    known(followers, b.enter(8))
    have_write(a)


def test_writer_from_a_backup_takes_what_it_lacks_and_keeps_what_it_entered_since(followers):
    a, _, c = followers.hosts
    saved = {end: Path(f"{a.base}{end}").read_bytes() for end in (".json", ".shared")}
    known(followers, since := a.enter(9))
    a.stop(a.program)
    for end, old in saved.items():
        Path(f"{a.base}{end}").write_bytes(old)
    own = a.enter(10)
    a.start_follow("a")
    known(followers, own)
    assert since in c.registry()


@pytest.mark.parametrize("word", ["--take", "--give"])
def test_writer_that_can_not_tell_which_is_newer_changes_nothing_and_asks(followers, word):
    a, b, c = followers.hosts
    before, gone = c.registry(), followers.guests[2].mac
    with one_line(followers, a, "--take goes on with etcd's, --give with this host's"):
        a.stop(a.program)
        Path(f"{a.base}.shared").unlink()
        a.update("--remove", gone)
        a.start_follow("a")
    own = a.registry()
    assert gone not in own

    def decide(host):
        env = environment(host.base, INSTANCES_TLS=f"{host.folder}/tls")
        env["PATH"] = f"{followers.bin}:{env['PATH']}"
        return host.run(sys.executable, followers.bin / "instances-follow.py", word, env=env, check=False)

    assert decide(a).returncode == 0
    wait_for(lambda: equal(followers) and c.registry() == {"--take": before, "--give": own}[word], "one registry")
    refused = decide(b)
    assert refused.returncode == 1 and refused.stderr.endswith("does not write: a writes it\n")
    write(a, before)
    wait_for(lambda: equal(followers) and c.registry() == before, "all as before")


def test_change_of_a_large_registry_is_in_force_on_another_host(followers):
    a, b, c = followers.hosts
    before = a.registry()
    fill(a, 1000)
    wait_for(lambda: equal(followers) and len(c.registry()) > 1000, "the registry on c", 120)
    times = []
    for number in (11, 12, 13):
        mac, begun = a.enter(number), time.monotonic()
        wait_for(lambda new=(mac, f"10.85.0.{number}"): in_force(c, *new), "in force on c", 120)
        times.append(time.monotonic() - begun)
        wait_for(lambda: equal(followers), "equal registries", 120)
    report(f"1,000 instances: from a change to its element on another host {' '.join(f'{t:.2f}' for t in times)} s")
    write(a, before)
    wait_for(lambda: equal(followers) and b.registry() == before, "the former registry", 120)


# ---- One program by itself ----
@pytest.fixture(params=["instances-follow.py", "instances-lead.py"])
def program(host, request):
    """The path of a program, on a host without an etcd."""
    need(*PROGRAMS, "openssl")
    (host.folder / "bin").mkdir()
    copy_programs(host.folder / "bin")
    return host.folder / "bin" / request.param


def test_settings_that_are_none_are_told_in_one_line_and_so_is_an_interruption(program, host):
    tls, log = host.folder / "tls", host.folder / "said"

    def says(words, **variables):
        env = environment(host.base, INSTANCES_WRITER="b", INSTANCES_TLS=str(tls), **variables)
        with open(log, "w") as file:
            host.program = host.start(sys.executable, program, env=env, stderr=file)
        wait_for(lambda: words in log.read_text() or host.program.poll() is not None, "the error")
        return log.read_text()

    assert re.fullmatch(rf"{program.name}: etcd .*certificates in {tls}: .*\n", says("No such file"))
    host.stop(host.program, signal.SIGKILL)  # or it tells of the certificates that there are now
    make_certificates(tls)
    for end in ("crt", "key"):
        shutil.copy(tls / f"a.{end}", tls / f"host.{end}")
    said = says("127.0.0.1:etcd", INSTANCES_ETCD="127.0.0.1:etcd")
    assert re.fullmatch(rf"{program.name}: .*127.0.0.1:etcd.*: nonnumeric port: 'etcd'\n", said)
    host.program.send_signal(signal.SIGINT)
    assert host.program.wait(30) == 1
    assert "Traceback" not in log.read_text() and log.read_text().count("\n") == 2, log.read_text()


def test_program_without_the_registrys_script_says_so_and_runs_no_other(program, host):
    (program.parent / "instances-update.py").unlink()
    (host.folder / "elsewhere").mkdir()
    (host.folder / "elsewhere" / "instances-update.py").write_text("print('anybody has written this')\n")
    env = environment(host.base, PATH="/usr/sbin:/usr/bin:/sbin:/bin")
    result = host.run(sys.executable, program, env=env, check=False, cwd=host.folder / "elsewhere")
    assert result.stdout == "" and result.returncode == 1 and result.stderr.count("\n") == 1, result
