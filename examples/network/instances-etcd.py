#!/usr/bin/env python3
"""The registry of instances in etcd, for instances-follow.py and instances-lead.py; it does nothing by itself.

There are PARTS keys that have the instances, and the key "history": a digest of them all, and how many changes each
writer has made, by which two registries tell which is the newer one. A change is one transaction: of the parts that it
concerns, or of all.
"""

import base64
import hashlib
import http.client
import json
import os
import select
import ssl
import sys
import zlib
from runpy import run_path
from shutil import which
from types import SimpleNamespace

PATIENCE = 1  # seconds that each part of etcd's answer may take; half a second more per megabyte of a request
PARTS = 100  # a change writes little of a large registry, and a transaction has room for 128, which is etcd's default
WRITERS = 100  # of how many writers a history tells

files = SimpleNamespace(**run_path(which("instances-update.py") or sys.exit("no instances-update.py on the PATH")))


def encoded(text):
    """Return a text as etcd's JSON has keys and values."""
    return base64.b64encode(text.encode()).decode()


def packed(value):
    """Return an object as etcd's JSON has values: compressed, to a fifth."""
    return base64.b64encode(zlib.compress(json.dumps(value).encode())).decode()


def decoded(entry):
    """Return the object that an entry has. Invalid if it has none."""
    try:
        value = json.loads(zlib.decompress(base64.b64decode(entry.get("value", ""))))
        if isinstance(value, dict):
            return value
        raise ValueError("no JSON object")
    except (ValueError, RecursionError, zlib.error) as error:
        raise Invalid(f"not taken from etcd: {base64.b64decode(entry['key']).decode()}: {error}") from None


def checked(entry=None):
    """Return the history that an entry has, None if there is none. Invalid if it is not one."""
    history = decoded(entry) if entry else None
    if history is None or isinstance(history.get("changes"), dict) and history["changes"]:
        return history
    raise Invalid("not taken from etcd: a history without changes")


def digest(registry):
    """Return what tells registries apart, whatever their order is."""
    return hashlib.sha256(json.dumps(registry, sort_keys=True).encode()).hexdigest()


def part_of(mac):
    """Return the name of the key that has an instance."""
    return f"part/{zlib.crc32(ascii(mac).encode()) % PARTS:02}"


def divided(registry):
    """Return the parts of a registry by the names of their keys."""
    parts = {f"part/{number:02}": {} for number in range(PARTS)}
    for mac, instance in registry.items():
        parts[part_of(mac)][mac] = instance
    return parts


def knows(history, other):
    """Tell whether a history has the last change of another one: it is the same or newer."""
    writer, number = list(other["changes"].items())[-1]
    return history["changes"].get(writer, 0) >= number


def longer(history, writer, registry):
    """Return a history with one change more, by a writer, that has led to a registry."""
    changes = dict(history["changes"]) if history else {}
    changes[writer] = changes.pop(writer, 0) + 1  # the last one is the last writer
    return {"digest": digest(registry), "changes": dict(list(changes.items())[-WRITERS:])}


def own_changes(mine, shared, there, apart):
    """Return what a host has and etcd lacks: by MAC address what it replaces, None where there is nothing, and what.

    That is what was entered or changed since both had the same. What is missing here is not missed there. If their
    histories went apart, it is all that etcd does not have.
    """
    late = {mac: [there.get(mac), new | there.get(mac, {})] for mac, new in mine.items()} if apart else {}
    late |= {mac: [shared.get(mac), new] for mac, new in mine.items() if new not in (shared.get(mac), there.get(mac))}
    return {mac: change for mac, change in late.items() if change[0] != change[1]}


def merge(registry, late):
    """Enter what a host alone had, where nothing else was entered since; return the MAC addresses of what was entered.

    A name or address that somebody else has by now stays there.
    """
    entered = [mac for mac, (old, _) in late.items() if registry.get(mac) == old]
    for mac in entered:
        new = late[mac][1]
        taken = [f for f in ("name", *files.LEASED) if new.get(f) and files.others(registry, mac, f, new[f])]
        registry[mac] = {"name": ""} | {field: value for field, value in new.items() if field not in taken}
    return entered


def listed(macs):
    """Return MAC addresses for a message."""
    return ", ".join(sorted(macs)[:5]) + (f", and {len(macs) - 5} more" if len(macs) > 5 else "")


class Invalid(ValueError):
    """What etcd has is not valid, and not taken."""


class Store:
    """What an etcd has of one registry, by its JSON gateway. OSError where it does not answer, or by an error."""

    def __init__(self, name):
        self.address = os.environ.get("INSTANCES_ETCD") or "127.0.0.1:2379"
        self.certificates = os.environ.get("INSTANCES_TLS") or "/etc/etcd"
        self.tls = None  # the certificates by which etcd and this host know each other
        self.folder = f"/{name}/"  # of the keys: history, late/HOST, leader, and then part/NN
        self.small = {"key": encoded(self.folder), "range_end": encoded(self.folder + "part/")}  # the keys but the last
        self.seen = {}  # the small keys' entries as of the last look
        self.watch = None  # the connection by which etcd tells of their changes

    def ask(self, path, stream=False, **body):
        """Return the answer to a request; the connection that answers come by, if there is to be a stream of them."""
        try:
            if not self.tls:
                self.tls = ssl.create_default_context(cafile=f"{self.certificates}/ca.crt")
                self.tls.load_cert_chain(f"{self.certificates}/host.crt", f"{self.certificates}/host.key")
            body = json.dumps(body)
            patience = PATIENCE + len(body) / 2_000_000
            connection = http.client.HTTPSConnection(self.address, timeout=patience, context=self.tls)
            connection.request("POST", f"/v3/{path}", body)
            response = connection.getresponse()
            if stream and response.status == 200:
                return connection
            answer = json.loads(response.read())
            if response.status != 200:
                raise OSError(answer.get("message", answer))
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.tls = None  # they may have been renewed
            place = f"etcd at {self.address}, by the certificates in {self.certificates}"
            raise OSError(f"{place}: {str(error) or type(error).__name__}") from None
        connection.close()
        return answer

    def key(self, name):
        """Return a key as etcd's JSON has it."""
        return {"key": encoded(self.folder + name)}

    def look(self, serializable):
        """See the small keys: as the member that is asked has them (serializable), or the majority."""
        entries = self.ask("kv/range", **self.small, serializable=serializable).get("kvs", [])
        self.seen = {base64.b64decode(e["key"]).decode().removeprefix(self.folder): e for e in entries}

    def late(self, name):
        """Return what was handed over by a key, nothing if it is not valid."""
        try:
            return {mac: (old, dict(new)) for mac, (old, new) in decoded(self.seen[name]).items()}
        except (TypeError, ValueError) as error:
            files.say(f"{name} in etcd is ignored: {error}")
            return {}

    def registry(self, revision, known):
        """Return history, registry and revision, known as of a revision. Invalid if the two do not belong together."""
        parts = {**self.key("part/"), "range_end": encoded(self.folder + "part0"), "serializable": True}  # 0: after /
        for since, old in ((revision + 1, known), (0, {})):  # mostly, little was changed
            ranges = self.key("history") | {"serializable": True}, parts | {"min_mod_revision": since}
            answer = self.ask("kv/txn", success=[{"request_range": keys} for keys in ranges])
            history, entries = (part["response_range"].get("kvs", []) for part in answer["responses"])
            history, changed = checked(*history), {base64.b64decode(e["key"]).decode(): decoded(e) for e in entries}
            registry = {mac: i for mac, i in old.items() if self.folder + part_of(mac) not in changed}
            for part in changed.values():
                registry |= part
            valid = registry and all(isinstance(instance, dict) for instance in registry.values())
            if valid and history and digest(registry) == history.get("digest"):
                return history, registry, int(answer["header"]["revision"])
        raise Invalid("not taken from etcd: its instances are not those of its history")

    def give(self, registry, history, known, *conditions, without=()):
        """Make the registry this one, known as etcd has it, or {}; return the revision, None if somebody was faster."""
        old = divided(known) if known else {}
        new = {name: part for name, part in divided(registry).items() if part != old.get(name)} | {"history": history}
        done = [{"request_put": self.key(name) | {"value": packed(value)}} for name, value in new.items()]
        done += [{"request_delete_range": self.key(name)} for name in without]
        same, nothing = [], {"target": "MOD", "mod_revision": 0}
        for name in ("history", *without):  # by values: members with other revisions of the same have been seen
            value = {"target": "VALUE", "value": self.seen.get(name, {}).get("value", "")}
            same.append(self.key(name) | (value if name in self.seen else nothing))
        answer = self.ask("kv/txn", compare=[*conditions, *same], success=done)
        if not answer.get("succeeded"):
            return None
        self.seen = {name: entry for name, entry in self.seen.items() if name not in without}
        self.seen["history"] = {"value": packed(history)}
        return int(answer["header"]["revision"])

    def listen(self):
        """Return the connection by which etcd tells of changes. Once all that it told of was seen, wait() keeps it."""
        watch, self.watch = self.watch or self.ask("watch", stream=True, create_request=self.small), None
        return watch

    def wait(self, watch, seconds):
        """Wait until etcd tells of a change, or for so many seconds; return whether it did."""
        told = False
        while select.select([watch.sock], [], [], 0 if told else seconds)[0]:
            if not watch.sock.recv(1 << 16):  # what was changed is asked for
                raise OSError("etcd ended the watch")
            told = True
        self.watch = watch
        return told
