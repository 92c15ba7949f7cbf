# SPDX-License-Identifier: Apache-2.0
"""One write on its way: who asked, what it waits for, who has it.

A record without behaviour; `writes` moves it along.  Peers are bits (1 << node id), so that the common case, nobody
is missing, is one comparison with 0.
"""

from __future__ import annotations

from typing import Any

from replicator.core.events import Buffer, Io
from replicator.core.locks import Lock, LockKind
from replicator.core.transferlog import Epoch


class Write:
    """One write, trim or zero: a client's (origin is this node) or a replicated one (origin is the peer)."""

    __slots__ = (
        "arrival",
        "data",
        "disk_failed",
        "epoch",
        "fua",
        "io",
        "keep",
        "local",
        "lock",
        "lone",
        "missed",
        "offset",
        "origin",
        "replied",
        "sent",
        "sequence",
        "since",
        "size",
        "token",
        "unwritten",
        "waiting",
    )  # fmt: skip

    def __init__(
        self,
        io: Io,
        offset: int,
        size: int,
        data: Buffer,
        *,
        fua: bool,
        keep: bool,
        origin: int,
        kind: LockKind,
    ) -> None:
        self.io = io
        self.offset = offset
        self.size = size
        self.data = data
        self.fua = fua
        self.keep = keep
        self.origin = origin
        self.lock = Lock(kind, offset, offset + size, self)
        self.lone = 0  # replicated: bit of the origin if its own disk does not have it
        self.token = 0  # the client's token
        self.arrival: Any = None  # replicated: (receiver, batch)
        self.sequence = 0  # on the link
        self.since = 0  # ns
        self.epoch: Epoch | None = None
        self.local = False  # waiting for the local disk
        self.disk_failed = False  # the local disk does not have it
        self.sent = 0  # bit per peer that got it and was not lost since
        self.unwritten = 0  # bit per peer whose disk has not confirmed it
        self.waiting = 0  # bit per peer whose acknowledgement the reply needs
        self.missed = False  # a peer was lost: the reply needs a fork point
        self.replied = False
