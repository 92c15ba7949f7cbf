# SPDX-License-Identifier: Apache-2.0
"""The durable steps around a resync (decision 0001, "Resync", 1, 2 and 5), for one volume and one peer.

The copying itself is in `resync`; here is what must be durable before it may begin and before it counts as finished:
the target is Inconsistent under the source's generation before the first block that makes it a mixture; the source
has dropped its fork point before the first block is asked for; the target is UpToDate only when no bit is left and all
is stable.  Every step ends by sending the frame that lets the other side take its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from replicator.core.generations import JUST_CREATED, UNSET, remember, same
from replicator.core.geometry import BLOCK_SHIFT
from replicator.core.handshake_wire import VolumeState, unpack_ranges, unpack_sync_pause
from replicator.core.ledger import slot_index, with_slot
from replicator.core.resync import SyncSource, SyncTarget
from replicator.core.states import Disk, DiskMove, Replication, ReplicationMove
from replicator.core.superblock import Superblock
from replicator.core.wire import Frame, Kind

if TYPE_CHECKING:
    from replicator.core.connection import Connection
    from replicator.core.replica import Replica


class ResyncSteps:
    """At most one resync between this volume and this peer."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.volume = replica.volume
        self.peer = replica.peer
        self.sync: SyncTarget | SyncSource | None = None
        self.paused_here = False
        self.paused_there = False
        self._broken_off = False  # we ended a resync on this link before the peer could know
        self._bitmap_end = False
        self._ready = False
        self._full = False
        self._source_disk = Disk.UP_TO_DATE  # what the source was when it was chosen

    def link_up(self) -> None:
        """A new link: nothing of an older resync can come on it."""
        self._broken_off = False

    @property
    def link(self) -> Connection | None:
        """The agreed link to the peer."""
        return self._replica.link

    @property
    def replication(self) -> Replication:
        """The state this is a part of."""
        return self._replica.replication

    def stop(self) -> None:
        """The link, a disk or the decision is gone; dirty bits stay."""
        if self.sync is not None:
            self.sync.cancel()
            self.sync = None
            self._broken_off = True
        self._bitmap_end = self._ready = False

    def _send_bitmap(self) -> None:
        """Our bits for the peer, and from this turn on every write: no third case (decision 0001)."""
        assert self.link is not None and self.volume.attached is not None
        number = self.volume.number
        for first, count, payload in self.volume.attached.bitmaps[self.peer].export_chunks():
            offset = first << BLOCK_SHIFT
            size = min(count << BLOCK_SHIFT, self.volume.size - offset)
            self.link.send(Frame(Kind.BITMAP, number, offset=offset, size=size, payload=payload))
        self.link.send(Frame(Kind.BITMAP_END, number))

    def be_source(self, *, full: bool) -> None:
        volume = self.volume
        self._replica.disk = Disk.INCONSISTENT
        if full:
            assert volume.attached is not None
            volume.attached.bitmaps[self.peer].mark_all()
        if volume.disk is Disk.CONSISTENT:
            volume.become(DiskMove.PEER_NOT_NEWER)  # the only other copy has just been found older
            volume.start_serving()
        self._send_bitmap()
        self._replica.move(ReplicationMove.BE_SOURCE)
        self._replica.release()

    def be_target(self, theirs: VolumeState, *, full: bool) -> None:
        """Step 1 of the resync."""
        volume, link = self.volume, self.link
        assert link is not None and volume.attached is not None
        self._source_disk = Disk(theirs.disk)
        volume.stop_serving()
        was_inconsistent = volume.disk is Disk.INCONSISTENT
        volume.become(DiskMove.BECOME_TARGET)
        if same(volume.ledger.wanted.current, JUST_CREATED):
            volume.agree_size(theirs.size_bytes)
        self._send_bitmap()
        if full:
            volume.attached.bitmaps[self.peer].mark_all()
        self._replica.move(ReplicationMove.BE_TARGET)
        self._full = full

        def change(found: Superblock) -> Superblock:
            history = found.history
            if not was_inconsistent and not same(found.current, theirs.current):
                history = remember(history, found.current)
            full_sync = full or found.peers[slot_index(found, self.peer)].full_sync
            found = with_slot(found, self.peer, bitmap_id=UNSET, survivor=False, outdated=False, full_sync=full_sync)
            return replace(
                found,
                consistent=False,
                was_up_to_date=False,
                crashed_primary=False,
                current=theirs.current,
                history=history,
                size_bytes=volume.size,
                resource_id=link.resource_id,
            )

        def durable() -> None:
            if self.link is not link or self.replication is not Replication.WF_BITMAP_T:
                return
            self._replica.release()
            link.send(Frame(Kind.SYNC_READY, volume.number))
            if full:
                volume.save_pages(self._full_sync_recorded)

        volume.ledger.save(change, durable)

    def _full_sync_recorded(self) -> None:
        """Every bit of the full sync is on disk: from here a crash resumes instead of beginning again."""
        self.volume.ledger.save(lambda found: with_slot(found, self.peer, full_sync=False), lambda: None)

    def _source_go(self) -> None:
        """Step 2: the target is durably Inconsistent and its bits are known."""
        if not (self._ready and self._bitmap_end):
            return
        volume, link = self.volume, self.link
        assert link is not None

        def change(found: Superblock) -> Superblock:
            resource_id = link.resource_id
            return replace(
                clear_slot(found, self.peer),
                crashed_primary=False,
                primary_indicator=found.primary_indicator or volume.group.primary,
                resource_id=resource_id,
                size_bytes=volume.size,
            )

        def durable() -> None:
            if self.link is not link or self.replication is not Replication.WF_BITMAP_S:
                return
            self._replica.generation = volume.ledger.durable.current  # what the peer is being made into
            self.sync = SyncSource(volume, volume.context, self.peer, link.send)
            self._replica.move(ReplicationMove.TARGET_READY)
            link.send(Frame(Kind.SYNC_START, volume.number))
            self._apply_pause()

        volume.ledger.save(change, durable)

    def _target_go(self) -> None:
        assert self.link is not None
        volume = self.volume
        self.sync = SyncTarget(volume, volume.context, self.peer, self.link.send, self._finished, full=self._full)
        self._replica.move(ReplicationMove.SOURCE_READY)
        volume.context.notice("resync-started", volume=volume.number, dirty_blocks=self.sync.total)
        self._apply_pause()

    def _finished(self) -> None:
        """Step 5: no bit is left and everything is stable."""
        volume, link, sync = self.volume, self.link, self.sync
        good = self._source_disk is Disk.UP_TO_DATE

        def change(found: Superblock) -> Superblock:
            found = with_slot(found, self.peer, full_sync=False)
            indicator = found.primary_indicator or volume.group.primary  # V6: the copy is served from now on
            return replace(found, consistent=True, was_up_to_date=good, primary_indicator=indicator)

        def durable() -> None:
            if self.link is not link or self.sync is not sync or link is None:
                return
            self.sync = None
            volume.suspect = False
            volume.become(DiskMove.SYNC_DONE)
            if not good:
                volume.become(DiskMove.PEER_IS_NEWER)
            volume.start_serving()
            self._replica.move(ReplicationMove.FINISHED)
            assert isinstance(sync, SyncTarget)
            volume.context.notice(
                "resync-finished", volume=volume.number, blocks=sync.total, same_blocks=sync.same_blocks
            )
            link.send(Frame(Kind.RESYNC_DONE, volume.number))
            volume.save_pages(lambda: None)
            if not good:
                self._replica.begin_round()  # equal now: whoever was in doubt may be lifted

        volume.ledger.save(change, durable)

    # --- frames

    def on_frame(self, frame: Frame) -> str | None:
        """A frame of the resync.  Returns what is wrong with it, or None."""
        if frame.kind in _LATE and self._broken_off and self.sync is None:
            return None  # it crossed our DISK_STATE or the beginning of our round; no bit depends on it
        handler = _HANDLERS.get(frame.kind)
        return f"{frame.kind.name} has no meaning here" if handler is None else handler(self, frame)

    def _on_bitmap(self, frame: Frame) -> str | None:
        if self._bitmap_end or self.replication not in (Replication.WF_BITMAP_S, Replication.WF_BITMAP_T):
            return f"BITMAP while {self.replication.value}"
        attached = self.volume.attached
        assert attached is not None
        if frame.offset + frame.size > self.volume.size:
            return f"BITMAP beyond the end: {frame.offset}+{frame.size} of {self.volume.size}"
        count = (frame.size + (1 << BLOCK_SHIFT) - 1) >> BLOCK_SHIFT
        attached.bitmaps[self.peer].merge_chunk(frame.offset >> BLOCK_SHIFT, count, bytes(frame.payload))
        return None

    def _on_bitmap_end(self, _: Frame) -> str | None:
        if self._bitmap_end or self.replication not in (Replication.WF_BITMAP_S, Replication.WF_BITMAP_T):
            return f"BITMAP_END while {self.replication.value}"
        self._bitmap_end = True
        self._source_go()
        return None

    def _on_ready(self, _: Frame) -> str | None:
        if self._ready or self.replication is not Replication.WF_BITMAP_S:
            return f"SYNC_READY while {self.replication.value}"
        self._ready = True
        self._source_go()
        return None

    def _on_start(self, _: Frame) -> str | None:
        if not self._bitmap_end or self.replication is not Replication.WF_BITMAP_T:
            return f"SYNC_START while {self.replication.value}"
        self._target_go()
        return None

    def _on_request(self, frame: Frame) -> str | None:
        if not isinstance(self.sync, SyncSource):
            return f"RESYNC_REQUEST while {self.replication.value}"
        return self.sync.on_request(frame)

    def _on_answer(self, frame: Frame) -> str | None:
        if not isinstance(self.sync, SyncTarget):
            return f"{frame.kind.name} while {self.replication.value}"
        self._replica.received_bytes += len(frame.payload)
        return self.sync.on_answer(frame)

    def _on_confirm(self, frame: Frame) -> str | None:
        """Rule zero (V2): only here, and only while the peer copies from us, does a confirmation count."""
        if not isinstance(self.sync, SyncSource):
            return f"RESYNC_CONFIRM while {self.replication.value}"
        for offset, size in unpack_ranges(frame.payload):
            if offset + size > self.volume.size:
                return f"RESYNC_CONFIRM beyond the end: {offset}+{size} of {self.volume.size}"
            if not self.sync.answered(offset, size):
                return f"RESYNC_CONFIRM of {offset}+{size}, which was never copied"
            self.volume.confirm(self.peer, offset, size)
        return None

    def _on_done(self, _: Frame) -> str | None:
        if not isinstance(self.sync, SyncSource):
            return f"RESYNC_DONE while {self.replication.value}"
        if self.volume.dirty_count(self.peer):
            return f"RESYNC_DONE with {self.volume.dirty_count(self.peer)} blocks not confirmed"
        self.sync = None
        self._replica.disk = Disk.UP_TO_DATE if self.volume.disk is Disk.UP_TO_DATE else self.volume.disk
        self._replica.move(ReplicationMove.FINISHED)
        self.volume.context.notice("resync-finished", volume=self.volume.number, peer=self.peer)
        self.volume.save_pages(lambda: None)
        return None

    # --- pause

    def pause(self, paused: bool) -> None:
        """The operator's flag."""
        self.paused_here = paused
        if self.link is not None:
            self.link.send(Frame(Kind.SYNC_PAUSE, self.volume.number, payload=bytes([paused])))
        self._apply_pause()

    def _on_pause(self, frame: Frame) -> str | None:
        self.paused_there = unpack_sync_pause(frame.payload)
        self._apply_pause()
        return None

    def _apply_pause(self) -> None:
        paused = self.paused_here or self.paused_there
        if self.sync is None:
            return
        is_paused = self.replication in (Replication.PAUSED_SYNC_S, Replication.PAUSED_SYNC_T)
        if paused != is_paused:
            self._replica.move(ReplicationMove.PAUSE if paused else ReplicationMove.RESUME)
        self.sync.paused = paused


def clear_slot(found: Superblock, peer: int) -> Superblock:
    """The peer is not behind any more: its fork point becomes history, and so does its loss as a Primary."""
    slot = found.peers[slot_index(found, peer)]
    history = remember(found.history, slot.bitmap_id) if slot.bitmap_id != UNSET else found.history
    return replace(with_slot(found, peer, bitmap_id=UNSET, survivor=False, outdated=False), history=history)


#: Frames of the copying itself: the peer may send them before it knows that we have stopped.
_LATE: Final = frozenset(
    (
        Kind.RESYNC_REQUEST,
        Kind.RESYNC_DATA,
        Kind.RESYNC_ZERO,
        Kind.RESYNC_EQUAL,
        Kind.RESYNC_FAILED,
        Kind.RESYNC_CONFIRM,
        Kind.RESYNC_DONE,
    )
)
_HANDLERS: Final[dict[Kind, Callable[[ResyncSteps, Frame], str | None]]] = {
    Kind.BITMAP: ResyncSteps._on_bitmap,
    Kind.BITMAP_END: ResyncSteps._on_bitmap_end,
    Kind.SYNC_READY: ResyncSteps._on_ready,
    Kind.SYNC_START: ResyncSteps._on_start,
    Kind.RESYNC_REQUEST: ResyncSteps._on_request,
    Kind.RESYNC_DATA: ResyncSteps._on_answer,
    Kind.RESYNC_ZERO: ResyncSteps._on_answer,
    Kind.RESYNC_EQUAL: ResyncSteps._on_answer,
    Kind.RESYNC_FAILED: ResyncSteps._on_answer,
    Kind.RESYNC_CONFIRM: ResyncSteps._on_confirm,
    Kind.RESYNC_DONE: ResyncSteps._on_done,
    Kind.SYNC_PAUSE: ResyncSteps._on_pause,
}
