# SPDX-License-Identifier: Apache-2.0
"""Disks that fail, are detached and come back (decision 0001, "Disk failure"; V8)."""

from __future__ import annotations

import errno

import pytest

from replicator.core.events import Io
from replicator.core.generations import same
from replicator.core.wire import Kind
from tests.sim.node import Node
from tests.sim.world import MS, SECOND
from tests.unit.mirror import MIB, Mirror, noise

LONG = 1000 * SECOND


def mend(m: Mirror, node: Node) -> None:
    """The disk works again and is attached."""
    node.disks[0].broken = node.disks[0].fail_flush = False
    m.done(node, "attach")


# --- failing


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_a_failed_write_of_the_primary_is_no_error_and_the_peer_has_it(protocol: str) -> None:
    m = Mirror(primary=0, protocol=protocol, epoch_time_ns=LONG)
    before = m.superblock(m.beta).current
    m.write(m.alpha, 2, 6)
    m.alpha.disks[0].broken = True
    m.write(m.alpha, 3, 7)
    assert m.disk(m.alpha) == "Diskless" and m.block(m.beta, 3) == 7
    found = m.superblock(m.beta)
    assert same(found.peers[0].bitmap_id, before), "the peer has a fork point"
    assert {2, 3} <= m.dirty(m.beta), "and the bits of all that may not be on the lost disk"
    m.write(m.alpha, 4, 8)
    assert m.read(m.alpha, 2)[0] == 6 and m.read(m.alpha, 4)[0] == 8
    assert "errno" in m.reasons(m.alpha)["diskless"] and "peer-diskless" in m.reasons(m.beta)


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_no_reply_leaves_before_the_peer_knows_of_the_lost_disk(protocol: str) -> None:
    m = Mirror(primary=0, protocol=protocol, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 6)
    m.alpha.disks[0].broken = True
    m.stall_at(Kind.DISK_STATE_ACK, m.beta)
    asked = [m.ask(m.alpha, Io.WRITE, block, value=7) for block in (3, 4)]
    m.pause(SECOND)
    assert [each.reply for each in asked] == [None, None]
    m.stall(m.beta, stalled=False)
    assert all(m.wait(each).error == 0 for each in asked)
    assert m.superblock(m.beta).peers[0].bitmap_id != 0


def test_many_writes_under_way_when_the_disk_fails_all_succeed() -> None:
    m = Mirror(primary=0)
    asked = [m.ask(m.alpha, Io.WRITE, block, value=block + 1) for block in range(30)]
    m.pause(MS)
    m.alpha.disks[0].broken = True
    asked += [m.ask(m.alpha, Io.WRITE, block, value=block + 1) for block in range(30, 60)]
    assert all(m.wait(each).error == 0 for each in asked)
    assert all(m.block(m.beta, block) == block + 1 for block in range(60))


def test_a_failed_write_at_the_secondary_is_no_error() -> None:
    m = Mirror(primary=0)
    before = m.superblock(m.alpha).current
    m.beta.disks[0].broken = True
    m.write(m.alpha, 3, 7)
    m.run(lambda: m.disk(m.beta) == "Diskless")
    assert m.disk(m.alpha) == "UpToDate"
    assert same(m.superblock(m.alpha).peers[0].bitmap_id, before)
    assert 3 in m.dirty(m.alpha)


@pytest.mark.parametrize("together", [True, False])
def test_when_both_disks_fail_every_request_ends_with_an_error(together: bool) -> None:
    m = Mirror(primary=0)
    m.alpha.disks[0].broken = True
    if not together:
        m.write(m.alpha, 3, 7)
    m.beta.disks[0].broken = True
    asked = [m.ask(m.alpha, io, 3, value=1) for io in (Io.WRITE, Io.READ, Io.WRITE, Io.FLUSH)]
    m.run(lambda: all(each.reply is not None for each in asked))
    assert [each.reply.error for each in asked[:3]] == [errno.EIO] * 3  # type: ignore[union-attr]
    assert m.wait(m.ask(m.alpha, Io.FLUSH)).error == errno.EIO
    assert m.wait(m.ask(m.alpha, Io.READ, 5)).error == errno.EIO


def test_a_failed_disk_without_a_peer_ends_in_errors() -> None:
    m = Mirror(primary=0)
    m.partition()
    m.write(m.alpha, 3, 7)
    m.alpha.disks[0].broken = True
    assert m.wait(m.ask(m.alpha, Io.WRITE, 4, value=7)).error == errno.EIO
    assert m.wait(m.ask(m.alpha, Io.READ, 3)).error == errno.EIO
    m.run(lambda: m.disk(m.alpha) == "Diskless")
    assert "diskless" in m.reasons(m.alpha) and "not-connected" in m.reasons(m.alpha)


def test_a_failed_metadata_write_is_a_failed_disk() -> None:
    m = Mirror(primary=0, size=12 * MIB)
    m.write(m.alpha, 3, 7)
    m.fail_metadata(m.alpha)
    m.write(m.alpha, 2048, 8)  # a cold extent: the activity log has to be written
    assert m.disk(m.alpha) == "Diskless" and m.block(m.beta, 2048) == 8
    assert m.notices(m.alpha, "disk-failed")[0].fields["operation"] == "metadata write"
    assert m.read(m.alpha, 3)[0] == 7


def test_a_failed_fork_point_is_a_failed_disk_and_the_lone_write_an_error() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 6)
    m.flush(m.alpha)  # so that losing the peer needs no fork point by itself
    m.partition()
    m.fail_metadata(m.alpha)
    assert m.wait(m.ask(m.alpha, Io.WRITE, 3, value=7)).error == errno.EIO
    assert m.block(m.alpha, 3) == 6


def test_a_disk_that_fails_in_the_middle_of_a_promotion_ends_it_one_way_or_the_other() -> None:
    m = Mirror()
    m.fail_metadata(m.alpha)
    asked = m.begin(m.alpha, "primary")
    m.run(lambda: bool(asked.answers))
    assert m.role(m.alpha) == ("Primary" if asked.answer.ok else "Secondary")


def test_a_disk_that_fails_in_the_middle_of_a_demotion_does_not_hang_it() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.fail_metadata(m.alpha)
    asked = m.begin(m.alpha, "secondary")
    m.run(lambda: bool(asked.answers))
    assert m.role(m.alpha) == "Secondary"


def test_a_disk_that_fails_while_a_new_generation_is_made_does_not_hang_it() -> None:
    m = Mirror()
    m.fail_metadata(m.alpha)
    asked = m.begin(m.alpha, "new-current-uuid", volume=0)
    m.run(lambda: bool(asked.answers))
    m.pause()
    m.done(m.beta, "primary")


@pytest.mark.parametrize("verb", ["invalidate", "invalidate-remote"])
def test_a_disk_that_fails_while_a_copy_is_invalidated_does_not_hang_it(verb: str) -> None:
    m = Mirror()
    m.fail_metadata(m.alpha)
    asked = m.begin(m.alpha, verb, volume=0)
    m.run(lambda: bool(asked.answers))


def test_a_lost_disk_is_marked_outdated_if_it_can_be_written() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 7)
    m.alpha.disks[0].fail_flush = True
    m.flush(m.alpha)
    assert m.superblock(m.alpha).outdated


# --- coming back


@pytest.mark.parametrize("how", ["write", "flush"])
def test_a_disk_that_comes_back_gets_what_it_lacks(how: str) -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 7)
    if how == "write":
        m.alpha.disks[0].broken = True
    else:
        m.alpha.disks[0].fail_flush = True
    m.write(m.alpha, 4, 8)
    m.flush(m.alpha)
    m.alpha.disks[0].power_cut(m.world.rng)  # its cache is gone
    m.write(m.alpha, 5, 9)
    mend(m, m.alpha)
    m.establish()
    assert m.identical()
    assert [m.block(m.alpha, block) for block in (3, 4, 5)] == [7, 8, 9]


def test_a_disk_that_comes_back_is_synced_by_bitmap() -> None:
    m = Mirror(primary=0, size=12 * MIB, checksum_sync="never")
    m.fill(m.alpha, noise(1, 12 * MIB))
    m.fill(m.beta, noise(1, 12 * MIB))
    m.done(m.alpha, "detach")
    m.write(m.alpha, 2048, 8, 4)
    before = m.replica(m.alpha).received_bytes
    mend(m, m.alpha)
    m.establish()
    assert m.identical() and m.replica(m.alpha).received_bytes - before == 4 * 4096


def test_a_disk_that_is_still_broken_cannot_be_attached_and_says_why() -> None:
    m = Mirror(primary=0)
    m.alpha.disks[0].broken = True
    m.write(m.alpha, 3, 7)
    answer = m.command(m.alpha, "attach")
    assert not answer.ok and "input/output error" in answer.message
    assert "input/output error" in m.reasons(m.alpha)["diskless"]
    mend(m, m.alpha)
    m.establish()


def test_a_primary_without_a_disk_that_is_killed_leaves_the_good_copy_in_charge() -> None:
    m = Mirror(primary=0)
    m.alpha.disks[0].broken = True
    m.write(m.alpha, 3, 7)
    m.kill(m.alpha)
    m.alpha.disks[0].broken = False
    m.restart(m.alpha)
    m.establish()
    assert m.identical() and m.block(m.alpha, 3) == 7


def test_a_diskless_primary_whose_peer_lost_power_gets_its_flushed_writes_back() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.done(m.alpha, "detach")
    m.write(m.alpha, 3, 7)
    m.flush(m.alpha)
    m.power_cut(m.beta)
    assert m.wait(m.ask(m.alpha, Io.READ, 3)).error == errno.EIO
    m.restart(m.beta)
    m.run(lambda: m.connection(m.alpha).connected and m.replica(m.alpha).has_good_data)
    assert m.read(m.alpha, 3)[0] == 7


# --- detaching


def test_detach_with_everything_under_way_loses_nothing() -> None:
    m = Mirror(primary=0)
    asked = [m.ask(m.alpha, Io.WRITE, block, value=block + 1) for block in range(30)]
    detach = m.begin(m.alpha, "detach")
    asked += [m.ask(m.alpha, Io.WRITE, block, value=block + 1) for block in range(30, 60)]
    m.run(lambda: bool(detach.answers))
    assert detach.answer.ok and m.disk(m.alpha) == "Diskless"
    assert all(m.wait(each).error == 0 for each in asked)
    assert all(m.block(m.beta, block) == block + 1 for block in range(60))
    m.done(m.alpha, "attach")
    m.establish()
    assert m.identical()


def test_detach_of_the_secondary_under_load_loses_nothing() -> None:
    m = Mirror(primary=0)
    asked = [m.ask(m.alpha, Io.WRITE, block, value=block + 1) for block in range(30)]
    detach = m.begin(m.beta, "detach")
    asked += [m.ask(m.alpha, Io.WRITE, block, value=block + 1) for block in range(30, 60)]
    m.run(lambda: bool(detach.answers))
    assert all(m.wait(each).error == 0 for each in asked)
    m.done(m.beta, "attach")
    m.establish()
    assert m.identical() and m.block(m.beta, 59) == 60


def test_detach_of_the_last_good_copy_of_a_primary_is_refused() -> None:
    m = Mirror(primary=0)
    m.partition()
    answer = m.command(m.alpha, "detach")
    assert (answer.ok, answer.number, answer.code) == (False, -2, "last-good-copy")
    m.write(m.alpha, 3, 7)


def test_detach_of_the_copy_a_diskless_primary_lives_on_is_refused() -> None:
    m = Mirror(primary=0)
    m.done(m.alpha, "detach")
    m.pause()
    answer = m.command(m.beta, "detach")
    assert not answer.ok, "alpha would be left without data"


def test_detach_is_refused_after_all_when_the_peer_is_lost_while_it_drains() -> None:
    m = Mirror(primary=0)
    m.stall(m.beta)
    write = m.ask(m.alpha, Io.WRITE, 3, value=7)
    m.pause(10 * MS)
    detach = m.begin(m.alpha, "detach")
    m.pause(10 * MS)
    assert not detach.answers
    m.partition()
    m.run(lambda: bool(detach.answers))
    assert m.wait(write).error == 0
    assert not detach.answer.ok and m.disk(m.alpha) == "UpToDate"
    m.write(m.alpha, 4, 8)


def test_disconnect_of_a_diskless_primary_is_refused() -> None:
    m = Mirror(primary=0)
    m.done(m.alpha, "detach")
    answer = m.command(m.alpha, "disconnect")
    assert (answer.ok, answer.number) == (False, -2)
    m.write(m.alpha, 3, 7)


def test_a_detached_secondary_takes_no_writes_and_is_synced_when_attached() -> None:
    m = Mirror(primary=0)
    m.done(m.beta, "detach")
    m.write(m.alpha, 3, 7)
    assert m.block(m.beta, 3) == 0
    m.done(m.beta, "attach")
    m.establish()
    assert m.block(m.beta, 3) == 7


# --- in the middle of something else


@pytest.mark.parametrize("kind", [Kind.DISK_STATE, Kind.DISK_STATE_ACK])
@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_a_link_lost_together_with_the_disk_hangs_nothing_and_breaks_no_promise(kind: Kind, protocol: str) -> None:
    m = Mirror(primary=0, protocol=protocol, epoch_time_ns=LONG)
    m.write(m.alpha, 2, 5)
    m.alpha.disks[0].broken = True
    cut = m.cut_at(kind)
    asked = [m.ask(m.alpha, Io.WRITE, block, value=7) for block in (3, 4)]
    answers = [m.wait(each).error for each in asked]
    assert cut
    m.run(lambda: m.replica(m.alpha).has_good_data)
    for block, error in zip((3, 4), answers, strict=True):
        assert error in (0, errno.EIO)
        assert error or m.read(m.alpha, block)[0] == 7
    mend(m, m.alpha)
    m.establish()
    assert m.identical()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("sender", [0, 1])
def test_a_disk_that_fails_in_the_middle_of_a_round_costs_no_link(victim: int, sender: int) -> None:
    m = Mirror()
    m.cut()
    node = m.node(victim)
    hit = m.on_frame(Kind.VOLUME_STATE, lambda: m.world.after(0, lambda: m.lose_disk(node)), m.node(sender))
    m.run(lambda: bool(hit) and m.disk(node) == "Diskless")
    m.run(lambda: m.connection(m.alpha).connected and m.connection(m.beta).connected)
    links = len(m.world.network.links)
    m.pause(30 * SECOND)
    assert len(m.world.network.links) == links and m.state(m.alpha) == m.state(m.beta) == "Connected"
    mend(m, node)
    m.establish()


@pytest.mark.parametrize("kind", [
    Kind.BITMAP_END, Kind.SYNC_READY, Kind.SYNC_START, Kind.RESYNC_REQUEST, Kind.RESYNC_DATA,
    Kind.RESYNC_CONFIRM, Kind.RESYNC_DONE,
])  # fmt: skip
@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_that_fails_at_any_moment_of_a_resync_costs_only_that_copy(kind: Kind, victim: int) -> None:
    m = Mirror(primary=0)
    m.partition()
    for block in range(10, 20):
        m.write(m.alpha, block, block)
    node = m.node(victim)
    hit = m.on_frame(kind, lambda: m.world.after(0, lambda: m.lose_disk(node)))
    m.heal()
    m.run(lambda: bool(hit) and m.disk(node) == "Diskless")
    m.pause(5 * SECOND)
    mend(m, node)
    m.establish()
    assert m.identical() and m.block(m.beta, 15) == 15


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("primary", [0, 1])
def test_attach_cut_at_any_frame_converges(victim: int, primary: int) -> None:
    for kind in (
        Kind.VOLUME_STATE,
        Kind.BITMAP_END,
        Kind.SYNC_READY,
        Kind.SYNC_START,
        Kind.RESYNC_CONFIRM,
        Kind.RESYNC_DONE,
    ):
        m = Mirror(primary=primary)
        node = m.node(victim)
        m.done(node, "detach")
        m.write(m.node(primary), 3, 7)
        cut = m.cut_at(kind)
        m.begin(node, "attach")
        m.establish()
        assert cut and m.identical() and m.block(node, 3) == 7, kind
