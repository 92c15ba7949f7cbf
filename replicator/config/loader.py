# SPDX-License-Identifier: Apache-2.0
"""One TOML file per resource, identical on every node: read, checked as a whole, believed afterwards.

`load` finds every fault before it raises, each as ``file: key: problem (hint)``, so that the administrator
edits once.  A `ResourceConfig` that exists is right: nothing behind this border checks it again.  Which
settings exist is declared in `replicator.config.schema`; here are the file and the checks that concern
several settings.  Any sequence of bytes gives a `ResourceConfig` or a `ConfigError`, nothing else.
"""

from __future__ import annotations

import difflib
import os
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from replicator.config.paths import resource_names
from replicator.config.schema import (
    EPHEMERAL_PORT_MIN,
    FOREIGN_KEYS,
    NAME,
    NAME_HINT,
    PROTOCOL,
    PROTOCOL_DEFAULT,
    VOLUME_NUMBER_MAX,
    VOLUMES_MAX,
    Device,
    Disk,
    Net,
    Node,
    NodeVolume,
    Options,
    Volume,
    specs,
)
from replicator.config.values import Fault, shown
from replicator.errors import ConfigError

FILE_BYTES_MAX = 1024 * 1024
FAULTS_MAX = 100  # a file that is wrong throughout is not worth a screen per key

_Section = TypeVar("_Section")
_Report = Callable[[str, str, str], None]  # key, problem, hint


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceConfig:
    """A resource as configured; `nodes` by ascending id, `volumes` by ascending number."""

    name: str
    path: Path
    protocol: str
    options: Options
    net: Net
    disk: Disk
    device: Device
    volumes: Mapping[int, Volume]
    nodes: tuple[Node, ...]

    def node(self, name: str) -> Node:
        """The node called `name`; a host name with a domain finds its short name, and the reverse.

        Raises ConfigError when there is none, or when a short name fits several.
        """
        wanted = name.lower()
        for node in self.nodes:
            if node.name == wanted:
                return node
        short = wanted.partition(".")[0]
        found = [node for node in self.nodes if short in (node.name, node.name.partition(".")[0])]
        # alpha.one and alpha.two are different machines: a domain may be missing, never different.
        found = [node for node in found if "." not in node.name or "." not in wanted]
        if len(found) == 1:
            return found[0]
        names = ", ".join(node.name for node in self.nodes)
        hint = f"the file has {names}; REPLICATOR_NODE overrides the host name"
        raise ConfigError([f"{self.path}: node: no single node fits the name {shown(name)} ({hint})"])

    def peer_ids(self, node: Node) -> tuple[int, ...]:
        """Ids of all other nodes, ascending."""
        return tuple(other.node_id for other in self.nodes if other.node_id != node.node_id)

    def options_to_match(self) -> tuple[tuple[str, str], ...]:
        """What both nodes must have configured alike, as it travels in HELLO."""
        net = self.net
        return (
            ("protocol", self.protocol),
            ("allow-two-primaries", "yes" if net.allow_two_primaries else "no"),
            ("after-sb-0pri", net.after_sb_0pri),
            ("after-sb-1pri", net.after_sb_1pri),
            ("after-sb-2pri", net.after_sb_2pri),
        )


def load(path: Path) -> ResourceConfig:
    """Read and check one file.  Raises ConfigError with every fault found."""
    return parse(_read(path), path)


def parse(data: bytes, path: Path) -> ResourceConfig:
    """Check the content of a file; `path` names the resource.  Raises ConfigError with every fault."""
    faults: list[str] = []

    def report(key: str, problem: str, hint: str = "") -> None:
        faults.append(f"{path}: {key}: {problem}" + (f" ({hint})" if hint else ""))

    if not NAME.fullmatch(path.stem):
        report("file name", f"{shown(path.stem)} cannot be the name of a resource", NAME_HINT)
    document = _document(data, report)
    config = None if document is None else _resource(document, path, report)
    if faults:
        more = len(faults) - FAULTS_MAX
        raise ConfigError(faults[:FAULTS_MAX] + ([f"{path}: and {more} more faults"] if more > 0 else []))
    assert config is not None, "a configuration without faults is complete"
    return config


def _read(path: Path) -> bytes:
    def fail(problem: str, hint: str) -> ConfigError:
        return ConfigError([f"{path}: file: {problem} ({hint})"])

    try:
        # Non-blocking: a fifo in place of the file must not hang an agent.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise fail("not a regular file", "one TOML file per resource")
            if status.st_mode & stat.S_IWOTH:
                raise fail("everybody may write to it", "it names the disks root overwrites: chmod o-w")
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError as error:
        names = ", ".join(resource_names(path.parent)) or "none"
        raise fail("does not exist", f"resources configured in {path.parent}: {names}") from error
    except (OSError, ValueError) as error:
        raise fail(f"cannot be read: {error}", "run as root, or set REPLICATOR_CONFIG_DIR") from error
    if len(data) > FILE_BYTES_MAX:
        raise fail(f"larger than {FILE_BYTES_MAX} bytes", "this is not a configuration file")
    return data


def _document(data: bytes, report: _Report) -> dict[str, object] | None:
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        report(f"line {line}, column {column}", "not UTF-8", "write the file as UTF-8 text")
    except RecursionError:
        report("file", "nested too deeply", "no table needs more than three levels")
    except ValueError as error:  # TOMLDecodeError, and numbers Python refuses to convert
        problem, _, place = str(error).rpartition(" (at ")
        key = place.rstrip(")") if problem and place.startswith(("line", "end")) else "file"
        report(key, (problem or str(error)).lower(), "TOML syntax")
    return None


def _resource(document: dict[str, object], path: Path, report: _Report) -> ResourceConfig | None:
    known = (PROTOCOL.key, "options", "net", "disk", "device", "volume", "node")
    _refuse_unknown(document, known, "top", "", report)
    protocol = PROTOCOL_DEFAULT
    try:
        protocol = str(PROTOCOL.kind.parse(document.get(PROTOCOL.key, PROTOCOL_DEFAULT)))
    except Fault as fault:
        report(PROTOCOL.key, fault.problem, fault.hint)
    options = _section(Options, document.get("options", {}), "options", report)
    net = _section(Net, document.get("net", {}), "net", report)
    disk = _section(Disk, document.get("disk", {}), "disk", report)
    device = _section(Device, document.get("device", {}), "device", report)
    volumes = _volumes(Volume, document.get("volume", {}), "volume", report)
    nodes = _nodes(document.get("node", {}), report)
    if net is not None:
        _check_net(net, protocol, report)
        _check_addresses(nodes, net, report)
    _check_nodes(nodes, report)
    _check_volumes(document, report)
    if options is None or net is None or disk is None or device is None:
        return None
    return ResourceConfig(
        name=path.stem,
        path=path,
        protocol=protocol,
        options=options,
        net=net,
        disk=disk,
        device=device,
        volumes=volumes,
        nodes=tuple(sorted(nodes, key=lambda node: node.node_id)),
    )


def _refuse_unknown(table: Mapping[str, object], known: Iterable[str], kind: str, where: str, report: _Report) -> None:
    possible = tuple(known)
    for key in table:
        if key in possible:
            continue
        foreign = FOREIGN_KEYS.get(kind, {}).get(key)
        near = difflib.get_close_matches(key[:64], possible, n=1)
        hint = foreign or (f"did you mean {near[0]}?" if near else "possible: " + ", ".join(possible))
        problem = "not supported" if foreign and "not supported" in foreign else "unknown key"
        report(_join(where, key), problem, hint)


def _join(where: str, key: str) -> str:
    name = key if key.isascii() and key.isprintable() and len(key) <= 64 else shown(key)
    return f"{where}.{name}" if where else name


def _section(
    section: type[_Section],
    table: object,
    where: str,
    report: _Report,
    **given: Any,
) -> _Section | None:
    """An instance of `section` from a TOML table, or None after its faults were reported."""
    if not isinstance(table, dict):
        report(where, f"{shown(table)} is not a table", f"write [{where}] on a line of its own")
        return None
    declared = specs(section)
    extra = ("volume",) if section is Node else ()
    kind = "node-volume" if section is NodeVolume else where.partition(".")[0]
    _refuse_unknown(table, (*declared, *extra), kind, where, report)
    values = dict(given)
    complete = True
    for key, (item, spec) in declared.items():
        if key not in table:
            if spec.required:
                report(_join(where, key), "missing", f"{spec.meaning}: {spec.kind.describe()}")
                complete = False
            continue
        try:
            values[item.name] = spec.kind.parse(table[key])
        except Fault as fault:
            report(_join(where, key), fault.problem, fault.hint)
            complete = False
    return section(**values) if complete else None


def _volumes(section: type[_Section], tables: object, where: str, report: _Report) -> dict[int, _Section]:
    if not isinstance(tables, dict):
        report(where, f"{shown(tables)} is not a table", f"write [{where}.0]")
        return {}
    found: dict[int, _Section] = {}
    for text, table in tables.items():
        number = int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else -1
        if str(number) != text or number > VOLUME_NUMBER_MAX:
            report(_join(where, text), "not a volume number", f"0 to {VOLUME_NUMBER_MAX}, without leading zeroes")
            continue
        volume = _section(section, table, f"{where}.{number}", report, number=number)
        if volume is not None:
            found[number] = volume
    if not tables:
        report(where, "no volume", f"add [{where}.0]")
    if len(tables) > VOLUMES_MAX:
        report(where, f"{len(tables)} volumes are too many", f"at most {VOLUMES_MAX} in one resource")
    return dict(sorted(found.items()))


def _nodes(tables: object, report: _Report) -> list[Node]:
    if not isinstance(tables, dict):
        report("node", f"{shown(tables)} is not a table", "write [node.NAME]")
        return []
    if len(tables) > 2:
        report("node", "a third node is not supported yet", "name exactly two nodes")
    elif len(tables) < 2:
        report("node", f"{len(tables)} of two nodes", "add a table [node.NAME] for each")
    nodes = []
    for name, table in tables.items():
        where = _join("node", name)
        if not NAME.fullmatch(name):
            report(where, "not the name of a node", NAME_HINT)
        volumes = {}
        if isinstance(table, dict):
            volumes = _volumes(NodeVolume, table.get("volume", {}), f"{where}.volume", report)
        node = _section(Node, table, where, report, name=name, volumes=volumes)
        if node is not None:
            nodes.append(node)
    return nodes


def _check_net(net: Net, protocol: str, report: _Report) -> None:
    if net.allow_two_primaries and protocol != "C":
        report("net.allow-two-primaries", f"impossible with protocol {protocol}", 'set protocol = "C"')
    for key, longer_ns in (
        ("connect-interval", net.connect_interval_ns),
        ("ping-interval", net.ping_interval_ns),
    ):
        if net.timeout_ns >= longer_ns:
            report("net.timeout", f"must be shorter than {key}", f"lower timeout or raise {key}")
    if net.ping_timeout_ns > net.timeout_ns:
        report("net.ping-timeout", "must not be longer than timeout", "lower ping-timeout or raise timeout")


def _check_addresses(nodes: list[Node], net: Net, report: _Report) -> None:
    seen: dict[str, str] = {}
    for node in nodes:
        key, address = f"node.{node.name}.address", node.address
        other = seen.setdefault(str(address), node.name)
        if other != node.name:
            report(key, f"{address} is the address of {other} too", "every node has its own")
        if address.version != nodes[0].address.version:
            report(key, f"{address} and {nodes[0].address} cannot reach each other", "use IPv4 or IPv6 for both")
        if address.port >= EPHEMERAL_PORT_MIN and not net.allow_ephemeral_port:
            hint = "two nodes can connect to themselves there; net.allow-ephemeral-port = true allows it"
            report(key, f"port {address.port} is not below {EPHEMERAL_PORT_MIN}", hint)
        if net.security == "clear" and not net.clear_off_loopback and not address.is_loopback:
            hint = 'use security = "tls", or set net.clear-off-loopback = true if that network is yours alone'
            report("net.security", f"clear is refused for {address}, which is not a loopback address", hint)


def _check_volumes(document: Mapping[str, object], report: _Report) -> None:
    # On the raw tables: a volume with a fault of its own must not be called missing as well.
    volumes, nodes = document.get("volume", {}), document.get("node", {})
    if not isinstance(volumes, dict) or not isinstance(nodes, dict):
        return
    for name, node in nodes.items():
        there = node.get("volume", {}) if isinstance(node, dict) else None
        if not isinstance(there, dict) or not there:
            continue  # reported where it was read
        for number in volumes:
            if number not in there:
                report(_join(_join("node", name), f"volume.{number}"), "missing", "every node has every volume")
        for number in there:
            if number not in volumes:
                hint = f"add [volume.{number}]"
                report(_join(_join("node", name), f"volume.{number}"), "not a volume of the resource", hint)


def _check_nodes(nodes: list[Node], report: _Report) -> None:
    ids: dict[int, str] = {}
    for node in nodes:
        where = f"node.{node.name}"
        other = ids.setdefault(node.node_id, node.name)
        if other != node.name:
            report(f"{where}.id", f"{node.node_id} is the id of {other} too", "every node has its own")
        users: dict[str, str] = {}
        for number, volume in node.volumes.items():
            for key, path in (("disk", volume.disk), ("metadata", volume.metadata)):
                user = users.setdefault(path, f"volume.{number}.{key}") if path != "internal" else ""
                if path != "internal" and user != f"volume.{number}.{key}":
                    hint = "every disk and every metadata area is used once"
                    report(f"{where}.volume.{number}.{key}", f"{shown(path)} is used by {user} too", hint)
