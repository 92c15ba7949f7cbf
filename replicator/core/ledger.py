# SPDX-License-Identifier: Apache-2.0
"""The superblock of one volume while it is in use: changes in order, one write at a time, and who waits for which.

`wanted` has every change asked for; `durable` is what a crash would leave.  A change becomes visible to anybody only
after its `then` was called, which is after it is durable (decision 0001: durable before visible).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from replicator.core.actions import WriteMeta
from replicator.core.context import Context
from replicator.core.events import DiskDone
from replicator.core.geometry import SUPERBLOCK_OFFSETS
from replicator.core.superblock import PeerSlot, Superblock, encode

Change = Callable[[Superblock], Superblock]
Then = Callable[[], None]


class Ledger:
    """Serialises superblock writes.  `failed(errno)` is called once if one cannot be written."""

    def __init__(self, context: Context, superblock: Superblock, sequence: int, failed: Callable[[int], None]) -> None:
        self._context = context
        self._failed = failed
        self.wanted = superblock
        self.durable = superblock
        self.sequence = sequence
        self._waiting: list[Then] = []
        self._writing = False
        self._dead = False

    @property
    def busy(self) -> bool:
        """A change is not durable yet."""
        return self._writing or bool(self._waiting)

    def save(self, change: Change, then: Then) -> None:
        """Apply a change; `then()` when it is durable.  After `abandon` nothing happens any more."""
        if self._dead:
            return
        self.wanted = change(self.wanted)
        self._waiting.append(then)
        if not self._writing:
            self._write()

    def settled(self, then: Then) -> None:
        """Call `then` when no change is pending (at once if none is)."""
        if self.busy:
            self.save(lambda superblock: superblock, then)
        else:
            then()

    def abandon(self) -> None:
        """The disk is gone: nobody who waits will be called."""
        self._dead = True
        self._waiting.clear()

    def slot(self, peer: int) -> PeerSlot:
        """What is durably known about a peer (KeyError if it has no slot)."""
        return self.durable.peers[slot_index(self.durable, peer)]

    def _write(self) -> None:
        self.sequence += 1
        self._writing = True
        subject = (self.wanted, self._waiting)
        self._waiting = []
        token = self._context.ask(self._written, subject)
        piece = (SUPERBLOCK_OFFSETS[self.sequence % 2], encode(self.wanted, self.sequence))
        self._context.out.append(WriteMeta(self.wanted.volume, token, (piece,)))

    def _written(self, subject: tuple[Superblock, list[Then]], event: DiskDone) -> None:
        self._writing = False
        if self._dead:
            return
        if event.error:
            self._dead = True
            self._failed(event.error)
            return
        self.durable, thens = subject
        for then in thens:
            if self.alive:
                then()
        if self.alive and self._waiting and not self._writing:
            self._write()

    @property
    def alive(self) -> bool:
        """Not abandoned, and every write so far succeeded (a `then` may change that)."""
        return not self._dead


def slot_index(superblock: Superblock, peer: int) -> int:
    """Which slot belongs to the peer (KeyError if none does)."""
    for index, slot in enumerate(superblock.peers):
        if slot.node_id == peer:
            return index
    raise KeyError(peer)


def with_slot(superblock: Superblock, peer: int, **changes: object) -> Superblock:
    """The superblock with one peer slot changed."""
    index = slot_index(superblock, peer)
    slot = replace(superblock.peers[index], **changes)  # type: ignore[arg-type]
    return replace(superblock, peers=(*superblock.peers[:index], slot, *superblock.peers[index + 1 :]))
