#!/usr/bin/env python3
"""Have one of a network's hosts at a time, the leader, be its gateway and run its dnsmasq. Runs until it is ended.

The leader has the key "leader" in etcd, which etcd deletes if its lease is not renewed for TTL seconds. A leader that
can't renew it stops STOP seconds after the last renewal began: by itself, or by the kernel's clock if it hangs.
The leader sends its registry to etcd while the key is its own; the others follow, as with instances-follow.py. A new
leader begins with the registry that the majority has, so that all registered guests keep their addresses.
"""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time

sys.dont_write_bytecode = True
follow = importlib.import_module("instances-follow")
files, say = follow.files, follow.say

USAGE = """\
usage: instances-lead.py        with its settings in the environment, the same on each host:

INSTANCES_HOST, this host (its host name); INSTANCES_RULES, the folder of gateway.ip and gateway.conf (/etc/instances);
INSTANCES_ETCD and INSTANCES_TLS, as for instances-follow.py."""

TTL, STOP, RENEW = 5, 3.5, 1  # in seconds; TTL - STOP is what the gateway's end may take

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
    """Return dnsmasq's --dhcp-hostsfile that keeps all instances' addresses theirs: lines of MAC,IPV4,[IPV6],..."""
    lines = []
    for mac in filter(files.is_mac, registry):
        words = [mac]
        for field in files.LEASED:
            address = registry[mac].get(field)
            with contextlib.suppress(ValueError):  # none, or none that instances-process.py would take
                if files.parse_address(address) == (field, address):
                    words.append(address if field == "ipv4" else f"[{address}]")
        if words[1:]:
            lines.append(",".join(words) + "\n")
    return "".join(lines)


class Host:
    """A host that leads or follows."""

    def __init__(self):
        self.registry = follow.Registry()
        self.etcd, self.base, self.key = self.registry.etcd, self.registry.base, self.registry.folder + "leader"
        self.name = os.environ.get("INSTANCES_HOST") or os.uname().nodename
        self.folder = os.environ.get("INSTANCES_RULES") or "/etc/instances"
        self.lease = self.dnsmasq = None
        self.until = self.renewal = 0  # when a leader has to stop, and to renew the lease: by the monotonic clock

    def holder(self, **options):
        """Return the lease behind the leader's key, None if there is none, and the reason to refuse changes."""
        entry = self.etcd.get(self.key, **options)
        if not entry:
            return None, NOBODY
        return entry.get("lease"), follow.base64.b64decode(entry["value"]).decode() + " leads"

    def renew(self):
        """Renew the lease, and with it the time to lead; return whether the leader's key is ours, and time is left."""
        begun = time.monotonic()
        if not self.lease or "TTL" not in self.etcd.ask("lease/keepalive", ID=self.lease)["result"]:
            self.lease = None
            return False
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
        self.lease = self.etcd.ask("lease/grant", TTL=TTL)["ID"]  # if another host was first, it runs out
        free = {"key": follow.encoded(self.key), "target": "CREATE", "create_revision": 0}
        put = {"key": follow.encoded(self.key), "value": follow.encoded(self.name), "lease": self.lease}
        self.etcd.ask("kv/txn", compare=[free], success=[{"request_put": put}])
        if self.renew():
            self.lead()

    def lead(self):
        """Become the gateway, with the majority's registry, and so the same leases. End if that fails."""
        try:
            self.registry.accept()
            files.replace_file(f"{self.base}.dhcp-hosts", dhcp_hosts(files.read_registry(self.registry.path)))
            run("rm", "-f", f"{self.base}.leases")  # of another time that we led
            run("ip", "-batch", f"{self.folder}/gateway.ip")
            run("instances-update.py", "--initialize", "gw0", "host")
            own = [f"--dhcp-hostsfile={self.base}.dhcp-hosts", f"--dhcp-leasefile={self.base}.leases"]
            self.dnsmasq = subprocess.Popen(["dnsmasq", "-k", f"--conf-file={self.folder}/gateway.conf", *own])
        except (OSError, ValueError, RuntimeError) as error:
            give_up(error)
        say("leads")

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
        holder, reason = self.holder(serializable=True)
        self.registry.follow(reason, RENEW if holder else 0)
        if not holder:
            self.campaign()
        elif holder == self.lease and self.renew():  # we had it all the time, as after a short stop of etcd's
            self.lead()

    def stay(self):
        """Go on to lead, or stop."""
        try:
            ours = time.monotonic() < self.renewal or self.renew()
            if not ours or not self.registry.send(self.key_is_ours()):
                self.stop()
            elif self.dnsmasq.poll() is not None:
                give_up("dnsmasq ended")
        finally:
            if self.dnsmasq and time.monotonic() > self.until:
                self.stop()

    def key_is_ours(self):
        """Return the condition of a transaction that the leader's key is ours."""
        return {"key": follow.encoded(self.key), "target": "LEASE", "lease": self.lease}

    def leave(self):
        """Stop, send what is not yet sent, and have another lead at once."""
        self.stop()
        if self.lease:
            self.registry.send(self.key_is_ours())
            self.etcd.ask("lease/revoke", ID=self.lease)


def main(arguments):
    """Lead and follow; return the exit status of wrong usage."""
    if arguments:
        print(USAGE, file=sys.stderr)
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
