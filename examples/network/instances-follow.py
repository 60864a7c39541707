#!/usr/bin/env python3
"""Keep the registry of instances the same on all hosts of one network, by way of etcd. Runs until it is ended.

The host that INSTANCES_WRITER names gives etcd each change of its registry. All others follow: they take it from there,
checked, as instances-update.py would, and make the marker. BASE.follows says that a host follows, and whom: there,
instances-update.py refuses to change anything. BASE.shared is what this host and etcd had in common last, with its
history: so it is known who has the newer registry, what etcd has lost, and gets again, and what this host alone has.
"""

import json
import os
import sys
import time
from runpy import run_path
from types import SimpleNamespace

USAGE = """\
usage: instances-follow.py            with its settings in the environment, the same on each host:
       instances-follow.py --take     once, where it says so: have this host's registry replaced by etcd's
       instances-follow.py --give     once, where it says so: have etcd's registry replaced by this host's

INSTANCES_WRITER, the host that writes the registry; INSTANCES_HOST, this one (its host name); INSTANCES_ETCD, etcd's
address (127.0.0.1:2379); INSTANCES_TLS, the folder of ca.crt, host.crt and host.key (/etc/etcd)."""

LOOK = 0.1  # how often the writer looks whether its file was changed, in seconds
CHECK = 10  # how often etcd is asked, in seconds, although it has reported no change
PAUSE = 1  # seconds to wait after a failure

etcd = SimpleNamespace(**run_path(os.path.dirname(os.path.realpath(__file__)) + "/instances-etcd.py"))
files, say = etcd.files, etcd.files.say


class Registry:
    """The registry of this host, and what etcd has of it."""

    def __init__(self):
        self.base = files.base_path()
        self.path, self.followed, self.note = (self.base + end for end in (".json", ".follows", ".shared"))
        self.store = etcd.Store(os.path.basename(self.base))
        self.name = os.environ.get("INSTANCES_HOST") or os.uname().nodename
        self.writer = None  # by what name changes of this host are counted
        self.history, self.shared, self.revision = None, {}, 0  # what etcd and this host had in common last
        self.read = None, {}  # the version of this host's file, and the registry in it
        self.current = False  # whether the writer has seen what etcd told of

    def mine(self, writes):
        """Return this host's registry: the very object that etcd and it have in common, if it is equal to that."""
        status = os.stat(self.path) if os.path.exists(self.path) else None
        version = status and (status.st_ino, status.st_mtime_ns, status.st_size)
        if version != self.read[0] or not version:
            try:
                registry = files.read_registry(self.path)
            except ValueError:  # who follows replaces it
                if writes:
                    raise
                version, registry = None, {}
            self.read = version, self.shared if registry == self.shared else registry
        return self.read[1]

    def refuse(self, reason):
        """Have instances-update.py refuse changes from now on, with a reason that names the host to make them on."""
        if not os.path.exists(self.followed) or open(self.followed).read() != reason:
            with files.locked(self.base):
                files.replace_file(self.followed, reason)

    def accept(self):
        """Have instances-update.py make changes from now on, to what the majority has."""
        if os.path.exists(self.followed):
            self.store.look(serializable=False)
            try:
                self.sync()
            except ValueError as error:  # our own is the last that was good
                say(error)
            with files.locked(self.base):
                os.unlink(self.followed)
                files.sync_folder(self.base)

    def agree(self, history, registry, revision):
        """Note what etcd and this host have in common, on disk."""
        files.replace_file(self.note, json.dumps({"history": history, "registry": registry}) + "\n")
        self.history, self.shared, self.revision = history, registry, revision
        self.read = None, {}

    def take(self, history, registry, revision, writes):
        """Have etcd's registry here. What this host alone has is entered again by who writes, or handed to who does."""
        mine, late, apart = self.mine(writes), {}, self.history and not etcd.knows(history, self.history)
        if writes and mine and not self.history and mine != registry:
            how = "instances-follow.py --take goes on with etcd's, --give with this host's"
            raise ValueError(f"etcd has another registry, and there is no {self.note} to tell which is newer: {how}")

        def change(mine):
            new = dict(registry)
            if self.history:
                late.clear()
                late.update(etcd.own_changes(mine, self.shared, registry, apart))
            if writes:
                etcd.merge(new, late)
            changed = new != mine
            mine.clear()
            mine.update(new)
            return changed, []

        change(dict(mine))
        if late and not writes:
            self.store.ask("kv/put", **self.store.key(f"late/{self.name}"), value=etcd.packed(late))
        files.change_registry(change, follower=True)
        if late:
            say(f"etcd did not have what this host had of {etcd.listed(late)}")
        self.agree(history, registry, revision)
        self.writer = None  # no change is counted twice by one name, wherever histories may part

    def give(self, registry, history, known, *conditions, **options):
        """Make etcd's registry this one; return whether nobody was faster."""
        revision = self.store.give(registry, history, known, *conditions, **options)
        if revision:
            self.agree(history, registry, revision)
        return bool(revision)

    def sync(self, *conditions, writes=False):
        """Make this host's registry and etcd's the same; return False if a transaction's conditions did not hold.

        Of what they had in common, the newer one counts. What was changed here since is given to etcd by who writes.
        """
        if not self.history:  # an earlier run, --take or --give has noted it
            noted = files.read_registry(self.note)
            self.history, self.shared = noted.get("history"), noted.get("registry", {})
        try:
            history = etcd.checked(self.store.seen.get("history"))
            if history and not (self.history and etcd.knows(self.history, history)):
                self.take(*self.store.registry(self.revision, self.shared), writes)
                history = self.history
        except etcd.Invalid as error:
            if not writes:
                raise
            say(error)
            history = None  # it is replaced
        if history != self.history:  # restored from a backup, or gone: whoever has it gives it back
            if not self.give(self.shared, self.history, {}, *conditions):
                return False
            say("etcd had lost changes: it has them again")
        mine = self.mine(writes)
        if self.history and mine is not self.shared and not (writes and mine):
            self.take(self.history, self.shared, self.revision, writes)
        return not writes or self.write_changes(*conditions)

    def write_changes(self, *conditions):
        """Give etcd what was changed here, and what others have handed over; return as sync does."""
        late = [name for name in self.store.seen if name.startswith("late/")]
        for name in late:
            changes = self.store.late(name)
            entered, _ = files.change_registry(lambda mine, late=changes: (etcd.merge(mine, late), []), follower=True)
            if entered:
                say(f"entered what {name[5:]} alone had of {etcd.listed(entered)}")
        mine = self.mine(True)
        if not mine or mine is self.shared and not late:
            return True
        self.writer = self.writer or f"{self.name}-{os.urandom(4).hex()}"
        return self.give(mine, etcd.longer(self.history, self.writer, mine), self.shared, *conditions, without=late)

    def follow(self, reason, watch, seconds):
        """Take what was seen of etcd, then wait until it tells of a change, or for so many seconds."""
        self.refuse(reason)
        self.sync()
        self.store.wait(watch, seconds)

    def step(self, writer):
        """Follow a writer for a moment, or write: give etcd what was changed."""
        watch = self.store.listen()  # first: so nothing is missed
        if writer != self.name:
            self.store.look(serializable=True)
            return self.follow(f"{writer} writes it", watch, CHECK)
        current, self.current = self.current, False
        if not current:
            self.store.look(serializable=False)
        self.accept()
        self.current = self.sync(writes=True) and not self.store.wait(watch, LOOK)

    def decide(self, take):
        """Have this host's registry replaced by etcd's, or else by whoever writes here etcd's by this host's."""
        if os.path.exists(self.followed):
            raise ValueError(f"this host does not write: {open(self.followed).read()}")
        self.store.look(serializable=False)
        agreed = self.store.registry(0, {})
        return self.take(*agreed, False) if take else self.agree(*agreed)


def repeat(step):
    """Do a step for ever. A failure is reported once when it begins and once when it is over."""
    told = ""
    while True:
        try:
            step()
            message = ""
        except (OSError, ValueError, RuntimeError) as error:
            message = str(error)
            time.sleep(PAUSE)
        if message != told:
            say(message or "goes on")
        told = message


def main(arguments):
    """Write or follow, or do what an administrator has decided; return the exit status."""
    writer = os.environ.get("INSTANCES_WRITER")
    if arguments in (["--take"], ["--give"]):
        return Registry().decide(arguments == ["--take"])
    if arguments in (["-h"], ["--help"]):
        return print(USAGE)
    if arguments or not writer:
        say(f"error: {' '.join(arguments) or 'no INSTANCES_WRITER'}: see --help")
        return 2
    registry = Registry()
    if writer == registry.name and not os.path.exists(registry.path):  # new, or lost: etcd is asked before dnsmasq
        registry.refuse("etcd is asked for it first")
    return repeat(lambda: registry.step(writer))


if __name__ == "__main__":
    sys.exit(files.run(main))
