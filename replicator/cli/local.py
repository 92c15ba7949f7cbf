# SPDX-License-Identifier: Apache-2.0
"""Verbs that work on this machine's files and disks: keys, configuration, metadata."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from replicator import __version__, config
from replicator.cli import target as targets
from replicator.cli.remote import ask
from replicator.cli.say import complain, outcome, print_json
from replicator.cli.target import Target
from replicator.errors import ConfigError, DiskError, FormatError, NotRunning, ReplicatorError, UsageError

if TYPE_CHECKING:
    from replicator.drivers.metadata import Place

#: Flags of a volume as show-gi explains them: key, name, meaning.
VOLUME_FLAGS = (
    ("consistent", "Consistent", "the data is of one moment, not a half-done copy"),
    ("was-up-to-date", "WasUpToDate", "nothing newer was known when this was last written"),
    ("primary-indicator", "Primary", "this node was Primary when this was written"),
    ("crashed-primary", "CrashedPrimary", "it was Primary and did not end in order: writes may be half done"),
)
PEER_FLAGS = (
    ("full-sync", "FullSync", "every block has to be copied"),
    ("outdated", "Outdated", "the peer is known to have old data"),
    ("survivor", "Survivor", "this copy went on while that peer, then Primary, was gone"),
)


def version(args: Namespace) -> int:
    """Print the version."""
    if args.json:
        print_json({"version": __version__, "python": sys.version.split()[0]})
    else:
        print(f"replicator {__version__}")
    return 0


def keygen(args: Namespace) -> int:
    """Make, rotate or activate this node's key."""
    from replicator.drivers import keys

    node, directory = config.local_node_name(), config.key_dir()
    if args.rotate and args.activate:
        raise UsageError("--rotate makes the next key, --activate uses it", hint="between the two every peer needs it")
    if args.activate:
        shown, path, what = keys.activate_next(directory), directory / keys.CERTIFICATE_FILE, "now in use"
    elif args.rotate:
        shown = keys.rotate(node, directory, force=args.force)
        path = directory / (keys.CERTIFICATE_FILE + keys.NEXT_SUFFIX)
        what = f"append it to {directory}/peers/{node}.crt on every peer, then: replicator keygen --activate"
    else:
        shown = keys.generate(node, directory, force=args.force)
        path = directory / keys.CERTIFICATE_FILE
        what = f"copy it to {directory}/peers/{node}.crt on every peer"
    if args.json:
        print_json({"node": node, "certificate": str(path), "sha256": shown})
    else:
        print(f"{path}\nsha256 {shown}\n{what}")
    return 0


# -- check ----------------------------------------------------------------------------------------------


def check(args: Namespace) -> int:
    """Configuration and keys of one resource or all; every fault, or OK."""
    found = targets.parse(args.target or "all", volumes=False)
    outcomes = []
    code = 0
    for one in found:
        error: ReplicatorError | None = None
        try:
            _check(one)
        except ReplicatorError as caught:
            error, code = caught, code or caught.exit_code
        outcomes.append(outcome(one.resource, error))
        if args.json:
            continue
        if error is None:
            print(f"{one.resource}: OK")
        else:
            complain(one.resource, error)
    if args.json:
        print_json(outcomes)
    return code


def _check(one: Target) -> None:
    loaded = targets.load(one)
    faults: list[str] = []
    try:
        node = loaded.node(config.local_node_name())
    except ConfigError as error:
        node, faults = None, error.faults
    if node is not None and loaded.net.security == "tls":
        from replicator.drivers.transport import server_context

        names = {other.node_id: other.name for other in loaded.nodes if other is not node}
        try:
            _, trust = server_context(config.key_dir(), names)
            faults += trust.faults
        except ConfigError as error:
            faults += [f"{fault} ({error.hint})" if error.hint else fault for fault in error.faults]
    if faults:
        raise ConfigError(faults)


# -- metadata -------------------------------------------------------------------------------------------


def create_md(args: Namespace) -> int:
    """Fresh metadata for each volume; refuses to overwrite anything it recognises."""
    from replicator.config.schema import VOLUMES_MAX
    from replicator.config.values import Fault, Size

    size = None
    if args.size is not None:
        try:
            size = Size(1 << 20, VOLUMES_MAX << 40, multiple_bytes=4096).parse(_number_or_text(args.size))
        except Fault as fault:
            raise UsageError(f"--size: {fault.problem}", hint=fault.hint) from fault
    resource_ids: dict[str, bytes] = {}

    def do(one: Target) -> None:
        for number in targets.numbers(one):
            volume = Target(one.resource, number)
            if one.resource not in resource_ids:
                resource_ids[one.resource] = _resource_id(one)
            _create(volume, size, resource_ids[one.resource], force=args.force)
            if not args.json:
                print(f"{volume}: new metadata, the copy is Inconsistent until it is synced or declared good")

    return targets.each(args, targets.parse(args.target, volumes=True), do)


def _number_or_text(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text


def _create(one: Target, size: int | None, resource_id: bytes, *, force: bool) -> None:
    from replicator.drivers.backing import absent
    from replicator.drivers.metadata import create_metadata

    loaded = targets.load(one)
    node = loaded.node(config.local_node_name())
    place, number = _place(one)
    if size is not None and absent(place.disk):
        _make_file(place.disk, size)
    peers = loaded.peer_ids(node)
    create_metadata(
        place,
        volume=number,
        node_id=node.node_id,
        peer_ids=peers,
        slots=len(peers),
        resource_id=resource_id,
        al_extents=loaded.disk.al_extents,
        force=force,
    )


def _resource_id(one: Target) -> bytes:
    """The id that other volumes of the resource have on this node, else a new random one."""
    from replicator.drivers.metadata import dump

    for number in targets.numbers(Target(one.resource)):
        if one.volume is None or number == one.volume:
            continue
        try:
            found = bytes.fromhex(str(dump(_place(Target(one.resource, number))[0])["resource_id"]))
        except ReplicatorError:
            continue  # no metadata there yet, or its disk is in use: the handshake tells the volumes one id
        if any(found):
            return found
    return os.urandom(16)


def _make_file(path: str, size: int) -> None:
    if path.startswith("/dev/"):
        raise DiskError(f"{path} does not exist", hint="--size makes files, not devices")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(fd, size)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise DiskError(f"{path} cannot be made: {error.strerror}") from error


def _place(one: Target) -> tuple[Place, int]:
    """Where a volume lies on this node."""
    from replicator.drivers.metadata import Place

    assert one.volume is not None
    loaded = targets.load(one)
    there = loaded.node(config.local_node_name()).volumes[one.volume]
    metadata = None if there.metadata == "internal" else there.metadata
    return Place(disk=there.disk, metadata=metadata, io=loaded.disk.io), one.volume


def dump_md(args: Namespace) -> int:
    """Everything the metadata says; of an attached disk what its process says."""
    found: list[object] = []

    def do(one: Target) -> None:
        from replicator.drivers.metadata import dump

        running = _running_gi(one)
        for number in targets.numbers(one):
            if number in running:
                found.append({"source": "the running process", **running[number]})
            else:
                found.append(dump(_place(Target(one.resource, number))[0]))

    return _printing(args, do, lambda: print_json(found))


def show_gi(args: Namespace) -> int:
    """Generation ids and flags, each explained."""
    found: list[tuple[Target, Mapping[str, Any]]] = []

    def do(one: Target) -> None:
        from replicator.drivers.metadata import dump

        running = _running_gi(one)
        for number in targets.numbers(one):
            volume = Target(one.resource, number)
            gi = running[number] if number in running else gi_of_dump(dump(_place(volume)[0]))
            found.append((volume, gi))

    def show() -> None:
        if args.json:
            print_json([{"name": one.resource, **gi} for one, gi in found])
            return
        for one, gi in found:
            names = {node.node_id: node.name for node in targets.load(one).nodes}
            print("\n".join(gi_lines(str(one), gi, names)))

    return _printing(args, do, show)


def _printing(args: Namespace, do: Any, show: Any) -> int:
    """Do it for every target, print what was found, then say what was not."""
    code = 0
    for one in targets.parse(args.target, volumes=True):
        try:
            do(one)
        except (ConfigError, DiskError, FormatError, NotRunning, UsageError) as error:
            complain(str(one), error)
            code = code or error.exit_code
    show()
    return code


def _running_gi(one: Target) -> dict[int, Mapping[str, Any]]:
    """What the process of the resource says about the volumes it has attached; {} when there is none."""
    try:
        found = ask(one, "gi", {}, 5.0).get("volumes")
    except NotRunning:
        return {}
    assert isinstance(found, list)
    return {volume["volume"]: volume for volume in found}


def gi_of_dump(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `dump` read from a disk, in the words of `Resource.gi`."""
    flags = found["flags"]
    return {
        "volume": found["volume"],
        "resource-id": found["resource_id"],
        "current": found["current"],
        "history": found["history"],
        "consistent": flags["consistent"],
        "was-up-to-date": flags["was_up_to_date"],
        "primary-indicator": flags["primary_indicator"],
        "crashed-primary": flags["crashed_primary"],
        "size": found["size_bytes"] // 1024,
        "peers": [
            {
                "node-id": peer["node_id"],
                "bitmap": peer["bitmap_id"],
                "full-sync": peer["full_sync"],
                "outdated": peer["outdated"],
                "survivor": peer["survivor"],
                "dirty-blocks": peer["dirty_blocks"],
            }
            for peer in found["peers"]
        ],
    }


def gi_lines(name: str, gi: Mapping[str, Any], names: Mapping[int, str]) -> list[str]:
    """One volume's generations, for people."""
    lines = [
        f"{name} size:{gi['size']} KiB resource-id:{gi['resource-id']}",
        f"  current: {gi['current']}   the generation of the data here",
    ]
    past = [old for old in gi["history"] if int(old, 16)]
    lines += [f"  history: {old}   {'generations before it' if not n else ''}".rstrip() for n, old in enumerate(past)]
    lines += _flag_lines("  ", gi, VOLUME_FLAGS)
    for peer in gi["peers"]:
        number = peer["node-id"]
        lines.append(f"  peer {names.get(number, 'unknown')} (node id {number})")
        since = "the peer has had everything since" if not int(peer["bitmap"], 16) else "the peer lacks writes since"
        lines.append(f"    bitmap:  {peer['bitmap']}   {since}")
        lines.append(f"    dirty:   {peer['dirty-blocks']} blocks of 4 KiB to copy")
        lines += _flag_lines("    ", peer, PEER_FLAGS)
    return lines


def _flag_lines(indent: str, thing: Mapping[str, Any], flags: tuple[tuple[str, str, str], ...]) -> list[str]:
    return [f"{indent}{int(bool(thing[key]))} {name:<15} {meaning}" for key, name, meaning in flags]
