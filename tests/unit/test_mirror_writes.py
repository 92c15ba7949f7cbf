# SPDX-License-Identifier: Apache-2.0
"""When a write is complete, where it lies then, and where reads come from (decision 0001, "The life of a write")."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from replicator.core.events import Io
from replicator.core.geometry import BLOCK
from replicator.core.wire import Kind
from tests.sim.world import MS, SECOND
from tests.unit.mirror import MIB, Mirror

EXTENT_BLOCKS = 1024


# --- completion points


def test_protocol_a_answers_although_the_link_hangs() -> None:
    m = Mirror(primary=0, protocol="A")
    m.stall(m.alpha)
    m.write(m.alpha, 3, 7)
    assert (m.block(m.alpha, 3), m.block(m.beta, 3)) == (7, 0)


def test_protocol_a_stops_answering_beyond_the_send_window() -> None:
    m = Mirror(primary=0, protocol="A", send_window_bytes=4 * BLOCK)
    m.stall(m.alpha)
    for block in range(4):
        m.write(m.alpha, block, 7)
    over = m.ask(m.alpha, Io.WRITE, 4, value=7)
    m.pause(SECOND)
    assert over.reply is None
    m.stall(m.alpha, stalled=False)
    assert m.wait(over).error == 0
    assert m.block(m.beta, 4) == 7


def test_protocol_b_waits_until_the_peer_says_that_it_received_the_write() -> None:
    m = Mirror(primary=0, protocol="B")
    m.stall(m.beta)
    asked = m.ask(m.alpha, Io.WRITE, 3, value=7)
    m.pause(SECOND)
    assert asked.reply is None
    m.stall(m.beta, stalled=False)
    assert m.wait(asked).error == 0


def test_protocol_b_answers_before_the_disk_of_the_peer_has_the_write() -> None:
    m = Mirror(primary=0, protocol="B")
    m.write(m.alpha, 3, 6)  # the extent is hot from here on
    m.on_frame(Kind.WRITE, lambda: m.world.after(0, m.slow_disks))  # not for alpha's own disk
    m.write(m.alpha, 3, 7)
    assert (m.block(m.alpha, 3), m.block(m.beta, 3)) == (7, 6)


def test_protocol_c_waits_for_the_disk_of_the_peer() -> None:
    m = Mirror(primary=0)
    m.stall_at(Kind.WRITTEN, m.beta)
    asked = m.ask(m.alpha, Io.WRITE, 3, value=7)
    m.pause(SECOND)
    assert m.block(m.beta, 3) == 7 and asked.reply is None
    m.stall(m.beta, stalled=False)
    assert m.wait(asked).error == 0


def test_protocol_c_sends_no_received() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    assert (m.sent(Kind.RECEIVED), m.sent(Kind.WRITTEN)) == (0, 1)


# --- order


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
@pytest.mark.parametrize("seed", range(3))
def test_overlapping_writes_are_applied_in_the_order_they_came_on_both(protocol: str, seed: int) -> None:
    m = Mirror(primary=0, protocol=protocol, seed=seed)
    asked = [m.ask(m.alpha, Io.WRITE, 10 + number % 3, 3, value=number) for number in range(1, 30)]
    for each in asked:
        assert m.wait(each).error == 0
    m.pause()
    assert m.identical()
    # 27, 28, 29 begin at blocks 10, 11, 12: the last ones that touch each block are these
    assert [m.block(m.alpha, block) for block in (10, 11, 12, 13, 14)] == [27, 28, 29, 29, 29]


def test_a_client_without_a_primary_gets_an_error() -> None:
    m = Mirror()
    for io in (Io.READ, Io.WRITE, Io.TRIM, Io.ZERO, Io.FLUSH):
        assert m.wait(m.ask(m.alpha, io)).error == errno.EPERM


# --- what travels


@pytest.mark.parametrize(("io", "kind"), [(Io.TRIM, Kind.TRIM), (Io.ZERO, Kind.ZERO)])
def test_trim_and_zero_travel_as_such_and_read_back_as_zeroes_on_both(io: Io, kind: Kind) -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 8, 7, 4)
    writes = m.sent(Kind.WRITE)
    assert m.wait(m.ask(m.alpha, io, 9, 2)).error == 0
    assert (m.sent(kind), m.sent(Kind.WRITE)) == (1, writes)
    assert [m.block(node, block) for node in (m.alpha, m.beta) for block in (8, 9, 10, 11)] == [7, 0, 0, 7] * 2
    assert m.read(m.alpha, 9, 2) == bytes(2 * BLOCK)


@pytest.mark.parametrize(
    ("io", "keep", "punch"), [(Io.ZERO, True, False), (Io.ZERO, False, True), (Io.TRIM, False, True)]
)
def test_a_zero_that_must_keep_its_space_punches_no_hole_on_either_side(io: Io, keep: bool, punch: bool) -> None:
    m = Mirror(primary=0)
    seen = m.actions("ZeroData")
    assert m.wait(m.ask(m.alpha, io, 9, 2, keep=keep)).error == 0
    assert [(node, action.punch) for node, action in seen] == [(0, punch), (1, punch)]


def test_fua_reaches_both_disks_as_fua() -> None:
    m = Mirror(primary=0)
    seen = m.actions("WriteData")
    m.write(m.alpha, 1, 7, fua=True)
    m.write(m.alpha, 2, 7)
    assert sorted((node, action.offset // BLOCK, action.fua) for node, action in seen) == [
        (0, 1, True), (0, 2, False), (1, 1, True), (1, 2, False),
    ]  # fmt: skip


# --- losing the peer


def test_a_lost_link_marks_exactly_what_was_not_confirmed() -> None:
    m = Mirror(primary=0, epoch_time_ns=100 * SECOND)
    m.write(m.alpha, 1, 7)
    m.flush(m.alpha)
    m.pause(10 * MS)
    m.write(m.alpha, 20, 7, 2)
    m.write(m.alpha, 40, 7)
    m.partition()
    assert m.dirty(m.alpha) == {20, 21, 40}
    assert m.dirty(m.beta) == set()


def test_a_write_under_way_when_the_link_is_lost_is_answered_after_the_fork_point_is_durable() -> None:
    m = Mirror(primary=0)
    before = m.superblock(m.alpha).current
    m.stall(m.beta)
    asked = m.ask(m.alpha, Io.WRITE, 5, value=7)
    m.pause(20 * MS)
    assert asked.reply is None
    found = []
    m.on_reply(m.alpha, lambda: found.append(m.superblock(m.alpha)))
    m.partition()
    assert m.wait(asked).error == 0
    assert found[0].peers[0].bitmap_id == before and found[0].current != before
    assert m.dirty(m.alpha) == {5}


def test_writes_that_a_peer_refuses_are_marked_and_answered() -> None:
    m = Mirror(primary=0)
    m.beta.disks[0].broken = True
    m.write(m.alpha, 5, 7)
    assert m.dirty(m.alpha) >= {5}
    m.run(lambda: m.disk(m.beta) == "Diskless")
    assert m.replica(m.alpha).disk.word == "Diskless"


# --- reads


def test_reads_are_local_while_the_copy_is_good() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    assert m.read(m.alpha, 3) == bytes([7]) * BLOCK
    assert m.sent(Kind.READ) == 0


def test_a_diskless_primary_reads_from_the_peer() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.done(m.alpha, "detach")
    assert m.read(m.alpha, 3) == bytes([7]) * BLOCK
    assert m.sent(Kind.READ_DATA) == 1


def test_a_primary_that_is_synced_reads_dirty_blocks_from_the_peer_and_clean_ones_at_home() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.write(m.alpha, 200, 8)
    m.done(m.beta, "pause-sync")
    m.done(m.alpha, "detach")
    m.write(m.alpha, 3, 9)
    m.done(m.alpha, "attach")
    m.run(lambda: m.replication(m.alpha) == "PausedSyncT")
    before = m.sent(Kind.READ)
    dirty = m.dirty(m.alpha)
    assert 3 in dirty
    clean = next(block for block in range(250) if block not in dirty)
    m.alpha.disks[0].data.seen[clean * BLOCK : (clean + 1) * BLOCK] = bytes([5]) * BLOCK
    reads = [m.ask(m.alpha, Io.READ, block) for block in (3, clean)]
    m.run(lambda: all(read.reply is not None for read in reads))
    assert bytes(reads[0].reply.data) == bytes([9]) * BLOCK  # type: ignore[union-attr]
    assert bytes(reads[1].reply.data) == bytes([5]) * BLOCK  # type: ignore[union-attr]
    assert m.sent(Kind.READ) == before + 1


def test_without_good_data_reads_and_writes_end_with_an_error() -> None:
    m = Mirror(primary=0)
    m.done(m.alpha, "detach")
    m.partition()
    assert m.wait(m.ask(m.alpha, Io.READ, 3)).error == errno.EIO
    assert m.wait(m.ask(m.alpha, Io.WRITE, 3, value=1)).error == errno.EIO
    assert m.wait(m.ask(m.alpha, Io.FLUSH)).error == errno.EIO


def test_a_read_the_local_disk_cannot_serve_is_served_by_the_peer() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.fail_reads(m.alpha)
    assert m.read(m.alpha, 3) == bytes([7]) * BLOCK
    assert m.notices(m.alpha, "read-error") and m.disk(m.alpha) == "UpToDate"


def test_a_read_nobody_can_serve_ends_with_an_error() -> None:
    m = Mirror(primary=0)
    m.fail_reads(m.alpha)
    m.fail_reads(m.beta)
    assert m.wait(m.ask(m.alpha, Io.READ, 3)).error == errno.EIO


def test_a_read_under_way_at_the_peer_when_the_link_is_lost_ends() -> None:
    m = Mirror(primary=0)
    m.done(m.alpha, "detach")
    m.stall(m.beta)
    read = m.ask(m.alpha, Io.READ, 3)
    m.pause(10 * MS)
    m.partition()
    assert m.wait(read).error == errno.EIO


# --- the activity log


def small_log(**options: Any) -> Mirror:
    return Mirror(primary=0, size=56 * MIB, activity_extents=9, epoch_time_ns=1000 * SECOND, **options)


def test_writes_over_more_extents_than_the_log_holds_go_on_by_closing_epochs() -> None:
    m = small_log()
    for extent in range(12):
        m.write(m.alpha, extent * EXTENT_BLOCKS, extent + 1)
    assert m.sent(Kind.BARRIER) >= 1, "only a retired epoch makes room"
    attached = m.volume(m.alpha).attached
    assert attached is not None and attached.log.hot_count <= 9
    assert m.identical()


def test_after_a_crash_the_hot_extents_are_dirty_and_nothing_else() -> None:
    m = small_log()
    for extent in (1, 5):
        m.write(m.alpha, extent * EXTENT_BLOCKS, 7)
    m.partition()
    m.kill(m.alpha)
    m.restart(m.alpha)
    m.run(lambda: m.disk(m.alpha) == "UpToDate")
    assert m.dirty(m.alpha) == {*range(1024, 2048), *range(5 * 1024, 6 * 1024)}


def test_after_a_clean_demotion_nothing_is_dirty() -> None:
    m = small_log()
    m.write(m.alpha, 1024, 7)
    m.done(m.alpha, "secondary")
    m.partition()
    m.kill(m.alpha)
    m.restart(m.alpha)
    m.run(lambda: m.disk(m.alpha) == "UpToDate")
    assert m.dirty(m.alpha) == set()


@pytest.mark.parametrize("writes", [11, 12, 13, 14])
def test_bits_of_evicted_extents_are_on_disk_before_they_leave_the_log(writes: int) -> None:
    """A lone Primary writes over more extents than the log holds and loses power; nothing that differs is clean."""
    m = small_log()
    m.partition()
    for extent in range(writes):
        m.write(m.alpha, extent * EXTENT_BLOCKS + extent, 7)
    m.power_cut(m.alpha)
    m.restart(m.alpha)
    m.run(lambda: m.disk(m.alpha) == "UpToDate")
    alpha, beta = m.alpha.disks[0].data.seen, m.beta.disks[0].data.seen
    differing = {block for block in range(writes * 1024) if block % 1025 == 0 and m.block(m.alpha, block)}
    assert differing and alpha != beta
    assert differing <= m.dirty(m.alpha)


def test_every_eviction_finds_its_bitmap_pages_on_disk() -> None:
    m = small_log()
    m.partition()
    seen = m.actions("WriteMeta")
    for extent in range(12):
        m.write(m.alpha, extent * EXTENT_BLOCKS, 7)
    kinds = ["page" if action.pieces[0][0] < 0 else "log" for _, action in seen if not 0 <= action.pieces[0][0] < 8192]
    assert "page" in kinds
    evicting = kinds.index("page")
    assert kinds[evicting + 1] == "log", "the pages first, in an action of their own, then the transaction"
