# SPDX-License-Identifier: Apache-2.0
"""Status as people and scripts know it: drbdsetup's `status` and `events2`, with the reasons.

Pure functions over the status object (`Resource.status()`, the same keys as `status --json`).  A key that
is missing shows as `unknown`: the process may be older or newer than the command.  Text that came from
elsewhere (a peer's farewell, a process name) is made printable, so that nobody's terminal obeys a stranger.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

Status = Mapping[str, object]

NOTHING_CONFIGURED = "# No currently configured resource found."
WIDTH = 80

_CYAN, _GREEN, _RED, _OFF = "\x1b[1;36m", "\x1b[1;32m", "\x1b[1;31m", "\x1b[0m"
_GOOD = ("UpToDate",)
_BAD = ("Diskless", "Failed", "Inconsistent", "Outdated", "DUnknown", "StandAlone", "Unknown")
_QUIET_REPLICATION = ("Off", "Established")

_DEVICE_STATISTICS = ("size", "read", "written")
_DEVICE_STATISTICS_VERBOSE = ("al-writes", "bm-writes", "upper-pending", "lower-pending")
_CONNECTION_STATISTICS = ("congested", "ap-in-flight", "rs-in-flight")
_PEER_STATISTICS = ("received", "sent", "out-of-sync", "pending", "unacked")


def status_json(statuses: Sequence[Status]) -> str:
    """The array as it is, for programs."""
    return json.dumps(list(statuses), indent=2, allow_nan=False) + "\n"


def status_text(
    statuses: Sequence[Status], *, verbose: bool = False, statistics: bool = False, colour: bool = False
) -> str:
    """All resources, as `drbdsetup status` prints them; `colour` only for a terminal."""
    if not statuses:
        return NOTHING_CONFIGURED + "\n"
    page = _Page(verbose, statistics, colour)
    for status in statuses:
        page.resource(status)
    return "\n".join(page.lines) + "\n"


class _Page:
    """Lines of one status page, wrapped between words as drbdsetup does."""

    def __init__(self, verbose: bool, statistics: bool, colour: bool) -> None:
        self.verbose = verbose
        self.statistics = statistics
        self.colour = colour
        self.lines: list[str] = []

    def resource(self, status: Status) -> None:
        words = [_text(status, "name")]
        if self.verbose:
            words.append(f"node-id:{_text(status, 'node-id')}")
        words.append(f"role:{self._painted(_text(status, 'role'))}")
        if self.verbose or status.get("suspended"):
            words.append(f"suspended:{_text(status, 'suspended')}")
        self._line(0, 4, words)
        if self.verbose and self.statistics:
            self._line(4, 4, [f"write-ordering:{_text(status, 'write-ordering')}"])
        reasons = _items(status, "reasons")
        devices, connections = _items(status, "devices"), _items(status, "connections")
        places = {f"volume {_text(device, 'volume')}" for device in devices}
        places |= {f"connection {_text(connection, 'name')}" for connection in connections}
        # A reason with a scope we do not know belongs to the resource: none is ever lost.
        self._reasons(4, [reason for reason in reasons if _text(reason, "scope") not in places])
        for device in devices:
            self._device(device, len(devices) == 1)
            scope = f"volume {_text(device, 'volume')}"
            self._reasons(6, [reason for reason in reasons if _text(reason, "scope") == scope])
        for connection in connections:
            self._connection(connection)
            scope = f"connection {_text(connection, 'name')}"
            self._reasons(6, [reason for reason in reasons if _text(reason, "scope") == scope])
            peers = _items(connection, "peer_devices")
            if self.verbose or self.statistics or _text(connection, "connection-state") == "Connected":
                for peer in peers:
                    self._peer_device(peer, len(peers) == 1)
        self.lines.append("")

    def _device(self, device: Status, single: bool) -> None:
        words = self._volume(device, single)
        if self.verbose and device.get("minor") is not None:
            words.append(f"minor:{_text(device, 'minor')}")
        words.append(f"disk:{self._painted(_text(device, 'disk-state'))}")
        if "open" in device:
            words.append(f"open:{_text(device, 'open')}")
        self._line(2, 6, words)
        openers = device.get("openers")
        if self.verbose and isinstance(openers, list) and openers:
            self._line(6, 6, ["open-by:" + ", ".join(_clean(str(opener)) for opener in openers)])
        if self.statistics:
            keys = _DEVICE_STATISTICS + (_DEVICE_STATISTICS_VERBOSE if self.verbose else ())
            self._line(6, 6, [f"{key}:{_text(device, key)}" for key in keys])

    def _connection(self, connection: Status) -> None:
        state = _text(connection, "connection-state")
        words = [_text(connection, "name")]
        if self.verbose:
            words.append(f"node-id:{_text(connection, 'peer-node-id')}")
        if self.verbose or state != "Connected":
            words.append(f"connection:{self._painted(state)}")
        if self.verbose or state == "Connected":
            words.append(f"role:{self._painted(_text(connection, 'peer-role'))}")
        if self.verbose or connection.get("congested"):
            words.append(f"congested:{_text(connection, 'congested')}")
        if self.verbose:
            words.append(f"tls:{_text(connection, 'tls')}")
        self._line(2, 6, words)
        if self.verbose and self.statistics:
            self._line(6, 6, [f"{key}:{_text(connection, key)}" for key in _CONNECTION_STATISTICS[1:]])

    def _peer_device(self, peer: Status, single: bool) -> None:
        words = self._volume(peer, single)
        replication, syncing = _text(peer, "replication-state"), bool(peer.get("has-sync-details"))
        if self.verbose or replication not in _QUIET_REPLICATION:
            words.append(f"replication:{replication}")
        words.append(f"peer-disk:{self._painted(_text(peer, 'peer-disk-state'))}")
        if syncing:
            words.append(f"done:{_done(peer)}")
        if self.verbose or peer.get("resync-suspended", "no") != "no":
            words.append(f"resync-suspended:{_text(peer, 'resync-suspended')}")
        self._line(4, 8, words)
        if self.statistics:
            keys = _PEER_STATISTICS if self.verbose else _PEER_STATISTICS[:3]
            self._line(8, 8, [f"{key}:{_text(peer, key)}" for key in keys])
            if syncing:
                rate, eta = _text(peer, "db/dt [MiB/s]"), _text(peer, "estimated-seconds-to-finish")
                self._line(8, 8, [f"sync:{_text(peer, 'sync-kind')}", f"dbdt:{rate}", f"eta:{eta}"])

    def _volume(self, thing: Status, single: bool) -> list[str]:
        number = _text(thing, "volume")
        return [f"volume:{number}"] if self.verbose or not (single and number == "0") else []

    def _reasons(self, indent: int, reasons: Sequence[Status]) -> None:
        # Not wrapped: a sentence in one line can be found with grep.
        for reason in reasons:
            self.lines.append(f"{' ' * indent}why: {_text(reason, 'text')}")
            if reason.get("do"):
                self.lines.append(f"{' ' * indent}do: {_text(reason, 'do')}")

    def _line(self, indent: int, continued: int, words: Sequence[str]) -> None:
        line, length = " " * indent + words[0], indent + _columns(words[0])
        for word in words[1:]:
            if length + 1 + _columns(word) > WIDTH:
                self.lines.append(line)
                line, length = " " * continued + word, continued + _columns(word)
            else:
                line, length = f"{line} {word}", length + 1 + _columns(word)
        self.lines.append(line)

    def _painted(self, word: str) -> str:
        ink = _CYAN if word == "Primary" else _GREEN if word in _GOOD else _RED if word in _BAD else ""
        return f"{ink}{word}{_OFF}" if self.colour and ink else word


def initial_events(statuses: Sequence[Status], *, statistics: bool = False) -> list[str]:
    """What `events2` prints first: everything that exists, then `exists -`."""
    lines = []
    for status in statuses:
        lines += [f"exists {_shown(key, fields)}" for key, fields in _objects(status, statistics).items()]
    return [*lines, "exists -"]


def event_lines(
    before: Status | None, after: Status | None, *, statistics: bool = False, diff: bool = False
) -> list[str]:
    """The lines of `events2` between two states of one resource; None: it does not exist.

    A change names only the fields that changed, with `diff` as `old->new`.
    """
    old = {} if before is None else _objects(before, statistics)
    new = {} if after is None else _objects(after, statistics)
    lines = [f"destroy {' '.join(key)}" for key in reversed(old) if key not in new]
    for key, fields in new.items():
        if key not in old:
            lines.append(f"create {_shown(key, fields)}")
            continue
        was = old[key]
        names = (*fields, *(gone for gone in was if gone not in fields))
        changed = {name: fields.get(name, "-") for name in names if was.get(name) != fields.get(name)}
        # `done` ends with the resync; the change of `replication` says so.
        if "done" not in fields:
            changed.pop("done", None)
        if diff:
            changed = {name: f"{was.get(name, '-')}->{value}" for name, value in changed.items()}
        if changed:
            lines.append(f"change {_shown(key, changed)}")
    return lines


_Key = tuple[str, ...]


def _objects(status: Status, statistics: bool) -> dict[_Key, dict[str, str]]:
    """Everything a resource consists of: (sort, identity …) → fields, in the order events2 prints."""
    name = f"name:{_text(status, 'name')}"
    resource = {"role": _text(status, "role"), "suspended": _text(status, "suspended")}
    resource |= _some(status, {"may-promote": "may_promote", "promotion-score": "promotion_score"})
    if statistics:
        resource |= _some(status, {"write-ordering": "write-ordering"})
    found: dict[_Key, dict[str, str]] = {("resource", name): resource}
    for connection, key in _connections(status):
        fields = {
            "connection": _text(connection, "connection-state"),
            "role": _text(connection, "peer-role"),
        }
        fields |= _some(connection, {key: key for key in _CONNECTION_STATISTICS} if statistics else {})
        found[("connection", name, *key)] = fields
    for device in _items(status, "devices"):
        identity = _some(device, {"volume": "volume", "minor": "minor"})
        fields = {"disk": _text(device, "disk-state")} | _some(device, {"open": "open"})
        keys = _DEVICE_STATISTICS + _DEVICE_STATISTICS_VERBOSE if statistics else ()
        fields |= _some(device, {key: key for key in keys})
        found[("device", name, *_pairs(identity))] = fields
    for connection, key in _connections(status):
        for peer in _items(connection, "peer_devices"):
            fields = {
                "replication": _text(peer, "replication-state"),
                "peer-disk": _text(peer, "peer-disk-state"),
                "resync-suspended": _text(peer, "resync-suspended"),
            }
            if peer.get("has-sync-details"):
                fields["done"] = _done(peer)
            fields |= _some(peer, {key: key for key in _PEER_STATISTICS} if statistics else {})
            found[("peer-device", name, *key, f"volume:{_text(peer, 'volume')}")] = fields
    return found


def _connections(status: Status) -> Iterator[tuple[Status, _Key]]:
    for item in _items(status, "connections"):
        yield item, (f"peer-node-id:{_text(item, 'peer-node-id')}", f"conn-name:{_text(item, 'name')}")


def _shown(key: _Key, fields: Mapping[str, str]) -> str:
    return " ".join((*key, *_pairs(fields)))


def _pairs(fields: Mapping[str, str]) -> Iterator[str]:
    return (f"{name}:{value}" for name, value in fields.items())


def _some(thing: Status, names: Mapping[str, str]) -> dict[str, str]:
    return {name: _text(thing, key) for key, name in names.items() if thing.get(key) is not None}


def _items(thing: Status, key: str) -> list[Status]:
    value = thing.get(key)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def _text(thing: Status, key: str) -> str:
    value = thing.get(key)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else _clean(str(value))


def _done(peer: Status) -> str:
    value = peer.get("percent-resync-done", peer.get("percent-in-sync"))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "unknown"
    # What is unfinished never reads 100.00.
    return f"{value if value >= 100 else min(max(0.0, value), 99.99):.2f}"


def _clean(text: str) -> str:
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def _columns(word: str) -> int:
    for code in (_CYAN, _GREEN, _RED, _OFF):
        word = word.replace(code, "")
    return len(word)
