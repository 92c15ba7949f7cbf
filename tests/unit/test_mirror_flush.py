# SPDX-License-Identifier: Apache-2.0
"""Epochs, barriers and what FLUSH and FUA promise (decision 0001, V8 and V10)."""

from __future__ import annotations

import errno

import pytest

from replicator.core.events import Io
from replicator.core.wire import Kind
from tests.sim.world import MS, SECOND
from tests.unit.mirror import Mirror

LONG = 1000 * SECOND


@pytest.mark.parametrize("protocol", ["B", "C"])
def test_what_was_flushed_survives_a_power_cut_of_both_on_both(protocol: str) -> None:
    m = Mirror(primary=0, protocol=protocol, epoch_time_ns=LONG)
    for block in range(8):
        m.write(m.alpha, block, block + 1)
    m.flush(m.alpha)
    m.power_cut(m.alpha)
    m.power_cut(m.beta)
    for node in (m.alpha, m.beta):
        assert [m.block(node, block) for block in range(8)] == list(range(1, 9))


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_without_a_flush_a_power_cut_may_lose_a_write(protocol: str) -> None:
    """Shows that the tests beside it can fail."""
    m = Mirror(primary=0, protocol=protocol, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 7)
    m.power_cut(m.alpha)
    assert m.block(m.alpha, 3) == 0


@pytest.mark.parametrize("protocol", ["B", "C"])
def test_flush_waits_for_the_confirmation_of_the_peer(protocol: str) -> None:
    m = Mirror(primary=0, protocol=protocol, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 7)
    m.stall_at(Kind.BARRIER_ACK, m.beta)
    flush = m.ask(m.alpha, Io.FLUSH)
    m.pause(SECOND)
    assert m.stable(m.alpha, 3) == m.stable(m.beta, 3) == 7 and flush.reply is None
    m.stall(m.beta, stalled=False)
    assert m.wait(flush).error == 0


def test_flush_under_protocol_a_is_about_the_local_disk() -> None:
    m = Mirror(primary=0, protocol="A", epoch_time_ns=LONG)
    m.stall(m.alpha)
    m.write(m.alpha, 3, 7)
    m.flush(m.alpha)
    assert (m.stable(m.alpha, 3), m.block(m.beta, 3)) == (7, 0)


def test_flush_under_protocol_a_of_a_diskless_primary_waits_for_the_peer() -> None:
    m = Mirror(primary=0, protocol="A", epoch_time_ns=LONG)
    m.done(m.alpha, "detach")
    m.write(m.alpha, 3, 7)
    m.flush(m.alpha)
    assert m.stable(m.beta, 3) == 7


def test_fua_under_c_is_stable_on_both_at_the_reply() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 7, fua=True)
    assert m.stable(m.alpha, 3) == m.stable(m.beta, 3) == 7


@pytest.mark.parametrize("protocol", ["A", "B"])
def test_fua_under_a_and_b_is_stable_here_at_the_reply(protocol: str) -> None:
    m = Mirror(primary=0, protocol=protocol, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 7, fua=True)
    assert m.stable(m.alpha, 3) == 7


def test_fua_under_b_is_stable_on_both_at_the_reply() -> None:
    m = Mirror(primary=0, protocol="B", epoch_time_ns=LONG)
    m.write(m.alpha, 3, 6)
    m.stall_at(Kind.WRITTEN, m.beta)
    m.on_frame(Kind.WRITE, lambda: m.world.after(0, m.slow_disks))
    asked = m.ask(m.alpha, Io.WRITE, 3, value=7, fua=True)
    m.pause(SECOND)
    assert asked.reply is None or m.stable(m.beta, 3) == 7


@pytest.mark.parametrize("io", [Io.TRIM, Io.ZERO])
def test_fua_holds_for_trim_and_zero(io: Io) -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 7, fua=True)
    assert m.wait(m.ask(m.alpha, io, 3, fua=True)).error == 0
    assert m.stable(m.alpha, 3) == m.stable(m.beta, 3) == 0


def test_flush_without_a_peer_is_local() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.partition()
    m.write(m.alpha, 3, 7)
    m.flush(m.alpha)
    assert m.stable(m.alpha, 3) == 7


@pytest.mark.parametrize("written", [False, True])
def test_a_lone_primary_answers_a_flush(written: bool) -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    if written:
        m.write(m.alpha, 3, 7)
        m.pause()
    m.partition()
    m.flush(m.alpha)
    assert m.dirty(m.alpha) == ({3} if written else set())


def test_a_flush_waiting_for_a_peer_that_is_lost_is_answered_after_the_fork_point() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    before = m.superblock(m.alpha).current
    m.write(m.alpha, 3, 7)
    m.stall_at(Kind.BARRIER_ACK, m.beta)
    flush = m.ask(m.alpha, Io.FLUSH)
    m.pause(SECOND)
    assert flush.reply is None
    m.partition()
    assert m.wait(flush).error == 0
    assert m.stable(m.alpha, 3) == 7
    assert m.dirty(m.alpha) == {3}
    power = m.superblock(m.alpha)
    assert power.peers[0].bitmap_id in (0, before)


def test_epochs_close_at_the_number_of_writes() -> None:
    m = Mirror(primary=0, epoch_writes_max=4, epoch_time_ns=LONG)
    for block in range(12):
        m.write(m.alpha, block, 7)
    m.pause()
    assert m.sent(Kind.BARRIER) == m.sent(Kind.BARRIER_ACK) == 3


def test_epochs_close_by_time_and_retire() -> None:
    m = Mirror(primary=0, epoch_time_ns=50 * MS)
    m.write(m.alpha, 3, 7)
    m.run(lambda: m.resource(m.alpha).log.idle, limit=SECOND)
    assert m.stable(m.alpha, 3) == m.stable(m.beta, 3) == 7


def test_an_idle_mirror_sends_no_barriers() -> None:
    m = Mirror(primary=0, epoch_time_ns=10 * MS)
    m.write(m.alpha, 3, 7)
    m.pause(SECOND)
    barriers = m.sent(Kind.BARRIER)
    m.pause(5 * SECOND)
    assert m.sent(Kind.BARRIER) == barriers == 1


def test_an_epoch_does_not_retire_before_the_peer_confirms_it() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 7)
    retired = m.resource(m.alpha).log.retired
    m.stall_at(Kind.BARRIER_ACK, m.beta)
    m.ask(m.alpha, Io.FLUSH)
    m.pause(SECOND)
    assert m.resource(m.alpha).log.retired == retired
    m.stall(m.beta, stalled=False)
    m.run(lambda: m.resource(m.alpha).log.retired > retired)


def test_unconfirmed_epochs_are_bounded_and_writes_go_on_when_they_are_confirmed() -> None:
    m = Mirror(primary=0, protocol="A", epoch_writes_max=1, epoch_time_ns=LONG)
    m.stall(m.beta)
    asked = [m.ask(m.alpha, Io.WRITE, block, value=7) for block in range(80)]
    m.pause(SECOND)
    assert sum(each.reply is not None for each in asked) == 64
    m.stall(m.beta, stalled=False)
    assert all(m.wait(each).error == 0 for each in asked)
    m.pause()
    assert m.identical()


def test_protocol_a_applies_nothing_behind_a_barrier_before_its_flush() -> None:
    """A power cut of the peer loses a suffix of the writes, never one in the middle."""
    m = Mirror(primary=0, protocol="A", epoch_writes_max=2, epoch_time_ns=LONG)
    seen = m.actions("WriteData")
    for block in range(8):
        m.ask(m.alpha, Io.WRITE, block, value=7)
    order: list[str] = []
    m.watch(lambda node, action: order.append(type(action).__name__) if node is m.beta else None)
    m.pause()
    assert seen
    data = [name for name in order if name in ("WriteData", "FlushData")]
    assert data == ["WriteData", "WriteData", "FlushData"] * 4


def test_a_failed_flush_takes_the_disk_out_and_the_client_sees_no_error() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 7)
    m.alpha.disks[0].fail_flush = True
    m.flush(m.alpha)
    assert m.disk(m.alpha) == "Diskless"
    assert m.stable(m.beta, 3) == 7
    assert m.notices(m.alpha, "disk-failed")[0].fields["operation"] == "flush"


def test_a_failed_flush_without_a_peer_is_an_error_and_no_later_flush_succeeds() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.partition()
    m.write(m.alpha, 3, 7)
    m.alpha.disks[0].fail_flush = True
    assert m.wait(m.ask(m.alpha, Io.FLUSH)).error == errno.EIO
    m.alpha.disks[0].fail_flush = False
    assert m.wait(m.ask(m.alpha, Io.FLUSH)).error == errno.EIO, "a failed flush is never retried (V8)"


def test_a_failed_flush_of_the_peer_is_no_error_and_its_copy_is_known_to_lack_the_writes() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 7)
    m.beta.disks[0].fail_flush = True
    m.flush(m.alpha)
    m.run(lambda: m.disk(m.beta) == "Diskless")
    assert m.disk(m.alpha) == "UpToDate" and 3 in m.dirty(m.alpha)


def test_a_flush_while_an_attached_disk_is_being_compared_waits_for_the_decision() -> None:
    """The peer has everything; that its copy counts is only not agreed again yet.  It must not be an error."""
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 6)
    m.lose_disk(m.alpha)
    m.run(lambda: m.disk(m.alpha) == "Diskless")
    m.write(m.alpha, 3, 7)
    m.flush(m.alpha)  # so that the next one waits for nothing else
    m.alpha.disks[0].broken = False
    m.stall_at(Kind.VOLUME_STATE, m.beta)
    m.begin(m.alpha, "attach")
    m.run(lambda: m.disk(m.alpha) == "Consistent")
    flush, read, write = (m.ask(m.alpha, io, 3, value=8) for io in (Io.FLUSH, Io.READ, Io.WRITE))
    m.pause(100 * MS)
    assert flush.reply is None and read.reply is None and write.reply is None
    m.hooks.clear()
    m.stall(m.beta, stalled=False)
    assert m.wait(flush).error == 0 and m.wait(read).error == 0 and m.wait(write).error == 0
    m.establish()
    assert m.identical()
