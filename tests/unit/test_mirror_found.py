# SPDX-License-Identifier: Apache-2.0
"""What the scenarios found, as properties: no way back for clients, one lets go, confirmed losses (V6, V11 to V13)."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.core.actions import CloseLink, Send
from replicator.core.connection import GOODBYE_OUTDATED
from replicator.core.events import Io, LinkFrames
from replicator.core.generations import (
    EXPOSED_RULE,
    PRIMARY_BIT,
    UNSET,
    Outcome,
    Side,
    decide,
    hold_to_exposed,
    same,
)
from replicator.core.handshake_wire import RelyAnswer, pack_rely_reply, unpack_goodbye
from replicator.core.states import Disk
from replicator.core.wire import Frame, Kind
from tests.sim.node import Node
from tests.sim.world import MS, SECOND
from tests.unit.mirror import MIB, Mirror

IDS = [1 << shift for shift in (10, 20, 30)]
DISKS = [Disk.INCONSISTENT, Disk.OUTDATED, Disk.CONSISTENT, Disk.UP_TO_DATE]


def sides(node_id: int) -> st.SearchStrategy[Side]:
    return st.builds(
        Side,
        node_id=st.just(node_id),
        disk=st.sampled_from(DISKS),
        current=st.sampled_from(IDS),
        bitmap_id=st.sampled_from([UNSET, *IDS]),
        history=st.lists(st.sampled_from(IDS), max_size=2, unique=True).map(tuple),
        dirty=st.booleans(),
        full_sync=st.just(False),
        crashed_primary=st.booleans(),
        survived=st.booleans(),
        primary=st.just(False),
        exposed=st.sampled_from([UNSET, *IDS, *(each | PRIMARY_BIT for each in IDS)]),
    )


def alone_then_diskless(m: Mirror) -> None:
    """alpha goes on alone, what it wrote is acknowledged and flushed, and its disk fails."""
    m.partition()
    m.write(m.alpha, 3, 7)
    m.flush(m.alpha)
    m.alpha.disks[0].broken = True
    assert m.wait(m.ask(m.alpha, Io.WRITE, 4, value=8)).error == errno.EIO
    m.run(lambda: m.disk(m.alpha) == "Diskless")


def refused(m: Mirror) -> bool:
    """Both nodes refuse to go on together because of what the clients have seen."""
    return all(EXPOSED_RULE in m.reasons(node) for node in (m.alpha, m.beta)) and (
        m.state(m.alpha) == m.state(m.beta) == "StandAlone"
    )


def sent(m: Mirror, kind: Kind) -> list[tuple[Node, Frame]]:
    """Every frame of this kind from now on."""
    seen: list[tuple[Node, Frame]] = []
    m.watch(
        lambda node, action: (
            seen.append((node, action.frame)) if isinstance(action, Send) and action.frame.kind is kind else None
        )
    )
    return seen


# --- V11: no way back


@given(sides(0), sides(1))
def test_both_nodes_hold_a_decision_alike_to_what_clients_have_seen(a: Side, b: Side) -> None:
    here, there = hold_to_exposed(a, b, decide(a, b)), hold_to_exposed(b, a, decide(b, a))
    assert here.outcome is there.outcome.mirrored
    assert (here.rule == EXPOSED_RULE) == (there.rule == EXPOSED_RULE)


@given(sides(0), sides(1))
def test_a_copy_that_becomes_good_contains_what_clients_have_seen(a: Side, b: Side) -> None:
    decision = hold_to_exposed(a, b, decide(a, b))
    good = {Outcome.SOURCE: [a], Outcome.TARGET: [b], Outcome.NONE: [a, b]}.get(decision.outcome, [])
    for seen in (a.exposed, b.exposed):
        if seen != UNSET and good:
            assert any(seen | PRIMARY_BIT in copy.lineage() for copy in good)


def test_the_refusal_names_both_generations_and_what_to_do() -> None:
    m = Mirror(primary=0)
    alone_then_diskless(m)
    seen, old = m.superblock(m.alpha).current, m.superblock(m.beta).current
    m.heal()
    m.run(lambda: refused(m))
    for node in (m.alpha, m.beta):
        text = m.reasons(node)[EXPOSED_RULE]
        assert f"{seen:016x}" in text and f"{old:016x}" in text and "alpha" in text and "beta" in text
    assert m.wait(m.ask(m.alpha, Io.READ, 3)).error == errno.EIO
    assert m.superblock(m.beta).current == old and m.disk(m.beta) == "UpToDate", "the peer is not touched"


def test_the_own_disk_with_that_generation_is_the_way_out() -> None:
    m = Mirror(primary=0)
    alone_then_diskless(m)
    m.heal()
    m.run(lambda: refused(m))
    m.alpha.disks[0].broken = False
    m.done(m.alpha, "attach")
    m.done(m.alpha, "connect")
    m.done(m.beta, "connect")
    m.establish()
    assert m.read(m.alpha, 3)[0] == 7 and m.identical()


def test_a_secondary_has_shown_nothing_to_anybody() -> None:
    m = Mirror(primary=0)
    alone_then_diskless(m)
    m.done(m.alpha, "secondary")
    m.heal()
    m.run(lambda: m.replication(m.alpha) == m.replication(m.beta) == "Established")
    m.done(m.alpha, "primary")
    assert m.read(m.alpha, 3)[0] == 0, "the operator stopped the clients first"


def test_a_restarted_process_has_shown_nothing_to_anybody() -> None:
    m = Mirror(primary=0)
    alone_then_diskless(m)
    m.kill(m.alpha)
    m.heal()
    m.restart(m.alpha)
    m.run(lambda: m.replication(m.alpha) == m.replication(m.beta) == "Established")


def test_a_peer_that_took_over_is_taken_back_although_nobody_heard_of_its_generation() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    hit = m.cut_at(Kind.CURRENT_GENERATION, m.beta)
    m.lose_disk(m.alpha)
    m.run(lambda: bool(hit) and not m.connection(m.alpha).connected)
    m.run(lambda: m.replication(m.alpha) == "Established" and m.disk(m.alpha) == "Diskless")
    assert m.read(m.alpha, 3)[0] == 7
    m.write(m.alpha, 4, 8)
    assert m.volume(m.alpha).exposed == m.superblock(m.beta).current


def test_a_promotion_through_the_peer_exposes_the_generation_that_the_first_write_makes() -> None:
    m = Mirror()
    m.done(m.alpha, "detach")
    m.done(m.alpha, "primary")
    before = m.superblock(m.beta).current
    assert same(m.volume(m.alpha).exposed, before)
    m.write(m.alpha, 3, 7)
    now = m.superblock(m.beta).current
    assert not same(now, before) and m.volume(m.alpha).exposed == now


def test_what_a_target_became_is_known_when_its_source_loses_the_disk() -> None:
    """The source of a resync is detached while Secondary, and promoted: its peer's generation is not the old one."""
    m = Mirror(primary=0)
    m.partition()
    m.write(m.alpha, 3, 7)
    m.heal()
    m.establish()
    m.done(m.alpha, "secondary")
    m.done(m.alpha, "detach")
    m.done(m.alpha, "primary")
    assert same(m.volume(m.alpha).exposed, m.superblock(m.beta).current)


@pytest.mark.parametrize("protocol", ["A", "B"])
def test_a_fork_that_was_asked_for_counts_as_made(protocol: str) -> None:
    m = Mirror(primary=0, protocol=protocol)
    m.partition()
    m.fail_metadata(m.alpha)
    assert m.wait(m.ask(m.alpha, Io.WRITE, 3, value=7)).error == errno.EIO
    m.run(lambda: m.disk(m.alpha) == "Diskless")
    assert not same(m.volume(m.alpha).exposed, m.superblock(m.beta).current)
    m.heal()
    m.run(lambda: refused(m))


def test_under_protocol_c_nothing_was_acknowledged_before_its_fork() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.flush(m.alpha)
    m.partition()
    m.fail_metadata(m.alpha)
    assert m.wait(m.ask(m.alpha, Io.WRITE, 3, value=8)).error == errno.EIO
    m.heal()
    m.run(lambda: m.replication(m.alpha) == m.replication(m.beta) == "Established")
    assert m.read(m.alpha, 3)[0] == 7


def test_a_disk_that_comes_back_is_served_again_and_its_generation_counts() -> None:
    m = Mirror(primary=0)
    m.done(m.alpha, "detach")
    m.write(m.alpha, 3, 7)
    m.done(m.alpha, "attach")
    m.establish()
    assert m.volume(m.alpha).serving and m.volume(m.alpha).exposed == UNSET
    alone_then_diskless(m)
    m.heal()
    m.run(lambda: refused(m))


# --- V6: a copy that became good under a Primary


def test_a_copy_that_becomes_good_under_a_primary_has_the_indicator() -> None:
    m = Mirror(primary=0)
    m.done(m.alpha, "detach")
    m.write(m.alpha, 3, 7)
    m.done(m.alpha, "attach")
    m.establish()
    assert m.superblock(m.alpha).primary_indicator


@pytest.mark.parametrize("delay_us", range(0, 1500, 100))
def test_a_demotion_while_a_resync_ends_leaves_no_indicator(delay_us: int) -> None:
    m = Mirror(primary=0)
    m.done(m.alpha, "detach")
    m.write(m.alpha, 3, 7)
    m.done(m.alpha, "attach")
    m.pause(delay_us * 1000)
    m.done(m.alpha, "secondary")
    assert not m.superblock(m.alpha).primary_indicator
    m.establish()
    assert not m.superblock(m.alpha).primary_indicator and not m.superblock(m.alpha).crashed_primary


@pytest.mark.parametrize("delay_us", range(0, 1500, 100))
def test_a_promotion_while_a_resync_ends_is_durable(delay_us: int) -> None:
    m = Mirror()
    m.done(m.alpha, "invalidate")
    m.pause(delay_us * 1000)
    m.done(m.alpha, "primary")
    m.establish()
    assert m.superblock(m.alpha).primary_indicator


# --- V12: one lets go


@pytest.mark.parametrize(
    ("primary", "verb_a", "verb_b"),
    [
        *((primary, "invalidate", "invalidate") for primary in (0, 1, None)),
        *((primary, "detach", verb) for primary in (0, 1) for verb in ("detach", "invalidate")),
    ],
)
def test_of_two_who_let_go_at_once_one_is_refused(primary: int | None, verb_a: str, verb_b: str) -> None:
    m = Mirror(primary=primary)
    m.pause()
    if primary is not None:
        m.write(m.node(primary), 3, 7)
    asked = [m.begin(m.alpha, verb_a), m.begin(m.beta, verb_b)]
    m.run(lambda: all(each.answers for each in asked))
    assert asked[0].answer.ok, "the lower node id wins"
    assert not asked[1].answer.ok and asked[1].answer.code == "peer-lets-go" and asked[1].answer.number == -2
    assert m.disk(m.beta) == "UpToDate" and m.superblock(m.beta).consistent
    if primary is not None:
        assert m.read(m.node(primary), 3)[0] == 7


def test_nothing_is_let_go_when_the_peer_is_lost_before_it_agrees() -> None:
    m = Mirror(primary=0)
    m.stall(m.beta)
    asked = m.begin(m.alpha, "invalidate")
    m.pause(10 * MS)
    assert not asked.answers and m.disk(m.alpha) == "UpToDate"
    m.partition()
    m.run(lambda: bool(asked.answers))
    assert asked.answer.code == "no-good-peer" and m.disk(m.alpha) == "UpToDate"
    assert m.resource(m.alpha).settled


def test_a_second_volume_that_is_refused_keeps_the_first_one() -> None:
    m = Mirror(primary=0, volumes=(0, 1))
    m.done(m.beta, "detach", volume=0)
    answer = m.command(m.alpha, "detach")
    assert not answer.ok and m.disk(m.alpha, 0) == m.disk(m.alpha, 1) == "UpToDate"
    m.write(m.alpha, 3, 7, volume=1)
    assert not any(volume.path.draining for volume in m.resource(m.alpha).volumes.values())


def test_a_peer_is_not_promoted_while_the_copy_it_may_live_on_is_drained() -> None:
    m = Mirror(primary=0)
    m.done(m.beta, "detach")
    m.done(m.alpha, "secondary")
    m.pause()
    asked = m.begin(m.alpha, "detach")
    promotion = m.begin(m.beta, "primary")
    m.run(lambda: bool(asked.answers and promotion.answers))
    assert not (asked.answer.ok and promotion.answer.ok), "a Primary without any data"


def test_an_answer_to_no_question_is_a_protocol_error() -> None:
    m = Mirror()
    link = m.connection(m.alpha).link
    assert link is not None
    reply = Frame(Kind.RELY_REPLY, sequence=99, payload=pack_rely_reply(RelyAnswer.GRANTED))
    m.alpha.step(LinkFrames(link, [reply]))
    m.pause(MS)
    assert "without a question" in str(m.notices(m.alpha, "protocol-error")[0].fields["reason"])


# --- V13: outdated is confirmed


@pytest.mark.parametrize("who", [0, 1])
def test_whoever_disconnects_the_secondary_is_outdated_and_says_so(who: int) -> None:
    m = Mirror(primary=0, fencing="resource-only")
    durable: list[bool] = []
    m.watch(
        lambda node, action: (
            durable.append(not m.superblock(m.beta).was_up_to_date)
            if isinstance(action, Send)
            and action.frame.kind is Kind.GOODBYE
            and unpack_goodbye(action.frame.payload)[0] == GOODBYE_OUTDATED
            else None
        )
    )
    m.done(m.node(who), "disconnect")
    m.pause()
    assert durable == [True], "it is said once, and not before it is true"
    assert m.superblock(m.alpha).peers[0].outdated and m.disk(m.beta) == "Outdated"
    m.done(m.alpha, "secondary")
    m.done(m.alpha, "primary")


def test_without_a_fencing_policy_a_goodbye_outdates_nobody() -> None:
    m = Mirror(primary=0)
    closed = m.actions("CloseLink")
    m.done(m.alpha, "disconnect")
    assert len(closed) == 1 and isinstance(closed[0][1], CloseLink), "nothing is waited for"
    m.pause()
    assert not m.superblock(m.alpha).peers[0].outdated and m.disk(m.beta) == "UpToDate"


def test_a_confirmation_of_an_older_link_is_not_believed() -> None:
    m = Mirror(primary=0, fencing="resource-only", ping_timeout_ns=30 * SECOND)
    m.stall(m.beta)
    asked = m.begin(m.alpha, "disconnect")
    m.pause(10 * MS)
    m.done(m.alpha, "connect")
    m.run(lambda: bool(asked.answers))
    m.establish()
    assert asked.answer.ok and not m.superblock(m.alpha).peers[0].outdated


def test_a_secondary_whose_disk_hangs_confirms_nothing() -> None:
    m = Mirror(primary=0, fencing="resource-only")
    m.slow_disks(60_000_000)
    asked = m.begin(m.alpha, "disconnect")
    m.pause(10 * MS)
    m.fast_disks()
    m.run(lambda: bool(asked.answers))
    assert m.notices(m.alpha, "outdate-unconfirmed") and not m.superblock(m.alpha).peers[0].outdated


def test_a_lost_target_that_got_everything_is_not_counted_out() -> None:
    m = Mirror(primary=0, fencing="resource-only")
    hit = m.cut_at(Kind.RESYNC_DONE, m.beta)
    m.done(m.beta, "invalidate")
    m.run(lambda: bool(hit))
    assert not m.superblock(m.alpha).peers[0].outdated and m.superblock(m.beta).was_up_to_date


# --- a peer that does not answer


def test_two_primaries_do_not_wait_for_each_other_to_speak() -> None:
    m = Mirror(primary=0)
    m.partition()
    m.done(m.beta, "primary")
    m.heal()
    m.run(lambda: m.state(m.alpha) == m.state(m.beta) == "StandAlone")


def test_what_is_written_before_the_peer_has_spoken_forks_every_volume() -> None:
    m = Mirror(primary=0, volumes=(0, 1))
    m.stall_at(Kind.VOLUME_STATE, m.beta)
    m.cut()
    m.run(lambda: m.connection(m.alpha).connected)
    assert m.connection(m.alpha).waits_for_state
    m.write(m.alpha, 3, 7, volume=0)
    assert all(m.superblock(m.alpha, number).peers[0].bitmap_id != UNSET for number in (0, 1))


def test_a_primary_waits_until_the_peer_has_spoken_for_all_volumes() -> None:
    m = Mirror(primary=0, volumes=(0, 1))
    states = sent(m, Kind.VOLUME_STATE)
    m.cut()
    m.establish()
    speakers = [node.id for node, _ in states]
    assert speakers[:2] == [m.beta.id, m.beta.id] and sorted(speakers[2:4]) == [m.alpha.id, m.alpha.id]


def test_the_exposed_generation_travels_only_while_the_copy_is_not_served() -> None:
    m = Mirror(primary=0, size=MIB)
    assert m.replica(m.alpha).state().exposed == UNSET
    m.done(m.alpha, "detach")
    m.write(m.alpha, 3, 7)
    assert m.replica(m.alpha).state() == replace(
        m.replica(m.alpha).state(), disk=Disk.DISKLESS, exposed=m.superblock(m.beta).current, size_bytes=0
    )


def test_a_new_primary_has_everything_stable_before_it_answers_a_flush() -> None:
    m = Mirror(primary=0, epoch_time_ns=1000 * SECOND)
    m.write(m.alpha, 3, 7)
    m.kill(m.alpha)
    m.run(lambda: m.state(m.beta) != "Connected")
    m.done(m.beta, "primary")
    m.flush(m.beta)
    assert m.stable(m.beta, 3) == 7


def test_after_a_failed_flush_no_block_counts_as_equal_by_its_digest() -> None:
    m = Mirror(primary=0, checksum_sync="always", epoch_time_ns=1000 * SECOND)
    m.write(m.alpha, 3, 7)
    m.beta.disks[0].fail_flush = True
    m.begin(m.alpha, "pause-sync")
    m.ask(m.alpha, Io.FLUSH)
    m.run(lambda: m.disk(m.beta) == "Diskless")
    m.beta.disks[0].mend()
    m.done(m.alpha, "resume-sync")
    m.done(m.beta, "attach")
    m.establish()
    assert m.notices(m.beta, "resync-finished")[-1].fields["same_blocks"] == 0
    assert m.stable(m.beta, 3) == 7
