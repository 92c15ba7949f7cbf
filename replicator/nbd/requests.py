# SPDX-License-Identifier: Apache-2.0
"""Where a request is judged, once, and cut into pieces.

`judge` is the border: what passes it is inside the export, aligned, of an allowed length and kind, and nobody
behind it checks again.  The order of its rules is part of the behaviour: unknown things first, then what the
export is, then where the range lies, so the same wrong request always gets the same answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from replicator.nbd import constants as c
from replicator.nbd.constants import Command, Errno
from replicator.nbd.negotiation import Export

Buffer = bytes | bytearray | memoryview


class Kind(Enum):
    """What a piece asks of the volume."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"
    TRIM = "trim"
    ZERO = "zero"


@dataclass(slots=True)
class Request:
    """One piece of work, answered by `NbdSession.reply(token, …)`.

    At most `IO_MAX` bytes (READ, WRITE) or `ZERO_MAX` bytes (TRIM, ZERO); never empty except FLUSH.
    """

    token: int
    kind: Kind
    offset: int
    size: int
    data: Buffer = b""
    fua: bool = False
    keep: bool = False  #: ZERO: do not punch a hole


class Fault(NamedTuple):
    """Why a request is refused."""

    error: int
    message: str


#: Flags a client may set per command.  FUA is valid everywhere, without meaning where nothing is written.
FLAGS_ALLOWED: dict[int, int] = {
    Command.READ: c.CMD_FLAG_FUA | c.CMD_FLAG_DF,
    Command.WRITE: c.CMD_FLAG_FUA,
    Command.FLUSH: c.CMD_FLAG_FUA,
    Command.TRIM: c.CMD_FLAG_FUA,
    Command.WRITE_ZEROES: c.CMD_FLAG_FUA | c.CMD_FLAG_NO_HOLE,
    Command.BLOCK_STATUS: c.CMD_FLAG_FUA | c.CMD_FLAG_REQ_ONE,
}

KINDS: dict[int, Kind] = {
    Command.READ: Kind.READ,
    Command.WRITE: Kind.WRITE,
    Command.FLUSH: Kind.FLUSH,
    Command.TRIM: Kind.TRIM,
    Command.WRITE_ZEROES: Kind.ZERO,
}

_CHANGES = frozenset((Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))
_FILLS = frozenset((Command.WRITE, Command.WRITE_ZEROES))


class Abilities(NamedTuple):
    """What one session may ask for: its export and what it negotiated."""

    export: Export
    structured: bool
    allocation: bool


def judge(able: Abilities, command: int, flags: int, offset: int, size: int) -> Fault | None:
    """None if the request may be carried out, else the errno and sentence to answer with."""
    export = able.export
    allowed = FLAGS_ALLOWED.get(command)
    if allowed is None:
        return Fault(Errno.EINVAL, f"unknown command {command}")
    if flags & ~allowed or (flags & c.CMD_FLAG_DF and not able.structured):
        return Fault(Errno.EINVAL, f"flags {flags:#x} are not valid for command {command}")
    if command == Command.FLUSH:
        if offset or size:
            return Fault(Errno.EINVAL, f"flush has no range, but offset {offset} and length {size} came")
        return None
    if command in _CHANGES and export.read_only:
        return Fault(Errno.EPERM, f"{export.name} is read-only here")
    if command == Command.BLOCK_STATUS and (not able.allocation or size == 0):
        return Fault(Errno.EINVAL, "block status needs a negotiated context and a length")
    if command <= Command.WRITE and size > export.payload_max:
        return Fault(Errno.EINVAL, f"length {size} is more than {export.payload_max}")
    if offset + size > export.size_bytes:
        error = Errno.ENOSPC if command in _FILLS else Errno.EINVAL
        return Fault(error, f"offset {offset} length {size} ends behind byte {export.size_bytes}")
    if (offset | size) & (export.block_min - 1):
        return Fault(Errno.EINVAL, f"offset {offset} length {size} is not a multiple of {export.block_min}")
    return None


def pieces(kind: Kind, offset: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut a range: (offset, size) of each piece in order; one empty piece for FLUSH."""
    limit = c.IO_MAX if kind in (Kind.READ, Kind.WRITE) else c.ZERO_MAX
    end = offset + size
    yield offset, min(limit, size)
    for start in range(offset + limit, end, limit):
        yield start, min(limit, end - start)
