# SPDX-License-Identifier: Apache-2.0
"""Becoming Primary and ceasing to be: refusals with their numbers, races, demotion (decision 0001, "Promotion")."""

from __future__ import annotations

import pytest

from replicator.core.events import Io
from replicator.core.wire import Kind
from tests.sim.world import MS, SECOND
from tests.unit.mirror import Mirror


def refused(m: Mirror, node: int, verb: str, **args: object) -> int:
    """The number of the refusal."""
    answer = m.command(m.node(node), verb, **args)
    assert not answer.ok and answer.message and answer.hint, answer
    return answer.number


# --- refusals


def test_a_second_primary_is_refused_with_minus_1() -> None:
    m = Mirror(primary=0)
    assert refused(m, 1, "primary") == -1
    assert refused(m, 1, "primary", force=True) == -1
    assert (m.role(m.alpha), m.role(m.beta)) == ("Primary", "Secondary")


def test_fresh_copies_are_refused_with_minus_2() -> None:
    m = Mirror(start="booted")
    assert refused(m, 0, "primary") == -2


def test_a_diskless_node_without_a_peer_is_refused_with_minus_2_even_by_force() -> None:
    m = Mirror()
    m.done(m.alpha, "detach")
    m.partition()
    assert refused(m, 0, "primary") == -2
    assert refused(m, 0, "primary", force=True) == -2


def test_a_target_is_refused_with_minus_2_when_its_source_is_gone() -> None:
    m = Mirror()
    m.stall_resync(m.alpha)
    m.done(m.beta, "invalidate", volume=0)
    m.run(lambda: m.replication(m.beta) == "SyncTarget")
    m.partition()
    assert m.disk(m.beta) == "Inconsistent"
    assert refused(m, 1, "primary") == -2


def test_with_fencing_an_absent_peer_that_may_be_newer_is_refused_with_minus_7() -> None:
    m = Mirror(fencing="resource-only")
    m.partition()
    assert refused(m, 0, "primary") == -7
    m.done(m.alpha, "primary", force=True)


def test_a_device_held_open_refuses_demotion_with_minus_12_and_names_who_holds_it() -> None:
    m = Mirror(primary=0)
    m.open(m.alpha)
    answer = m.command(m.alpha, "secondary")
    assert (answer.ok, answer.number) == (False, -12) and "client 0" in answer.message
    assert m.command(m.alpha, "down").number == -12
    m.close(m.alpha)
    m.done(m.alpha, "secondary")


def test_while_another_promotion_runs_a_second_is_refused_with_minus_18() -> None:
    m = Mirror()
    first = m.begin(m.alpha, "primary")
    assert refused(m, 0, "primary") == -18
    assert refused(m, 0, "detach") == -18
    m.run(lambda: bool(first.answers))
    assert first.answer.ok


def test_promotion_waits_for_a_round_and_is_refused_with_minus_18_when_it_does_not_end() -> None:
    m = Mirror(handshake_timeout_ns=60 * SECOND, ping_interval_ns=60 * SECOND)
    m.cut()
    m.stall_at(Kind.VOLUME_STATE, m.beta)
    m.run(lambda: m.connection(m.alpha).connected)
    assert refused(m, 0, "primary") == -18


def test_promoting_a_primary_and_demoting_a_secondary_change_nothing() -> None:
    m = Mirror(primary=0)
    m.done(m.alpha, "primary")
    m.done(m.beta, "secondary")
    assert (m.role(m.alpha), m.role(m.beta)) == ("Primary", "Secondary")


# --- races


@pytest.mark.parametrize("seed", range(8))
def test_of_two_promotions_at_once_the_lower_node_id_wins(seed: int) -> None:
    m = Mirror(seed=seed)
    asked = [m.begin(node, "primary") for node in (m.beta, m.alpha)]
    m.run(lambda: all(each.answers for each in asked))
    assert [each.answer.ok for each in asked] == [False, True]
    assert asked[0].answer.number in (-1, -18)
    m.pause()
    assert (m.role(m.alpha), m.role(m.beta)) == ("Primary", "Secondary")


@pytest.mark.parametrize("delay_us", range(0, 1600, 200))
def test_two_promotions_a_moment_apart_never_make_two_primaries(delay_us: int) -> None:
    m = Mirror(seed=delay_us)
    first = m.begin(m.beta, "primary")
    m.pause(delay_us * 1000)
    second = m.begin(m.alpha, "primary")
    m.run(lambda: bool(first.answers and second.answers))
    m.pause()
    assert sorted((m.role(m.alpha), m.role(m.beta))) == ["Primary", "Secondary"]


def promotion_met_by_a_link(m: Mirror) -> bool:
    """alpha, alone, writes its indicator while the link comes up; whether the promotion succeeded."""
    flushes, indicators = m.actions("FlushData"), m.actions("WriteMeta")
    asked = m.begin(m.alpha, "primary")
    m.run(lambda: bool(flushes))
    m.slow_disks(2_000_000)
    m.run(lambda: bool(indicators))
    m.fast_disks()
    m.heal()
    m.run(lambda: m.connection(m.alpha).connected or bool(asked.answers))
    assert not asked.answers, "the indicator was to be under way when the link came up"
    m.run(lambda: bool(asked.answers))
    return asked.answer.ok


def test_a_primary_that_connects_while_the_indicator_is_written_forbids_the_promotion() -> None:
    m = Mirror()
    m.partition()
    m.done(m.beta, "primary")
    assert not promotion_met_by_a_link(m)
    m.establish()
    assert (m.role(m.alpha), m.role(m.beta)) == ("Secondary", "Primary")


def test_a_secondary_that_connects_while_the_indicator_is_written_is_asked_too() -> None:
    m = Mirror()
    m.partition()
    promoted = promotion_met_by_a_link(m)
    m.establish()
    assert m.sent(Kind.ROLE_REQUEST) >= 1
    assert m.role(m.alpha) == ("Primary" if promoted else "Secondary")


def test_a_promotion_that_is_refused_late_leaves_no_indicator_on_disk() -> None:
    m = Mirror()
    m.partition()
    m.done(m.beta, "primary")
    assert not promotion_met_by_a_link(m)
    m.establish()
    m.pause()
    assert not m.superblock(m.alpha).primary_indicator, "a crash would make a crashed Primary of a Secondary"


def test_a_node_that_was_only_refused_is_never_taken_for_a_crashed_primary() -> None:
    """Protocol A: what the real Primary flushed and its peer never got must not be overwritten."""
    m = Mirror(protocol="A")
    m.partition()
    m.done(m.beta, "primary")
    assert not promotion_met_by_a_link(m)
    m.establish()
    m.pause()
    m.stall(m.beta)
    m.write(m.beta, 3, 7)
    m.flush(m.beta)
    m.power_cut(m.alpha)
    m.power_cut(m.beta)
    m.restart(m.alpha, m.beta)
    m.establish()
    assert m.block(m.beta, 3) == m.block(m.alpha, 3) == 7


def test_a_grant_to_a_peer_that_is_lost_ends() -> None:
    m = Mirror()
    m.stall_at(Kind.ROLE_REPLY, m.alpha)
    m.begin(m.beta, "primary")
    m.run(lambda: m.sent(Kind.ROLE_REPLY) == 1)
    m.kill(m.beta)
    m.done(m.alpha, "primary")


def test_two_primaries_that_meet_part() -> None:
    m = Mirror()
    m.partition()
    m.done(m.alpha, "primary")
    m.done(m.beta, "primary")
    m.heal()
    m.run(lambda: m.state(m.alpha) == m.state(m.beta) == "StandAlone")
    assert m.reasons(m.alpha) and m.reasons(m.beta)


# --- demotion


def test_force_demotion_cuts_the_clients() -> None:
    m = Mirror(primary=0)
    m.open(m.alpha)
    m.done(m.alpha, "secondary", force=True)
    assert m.role(m.alpha) == "Secondary" and not m.resource(m.alpha).openers()


def test_demotion_waits_for_writes_under_way_and_for_their_epoch() -> None:
    m = Mirror(primary=0, epoch_time_ns=1000 * SECOND)
    m.stall(m.beta)
    write = m.ask(m.alpha, Io.WRITE, 3, value=7)
    asked = m.begin(m.alpha, "secondary")
    m.pause(SECOND)
    assert not asked.answers and m.role(m.alpha) == "Primary"
    m.stall(m.beta, stalled=False)
    m.run(lambda: bool(asked.answers))
    assert asked.answer.ok and write.reply is not None and write.reply.error == 0
    assert m.stable(m.alpha, 3) == m.stable(m.beta, 3) == 7
    assert not m.superblock(m.alpha).primary_indicator


def test_a_demotion_that_waits_long_makes_no_busy_loop() -> None:
    m = Mirror(primary=0)
    m.slow_disks(30_000_000)
    m.ask(m.alpha, Io.WRITE, 3, value=7)
    asked = m.begin(m.alpha, "secondary")
    m.pause(MS)
    m.fast_disks()
    m.run(lambda: bool(asked.answers), limit=3600 * SECOND)


def test_no_request_is_served_after_demotion_and_the_other_side_goes_on() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.switch(m.alpha)
    assert m.wait(m.ask(m.alpha, Io.READ, 3)).error != 0
    m.write(m.beta, 4, 8)
    assert m.read(m.beta, 3)[0] == 7 and m.identical()


def test_a_promotion_right_after_the_demotion_of_the_other_node_succeeds() -> None:
    m = Mirror(primary=0)
    m.done(m.alpha, "secondary")
    m.done(m.beta, "primary")


def test_down_ends_with_everything_closed_and_clean() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.done(m.alpha, "down")
    assert m.disk(m.alpha) == "Diskless" and m.state(m.alpha) == "StandAlone"
    found = m.superblock(m.alpha)
    assert found.consistent and found.was_up_to_date and not found.primary_indicator
    assert m.stable(m.alpha, 3) == 7
    m.kill(m.alpha)
    m.restart(m.alpha)
    m.establish()
    assert m.sent(Kind.RESYNC_REQUEST) == 0


# --- fencing


def test_with_fencing_a_secondary_that_a_primary_disconnects_is_outdated() -> None:
    m = Mirror(primary=0, fencing="resource-only")
    m.done(m.alpha, "disconnect")
    m.run(lambda: m.disk(m.beta) == "Outdated")
    m.pause(MS * 10)
    assert m.superblock(m.beta).outdated
    assert refused(m, 1, "primary") == -2


def test_with_fencing_a_secondary_that_disconnects_from_a_primary_is_outdated_on_both_sides() -> None:
    m = Mirror(primary=0, fencing="resource-only")
    m.done(m.beta, "disconnect")
    m.pause()
    assert m.superblock(m.alpha).peers[0].outdated, "the Primary knows"
    assert m.disk(m.beta) == "Outdated" and m.superblock(m.beta).outdated


def test_with_fencing_a_peer_that_came_back_does_not_count_as_outdated_for_ever() -> None:
    """Or the fence is open: the peer that caught up, became Primary and wrote is newer."""
    m = Mirror(primary=0, fencing="resource-only")
    m.done(m.beta, "disconnect")
    m.pause()
    m.done(m.beta, "connect")
    m.establish()
    m.switch(m.alpha)
    m.partition()
    m.write(m.beta, 3, 7)
    assert refused(m, 0, "primary") == -7


# --- what status says


def score(m: Mirror, node: int) -> tuple[object, object]:
    status = m.resource(m.node(node)).status()
    return status["promotion-score"], status["may-promote"]


def test_promotion_score_10000_when_both_are_known() -> None:
    m = Mirror()
    assert score(m, 0) == score(m, 1) == (10000, True)


def test_promotion_score_1000_when_the_peer_is_unknown() -> None:
    m = Mirror()
    m.partition()
    assert score(m, 0) == (1000, True)


def test_promotion_score_10_when_only_the_peer_has_data() -> None:
    m = Mirror()
    m.done(m.alpha, "detach")
    assert score(m, 0) == (10, True)


def test_promotion_score_0_without_data() -> None:
    m = Mirror()
    m.done(m.alpha, "detach")
    m.partition()
    assert score(m, 0) == (0, False)


def test_may_not_promote_beside_a_primary_but_the_score_stays() -> None:
    m = Mirror(primary=0)
    m.pause()
    assert score(m, 1) == (10000, False)


def test_with_fencing_and_an_unknown_peer_nobody_may_promote() -> None:
    m = Mirror(fencing="resource-only")
    m.partition()
    assert score(m, 0) == (1000, False)


def test_in_a_normal_state_there_is_no_reason_to_give() -> None:
    m = Mirror(primary=0)
    m.pause()
    assert m.reasons(m.alpha) == m.reasons(m.beta) == {}


@pytest.mark.parametrize("primary", [None, 0])
def test_an_idle_mirror_does_not_spin(primary: int | None) -> None:
    m = Mirror(primary=primary)
    m.pause(3600 * SECOND)  # (asserts the number of events)
    assert m.state(m.alpha) == "Connected"


def test_a_promotion_outlives_the_discovery_that_the_peer_is_silently_gone() -> None:
    m = Mirror()
    m.world.network.partitioned = True
    for link in m.world.network.links:
        link.alive = False
    m.beta.die(power=False)
    m.done(m.alpha, "primary")


@pytest.mark.parametrize(
    ("verb", "args"),
    [
        ("disconnect", {"peer": "nobody"}),
        ("connect", {"peer": "nobody"}),
        ("detach", {"volume": 9}),
        ("pause-sync", {"volume": 9}),
    ],
)
def test_a_name_that_does_not_exist_is_refused(verb: str, args: dict[str, object]) -> None:
    m = Mirror()
    assert not m.command(m.alpha, verb, **args).ok


def test_who_leads_without_its_peer_counts_after_a_crash_of_both() -> None:
    m = Mirror(primary=0)
    m.kill(m.alpha)
    m.kill(m.beta)
    m.world.network.partitioned = True
    m.restart(m.beta)
    m.run(lambda: m.disk(m.beta) == "UpToDate")
    m.done(m.beta, "primary")  # it serves reads, and writes nothing
    assert m.superblock(m.beta).peers[0].survivor
    m.kill(m.beta)
    m.world.network.partitioned = False
    m.restart(m.alpha, m.beta)
    m.establish()
    assert m.rule(m.beta) == "crashed-last-self"
