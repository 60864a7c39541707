#!/usr/bin/env python3
"""Have one of a network's hosts at a time, the leader, be its gateway and run its dnsmasq. Runs until it is ended.

The leader has the key "leader" in etcd, which etcd deletes if its lease is not renewed for TTL seconds. A leader that
can't renew it stops STOP seconds after the last renewal began: by itself, or by the kernel's clock if it hangs.
The leader gives etcd its registry while the key is its own; the others follow, as with instances-follow.py. A new
leader begins with the registry that the majority has, so that all registered guests keep their addresses.
"""

import base64
import contextlib
import os
import signal
import subprocess
import sys
import time
from runpy import run_path
from types import SimpleNamespace

follow = SimpleNamespace(**run_path(os.path.dirname(os.path.realpath(__file__)) + "/instances-follow.py"))
etcd, files, say = follow.etcd, follow.files, follow.say

USAGE = """\
usage: instances-lead.py        with its settings in the environment, the same on each host:

INSTANCES_HOST, this host (its host name); INSTANCES_RULES, the folder of gateway.ip and gateway.conf (/etc/instances);
INSTANCES_ETCD and INSTANCES_TLS, as for instances-follow.py."""

TTL, STOP, RENEW = 5, 3.5, 1  # in seconds; TTL - STOP is what the gateway's end may take
KNOWN = 20  # how often dnsmasq is told of new guests that etcd knows, in seconds

# The gateway is the interface gw0, its peer gw1 a port of the bridge. What passes there passes while the element lives.
GATE = """\
table bridge instances_lead {
    set leading { type ifname; flags timeout; }
    chain from_gateway { type filter hook prerouting priority -310; }
    chain to_gateway { type filter hook postrouting priority 310; }
}
flush table bridge instances_lead
add rule bridge instances_lead from_gateway iifname "gw1" iifname != @leading counter drop
add rule bridge instances_lead to_gateway oifname "gw1" oifname != @leading counter drop
flush set bridge instances_lead leading
"""
OPEN = "add element bridge instances_lead leading {{ gw1 timeout {}ms }}\n"
NOBODY = "no host leads at this moment"


def run(*command, check=True, **options):
    """Run a command. OSError if it fails, or hangs."""
    try:
        subprocess.run(command, check=check, text=True, timeout=TTL, **options)
    except subprocess.SubprocessError as error:
        raise OSError(str(error)) from None


def give_up(error):
    """End, so that another host leads."""
    say(f"can't lead: {error}")
    sys.exit(1)


def dhcp_hosts(registry):
    """Return lines of dnsmasq's --dhcp-hostsfile that keep all addresses theirs: MAC,IPV4 and MAC,[IPV6],..."""
    lines = []
    for mac in filter(files.is_mac, registry):
        found = {}
        for field in files.LEASED:
            address = registry[mac].get(field)
            with contextlib.suppress(ValueError):  # none, or none that instances-process.py would take
                if files.parse_address(address) == (field, address):
                    found[field] = address if field == "ipv4" else f"[{address}]"
        four = found.pop("ipv4", None)
        lines += [",".join([mac, *words]) + "\n" for words in ([four] if four else [], found.values()) if words]
    return lines


class Host:
    """A host that leads or follows."""

    def __init__(self):
        self.registry = follow.Registry()
        self.store, self.base, self.name = self.registry.store, self.registry.base, self.registry.name
        self.folder = os.environ.get("INSTANCES_RULES") or "/etc/instances"
        self.lease = self.dnsmasq = None
        self.until = self.renewal = 0  # when a leader has to stop, and to renew the lease: by the monotonic clock

    def holder(self):
        """Return the lease behind the leader's key, None if there is none, and the reason to refuse changes."""
        entry = self.store.seen.get("leader")
        name = base64.b64decode(entry["value"]).decode() if entry else self.name
        return entry and entry.get("lease"), NOBODY if name == self.name else f"{name} leads"

    def renew(self):
        """Renew the lease, and with it the time to lead; return whether the leader's key is ours, and time is left."""
        begun = time.monotonic()
        if not self.lease or "TTL" not in self.store.ask("lease/keepalive", ID=self.lease)["result"]:
            self.lease = None
            return False
        self.store.look(serializable=False)
        if self.holder()[0] != self.lease:
            return False
        self.until, self.renewal = begun + STOP, begun + RENEW
        left = int((self.until - time.monotonic()) * 1000)
        try:
            run("nft", "-f", "-", input=GATE + OPEN.format(left) if left > 0 else GATE)
        except OSError as error:
            give_up(error)
        return time.monotonic() < self.until  # if that took longer, the gate is open for too long

    def campaign(self):
        """Take the leader's key if nobody has it, and lead."""
        self.lease = self.store.ask("lease/grant", TTL=TTL)["ID"]  # if another host was first, it runs out
        key = self.store.key("leader")
        free = key | {"target": "CREATE", "create_revision": 0}
        put = {"request_put": key | {"value": etcd.encoded(self.name), "lease": self.lease}}
        self.store.ask("kv/txn", compare=[free], success=[put])
        if self.renew():
            self.lead()

    def lead(self):
        """Become the gateway, with the majority's registry, and so the same leases. End if that fails."""
        hosts = f"{self.base}.dhcp-hosts"
        try:
            self.registry.accept()
            lines = dhcp_hosts(files.read_registry(self.registry.path))
            self.known, self.telling = set(lines), 0  # what dnsmasq has, and when it is told of others
            files.replace_file(hosts, "".join(lines))
            run("rm", "-rf", f"{hosts}.d", f"{self.base}.leases")  # of another time that we led
            os.mkdir(f"{hosts}.d")
            run("ip", "-batch", f"{self.folder}/gateway.ip")
            run("instances-update.py", "--initialize", "gw0", "host")
            own = [f"--dhcp-hostsfile={hosts}", f"--dhcp-hostsdir={hosts}.d", f"--dhcp-leasefile={self.base}.leases"]
            self.dnsmasq = subprocess.Popen(["dnsmasq", "-k", f"--conf-file={self.folder}/gateway.conf", *own])
        except (OSError, ValueError, RuntimeError) as error:
            give_up(error)
        say("leads")

    def tell_known(self):
        """Tell dnsmasq of the guests that etcd knows by now: until then, their leases are short."""
        if time.monotonic() < self.telling:
            return
        self.telling = time.monotonic() + KNOWN
        lines = [line for line in dhcp_hosts(self.registry.shared) if line not in self.known]
        if lines:
            new = f"{self.base}.dhcp-hosts.new"
            files.replace_file(new, "".join(lines))
            os.rename(new, f"{self.base}.dhcp-hosts.d/{len(self.known)}")  # dnsmasq reads what is moved there
            self.known.update(lines)

    def stop(self):
        """Lead no longer, and change the registry no longer: the gateway goes first."""
        run("ip", "link", "delete", "gw0", check=False, stderr=subprocess.DEVNULL)
        if self.dnsmasq:
            self.dnsmasq.kill()
            self.dnsmasq.wait()
            self.dnsmasq = None
            say("leads no longer")
        self.registry.refuse(NOBODY)

    def step(self):
        """Lead or follow for a moment."""
        if self.dnsmasq:
            self.stay()
            return time.sleep(follow.LOOK)
        watch = self.store.listen()  # first: so nothing is missed
        self.store.look(serializable=True)
        holder, reason = self.holder()
        self.registry.follow(reason, watch, RENEW if holder else 0)
        if not holder:
            self.campaign()
        elif holder == self.lease and self.renew():  # we had it all the time, as after a short stop of etcd's
            self.lead()

    def stay(self):
        """Go on to lead, or stop."""
        try:
            if not (time.monotonic() < self.renewal or self.renew()):
                self.stop()
            elif self.dnsmasq.poll() is not None:
                give_up("dnsmasq ended")
            elif self.registry.sync(self.key_is_ours(), writes=True):
                self.tell_known()
            else:  # the key is not ours, or somebody else gave etcd a registry: look at once
                self.renewal = 0
        finally:
            if self.dnsmasq and time.monotonic() > self.until:
                self.stop()

    def key_is_ours(self):
        """Return the condition that the leader's key is ours."""
        return self.store.key("leader") | {"target": "LEASE", "lease": self.lease}

    def leave(self):
        """Stop, give etcd what it has not yet, and have another lead at once."""
        self.stop()
        if self.lease:
            self.store.look(serializable=False)
            self.registry.sync(self.key_is_ours(), writes=True)
            self.store.ask("lease/revoke", ID=self.lease)


def main(arguments):
    """Lead and follow; return the exit status where that is not what was asked for."""
    if arguments in (["-h"], ["--help"]):
        return print(USAGE)
    if arguments:
        say(f"error: {' '.join(arguments)}: see --help")
        return 2
    host = Host()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    run("nft", "-f", "-", input=GATE)
    host.stop()  # what a former run may have left
    try:
        follow.repeat(host.step)
    finally:
        host.leave()


if __name__ == "__main__":
    sys.exit(files.run(main))
