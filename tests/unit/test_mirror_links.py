# SPDX-License-Identifier: Apache-2.0
"""Links that come and go in the middle of something: a round, a promotion, a durable step (decision 0001)."""

from __future__ import annotations

import errno

from replicator.core.actions import Action, CloseLink, Send
from replicator.core.events import Io, LinkFrames, LinkUp
from replicator.core.resource import CANDIDATES_MAX
from replicator.core.wire import Frame, Kind
from tests.sim.node import Node
from tests.sim.world import MS, SECOND
from tests.unit.mirror import Mirror

LONG = 1000 * SECOND


def swallow(m: Mirror, kind: Kind, sender: Node, volume: int = 0) -> list[Frame]:
    """Frames of this kind from this node never arrive; everything else does."""
    perform = m.world.perform
    gone: list[Frame] = []

    def other(who: Node, action: Action) -> None:
        if who is sender and isinstance(action, Send) and (action.frame.kind, action.frame.volume) == (kind, volume):
            gone.append(action.frame)
        else:
            perform(who, action)

    m.world.perform = other  # type: ignore[method-assign]
    return gone


def begin_rounds(m: Mirror, node: Node, *volumes: int) -> None:
    """Compare these volumes again, over the living link."""
    for number in volumes:
        m.replica(node, number).begin_round()
    m.pause(0)


# --- rounds


def test_a_round_waits_for_a_disk_that_is_being_attached() -> None:
    m = Mirror(primary=0)
    m.done(m.beta, "detach")
    m.write(m.alpha, 3, 7)
    m.slow_disks(2_000_000)
    asked = m.begin(m.beta, "attach")
    m.pause(10 * MS)
    m.fast_disks()
    m.cut()
    m.run(lambda: m.connection(m.beta).connected)
    m.pause(100 * MS)
    states = m.sent(Kind.VOLUME_STATE)
    assert m.disk(m.beta) == "Attaching" and not m.connection(m.beta).settled
    m.pause(100 * MS)
    assert m.sent(Kind.VOLUME_STATE) == states, "it has nothing to say of its copy yet"
    m.run(lambda: bool(asked.answers))
    assert asked.answer.ok
    m.establish()
    assert m.block(m.beta, 3) == 7


def test_a_round_of_one_volume_that_hangs_ends_the_link_although_another_was_decided() -> None:
    m = Mirror(volumes=(0, 1), ping_interval_ns=100 * SECOND)
    swallow(m, Kind.VOLUME_STATE, m.beta, volume=1)
    begin_rounds(m, m.alpha, 0, 1)
    m.run(lambda: m.replication(m.alpha, 0) == "Established" and m.replication(m.alpha, 1) == "Off")
    m.pause(11 * SECOND)
    assert any("handshake" in str(notice.fields["reason"]) for notice in m.notices(m.alpha, "connection-state"))


def test_writes_that_wait_for_a_round_when_the_link_is_lost_are_dropped_there_and_kept_here() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.stall_at(Kind.VOLUME_STATE, m.beta)
    begin_rounds(m, m.beta, 0)
    asked = [m.ask(m.alpha, Io.WRITE, block, value=7) for block in (3, 4)]
    m.run(lambda: m.volume(m.beta).path.in_flight == 2)
    m.pause(10 * MS)
    assert m.block(m.beta, 3) == 0 and m.volume(m.beta).path.parked, "nothing is written before the copies are compared"
    m.partition()
    assert m.volume(m.beta).path.in_flight == 0
    assert all(m.wait(each).error == 0 for each in asked)
    assert m.block(m.beta, 3) == 0 and m.dirty(m.alpha) == {3, 4}
    m.hooks.clear()
    m.stall(m.beta, stalled=False)
    m.heal()
    m.establish()
    assert m.identical() and m.block(m.beta, 3) == 7


def test_a_clients_write_that_waits_for_a_round_outlives_the_link() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.stall_at(Kind.VOLUME_STATE, m.alpha)
    begin_rounds(m, m.alpha, 0)
    asked = m.ask(m.alpha, Io.WRITE, 3, value=7)
    m.pause(10 * MS)
    assert asked.reply is None and m.block(m.alpha, 3) == 0, "the round has to say who gets it"
    m.partition()
    assert m.wait(asked).error == 0 and m.block(m.alpha, 3) == 7
    assert m.superblock(m.alpha).peers[0].bitmap_id != 0 and m.dirty(m.alpha) == {3}


def test_a_link_lost_while_equality_is_recorded_leaves_nobody_mirrored() -> None:
    m = Mirror(primary=0, fencing="resource-only", epoch_time_ns=LONG)
    m.done(m.beta, "disconnect")
    m.pause()
    assert m.disk(m.beta) == "Outdated"
    m.on_frame(Kind.VOLUME_STATE, m.slow_disks, m.beta)
    rounds = len(m.notices(m.beta, "sync-decision"))
    m.done(m.beta, "connect")
    m.run(lambda: len(m.notices(m.beta, "sync-decision")) > rounds and m.volume(m.beta).ledger.busy)
    assert m.rule(m.beta) == "equal"
    m.fast_disks()
    m.partition()
    m.run(lambda: not m.volume(m.beta).ledger.busy)
    assert m.replication(m.beta) == "Off" and m.disk(m.beta) == "Outdated", "what it was equal to may be newer by now"
    m.heal()
    m.establish()


# --- losing a Primary


def test_a_secondary_that_cannot_flush_what_a_lost_primary_sent_is_no_survivor() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 7)
    m.beta.disks[0].fail_flush = True
    m.partition()
    m.run(lambda: m.disk(m.beta) == "Diskless")
    assert m.notices(m.beta, "disk-failed")[0].fields["operation"] == "flush"
    assert not m.superblock(m.beta).peers[0].survivor
    m.heal()
    m.run(lambda: m.replication(m.alpha) == "Established")
    m.write(m.alpha, 4, 8)
    assert {3, 4} <= m.dirty(m.alpha)


def test_a_read_that_failed_here_and_whose_peer_is_lost_ends_with_an_error() -> None:
    m = Mirror(primary=0)
    m.fail_reads(m.alpha)
    m.stall_at(Kind.READ_DATA, m.beta)
    asked = m.ask(m.alpha, Io.READ, 3)
    m.run(lambda: bool(m._held))
    m.partition()
    assert m.wait(asked).error == errno.EIO
    assert len(m.notices(m.alpha, "read-error")) == 2, "the local disk was asked again, it might have been mended"


# --- promotion


def test_a_peer_that_does_not_answer_a_promotion_refuses_it_in_the_end() -> None:
    m = Mirror()
    gone = swallow(m, Kind.ROLE_REPLY, m.beta)
    answer = m.command(m.alpha, "primary")
    assert (answer.ok, answer.code, answer.number) == (False, "in-transient-state", -18)
    assert len(gone) == 1 and m.role(m.alpha) == "Secondary"
    m.pause()
    m.done(m.beta, "primary")


def test_the_answer_to_a_promotion_that_is_over_is_not_taken_for_the_answer_to_the_next() -> None:
    m = Mirror()
    gone = swallow(m, Kind.ROLE_REPLY, m.beta)
    assert not m.command(m.alpha, "primary").ok
    asked = m.begin(m.alpha, "primary")
    m.run(lambda: len(gone) == 2)
    link = m.connection(m.alpha).link
    assert link is not None
    m.alpha.step(LinkFrames(link, [gone[0]]))
    m.pause()
    assert not asked.answers and m.role(m.alpha) == "Secondary"
    m.alpha.step(LinkFrames(link, [gone[1], gone[0]]))
    m.run(lambda: bool(asked.answers))
    assert asked.answer.ok and m.connection(m.alpha).link == link


def test_a_primary_met_while_the_indicator_is_written_says_no_before_its_role_is_known() -> None:
    m = Mirror()
    m.partition()
    m.done(m.beta, "primary")
    m.stall_at(Kind.ROLE, m.beta)
    flushes, indicators = m.actions("FlushData"), m.actions("WriteMeta")
    asked = m.begin(m.alpha, "primary")
    m.run(lambda: bool(flushes))
    m.slow_disks(4_000_000)
    m.run(lambda: bool(indicators))
    m.fast_disks()
    m.heal()
    m.run(lambda: m.connection(m.alpha).connected)
    assert not asked.answers and m.alpha.in_flight, "the indicator was to be under way when the link came up"
    m.run(lambda: m.sent(Kind.ROLE_REQUEST) == 1)
    assert m.connection(m.alpha).role is None and not asked.answers
    m.hooks.clear()
    m.stall(m.beta, stalled=False)
    m.run(lambda: bool(asked.answers))
    assert (asked.answer.code, asked.answer.number) == ("peer-is-primary", -1)
    m.establish()
    m.pause()
    assert (m.role(m.alpha), m.role(m.beta)) == ("Secondary", "Primary")
    assert not m.superblock(m.alpha).primary_indicator


def test_a_promotion_does_not_ping_a_peer_whose_answer_is_awaited_already() -> None:
    m = Mirror()
    m.stall(m.beta)
    m.run(lambda: m.sent(Kind.PING) == 2)
    asked = m.begin(m.alpha, "primary")
    m.pause(10 * MS)
    assert m.sent(Kind.PING) == 2 and m.sent(Kind.ROLE_REQUEST) == 1
    m.stall(m.beta, stalled=False)
    m.run(lambda: bool(asked.answers))
    assert asked.answer.ok


# --- leaving


def test_with_fencing_a_diskless_volume_is_not_outdated_and_the_others_are() -> None:
    m = Mirror(primary=0, volumes=(0, 1), fencing="resource-only")
    m.done(m.beta, "detach", volume=0)
    m.done(m.beta, "disconnect")
    m.pause()
    assert (m.disk(m.beta, 0), m.disk(m.beta, 1)) == ("Diskless", "Outdated")
    assert m.superblock(m.alpha, 1).peers[0].outdated


def test_with_fencing_two_secondaries_that_part_stay_good() -> None:
    m = Mirror(fencing="resource-only")
    before = [m.superblock(node) for node in (m.alpha, m.beta)]
    m.done(m.beta, "disconnect")
    m.pause()
    assert m.disk(m.alpha) == m.disk(m.beta) == "UpToDate"
    assert [m.superblock(node) for node in (m.alpha, m.beta)] == before


# --- links that were refused


def test_what_comes_on_a_link_that_was_refused_is_not_looked_at() -> None:
    m = Mirror()
    closed = m.actions(CloseLink.__name__)
    for number in range(CANDIDATES_MAX + 1):
        m.alpha.step(LinkUp(1000 + number, 1, False, bytes(32)))
    m.pause(MS)
    refused = closed[0][1].link
    sent = m.actions(Send.__name__)
    m.alpha.step(LinkFrames(refused, [Frame(Kind.AGREE, payload=bytes(32))]))
    m.pause(MS)
    assert [action for _, action in sent if action.link == refused] == []
    assert len(closed) == 1 and m.state(m.alpha) == "Connected"
