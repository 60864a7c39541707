#!/usr/bin/env python3
"""The registry of instances in etcd, for instances-follow.py and instances-lead.py; it does nothing by itself.

There is one key per instance, and the key "history": a digest of all instances, and how many changes each writer has
made, by which two registries tell which is the newer one. All changes of one time are made by one transaction.
"""

import base64
import hashlib
import http.client
import json
import os
import select
import ssl
import sys
from runpy import run_path
from shutil import which
from types import SimpleNamespace

PATIENCE = 1  # seconds that each part of etcd's answer may take; half a second more per megabyte of a request
LARGE = 10  # the same, where the answer is a whole registry
WRITERS = 100  # of how many writers a history tells

files = SimpleNamespace(**run_path(which("instances-update.py") or sys.exit("no instances-update.py on the PATH")))


def encoded(text):
    """Return a text as etcd's JSON has keys and values."""
    return base64.b64encode(text.encode()).decode()


def decoded(entry):
    """Return the JSON of an entry's value, which has to be an object. Invalid if it is none."""
    try:
        value = json.loads(base64.b64decode(entry.get("value", "")))
        if isinstance(value, dict):
            return value
        raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
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


def certified(folder):
    """Return the TLS settings by which etcd and a host's programs know each other."""
    try:
        tls = ssl.create_default_context(cafile=f"{folder}/ca.crt")
        tls.load_cert_chain(f"{folder}/host.crt", f"{folder}/host.key")
        return tls
    except OSError as error:
        raise OSError(f"ca.crt, host.crt, host.key in {folder}: {error.strerror or error}") from None


class Store:
    """What an etcd has of one registry, by its JSON gateway. OSError where it does not answer, or by an error."""

    def __init__(self, name):
        self.address = os.environ.get("INSTANCES_ETCD") or "127.0.0.1:2379"
        self.certificates = os.environ.get("INSTANCES_TLS") or "/etc/etcd"
        self.tls = certified(self.certificates)
        self.folder = f"/{name}/"  # of the keys: history, late/HOST, leader, and then mac/MAC
        self.small = {"key": encoded(self.folder), "range_end": encoded(self.folder + "mac/")}  # the keys but the last
        self.seen = {}  # the small keys' entries as of the last look
        self.watch = None  # the connection by which etcd tells of their changes

    def ask(self, path, stream=False, patience=PATIENCE, **body):
        """Return the answer to a request; the connection that answers come by, if there is to be a stream of them."""
        self.tls = self.tls or certified(self.certificates)
        try:
            body = json.dumps(body)
            patience += len(body) / 2_000_000
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
            raise OSError(f"etcd at {self.address}: {error or type(error).__name__}") from None
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

    def fetch(self, since=0, **options):
        """Return the entries of the history and of the instances changed since a revision, and the revision of both."""
        every = {
            **self.key("mac/"),
            "range_end": encoded(self.folder + "mac0"),
            "min_mod_revision": since,
        }  # 0: after /
        ranges = [{"request_range": keys | options} for keys in (self.key("history"), every)]
        answer = self.ask("kv/txn", patience=PATIENCE if since else LARGE, success=ranges)
        history, entries = (part["response_range"].get("kvs", []) for part in answer["responses"])
        macs = [base64.b64decode(e["key"]).decode().removeprefix(self.folder + "mac/") for e in entries]
        return history, {json.loads(f'"{m}"'): e for m, e in zip(macs, entries)}, int(answer["header"]["revision"])

    def registry(self, revision, known):
        """Return history, registry and revision, known as of a revision. Invalid if the two do not belong together."""
        for since, old in ((revision + 1, known), (0, {})):  # mostly, little was changed
            entries, changed, now = self.fetch(since, serializable=True)
            history, registry = checked(*entries), old | {mac: decoded(entry) for mac, entry in changed.items()}
            if registry and history and digest(registry) == history.get("digest"):
                return history, registry, now
        raise Invalid("not taken from etcd: its instances are not those of its history")

    def give(self, registry, history, known, *conditions, without=()):
        """Make the registry this one, where it has what is known; return the revision, None if somebody was faster."""
        done = [{"request_put": self.key("history") | {"value": encoded(json.dumps(history))}}]
        gone = list(without)
        for mac in {*registry, *known}:
            name = "mac/" + json.dumps(mac)[1:-1]
            if mac not in registry:
                gone.append(name)
            elif registry[mac] != known.get(mac):
                done.append({"request_put": self.key(name) | {"value": encoded(json.dumps(registry[mac]))}})
        done += [{"request_delete_range": self.key(name)} for name in gone]
        same, nothing = [], {"target": "MOD", "mod_revision": 0}
        for name in ("history", *without):  # by values: members with other revisions of the same have been seen
            value = {"target": "VALUE", "value": self.seen.get(name, {}).get("value", "")}
            same.append(self.key(name) | (value if name in self.seen else nothing))
        answer = self.ask("kv/txn", compare=[*conditions, *same], success=done)
        if not answer.get("succeeded"):
            return None
        self.seen = {name: entry for name, entry in self.seen.items() if name not in without}
        self.seen["history"] = {"value": encoded(json.dumps(history))}
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
