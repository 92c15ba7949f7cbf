# SPDX-License-Identifier: Apache-2.0
"""Everything a resource can ask for.

The core never says "do X after Y": it asks for Y, and asks for X when Y's completion event arrives.  So a driver
has two rules: frames on one link go out in order; everything else may finish in any order.  `FlushData` covers the
writes whose completion was delivered before it was asked for.  `WriteMeta` completes when its bytes are stable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from replicator.core.events import Buffer
from replicator.core.wire import Frame


@dataclass(slots=True)
class ReadData:
    """Read `size` bytes; completion carries exactly that many or an error."""

    volume: int
    token: int
    offset: int
    size: int


@dataclass(slots=True)
class WriteData:
    """Write to the data area.  With `fua` the completion means stable."""

    volume: int
    token: int
    offset: int
    data: Buffer
    fua: bool


@dataclass(slots=True)
class ZeroData:
    """Make a range read back as zeroes; `punch` allows (TRIM: prefers) deallocation."""

    volume: int
    token: int
    offset: int
    size: int
    punch: bool
    fua: bool


@dataclass(slots=True)
class FlushData:
    """Make every data write completed so far stable."""

    volume: int
    token: int


@dataclass(slots=True)
class WriteMeta:
    """Write pieces (offset in the metadata area, bytes), all stable at completion.

    Offsets and lengths are multiples of 4096.  The offset is relative to the start of the fixed part and may be
    negative: bitmap slots lie below it (docs/disk-format.md).  Pieces of one action may land in any order.
    """

    volume: int
    token: int
    pieces: Sequence[tuple[int, bytes]]


@dataclass(slots=True)
class OpenDisk:
    """Open the configured disk and read its metadata: `DiskOpened` or `DiskOpenFailed`."""

    volume: int


@dataclass(slots=True)
class CloseDisk:
    """Close the disk when everything handed over is done: `DiskClosed`."""

    volume: int


@dataclass(slots=True)
class Reply:
    """Answer a client request; `error` is an errno or 0."""

    token: int
    error: int
    data: Buffer = b""


@dataclass(slots=True)
class Send:
    """Send one frame; frames of one link keep their order."""

    link: int
    frame: Frame


@dataclass(slots=True)
class Dial:
    """Try to connect to a peer once: `LinkUp` or `DialFailed`."""

    peer: int


@dataclass(slots=True)
class CloseLink:
    """Send what is queued (bounded, at most a second), then close: `LinkDown` follows."""

    link: int
    reason: str


@dataclass(slots=True)
class CutClients:
    """Close every client of a volume (demotion by force); `ClientClosed` follows for each."""

    volume: int


@dataclass(slots=True)
class CommandDone:
    """Answer an operator's command."""

    token: int
    ok: bool
    code: str = "ok"
    number: int = 0
    message: str = ""
    hint: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Notice:
    """Something an operator may want to know; `code` is stable and documented, `fields` are the values."""

    code: str
    fields: Mapping[str, Any] = field(default_factory=dict)


Action = (
    ReadData
    | WriteData
    | ZeroData
    | FlushData
    | WriteMeta
    | OpenDisk
    | CloseDisk
    | Reply
    | Send
    | Dial
    | CloseLink
    | CutClients
    | CommandDone
    | Notice
)
