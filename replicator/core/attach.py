# SPDX-License-Identifier: Apache-2.0
"""Attaching a disk: from the bytes of its metadata area to a copy that may be used (decision 0001, "Attach").

The durable steps, in order: bitmap pages with the bits of every extent that was hot; a flush of the data, because what
a killed process wrote may still be in a volatile cache, and an extent leaves the log only when it is stable (V4; found
by the simulator: kill, resync *from* here, power cut); the superblock with CrashedPrimary
(kept if it was set: a crash in the middle of this must not forget it) and without PrimaryIndicator; the empty activity
log.  A crash in between repeats the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from replicator.core import activity, superblock
from replicator.core.actions import FlushData, WriteMeta
from replicator.core.activity import ActivityLog
from replicator.core.bitmap import Bitmap
from replicator.core.context import Context
from replicator.core.events import DiskDone, DiskOpened
from replicator.core.geometry import (
    ACTIVITY_BLOCKS,
    ACTIVITY_OFFSET,
    PAGE,
    block_count,
    blocks_of_extent,
    slot_bytes_for,
    slot_offset,
)
from replicator.core.ledger import Ledger
from replicator.core.superblock import NO_NODE, Superblock
from replicator.errors import FormatError

#: Bitmap pages written with one action.
PAGES_MAX = 256


class Attached:
    """What a volume works with while its disk is attached."""

    def __init__(self, ledger: Ledger, bitmaps: dict[int, Bitmap], log: ActivityLog, size: int) -> None:
        self.ledger = ledger
        self.bitmaps = bitmaps  # by peer node id
        self.log = log
        self.size = size  # bytes of the volume


class Attaching:
    """One attempt.  Ends with `done(Attached)` or `failed(sentence)`."""

    def __init__(
        self,
        context: Context,
        volume: int,
        peers: dict[int, str],
        done: Callable[[Attached], None],
        failed: Callable[[str], None],
        ledger_failed: Callable[[int], None],
    ) -> None:
        self._context = context
        self._volume = volume
        self._peers = peers
        self._done = done
        self._failed = failed
        self._ledger_failed = ledger_failed
        self._attached: Attached | None = None

    def begin(self, opened: DiskOpened) -> None:
        """Read what the disk says; FormatError becomes `failed`."""
        fixed = opened.fixed
        try:
            chosen = superblock.choose(fixed[:PAGE], fixed[PAGE : 2 * PAGE])
            self._check(chosen.superblock, opened.size)
        except FormatError as error:
            self._failed(str(error))
            return
        found = chosen.superblock
        ring = fixed[ACTIVITY_OFFSET : ACTIVITY_OFFSET + ACTIVITY_BLOCKS * PAGE]
        recovered = activity.recover(ring)
        for note in (*chosen.notes, *recovered.notes):
            self._context.notice("metadata-note", volume=self._volume, text=note)
        size = found.size_bytes or opened.size
        bitmaps = self._bitmaps(found, opened, size)
        blocks = block_count(size)
        for peer, bitmap in bitmaps.items():
            slot = found.peers[bitmap.slot]
            if recovered.unknown or slot.full_sync:
                bitmap.mark_all()
            for extent in recovered.extents:
                first, count = blocks_of_extent(extent, blocks)
                if count:
                    bitmap.mark(first, count)
            if recovered.extents or recovered.unknown:
                self._context.notice(
                    "activity-log-applied",
                    volume=self._volume,
                    peer=self._peers.get(peer, str(peer)),
                    extents=len(recovered.extents),
                    dirty_blocks=bitmap.dirty_count,
                )
        ledger = Ledger(self._context, found, chosen.next_sequence - 1, self._ledger_failed)
        ring_bytes, sequence = activity.fresh_ring(recovered.sequence)
        extents_max = min(found.al_extents, self._context.options.activity_extents)
        self._attached = Attached(ledger, bitmaps, ActivityLog(extents_max, sequence), size)
        self._save_pages(ring_bytes)

    def _check(self, found: Superblock, size: int) -> None:
        if found.volume != self._volume or found.node_id != self._context.options.node_id:
            raise FormatError(
                f"the metadata belongs to volume {found.volume} of node {found.node_id}, "
                f"not to volume {self._volume} of node {self._context.options.node_id}",
                hint="check which disk is configured",
            )
        if found.size_bytes > size:
            raise FormatError(
                f"the device has {size} bytes for data, the volume {found.size_bytes}",
                hint="give the device back its size, or run `replicator create-md --force` and let the peer fill it",
            )
        if slot_bytes_for(found.size_bytes or size) > found.slot_bytes:
            raise FormatError(
                f"the bitmap slots of {found.slot_bytes} bytes are too small for "
                f"{found.size_bytes or size} bytes of data",
                hint="run `replicator create-md --force` and let the peer fill this copy",
            )
        known = {slot.node_id for slot in found.peers if slot.node_id != NO_NODE}
        missing = [name for node, name in self._peers.items() if node not in known]
        if missing:
            raise FormatError(
                f"the metadata has no slot for {', '.join(missing)}",
                hint="node ids changed after create-md; change them back or run `replicator create-md --force`",
            )

    def _bitmaps(self, found: Superblock, opened: DiskOpened, size: int) -> dict[int, Bitmap]:
        bitmaps = {}
        for index, slot in enumerate(found.peers):
            if slot.node_id == NO_NODE:
                continue
            bitmap, damaged = Bitmap.decode(opened.bitmaps.get(index, b""), block_count(size), index)
            if damaged:
                self._context.notice("bitmap-damaged", volume=self._volume, peer=slot.node_id, sectors=damaged)
            bitmaps[slot.node_id] = bitmap
        return bitmaps

    def _save_pages(self, ring: bytes) -> None:
        assert self._attached is not None
        pieces = bitmap_pieces(self._attached, PAGES_MAX)
        if pieces:
            token = self._context.ask(self._pages_saved, ring)
            self._context.out.append(WriteMeta(self._volume, token, pieces))
        else:
            token = self._context.ask(self._flushed, ring)
            self._context.out.append(FlushData(self._volume, token))

    def _flushed(self, ring: bytes, event: DiskDone) -> None:
        assert self._attached is not None
        if event.error:
            self._ledger_failed(event.error)
        else:
            self._attached.ledger.save(_after_crash, lambda: self._empty_log(ring))

    def _pages_saved(self, ring: bytes, event: DiskDone) -> None:
        if event.error:
            self._ledger_failed(event.error)
        else:
            self._save_pages(ring)

    def _empty_log(self, ring: bytes) -> None:
        token = self._context.ask(self._emptied, None)
        self._context.out.append(WriteMeta(self._volume, token, ((ACTIVITY_OFFSET, ring),)))

    def _emptied(self, _: None, event: DiskDone) -> None:
        assert self._attached is not None
        if event.error:
            self._ledger_failed(event.error)
        else:
            self._done(self._attached)


def _after_crash(found: Superblock) -> Superblock:
    # A FullSync flag has done its work: every page with all its bits has just been written.
    peers = tuple(replace(slot, full_sync=False) if slot.full_sync else slot for slot in found.peers)
    crashed = found.crashed_primary or found.primary_indicator
    return replace(found, crashed_primary=crashed, primary_indicator=False, peers=peers)


def bitmap_pieces(attached: Attached, limit: int, pages: dict[int, set[int]] | None = None) -> list[tuple[int, bytes]]:
    """Changed bitmap pages as pieces for `WriteMeta`: at most `limit`, or exactly `pages` (peer -> page numbers)."""
    slot_bytes = attached.ledger.wanted.slot_bytes
    pieces: list[tuple[int, bytes]] = []
    for peer, bitmap in attached.bitmaps.items():
        if pages is None:
            taken = bitmap.take_changed(limit - len(pieces))
        else:
            taken = bitmap.take_pages(sorted(pages.get(peer, ())))
        base = slot_offset(bitmap.slot, slot_bytes)
        pieces += [(base + page * PAGE, data) for page, data in taken]
    return pieces
