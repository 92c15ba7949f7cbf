# SPDX-License-Identifier: Apache-2.0
"""One volume on this node: its disk, its metadata, its writes, and a `Replica` per peer.

Owns the local disk's state and everything that is written to the metadata area.  The only place where bits are set
(`mark`) and, on the word of a resync, cleared (`confirm`).  What concerns one peer is in `replica`, what concerns all
volumes in `resource`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from replicator.core.actions import CloseDisk, OpenDisk, WriteMeta
from replicator.core.attach import PAGES_MAX, Attached, Attaching, bitmap_pieces
from replicator.core.context import Context
from replicator.core.events import DiskDone, DiskOpened
from replicator.core.generations import PRIMARY_BIT, UNSET
from replicator.core.geometry import (
    BLOCK_SHIFT,
    EXTENT,
    block_count,
    blocks_of,
    blocks_of_extent,
    whole_blocks_of,
)
from replicator.core.ledger import Ledger, slot_index, with_slot
from replicator.core.locks import RangeLocks
from replicator.core.replica import Replica
from replicator.core.states import DISK_MOVES, Disk, DiskMove, move
from replicator.core.superblock import Superblock, encode
from replicator.core.transferlog import TransferLog
from replicator.core.write import Write
from replicator.core.writes import WritePath

#: Bitmap pages changed by a resync are written now and then, so that a crash does not start it over.
CHECKPOINT_NS = 2_000_000_000
RECENT_NS = 200_000_000


class Group(Protocol):
    """What a volume asks of its resource."""

    @property
    def primary(self) -> bool:
        """This node is Primary."""

    @property
    def crowded(self) -> bool:
        """Too much is under way already."""

    def forked(self, volume: Volume, peers: int) -> bool:
        """Fork points towards these peers are durable, on every volume they are needed on (decision 0001, V3)."""

    def rotate(self, volume: Volume, peers: int) -> None:
        """Make them."""

    def rotated(self) -> None:
        """A volume made its fork point."""

    def replicated_done(self, volume: Volume, write: Write, error: int) -> None:
        """A replicated write ended."""

    def disk_lost(self, volume: Volume) -> None:
        """The local disk is being let go: no durable step that was asked for will end."""

    def disk_changed(self, volume: Volume) -> None:
        """The local disk was attached, or is gone for good."""


class Volume:
    """One volume.  `disk` is what operators see; `attached` is set from a finished attach to a detach or failure."""

    def __init__(self, number: int, context: Context, log: TransferLog, group: Group) -> None:
        self.number = number
        self.context = context
        self.log = log
        self.group = group
        self.disk = Disk.DISKLESS
        self.attached: Attached | None = None
        self.size = 0
        self.device_size = 0
        self.serving = False  # Primary on this copy (not one that was attached while Primary)
        self.exposed = UNSET  # the generation our clients have seen, while it is not served from here (V11)
        self.error = ""  # why the last attach failed
        self.suspect = False  # the disk failed and came back: what it shows may not be on it
        self.path = WritePath(self, context, log)
        self.replicas: dict[int, Replica] = {peer: Replica(self, peer) for peer in context.options.peers}
        self.absent_mask = 0
        self.read_bytes = 0
        self.written_bytes = 0
        self.log_writes = 0
        self.bitmap_writes = 0
        self._attaching: Attaching | None = None
        self._rotating = False
        self._writing_pages = False
        self._page_waiters: list[Callable[[], None]] = []
        self._checkpoint_at = 0
        self._last_gasp = False  # the write that marks a lost disk Outdated is under way
        self._refused = False
        self._farewells: set[int] = set()  # peers that have not confirmed that our disk is gone

    # --- what the write path and resync ask (writes.Home, resync.Home)

    @property
    def locks(self) -> RangeLocks:
        """Of this volume."""
        return self.path.locks

    def absent(self, origin: int) -> int:
        """Bit per peer that will not have a write made now; nothing is recorded without a disk of our own."""
        return self.absent_mask if self.attached else 0

    def refresh(self) -> None:
        """Recompute what depends on the peers' states; called by whoever changes one."""
        self.absent_mask = sum(1 << peer for peer, replica in self.replicas.items() if not replica.replicating)

    def has_disk(self) -> bool:
        """Writes go to the local disk."""
        return self.attached is not None

    def forked(self, peers: int) -> bool:
        """See `Group.forked`."""
        return not peers or self.group.forked(self, peers)

    def crowded(self) -> bool:
        """See `writes.Home`."""
        return self.group.crowded

    def missed(self) -> bool:
        """See `writes.Home`."""
        return any(self.absent_mask >> peer & 1 and self.dirty_count(peer) for peer in self.replicas)

    def rotate(self) -> None:
        """Make the fork points that are missing."""
        self.group.rotate(self, self.absent_mask)

    def writable(self) -> bool:
        """Up-to-date data is within reach."""
        if self.disk is Disk.UP_TO_DATE:
            return True
        return any(replica.has_good_data for replica in self.replicas.values())

    def trusts_itself(self) -> bool:
        """The local copy alone is good data."""
        return self.disk is Disk.UP_TO_DATE

    def hot(self, extents: range) -> bool:
        """The extents are in the activity log on disk; if not, they are asked for."""
        assert self.attached is not None
        log = self.attached.log
        for extent in extents:
            if not log.is_hot(extent):
                log.want(extents)
                return False
        return True

    def touch(self, extents: range, epoch: int) -> None:
        """A write of `epoch` is launched into hot extents.  The epoch keeps them hot until it retires."""
        assert self.attached is not None
        for extent in extents:
            self.attached.log.hold(extent, epoch)
            self.attached.log.release(extent)

    def send(self, write: Write) -> int:
        """Send a client's write to every peer that should have it; returns them as bits."""
        sent = 0
        for peer, replica in self.replicas.items():
            if replica.replicating:
                replica.send_write(write)
                sent |= 1 << peer
        return sent

    def mark(self, peer: int, offset: int, size: int) -> None:
        """The peer may not have this range.  The one place where a write sets bits."""
        if self.attached is not None:
            self.attached.bitmaps[peer].mark(*blocks_of(offset, size))

    def confirm(self, peer: int, offset: int, size: int) -> None:
        """The range is stable at the target of a resync (V2).  The one place where bits are cleared."""
        assert self.attached is not None, "a resync ends with its disk"
        self.attached.bitmaps[peer].confirm(*whole_blocks_of(offset, size, self.size))

    def next_dirty(self, peer: int, start: int, blocks_max: int) -> tuple[int, int] | None:
        """The next dirty run towards the peer."""
        return self.attached.bitmaps[peer].next_run(start, blocks_max) if self.attached else None

    def dirty_count(self, peer: int) -> int:
        """Dirty blocks towards the peer; 0 without a disk."""
        return self.attached.bitmaps[peer].dirty_count if self.attached else 0

    def application_waits(self) -> bool:
        """Our clients wrote lately, and waited longer than the latency target."""
        path, options = self.path, self.context.options
        recent = self.context.now - path.last_reply < RECENT_NS
        return recent and path.latency_ns > options.resync_latency_target_ns

    def replicated_done(self, write: Write, error: int) -> None:
        """A replicated write ended."""
        self.group.replicated_done(self, write, error)

    def disk_error(self, what: str, error: int) -> None:
        """A write or flush failed: V8."""
        if self.disk in (Disk.FAILED, Disk.DISKLESS, Disk.DETACHING):
            return  # it is being let go already
        self.context.notice("disk-failed", volume=self.number, operation=what, errno=error)
        self.error = f"a {what} failed with errno {error}"
        self.suspect = True
        ranges = [] if self.attached is None else self._hot_ranges(self.attached)
        self.disk = move(DISK_MOVES, self.disk, DiskMove.IO_ERROR)
        self._let_go(ranges)

    # --- what our clients have seen (V11)

    def start_serving(self) -> None:
        """This copy became good data: a Primary serves it from now on."""
        self.serving = self.group.primary and self.disk is Disk.UP_TO_DATE
        if self.serving:
            self.exposed = UNSET  # it is this copy's generation, whatever that becomes

    def stop_serving(self) -> None:
        """This copy is not served any more: remember the generation that was.

        Under protocols A and B a fork that is asked for counts as made: what the peer lacks may have been acknowledged
        before it (V3).  Under C nothing was: what waits for the fork is not acknowledged without it.
        """
        if self.serving and self.attached is not None:
            ledger = self.ledger
            self.exposed = (ledger.durable if self.context.options.protocol == "C" else ledger.wanted).current
        self.serving = False

    def serve_from_peer(self) -> None:
        """The clients of a Primary see a peer's copy: that generation is the exposed one."""
        if self.group.primary and not self.serving:
            for replica in self.replicas.values():
                if replica.has_good_data:
                    self.exposed = replica.generation

    def tell_generation(self) -> None:
        """Our copy is at another generation, durably: a peer that lives on it has to know."""
        for replica in self.replicas.values():
            replica.tell_generation(self.ledger.durable.current)

    # --- metadata

    @property
    def ledger(self) -> Ledger:
        """The superblock in use; only while a disk is attached."""
        assert self.attached is not None
        return self.attached.ledger

    def forked_here(self, peers: int) -> bool:
        """Fork points towards these peers are durable here, or this copy makes none: only good data can fork."""
        if self.attached is None or self.disk is not Disk.UP_TO_DATE:
            return True
        return all(self.ledger.slot(peer).bitmap_id != UNSET for peer in self.replicas if peers >> peer & 1)

    def rotate_here(self, peers: int) -> None:
        """Record the fork point towards these peers and begin a new generation, in one durable step."""
        if self.forked_here(peers) or self._rotating:
            return
        self._rotating = True
        fresh = self.context.new_id() & ~PRIMARY_BIT | (PRIMARY_BIT if self.group.primary else 0)
        self.ledger.save(lambda found: self._forked(found, peers, fresh), self._rotated)

    def _forked(self, found: Superblock, peers: int, fresh: int) -> Superblock:
        for peer in self.replicas:
            if peers >> peer & 1 and found.peers[slot_index(found, peer)].bitmap_id == UNSET:
                found = with_slot(found, peer, bitmap_id=found.current)
        return replace(found, current=fresh)

    def _rotated(self) -> None:
        self._rotating = False
        self.context.notice("new-generation", volume=self.number, current=f"{self.ledger.durable.current:016x}")
        self.tell_generation()
        self.group.rotated()

    def save_pages(self, then: Callable[[], None]) -> None:
        """Write every bitmap page that is changed now; call `then` when they are on disk.

        One write at a time: a page that is on its way counts as changed until it has arrived, for everybody who waits.
        """
        assert self.attached is not None
        self._page_waiters.append(then)
        if not self._writing_pages:
            self._write_pages(self.attached)

    def _write_pages(self, attached: Attached) -> None:
        pieces = bitmap_pieces(attached, PAGES_MAX)
        complete = not any(bitmap.changed_page_count for bitmap in attached.bitmaps.values())
        waiters: list[Callable[[], None]] = []
        if complete:
            waiters, self._page_waiters = self._page_waiters, []
        if not pieces:
            self._pages_written(attached, waiters)
            return
        self._put_pages(attached, pieces, waiters)

    def _pages_written(self, attached: Attached, waiters: list[Callable[[], None]]) -> None:
        for then in waiters:
            if self.attached is attached:  # one of them may have let the disk go
                then()

    def _put_pages(
        self, attached: Attached, pieces: list[tuple[int, bytes]], waiters: list[Callable[[], None]]
    ) -> None:
        self._writing_pages = True
        self.bitmap_writes += len(pieces)

        def done(_: None, event: DiskDone) -> None:
            if self.attached is not attached:
                return
            self._writing_pages = False
            if event.error:
                self.disk_error("metadata write", event.error)
                return
            self._pages_written(attached, waiters)
            if self._page_waiters and not self._writing_pages and self.attached is attached:
                self._write_pages(attached)

        self.context.out.append(WriteMeta(self.number, self.context.ask(done, None), pieces))

    def empty_log(self, then: Callable[[], None]) -> None:
        """Take everything out of the activity log (every epoch must be retired), then call `then`."""
        if self.attached is None:
            then()
            return
        attached = self.attached
        self.save_pages(lambda: self._empty_log(attached, then))

    def _empty_log(self, attached: Attached, then: Callable[[], None]) -> None:
        transaction = attached.log.plan_empty(self.log.retired)
        if transaction is None:
            then()  # a request came in between: the log stays as it is, which costs a resync at most
            return

        def done(_: None, event: DiskDone) -> None:
            self._metadata_done(attached, event, then)

        token = self.context.ask(done, None)
        self.context.out.append(WriteMeta(self.number, token, ((transaction.offset, transaction.block),)))

    def _metadata_done(self, attached: Attached, event: DiskDone, then: Callable[[], None]) -> None:
        """A transaction of the activity log ended; if the disk was let go meanwhile, nobody waits for it."""
        if self.attached is not attached:
            return
        if event.error:
            self.disk_error("metadata write", event.error)
        else:
            attached.log.done()
            then()

    def settle(self) -> None:
        """Once per turn: the activity log's next transaction, the resyncs, a checkpoint of the bitmap."""
        attached = self.attached
        for replica in self.replicas.values():
            replica.settle()
        if attached is None:
            return
        if attached.log.pending and not attached.log.in_flight and not self._writing_pages:
            self._next_transaction(attached)
        now = self.context.now
        if now - self._checkpoint_at >= CHECKPOINT_NS:
            self._checkpoint_at = now
            if any(replica.syncing for replica in self.replicas.values()):
                self.save_pages(lambda: None)

    def _next_transaction(self, attached: Attached) -> None:
        transaction = attached.log.plan(self.log.retired)
        if transaction is None:
            self.log.close()  # no room: what holds the extents has to retire
            return
        pages: dict[int, set[int]] = {}
        blocks = block_count(self.size)
        for peer, bitmap in attached.bitmaps.items():
            for extent in transaction.evict:
                pages.setdefault(peer, set()).update(bitmap.changed_pages_over(*blocks_of_extent(extent, blocks)))
        pieces = bitmap_pieces(attached, PAGES_MAX, pages)
        block = ((transaction.offset, transaction.block),)

        def write_block() -> None:
            self.log_writes += 1
            token = self.context.ask(done, None)
            self.context.out.append(WriteMeta(self.number, token, block))

        def done(_: None, event: DiskDone) -> None:
            self._metadata_done(attached, event, self.path.wake_cold)

        if pieces:
            self._put_pages(attached, pieces, [write_block])
        else:
            write_block()

    # --- the disk comes and goes

    def attach(self) -> None:
        """Open the disk; `opened` or `open_failed` follows."""
        self.error = ""
        self.disk = move(DISK_MOVES, self.disk, DiskMove.ATTACH)
        self.context.out.append(OpenDisk(self.number))

    def opened(self, event: DiskOpened) -> None:
        """The metadata was read."""
        self.device_size = event.size
        self._attaching = Attaching(
            self.context,
            self.number,
            self.context.options.peers,
            self._usable,
            self.open_failed,
            lambda error: self.disk_error("metadata write", error),
        )
        self._attaching.begin(event)

    def open_failed(self, error: str) -> None:
        """The disk cannot be used; `error` says why."""
        self.error = error
        self.context.notice("attach-failed", volume=self.number, reason=error)
        self.context.out.append(CloseDisk(self.number))

    def _usable(self, attached: Attached) -> None:
        found = attached.ledger.durable
        self.attached = attached
        self._attaching = None
        self.size = attached.size
        self.serving = False
        self.suspect |= found.outdated  # as a failed disk is marked (decision 0001, disk failure)
        if not found.consistent:
            happened = DiskMove.FOUND_INCONSISTENT
        elif not found.was_up_to_date:
            happened = DiskMove.FOUND_OUTDATED
        elif self.context.options.fencing == "dont-care" and not self._somebody_may_be_newer():
            happened = DiskMove.FOUND_UP_TO_DATE
        else:
            happened = DiskMove.FOUND_CONSISTENT
        self.disk = move(DISK_MOVES, self.disk, happened)
        self.context.notice("attached", volume=self.number, disk=self.disk.word, size=self.size)
        self.refresh()
        self.group.disk_changed(self)

    def _somebody_may_be_newer(self) -> bool:
        """A disk that comes back to a running resource: a round decides, and until then it is not read."""
        return self.group.primary or any(replica.link is not None for replica in self.replicas.values())

    def detach(self) -> None:
        """Let a healthy disk go; nothing is in flight and every epoch is retired."""
        self.disk = move(DISK_MOVES, self.disk, DiskMove.DETACH)
        self._let_go([])

    def shut(self) -> None:
        """Close the disk at the end of the process: nothing is told to the peer, nothing marked."""
        assert self.attached is not None
        attached, self.attached = self.attached, None
        attached.ledger.abandon()
        self._rotating = self._writing_pages = False
        self._page_waiters.clear()
        self.disk = move(DISK_MOVES, self.disk, DiskMove.DETACH)
        self.context.out.append(CloseDisk(self.number))
        self.group.disk_lost(self)

    def _hot_ranges(self, attached: Attached) -> list[tuple[int, int]]:
        starts = [extent * EXTENT for extent in attached.log.hot()]
        return [(start, min(EXTENT, self.size - start)) for start in starts]

    def _let_go(self, ranges: list[tuple[int, int]]) -> None:
        """Decision 0001, "Disk failure": mark the disk Outdated, tell the peer, freeze replies until both are done."""
        self.stop_serving()
        attached, self.attached = self.attached, None
        self._attaching = None
        self._rotating = self._writing_pages = False
        self._page_waiters.clear()
        self.path.frozen = True
        self._farewells = set()
        self._refused = False
        for peer, replica in self.replicas.items():
            if replica.disk_gone(ranges):
                self._farewells.add(peer)
        if attached is not None:
            ledger = attached.ledger
            ledger.abandon()
            if any(r.has_good_data for r in self.replicas.values()):
                self._last_gasp = True
                outdated = replace(ledger.wanted, was_up_to_date=False)
                token = self.context.ask(self._gasped, None)
                piece = ((ledger.sequence + 1) % 2 * 4096, encode(outdated, ledger.sequence + 1))
                self.context.out.append(WriteMeta(self.number, token, (piece,)))
        self.context.out.append(CloseDisk(self.number))
        self._thaw()
        self.group.disk_lost(self)

    def _gasped(self, _: None, event: DiskDone) -> None:
        self._last_gasp = False  # written, or proven unwritable
        self._thaw()

    def farewell_heard(self, peer: int) -> None:
        """The peer marked what our disk lacks, durably."""
        self._farewells.discard(peer)
        self._thaw()

    def farewell_refused(self, peer: int) -> None:
        """The peer cannot vouch for what our disk lacks: it has lost its own, compares anew, or is gone."""
        if peer in self._farewells:
            self._farewells.discard(peer)
            self._refused = True
            self._thaw()

    def _thaw(self) -> None:
        if self._last_gasp or self._farewells or not self.path.frozen:
            return
        good = not self._refused and any(replica.has_good_data for replica in self.replicas.values())
        self.path.thaw(good=good)

    def closed(self) -> None:
        """The device is closed."""
        self.disk = move(DISK_MOVES, self.disk, DiskMove.CLOSED)
        self.group.disk_changed(self)

    def become(self, happened: DiskMove) -> None:
        """Move the disk's state."""
        before, self.disk = self.disk, move(DISK_MOVES, self.disk, happened)
        if before is not self.disk:
            self.context.notice("disk-state", volume=self.number, disk=self.disk.word, reason=happened.value)

    def agree_size(self, size: int) -> None:
        """One copy is fresh, or both: the volume is as large as the smaller disk."""
        assert self.attached is not None and 0 < size <= self.device_size
        if size == self.size:
            return
        self.size = self.attached.size = size
        for peer, bitmap in self.attached.bitmaps.items():
            self.attached.bitmaps[peer] = type(bitmap)(block_count(size), bitmap.slot)

    @property
    def blocks(self) -> int:
        """Blocks of the volume, the partial one at the end included."""
        return (self.size + (1 << BLOCK_SHIFT) - 1) >> BLOCK_SHIFT
