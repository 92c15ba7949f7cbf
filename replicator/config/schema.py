# SPDX-License-Identifier: Apache-2.0
"""Every setting there is: name, type, default, unit and bounds, declared once.

The dataclasses below are the declaration: a field made by `option` carries the key as it stands in the
file, the kind of value, and one sentence of meaning.  The loader (`replicator.config.loader`), the error
messages and the reference page are all derived from these fields, so they cannot disagree.

In the file durations, sizes and rates are written with a unit ("500ms", "64KiB"); here they are plain
integers whose unit is the end of the field's name (`_ns`, `_bytes`, `_bytes_s`).  What is not here: checks
that concern more than one setting, and files; both are in `replicator.config.loader`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from replicator.config.values import (
    GIB,
    KIB,
    MIB,
    MILLISECOND_NS,
    SECOND_NS,
    TIB,
    Address,
    Choice,
    Count,
    Duration,
    Endpoint,
    FilePath,
    Flag,
    Kind,
    Size,
)

BLOCK_BYTES = 4096
NODE_ID_MAX = 15
VOLUME_NUMBER_MAX = 65535  # u16 on the wire
VOLUMES_MAX = 255  # their count is a u8 in HELLO
EPHEMERAL_PORT_MIN = 32768  # where Linux begins to choose source ports

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
NAME_HINT = "lower-case letters, digits, '_', '.', '-', at most 64, beginning with a letter or digit"


@dataclass(frozen=True, slots=True)
class Spec:
    """What the file calls a field, and what may stand there."""

    key: str
    kind: Kind
    meaning: str
    required: bool = False


def option(key: str, kind: Kind, default: object, meaning: str) -> Any:
    """A dataclass field for the optional setting `key`."""
    return field(default=default, metadata={"spec": Spec(key, kind, meaning)})


def required(key: str, kind: Kind, meaning: str) -> Any:
    """A dataclass field for a setting that has no default."""
    return field(metadata={"spec": Spec(key, kind, meaning, required=True)})


def specs(section: type) -> dict[str, tuple[dataclasses.Field[Any], Spec]]:
    """Key in the file → (dataclass field, spec), in the order of declaration."""
    found = ((item, item.metadata.get("spec")) for item in dataclasses.fields(section))
    return {spec.key: (item, spec) for item, spec in found if spec is not None}


PROTOCOL = Spec(
    "protocol",
    Choice(("A", "B", "C")),
    "when a write is complete: on the local disk and A sent, B received, C on the peer's disk",
)
PROTOCOL_DEFAULT = "C"

_AFTER_SB_UNSUPPORTED = (
    "discard-younger-primary discard-older-primary discard-zero-changes discard-least-changes discard-local "
    "discard-remote discard-node-NODENAME consensus violently-as0p discard-secondary call-pri-lost-after-sb"
)
_AFTER_SB = Choice(("disconnect",), tuple(_AFTER_SB_UNSUPPORTED.split()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`[options]`: the resource as a whole."""

    on_no_data_accessible: str = option(
        "on-no-data-accessible",
        Choice(("io-error",), ("suspend-io",)),
        "io-error",
        "what a request gets when neither disk nor peer has the data",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """`[net]`: the link between the nodes."""

    security: str = option(
        "security",
        Choice(("tls", "clear")),
        "tls",
        "tls: TLS 1.3 with pinned certificates; clear: neither encrypted nor authenticated",
    )
    clear_off_loopback: bool = option(
        "clear-off-loopback",
        Flag(),
        False,
        "allow clear on other addresses: whoever reaches the port can read and replace the data",
    )
    allow_two_primaries: bool = option(
        "allow-two-primaries",
        Flag(),
        False,
        "both nodes may be Primary at once (needs protocol C and a cluster file system)",
    )
    allow_ephemeral_port: bool = option(
        "allow-ephemeral-port",
        Flag(),
        False,
        f"allow ports from {EPHEMERAL_PORT_MIN} up, where two nodes of one machine can connect to themselves",
    )
    connect_interval_ns: int = option(
        "connect-interval",
        Duration(100 * MILLISECOND_NS, 120 * SECOND_NS),
        10 * SECOND_NS,
        "pause between attempts to connect",
    )
    handshake_timeout_ns: int = option(
        "handshake-timeout",
        Duration(100 * MILLISECOND_NS, 120 * SECOND_NS),
        10 * SECOND_NS,
        "a new connection must have introduced itself within this time",
    )
    ping_interval_ns: int = option(
        "ping-interval",
        Duration(100 * MILLISECOND_NS, 120 * SECOND_NS),
        10 * SECOND_NS,
        "an idle link is tried this often",
    )
    ping_timeout_ns: int = option(
        "ping-timeout",
        Duration(50 * MILLISECOND_NS, 60 * SECOND_NS),
        2 * SECOND_NS,
        "the answer to a ping must arrive within this time",
    )
    timeout_ns: int = option(
        "timeout",
        Duration(100 * MILLISECOND_NS, 60 * SECOND_NS),
        6 * SECOND_NS,
        "a peer that owes an answer and shows no sign of life for this long is taken for dead",
    )
    ko_count: int = option(
        "ko-count",
        Count(0, 255),
        7,
        "a peer that does not finish a write within this many timeouts is cut off until the next `connect` (0: never)",
    )
    after_sb_0pri: str = option("after-sb-0pri", _AFTER_SB, "disconnect", "split brain found, no Primary")
    after_sb_1pri: str = option("after-sb-1pri", _AFTER_SB, "disconnect", "split brain found, one Primary")
    after_sb_2pri: str = option("after-sb-2pri", _AFTER_SB, "disconnect", "split brain found, two Primaries")
    fencing: str = option(
        "fencing",
        Choice(("dont-care", "resource-only", "resource-and-stonith")),
        "dont-care",
        "otherwise a copy that lost its Primary is Consistent, not UpToDate, until the peer is fenced",
    )
    max_epoch_size: int = option("max-epoch-size", Count(1, 20000), 2048, "writes between two barriers, at most")
    epoch_time_ns: int = option(
        "epoch-time",
        Duration(10 * MILLISECOND_NS, 60 * SECOND_NS),
        SECOND_NS,
        "time between two barriers, at most, while there are writes",
    )
    max_in_flight_bytes: int = option(
        "max-in-flight",
        Size(2 * MIB, GIB),
        32 * MIB,
        "payload sent and not yet answered by the peer, at most; above it requests wait",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """`[disk]`: the backing devices and the resync."""

    al_extents: int = option(
        "al-extents",
        Count(67, 1008),
        1008,
        "4 MiB extents written at once: more means fewer metadata writes, a longer resync after a crash",
    )
    io: str = option(
        "io",
        Choice(("direct", "buffered")),
        "direct",
        "direct: an answered write is on the disk; buffered: it may be in the page cache until a flush",
    )
    on_io_error: str = option(
        "on-io-error",
        Choice(("detach",), ("pass_on", "pass-on", "call-local-io-error")),
        "detach",
        "what follows the first failed write or flush of a backing device",
    )
    resync_max_rate_bytes_s: int = option(
        "resync-max-rate",
        Size(64 * KIB, TIB, per_second=True, zero="unlimited"),
        0,
        "resync no faster than this",
    )
    resync_latency_target_ns: int = option(
        "resync-latency-target",
        Duration(MILLISECOND_NS, 10 * SECOND_NS),
        20 * MILLISECOND_NS,
        "resync slows down when the application waits longer than this for a write",
    )
    checksum_sync: str = option(
        "checksum-sync", Choice(("auto", "always", "never")), "auto", "compare digests before copying"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """`[device]`: how the volume appears on a Primary."""

    kind: str = option(
        "kind",
        Choice(("auto", "nbd", "fuse", "none")),
        "auto",
        "the /dev node: kernel nbd, nbdfuse and a loop device, or none; auto takes the first that works",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """`[volume.N]`: what is the same about a volume on every node."""

    number: int
    size_bytes: int | None = option(
        "size",
        Size(MIB, 16 * TIB, multiple_bytes=BLOCK_BYTES),
        None,
        "use only this much; without it the smaller of the two disks decides",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeVolume:
    """`[node.NAME.volume.N]`: where a node keeps a volume."""

    number: int
    disk: str = required("disk", FilePath(), "the backing device or file")
    metadata: str = option(
        "metadata",
        FilePath("internal"),
        "internal",
        "internal: the tail of the disk; or a device or file of its own",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """`[node.NAME]`: one machine."""

    name: str
    node_id: int = required("id", Count(0, NODE_ID_MAX), "stands in the metadata: never change or reuse it")
    address: Address = required("address", Endpoint(), "where this node listens for its peer")  # noqa: RUF009
    volumes: Mapping[int, NodeVolume] = field(default_factory=dict)


#: Words of drbd.conf that operators will try, by section: what we say instead of "unknown key".
FOREIGN_KEYS: Mapping[str, Mapping[str, str]] = {
    "options": {
        "auto-promote": "auto-promote is not supported: use 'replicator primary' or Pacemaker",
        "quorum": "quorum is not supported yet: it needs a third node",
        "on-no-quorum": "quorum is not supported yet: it needs a third node",
    },
    "net": {
        "protocol": "protocol stands at the top of the file, before the first table",
        "connect-int": "here it is called connect-interval",
        "ping-int": "here it is called ping-interval",
        "shared-secret": "the peer is authenticated by its certificate, made by 'replicator keygen'",
        "cram-hmac-alg": "the peer is authenticated by its certificate, made by 'replicator keygen'",
        "data-integrity-alg": "every frame carries a checksum: there is nothing to choose",
        "csums-alg": "here it is [disk] checksum-sync",
        "tls": 'here it is security = "tls"',
        "rr-conflict": "rr-conflict is not supported yet: a conflict always disconnects",
    },
    "disk": {
        "resync-rate": "here it is called resync-max-rate",
        "c-max-rate": "here it is called resync-max-rate",
        "c-min-rate": "here the controller holds resync-latency-target",
        "c-delay-target": "here the controller holds resync-latency-target",
        "size": "the size stands in [volume.N]",
        "fencing": "here it is [net] fencing",
    },
    "node": {"node-id": "here it is called id", "on": "here it is called [node.NAME]"},
    "node-volume": {
        "meta-disk": "here it is called metadata",
        "device": "the device is /dev/replicated/RESOURCE/VOLUME",
    },
}
