# SPDX-License-Identifier: Apache-2.0
"""Bitmap pages and the activity log on their way to the disk: in what order, in what pieces, and when the disk goes."""

from __future__ import annotations

import errno
from collections.abc import Callable

from replicator.core import activity, superblock
from replicator.core.actions import (
    Action,
    CloseDisk,
    CommandDone,
    Dial,
    FlushData,
    OpenDisk,
    WriteMeta,
)
from replicator.core.attach import PAGES_MAX
from replicator.core.bitmap import Bitmap, fresh_pages
from replicator.core.events import Command, DialFailed, DiskClosed, DiskDone, DiskOpened, Event, Io, Tick
from replicator.core.geometry import ACTIVITY_BLOCKS, ACTIVITY_OFFSET, BLOCK, PAGE, block_count, slot_bytes_for
from replicator.core.options import Options
from replicator.core.resource import Resource
from replicator.core.superblock import PeerSlot, Superblock
from tests.sim.node import Node
from tests.sim.world import MS, SECOND
from tests.unit.mirror import MIB, Mirror, noise

LONG = 1000 * SECOND


def is_log(action: Action) -> bool:
    return (
        isinstance(action, WriteMeta)
        and ACTIVITY_OFFSET <= action.pieces[0][0] < ACTIVITY_OFFSET + ACTIVITY_BLOCKS * PAGE
    )


def is_bitmap(action: Action) -> bool:
    return isinstance(action, WriteMeta) and action.pieces[0][0] < 0


def fail_pages(m: Mirror, node: Node) -> None:
    """Writes of bitmap pages end with EIO; everything else works."""
    m.fail(node, is_bitmap)


def lose_disk_at(m: Mirror, node: Node, when: Callable[[Action], bool]) -> None:
    """The core learns of a failed flush right after it asked for this."""

    def lose() -> None:
        m.volume(node).disk_error("flush", errno.EIO)
        node.step(Tick())

    m.watch(lambda who, action: m.world.after(0, lose) if who is node and when(action) else None)


# --- who waits for pages


def test_whoever_asks_for_pages_while_some_are_on_their_way_is_told_when_the_later_ones_are_there() -> None:
    m = Mirror(size=130 * MIB)  # two pages
    volume = m.volume(m.alpha)
    found: list[tuple[str, set[int]]] = []
    writes: list[Action] = []
    m.watch(lambda who, action: writes.append(action) if who is m.alpha and is_bitmap(action) else None)

    def look(who: str) -> Callable[[], None]:
        return lambda: found.append((who, stable_bits(m, m.alpha)))

    volume.mark(1, 5 * BLOCK, BLOCK)
    volume.save_pages(look("first"))
    volume.mark(1, 128 * MIB, BLOCK)
    volume.save_pages(look("second"))
    m.alpha.step(Tick())
    m.pause(10 * MS)
    assert found == [("first", {5}), ("second", {5, 128 * MIB // BLOCK})]
    assert len(writes) == 2


def stable_bits(m: Mirror, node: Node) -> set[int]:
    disk = node.disks[0]
    bitmap, damaged = Bitmap.decode(bytes(disk.meta.stable[: disk.fixed_base]), block_count(disk.size), 0)
    assert not damaged
    bits, at = set(), 0
    while (run := bitmap.next_run(at, 1)) is not None:
        bits.add(run[0])
        at = run[0] + 1
    return bits


def test_nobody_is_told_of_pages_of_a_disk_that_was_let_go() -> None:
    m = Mirror()
    volume = m.volume(m.alpha)
    told: list[str] = []

    def leave() -> None:
        told.append("first")
        volume.disk_error("flush", errno.EIO)

    volume.mark(1, 0, BLOCK)
    volume.save_pages(lambda: told.append("page 0 is there"))
    volume.save_pages(leave)
    volume.save_pages(lambda: told.append("never"))
    m.alpha.step(Tick())
    m.run(lambda: m.disk(m.alpha) == "Diskless")
    assert told == ["page 0 is there", "first"]


def test_a_page_that_cannot_be_written_is_a_failed_disk() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.partition()
    m.write(m.alpha, 3, 7)
    fail_pages(m, m.alpha)
    m.done(m.alpha, "secondary")
    m.run(lambda: bool(m.notices(m.alpha, "disk-failed")))
    assert m.notices(m.alpha, "disk-failed")[0].fields["operation"] == "metadata write"
    m.run(lambda: m.disk(m.alpha) == "Diskless")


# --- emptying the log


def test_a_disk_lost_while_the_log_is_emptied_does_not_hang_the_demotion() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    lose_disk_at(m, m.alpha, is_log)
    m.done(m.alpha, "secondary")
    m.run(lambda: m.disk(m.alpha) == "Diskless")
    m.done(m.beta, "primary")
    assert m.read(m.beta, 3)[0] == 7


def test_a_demotion_does_not_wait_for_a_log_transaction_that_nobody_needs_any_more() -> None:
    """The extents stay hot on disk: that costs a resync of them at most."""
    m = Mirror(primary=1, size=12 * MIB, epoch_time_ns=LONG)
    m.fill(m.alpha, noise(3, 12 * MIB))
    m.stall_resync(m.alpha)
    m.done(m.beta, "invalidate", volume=0)
    m.run(lambda: m.replication(m.beta) == "SyncTarget" and bool(m._held))
    m.pause(10 * MS)
    m.slow_disks(5_000_000)
    write = m.ask(m.beta, Io.WRITE, 2048, value=7)
    m.pause(10 * MS)
    m.fast_disks()
    m.partition()
    assert m.wait(write).error == errno.EIO, "its good copy is gone while the log was written for it"
    begun = m.world.now
    m.done(m.beta, "secondary")
    assert m.world.now - begun < SECOND and m.beta.in_flight
    m.hooks.clear()
    m.stall(m.alpha, stalled=False)
    m.heal()
    m.establish()
    assert m.identical()


# --- a large volume, alone


class Lone:
    """A core with a disk of any size and no peer to be seen; every operation succeeds at once."""

    def __init__(self, size: int) -> None:
        options = Options(resource="r0", node_id=0, node_name="alpha", peers={1: "beta"}, volumes=(0,))
        self.resource = Resource(options, lambda: 1 << 40)
        slot_bytes = slot_bytes_for(size)
        self.size = size
        self.slot = bytearray(b"".join(fresh_pages(0, slot_bytes)))
        fresh = Superblock(
            resource_id=bytes(range(16)), volume=0, node_id=0, size_bytes=size, device_bytes=size,
            slot_bytes=slot_bytes, current=4, peers=(PeerSlot(node_id=1),),
        )  # fmt: skip
        self.fixed = superblock.fresh_fixed_part(fresh)
        self.writes: list[WriteMeta] = []
        self.answers: list[CommandDone] = []

    def command(self, verb: str, **args: object) -> None:
        """A verb that must succeed."""
        self.answers.clear()
        self._step(Command(1, verb, args))
        (answer,) = self.answers
        assert answer.ok, answer

    def _step(self, event: Event) -> None:
        events = [event]
        while events:
            self.resource.step(events.pop(0), 0)
            for action in self.resource.drain():
                events += self._act(action)

    def _act(self, action: Action) -> list[Event]:
        match action:
            case OpenDisk():
                return [DiskOpened(0, self.size, self.fixed, {0: bytes(self.slot)})]
            case CloseDisk():
                return [DiskClosed(0)]
            case FlushData():
                return [DiskDone(action.token, 0)]
            case WriteMeta():
                self.writes.append(action)
                for offset, data in action.pieces:
                    if offset < 0:
                        at = offset + len(self.slot)
                        self.slot[at : at + len(data)] = data
                return [DiskDone(action.token, 0)]
            case Dial():
                return [DialFailed(1, "nobody there")]
            case CommandDone():
                self.answers.append(action)
        return []


def test_more_pages_than_one_write_may_carry_are_all_on_disk_before_the_log_is_emptied() -> None:
    lone = Lone(40 << 30)
    lone.command("attach")
    lone.command("primary", force=True)
    assert lone.resource.volumes[0].dirty_count(1) == block_count(lone.size), "the peer has nothing of it"
    lone.writes.clear()
    lone.command("secondary")
    kinds = ["page" if is_bitmap(write) else "log" if is_log(write) else "superblock" for write in lone.writes]
    assert kinds == ["page", "page", "log", "superblock"]
    assert [len(write.pieces) for write in lone.writes[:2]] == [PAGES_MAX, len(lone.slot) // PAGE - PAGES_MAX]
    bitmap, damaged = Bitmap.decode(bytes(lone.slot), block_count(lone.size), 0)
    assert (bitmap.dirty_count, damaged) == (block_count(lone.size), 0)
    assert activity.recover(ring(lone)).extents == ()


def ring(lone: Lone) -> bytes:
    """The activity log as it lies on the disk."""
    area = bytearray(lone.fixed[ACTIVITY_OFFSET : ACTIVITY_OFFSET + ACTIVITY_BLOCKS * PAGE])
    for write in lone.writes:
        for offset, data in write.pieces if is_log(write) else ():
            area[offset - ACTIVITY_OFFSET : offset - ACTIVITY_OFFSET + len(data)] = data
    return bytes(area)
