# SPDX-License-Identifier: Apache-2.0
"""What comes between a node and the copy it lets go of: lost links, lost disks, crossing commands (V6, V12, V13)."""

from __future__ import annotations

import errno

import pytest

from replicator.core.actions import Send
from replicator.core.connection import GOODBYE_OUTDATED
from replicator.core.events import Io, LinkFrames
from replicator.core.handshake_wire import pack_goodbye
from replicator.core.states import Disk
from replicator.core.wire import Frame, Kind
from tests.sim.node import Node
from tests.sim.world import MS, SECOND
from tests.unit.mirror import Asked, Mirror

LONG = 1000 * SECOND


def answered(m: Mirror, *asked: Asked) -> list[str]:
    """The codes of these commands' answers."""
    m.run(lambda: all(each.answers for each in asked))
    return [each.answer.code for each in asked]


def hear(m: Mirror, node: Node, link: int, *frames: Frame) -> None:
    """These frames arrive at a node, in one piece."""
    node.step(LinkFrames(link, frames))


def link_of(m: Mirror, node: Node) -> int:
    link = m.connection(node).link
    assert link is not None
    return link


def goodbyes(m: Mirror, node: Node) -> list[int]:
    """The links on which a node says GOODBYE from now on."""
    links: list[int] = []

    def look(who: Node, action: object) -> None:
        if who is node and isinstance(action, Send) and action.frame.kind is Kind.GOODBYE:
            links.append(action.link)

    m.watch(look)
    return links


# --- V12: what happens before the grant is acted on, or while the copy is drained


def test_a_detach_whose_peer_is_lost_while_it_drains_is_refused_and_the_copy_serves_on() -> None:
    m = Mirror(primary=0)
    m.slow_disks(2_000_000)
    written = m.ask(m.alpha, Io.WRITE, 3, value=7)
    m.pause(10 * MS)
    asked = m.begin(m.alpha, "detach")
    m.run(lambda: m.volume(m.alpha).path.draining)
    m.partition()
    m.fast_disks()
    assert answered(m, asked) == ["last-good-copy"]
    assert m.disk(m.alpha) == "UpToDate" and m.wait(written).error == 0
    m.write(m.alpha, 4, 8)
    assert m.read(m.alpha, 3)[0] == 7


def test_an_invalidation_that_meets_a_promotion_of_its_node_gives_way() -> None:
    m = Mirror()
    invalidation, promotion = m.begin(m.alpha, "invalidate"), m.begin(m.alpha, "primary")
    assert answered(m, invalidation, promotion) == ["in-transient-state", "ok"]
    assert m.disk(m.alpha) == "UpToDate" and m.superblock(m.alpha).primary_indicator


def test_a_disk_that_is_lost_before_the_peer_agrees_is_not_invalidated() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.stall(m.beta)
    asked = m.begin(m.alpha, "invalidate")
    m.pause(MS)
    m.lose_disk(m.alpha)
    m.pause(MS)
    assert not asked.answers
    m.stall(m.beta, stalled=False)
    assert answered(m, asked) == ["no-disk"]
    m.run(lambda: m.disk(m.alpha) == "Diskless")
    assert m.read(m.alpha, 3)[0] == 7 and m.disk(m.beta) == "UpToDate"


def test_nobody_is_granted_anything_while_a_generation_is_being_made() -> None:
    m = Mirror()
    generation, invalidation = m.begin(m.beta, "new-current-uuid"), m.begin(m.alpha, "invalidate")
    assert answered(m, generation, invalidation) == ["ok", "in-transient-state"]
    assert m.disk(m.alpha) == m.disk(m.beta) == "UpToDate"
    m.done(m.alpha, "invalidate")
    m.establish()


# --- V13: who is known to be Outdated


def test_a_lost_target_that_did_not_get_everything_is_counted_out() -> None:
    m = Mirror(primary=0, fencing="resource-only")
    m.stall_resync(m.alpha)
    m.done(m.beta, "invalidate")
    m.run(lambda: m.replication(m.alpha) == "SyncSource")
    assert not m.superblock(m.alpha).peers[0].outdated
    m.partition()
    m.pause()
    assert m.superblock(m.alpha).peers[0].outdated
    m.done(m.alpha, "secondary")
    m.done(m.alpha, "primary")


def test_a_link_that_ends_before_the_confirmation_outdates_nobody() -> None:
    m = Mirror(primary=0, fencing="resource-only", ping_timeout_ns=30 * SECOND)
    m.stall(m.beta)
    asked = m.begin(m.alpha, "disconnect")
    m.pause(MS)
    assert not asked.answers
    m.world.network.cut_all()
    m.pause(100 * MS)
    assert asked.answer.ok, "nothing is waited for any more"
    assert [notice.fields["peer"] for notice in m.notices(m.alpha, "outdate-unconfirmed")] == ["beta"]
    assert not m.superblock(m.alpha).peers[0].outdated


@pytest.mark.parametrize("crossed", [Frame(Kind.PING, sequence=1), Frame(Kind.GOODBYE)], ids=["ping", "malformed"])
def test_what_crosses_the_goodbye_confirms_nothing_and_hides_no_confirmation(crossed: Frame) -> None:
    m = Mirror(primary=0, fencing="resource-only", ping_timeout_ns=30 * SECOND)
    link = link_of(m, m.alpha)
    m.stall(m.beta)
    asked = m.begin(m.alpha, "disconnect")
    hear(m, m.alpha, link, crossed)
    m.pause(MS)
    assert not asked.answers and not m.superblock(m.alpha).peers[0].outdated
    confirmation = Frame(Kind.GOODBYE, payload=pack_goodbye(GOODBYE_OUTDATED, "this copy is Outdated"))
    hear(m, m.alpha, link, crossed, confirmation)
    assert answered(m, asked) == ["ok"]
    m.pause(10 * MS)
    assert m.superblock(m.alpha).peers[0].outdated and not m.notices(m.alpha, "outdate-unconfirmed")


def test_a_primary_without_a_disk_on_one_volume_records_the_confirmation_on_the_others() -> None:
    m = Mirror(primary=0, volumes=(0, 1), fencing="resource-only")
    m.done(m.alpha, "detach", volume=1)
    m.done(m.beta, "disconnect")
    m.pause()
    assert m.superblock(m.alpha, 0).peers[0].outdated and m.disk(m.alpha, 1) == "Diskless"
    assert m.disk(m.beta, 0) == m.disk(m.beta, 1) == "Outdated"


@pytest.mark.parametrize("first", [0, 1])
def test_it_is_confirmed_when_the_last_volume_is_durably_outdated_and_not_before(first: int) -> None:
    m = Mirror(primary=0, volumes=(0, 1), fencing="resource-only", ping_timeout_ns=30 * SECOND)
    m.beta.disks[1 - first].frozen = True
    said = goodbyes(m, m.beta)
    asked = m.begin(m.alpha, "disconnect")
    m.pause()
    assert not m.superblock(m.beta, first).was_up_to_date and m.superblock(m.beta, 1 - first).was_up_to_date
    assert said == [] and not asked.answers
    m.beta.disks[1 - first].thaw()
    assert answered(m, asked) == ["ok"]
    m.pause()
    assert len(said) == 1 and all(m.superblock(m.alpha, number).peers[0].outdated for number in (0, 1))


def test_what_becomes_durable_after_the_link_has_ended_is_said_to_nobody() -> None:
    m = Mirror(primary=0, fencing="resource-only")
    m.beta.disks[0].frozen = True
    said = goodbyes(m, m.beta)
    closed = m.actions("CloseLink")
    asked = m.begin(m.alpha, "disconnect")
    m.run(lambda: m.disk(m.beta) == "Outdated")
    m.world.network.cut_all()
    m.pause(100 * MS)
    m.beta.disks[0].thaw()
    m.pause()
    assert not m.superblock(m.beta).was_up_to_date and answered(m, asked) == ["ok"]
    assert said == [] and [who for who, _ in closed if who == m.beta.id] == []
    assert not m.superblock(m.alpha).peers[0].outdated


def test_a_mixture_stays_a_mixture_when_it_is_told_to_be_outdated() -> None:
    m = Mirror(primary=0, fencing="resource-only")
    m.done(m.beta, "pause-sync")
    m.done(m.beta, "invalidate")
    m.run(lambda: m.replication(m.alpha) == "PausedSyncS")
    m.done(m.alpha, "disconnect")
    m.pause()
    assert m.superblock(m.alpha).peers[0].outdated and not m.notices(m.alpha, "outdate-unconfirmed")
    assert m.disk(m.beta) == "Inconsistent" and not m.superblock(m.beta).consistent


def test_a_secondary_without_a_disk_confirms_at_once() -> None:
    m = Mirror(primary=0, fencing="resource-only")
    m.done(m.beta, "detach")
    said = goodbyes(m, m.beta)
    m.done(m.alpha, "disconnect")
    assert len(said) == 1 and not m.notices(m.alpha, "outdate-unconfirmed")
    m.pause()
    assert m.superblock(m.alpha).peers[0].outdated


# --- rounds and resyncs that are interrupted


def test_a_volume_whose_disk_is_lost_before_the_peer_has_spoken_is_spoken_for_once() -> None:
    m = Mirror(primary=0, volumes=(0, 1))
    m.stall_at(Kind.VOLUME_STATE, m.beta)
    m.cut()
    m.run(lambda: m.connection(m.alpha).waits_for_state)
    states: list[int] = []

    def look(node: Node, action: object) -> None:
        if node is m.alpha and isinstance(action, Send) and action.frame.kind is Kind.VOLUME_STATE:
            states.append(action.frame.volume)

    m.watch(look)
    m.volume(m.alpha, 1).disk_error("flush", errno.EIO)
    m.pause(10 * MS)
    assert m.disk(m.alpha, 1) == "Diskless" and states == [1] and m.connection(m.alpha).waits_for_state
    m.stall(m.beta, stalled=False)
    m.run(lambda: all(m.replication(m.alpha, number) == "Established" for number in (0, 1)))
    assert sorted(states) == [0, 1], "a round that has begun is not begun again"


def test_a_primary_goes_on_while_the_peer_has_not_spoken_for_one_volume() -> None:
    m = Mirror(primary=0, volumes=(0, 1))
    m.beta.disks[1].frozen = True  # its part of the round waits for a flush
    m.cut()
    m.run(lambda: m.replica(m.alpha, 0).spoken)
    m.pause()
    assert m.connection(m.alpha).waits_for_state and not m.replica(m.alpha, 1).spoken
    m.write(m.alpha, 3, 7, volume=0)
    m.beta.disks[1].thaw()
    m.establish()
    assert m.block(m.beta, 3) == 7


def test_a_target_whose_link_ends_before_it_is_ready_says_so_on_no_other_link() -> None:
    m = Mirror(primary=0)
    m.partition()
    m.write(m.alpha, 3, 7)
    hit = m.on_frame(Kind.BITMAP_END, lambda: setattr(m.beta.disks[0], "frozen", True), m.beta)
    m.heal()
    m.run(lambda: bool(hit))
    m.pause(10 * MS)
    m.cut()
    m.run(lambda: m.connection(m.beta).connected)
    ready = m.sent(Kind.SYNC_READY)
    m.beta.disks[0].thaw()
    m.establish()
    assert m.sent(Kind.SYNC_READY) == ready + 1 and m.identical()
    assert not m.notices(m.alpha, "protocol-error") and not m.notices(m.beta, "protocol-error")


# --- the flush before a promotion


def test_a_disk_that_cannot_flush_is_not_promoted() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 7)
    m.partition()
    m.beta.disks[0].fail_flush = True
    answer = m.command(m.beta, "primary")
    assert answer.code == "in-transient-state" and m.role(m.beta) == "Secondary"
    m.run(lambda: m.volume(m.beta).disk is Disk.DISKLESS)
    assert not m.superblock(m.beta).primary_indicator
    assert m.notices(m.beta, "disk-failed")[-1].fields["operation"] == "flush"


def test_a_promotion_whose_flush_fails_lives_on_the_copy_of_its_peer() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.flush(m.alpha)
    m.done(m.alpha, "secondary")
    m.beta.disks[0].fail_flush = True
    m.done(m.beta, "primary")
    assert m.disk(m.beta) in ("Failed", "Diskless") and m.read(m.beta, 3)[0] == 7
    m.write(m.beta, 4, 8)
    assert m.block(m.alpha, 4) == 8
