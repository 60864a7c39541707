#!/usr/bin/env python3
"""Keep the registry of instances the same on all hosts of one network, by way of etcd. Runs until it is ended.

The host that INSTANCES_WRITER names sends its registry to etcd after each change. All others follow: they replace their
own with what etcd has, whole and checked, as instances-update.py would, and make the marker, so that it is processed.
BASE.follows says that a host follows, and whom: there, instances-update.py refuses to change anything.
"""

import base64
import http.client
import importlib
import json
import os
import select
import shutil
import ssl
import sys
import time

USAGE = """\
usage: instances-follow.py      with its settings in the environment, the same on each host:

INSTANCES_WRITER, the host that writes the registry; INSTANCES_HOST, this one (its host name); INSTANCES_ETCD, etcd's
address (127.0.0.1:2379); INSTANCES_TLS, the folder of ca.crt, host.crt and host.key (/etc/etcd)."""

LOOK = 0.1  # how often the writer looks whether its file was changed, in seconds
CHECK = 10  # how often a follower asks, in seconds, although etcd has reported no change
PATIENCE = 1  # seconds that each part of etcd's answer may take, and to wait after a failure

# The durable way to read and replace the registry stands in instances-update.py.
sys.dont_write_bytecode = True
script = shutil.which("instances-update.py") or sys.exit("no instances-update.py on the PATH")
sys.path.append(os.path.dirname(script))
files = importlib.import_module("instances-update")
files.__file__ = sys.argv[0]  # what it says is said by this program
say = files.say


def encoded(text):
    """Return a text as etcd's JSON has keys and values."""
    return base64.b64encode(text.encode()).decode()


def checked(value):
    """Return the text of a registry from etcd as the file has it. ValueError if it is no registry, or an empty one."""
    try:
        registry = json.loads(base64.b64decode(value))
        if isinstance(registry, dict) and registry and all(isinstance(i, dict) for i in registry.values()):
            return files.registry_text(registry)
        raise ValueError("no JSON object of objects")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the registry in etcd is not taken: {error}") from None


class Etcd:
    """The JSON gateway of an etcd. OSError where it does not answer, or by an error."""

    def __init__(self):
        self.address = os.environ.get("INSTANCES_ETCD") or "127.0.0.1:2379"
        folder = os.environ.get("INSTANCES_TLS") or "/etc/etcd"
        try:
            self.tls = ssl.create_default_context(cafile=f"{folder}/ca.crt")
            self.tls.load_cert_chain(f"{folder}/host.crt", f"{folder}/host.key")
        except OSError as error:
            raise OSError(f"ca.crt, host.crt, host.key in {folder}: {error.strerror or error}") from None

    def ask(self, path, stream=False, **body):
        """Return the answer to a request; the connection that answers come by, if there is to be a stream of them."""
        try:
            connection = http.client.HTTPSConnection(self.address, timeout=PATIENCE, context=self.tls)
            connection.request("POST", f"/v3/{path}", json.dumps(body))
            response = connection.getresponse()
            if stream and response.status == 200:
                return connection
            answer = json.loads(response.read())
            if response.status != 200:
                raise OSError(answer.get("message", answer))
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise OSError(f"etcd at {self.address}: {error or type(error).__name__}") from None
        connection.close()
        return answer

    def get(self, key, **options):
        """Return a key's entry, None if there is none."""
        return next(iter(self.ask("kv/range", key=encoded(key), **options).get("kvs", [])), None)


class Registry:
    """The registry of this host, and the one in etcd."""

    def __init__(self):
        self.etcd, self.base = Etcd(), files.base_path()
        self.path, self.followed = f"{self.base}.json", f"{self.base}.follows"
        self.folder = f"/{os.path.basename(self.base)}/"  # of the keys in etcd
        self.key = self.folder + "registry"
        self.same = None  # the revision in etcd and the state of the file when they were the same last
        self.watch = None  # the connection by which etcd tells of changes

    def state(self):
        """Return what changes with each change of the file, None where there is none."""
        status = os.stat(self.path) if os.path.exists(self.path) else None
        return status and (status.st_ino, status.st_mtime_ns, status.st_size)

    def refuse(self, reason):
        """Have instances-update.py refuse changes from now on, with a reason that names the host to make them on."""
        if not os.path.exists(self.followed) or open(self.followed).read() != reason:
            with files.locked(self.base):
                files.replace_file(self.followed, reason)

    def accept(self):
        """Have instances-update.py make changes from now on, to what the majority has."""
        if os.path.exists(self.followed):
            try:
                self.take(serializable=False)
            except ValueError as error:  # our own is the last that was good
                say(error)
                self.same = None
            with files.locked(self.base):
                os.unlink(self.followed)
                files.sync_folder(self.base)

    def take(self, serializable=True):
        """Make the file what etcd has: the one that is asked, or else the majority."""
        entry = self.etcd.get(self.key, serializable=serializable, keys_only=True)
        if not entry or self.same == (entry["mod_revision"], self.state()):
            return
        entry = self.etcd.get(self.key, serializable=serializable)
        text = checked(entry.get("value", ""))
        with files.locked(self.base):
            if not self.state() or open(self.path, errors="replace").read() != text:
                files.make_marker(self.base)
                files.replace_file(self.path, text)
        self.same = entry["mod_revision"], self.state()

    def follow(self, reason, seconds):
        """Take what etcd has, then wait until it reports a change, or for so many seconds."""
        self.refuse(reason)
        keys = {"key": encoded(self.folder), "range_end": encoded(self.folder[:-1] + "0")}  # 0 comes after the slash
        watch = self.watch or self.etcd.ask("watch", stream=True, create_request=keys)  # first: so nothing is missed
        self.watch = None
        self.take()
        while select.select([watch.sock], [], [], seconds)[0]:
            if not watch.sock.recv(1 << 16):  # what was changed is asked for
                raise OSError("etcd ended the watch")
            seconds = 0
        self.watch = watch  # for the next time, if nothing failed

    def send(self, *conditions):
        """Give etcd the file, if it was changed; return whether the conditions of the transaction held."""
        now = self.state()
        if not now or self.same and self.same[1] == now:
            return True
        text = files.registry_text(files.read_registry(self.path))
        put = {"request_put": {"key": encoded(self.key), "value": encoded(text)}}
        answer = self.etcd.ask("kv/txn", compare=conditions, success=[put])
        if answer.get("succeeded"):
            self.same = answer["header"]["revision"], now
        return answer.get("succeeded", False)

    def write(self):
        """Give etcd what was changed, then wait a moment."""
        self.accept()
        self.send()
        time.sleep(LOOK)


def repeat(step):
    """Do a step for ever. A failure is reported once when it begins and once when it is over."""
    told = ""
    while True:
        try:
            step()
            message = ""
        except (OSError, ValueError, RuntimeError) as error:
            message = str(error)
            time.sleep(PATIENCE)
        if message != told:
            say(message or "goes on")
        told = message


def main(arguments):
    """Send or follow; return the exit status of wrong usage."""
    writer = os.environ.get("INSTANCES_WRITER")
    if arguments or not writer:
        print(USAGE, file=sys.stderr)
        return 2
    registry = Registry()
    if writer != (os.environ.get("INSTANCES_HOST") or os.uname().nodename):
        return repeat(lambda: registry.follow(f"{writer} writes it", CHECK))
    if not registry.state():  # it is new or was lost: nobody is registered before etcd was asked
        registry.refuse("etcd is asked for it first")
    return repeat(registry.write)


if __name__ == "__main__":
    sys.exit(files.run(main))
