# SPDX-License-Identifier: Apache-2.0
"""Fork points, split brain, survivors and forced promotion between two running cores (decision 0001, V3, V7)."""

from __future__ import annotations

import pytest

from replicator.core.events import Io
from replicator.core.generations import JUST_CREATED, same
from replicator.core.wire import Kind
from tests.sim.world import MS, SECOND
from tests.unit.mirror import Mirror

LONG = 1000 * SECOND


def both_stand_alone(m: Mirror) -> bool:
    return m.state(m.alpha) == m.state(m.beta) == "StandAlone"


def untouched(m: Mirror) -> bool:
    """Nothing was copied and nothing asked for."""
    return m.sent(Kind.RESYNC_REQUEST) == m.sent(Kind.SYNC_READY) == 0


# --- fork points


def test_a_lone_write_begins_a_generation_before_its_reply() -> None:
    m = Mirror(primary=0)
    before = m.superblock(m.alpha)
    m.partition()
    found = []
    m.on_reply(m.alpha, lambda: found.append(m.superblock(m.alpha)))
    m.write(m.alpha, 3, 7)
    assert same(found[0].peers[0].bitmap_id, before.current) and not same(found[0].current, before.current)


def test_a_lone_write_is_on_no_disk_before_the_fork_point_is() -> None:
    m = Mirror(primary=0)
    before = m.superblock(m.alpha).current
    m.partition()
    seen: list[int] = []
    m.watch(
        lambda _, action: seen.append(m.superblock(m.alpha).current) if type(action).__name__ == "WriteData" else None
    )
    m.write(m.alpha, 3, 7)
    assert len(seen) == 1 and not same(seen[0], before)


def test_only_the_first_lone_write_begins_a_generation() -> None:
    m = Mirror(primary=0)
    m.partition()
    m.write(m.alpha, 3, 7)
    first = m.superblock(m.alpha)
    m.write(m.alpha, 4, 7)
    assert m.superblock(m.alpha).current == first.current


def test_promotion_and_demotion_without_a_write_change_no_generation() -> None:
    m = Mirror()
    before = [m.superblock(node).current for node in (m.alpha, m.beta)]
    m.partition()
    for node in (m.alpha, m.beta):
        m.done(node, "primary")
        m.read(node, 3)
        m.done(node, "secondary")
    assert [m.superblock(node).current for node in (m.alpha, m.beta)] == before
    m.heal()
    m.establish()
    assert untouched(m)


def test_mirrored_writes_begin_no_generation() -> None:
    m = Mirror(primary=0)
    before = m.superblock(m.alpha).current
    m.write(m.alpha, 3, 7)
    m.flush(m.alpha)
    assert m.superblock(m.alpha).current == before


def test_writes_of_one_side_alone_are_copied_to_the_other() -> None:
    m = Mirror(primary=0)
    m.partition()
    m.write(m.alpha, 3, 7)
    m.heal()
    m.establish()
    assert m.block(m.beta, 3) == 7
    assert m.superblock(m.alpha).current == m.superblock(m.beta).current
    assert m.superblock(m.alpha).peers[0].bitmap_id == 0


# --- split brain


@pytest.mark.parametrize("primary", [None, 0, 1])
def test_both_wrote_alone_is_a_split_brain_on_both_and_nothing_is_copied(primary: int | None) -> None:
    m = Mirror()
    m.partition()
    for node, value in ((m.alpha, 7), (m.beta, 8)):
        m.done(node, "primary")
        m.write(node, 3, value)
        if node.id != primary:
            m.done(node, "secondary")
    m.heal()
    m.run(lambda: both_stand_alone(m))
    assert untouched(m)
    assert (m.block(m.alpha, 3), m.block(m.beta, 3)) == (7, 8)
    assert "bitmap-both" in (m.rule(m.alpha), m.rule(m.beta)), "who decides first tells the other with its goodbye"
    for node in (m.alpha, m.beta):
        assert "split brain (bitmap-both)" in m.reasons(node)["split-brain"]
    m.pause(60 * SECOND)
    assert both_stand_alone(m), "StandAlone stays StandAlone"


def test_split_brain_is_found_again_after_a_restart_of_both() -> None:
    m = Mirror()
    m.partition()
    for node, value in ((m.alpha, 7), (m.beta, 8)):
        m.done(node, "primary")
        m.write(node, 3, value)
    m.kill(m.alpha)
    m.kill(m.beta)
    m.heal()
    m.restart(m.alpha, m.beta)
    m.run(lambda: both_stand_alone(m))
    assert untouched(m)


def test_split_brain_that_met_a_primary_leaves_it_serving() -> None:
    m = Mirror()
    m.partition()
    m.done(m.beta, "primary")
    m.write(m.beta, 3, 8)
    m.done(m.beta, "secondary")
    m.done(m.alpha, "primary")
    m.write(m.alpha, 3, 7)
    m.heal()
    m.run(lambda: both_stand_alone(m))
    m.write(m.alpha, 4, 9)
    assert m.read(m.alpha, 3)[0] == 7


# --- crashes of a Primary


def test_a_survivor_is_the_source_and_an_acknowledged_write_is_kept() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 7)
    m.world.network.partitioned = True
    m.power_cut(m.alpha)
    assert m.block(m.alpha, 3) == 0, "lost with its cache"
    m.run(lambda: m.superblock(m.beta).peers[0].survivor)
    m.heal()
    m.restart(m.alpha)
    m.establish()
    assert m.rule(m.beta).startswith("survivor")
    assert m.block(m.alpha, 3) == m.block(m.beta, 3) == 7


@pytest.mark.parametrize("how", ["down", "kill", "power"])
def test_a_survivor_that_was_restarted_is_still_the_source(how: str) -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 7)
    m.world.network.partitioned = True
    m.power_cut(m.alpha)
    m.run(lambda: m.superblock(m.beta).peers[0].survivor)
    if how == "down":
        m.done(m.beta, "down")
    m.beta.die(power=how == "power")
    m.heal()
    m.restart(m.alpha, m.beta)
    m.establish()
    assert m.block(m.alpha, 3) == m.block(m.beta, 3) == 7


def test_the_survivor_flag_is_not_set_before_what_it_promises_is_stable() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    for block in range(6):
        m.ask(m.alpha, Io.WRITE, block, value=7)
    m.pause(MS)
    m.world.network.partitioned = True
    m.power_cut(m.alpha)
    m.run(lambda: m.superblock(m.beta).peers[0].survivor)
    assert m.beta.disks[0].data.seen == m.beta.disks[0].data.stable


def test_the_survivor_flag_is_gone_after_the_copies_met() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.kill(m.alpha)
    m.pause()
    m.restart(m.alpha)
    m.establish()
    m.pause()
    assert not m.superblock(m.beta).peers[0].survivor and not m.superblock(m.alpha).crashed_primary


def test_after_a_clean_end_of_the_link_nobody_is_a_survivor() -> None:
    m = Mirror(primary=0)
    m.done(m.alpha, "disconnect")
    m.pause()
    assert not m.superblock(m.beta).peers[0].survivor


def test_a_crashed_primary_that_goes_on_alone_forks() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    before = m.superblock(m.alpha).current
    m.world.network.partitioned = True
    m.kill(m.alpha)
    m.restart(m.alpha)
    m.run(lambda: m.disk(m.alpha) == "UpToDate")
    m.done(m.alpha, "primary")
    assert same(m.superblock(m.alpha).peers[0].bitmap_id, before)


def test_a_crashed_primary_and_a_survivor_that_both_went_on_are_a_split_brain() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.world.network.partitioned = True
    m.kill(m.alpha)
    m.pause()
    m.done(m.beta, "primary")
    m.write(m.beta, 3, 8)
    m.restart(m.alpha)
    m.run(lambda: m.disk(m.alpha) == "UpToDate")
    m.done(m.alpha, "primary")
    m.heal()
    m.run(lambda: both_stand_alone(m))
    assert untouched(m)


def test_a_survivor_that_went_on_is_the_source_of_a_crashed_primary() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.kill(m.alpha)
    m.pause()
    m.done(m.beta, "primary")
    m.write(m.beta, 3, 8)
    m.restart(m.alpha)
    m.establish()
    assert m.block(m.alpha, 3) == m.block(m.beta, 3) == 8


@pytest.mark.parametrize("protocol", ["B", "C"])
def test_both_lost_power_and_what_was_flushed_is_there(protocol: str) -> None:
    m = Mirror(primary=1, protocol=protocol, epoch_time_ns=LONG)
    m.write(m.beta, 3, 7)
    m.flush(m.beta)
    m.write(m.beta, 4, 8)
    m.power_cut(m.beta)
    m.power_cut(m.alpha)
    m.restart(m.alpha, m.beta)
    m.establish()
    assert m.identical() and m.block(m.alpha, 3) == 7


# --- new-current-uuid


def test_skipping_the_first_sync_copies_nothing() -> None:
    m = Mirror()
    assert untouched(m) and m.dirty(m.alpha) == m.dirty(m.beta) == set()
    found = [m.superblock(node) for node in (m.alpha, m.beta)]
    assert found[0].current == found[1].current and found[0].resource_id == found[1].resource_id
    assert all(sb.consistent and sb.was_up_to_date for sb in found)


@pytest.mark.parametrize("initiator", [0, 1])
def test_a_skipped_first_sync_the_peer_never_heard_of_is_a_full_sync_from_where_it_was_said(initiator: int) -> None:
    m = Mirror(start="booted")
    node = m.node(initiator)
    node.disks[0].data.seen[:] = bytes([5]) * node.disks[0].size
    cut = m.cut_at(Kind.NEW_GENERATION)
    assert m.command(node, "new-current-uuid", volume=0, clear_bitmap=True).code == "connection-lost"
    assert cut
    m.establish()
    assert m.identical() and m.block(m.peer(node), 9) == 5


@pytest.mark.parametrize("initiator", [0, 1])
def test_a_skipped_first_sync_whose_acknowledgement_was_lost_is_complete(initiator: int) -> None:
    m = Mirror(start="booted")
    node = m.node(initiator)
    cut = m.cut_at(Kind.NEW_GENERATION_ACK)
    m.command(node, "new-current-uuid", volume=0, clear_bitmap=True)
    assert cut
    m.establish()
    found = [m.superblock(each) for each in (m.alpha, m.beta)]
    assert found[0].current == found[1].current
    assert found[0].peers[0].bitmap_id == found[1].peers[0].bitmap_id == 0
    assert untouched(m) and m.identical()


@pytest.mark.parametrize("crash", [0, 1])
@pytest.mark.parametrize("kind", [Kind.NEW_GENERATION, Kind.NEW_GENERATION_ACK, Kind.VOLUME_STATE])
def test_a_skipped_first_sync_interrupted_by_a_crash_ends_well(kind: Kind, crash: int) -> None:
    m = Mirror(start="booted")
    node = m.node(crash)
    hit = m.on_frame(kind, lambda: m.world.after(0, lambda: m.kill(node)))
    m.begin(m.alpha, "new-current-uuid", volume=0, clear_bitmap=True)
    m.run(lambda: bool(hit) and not node.up)
    m.restart(node)
    m.establish()
    assert m.identical()


def test_clear_bitmap_is_refused_for_copies_with_a_history() -> None:
    m = Mirror()
    answer = m.command(m.alpha, "new-current-uuid", volume=0, clear_bitmap=True)
    assert not answer.ok and answer.code == "not-just-created" and answer.hint


def test_clear_bitmap_is_refused_without_a_connection() -> None:
    m = Mirror(start="off")
    m.world.network.partitioned = True
    m.restart(m.alpha)
    m.run(lambda: m.disk(m.alpha) == "Inconsistent")
    m.pause()
    assert m.command(m.alpha, "new-current-uuid", volume=0, clear_bitmap=True).code == "not-connected"


@pytest.mark.parametrize("primary", [None, 0])
def test_a_plain_new_generation_is_taken_by_both_and_copies_nothing(primary: int | None) -> None:
    m = Mirror(primary=primary)
    before = m.superblock(m.alpha).current
    m.done(m.alpha, "new-current-uuid", volume=0)
    m.establish()
    found = [m.superblock(node) for node in (m.alpha, m.beta)]
    assert same(found[0].current, found[1].current) and not same(found[0].current, before)
    assert found[0].peers[0].bitmap_id == found[1].peers[0].bitmap_id == 0
    assert untouched(m)


@pytest.mark.parametrize("kind", [Kind.NEW_GENERATION, Kind.NEW_GENERATION_ACK])
@pytest.mark.parametrize("primary", [None, 0])
def test_a_plain_new_generation_that_is_interrupted_ends_well(kind: Kind, primary: int | None) -> None:
    m = Mirror(primary=primary)
    cut = m.cut_at(kind)
    m.command(m.alpha, "new-current-uuid", volume=0)
    assert cut
    m.establish()
    assert m.identical()


@pytest.mark.parametrize(
    "kind",
    [
        Kind.NEW_GENERATION,
        Kind.NEW_GENERATION_ACK,
    ],
)
def test_a_plain_new_generation_begun_beside_a_primary_that_is_interrupted_ends_well(kind: Kind) -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.cut_at(kind)
    m.command(m.beta, "new-current-uuid", volume=0)  # (or is refused)
    m.pause()
    m.establish()
    assert m.identical() and m.block(m.beta, 3) == 7


# --- force


def test_forced_promotion_of_a_fresh_disk_fills_the_other() -> None:
    m = Mirror(start="booted")
    m.alpha.disks[0].data.seen[:] = bytes([5]) * m.alpha.disks[0].size
    m.done(m.alpha, "primary", force=True)
    m.establish()
    assert m.identical() and m.block(m.beta, 200) == 5
    assert m.rule(m.beta).startswith("just-created")


def test_forced_promotion_alone_fills_a_fresh_peer_that_comes_later() -> None:
    m = Mirror(start="off")
    m.restart(m.alpha)
    m.run(lambda: m.disk(m.alpha) == "Inconsistent")
    m.done(m.alpha, "primary", force=True)
    m.write(m.alpha, 3, 7)
    m.restart(m.beta)
    m.establish()
    assert m.identical() and m.block(m.beta, 3) == 7


def interrupted_target() -> Mirror:
    """beta is Inconsistent, alpha has the good copy; they are apart."""
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.stall_resync(m.alpha)
    m.done(m.beta, "invalidate", volume=0)
    m.run(lambda: m.replication(m.beta) == "SyncTarget")
    m.partition()
    m.hooks.clear()
    m.stall(m.alpha, stalled=False)
    assert m.disk(m.beta) == "Inconsistent"
    return m


@pytest.mark.parametrize("alone", [False, True])
def test_a_forced_mixture_meets_the_good_copy_as_a_stranger_never_as_an_ancestor(alone: bool) -> None:
    m = interrupted_target()
    if alone:
        m.write(m.alpha, 4, 8)
    m.done(m.alpha, "secondary")
    good = bytes(m.alpha.disks[0].data.seen)
    m.done(m.beta, "primary", force=True)
    m.write(m.beta, 9, 9)
    m.done(m.beta, "secondary")
    m.heal()
    requests = m.sent(Kind.RESYNC_REQUEST)
    m.run(lambda: both_stand_alone(m))
    assert m.sent(Kind.RESYNC_REQUEST) == requests
    assert m.alpha.disks[0].data.seen == good
    assert "split-brain" in m.reasons(m.alpha) and "split-brain" in m.reasons(m.beta)


def test_without_force_an_interrupted_target_goes_on_when_the_source_is_back() -> None:
    m = interrupted_target()
    m.write(m.alpha, 4, 8)
    m.heal()
    m.establish()
    assert m.identical() and m.block(m.beta, 4) == 8


# --- the diskless


def test_an_outdated_copy_never_wins() -> None:
    """alpha is Outdated (it lost its disk while beta went on) and comes back alone, then meets beta."""
    m = Mirror(primary=0)
    m.alpha.disks[0].broken = True
    m.write(m.alpha, 3, 7)
    m.pause()
    m.alpha.disks[0].broken = False
    m.done(m.alpha, "attach")
    m.establish()
    assert m.block(m.alpha, 3) == m.block(m.beta, 3) == 7


def test_fresh_metadata_says_just_created() -> None:
    m = Mirror(start="booted")
    assert same(m.superblock(m.alpha).current, JUST_CREATED)
    assert m.rule(m.alpha) == m.rule(m.beta) == "just-created-both"
    assert "inconsistent" in m.reasons(m.alpha)


# --- acknowledged, but not confirmed when the link was lost


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_losing_a_peer_that_has_not_confirmed_acknowledged_writes_begins_a_generation(protocol: str) -> None:
    m = Mirror(primary=0, protocol=protocol, epoch_time_ns=LONG)
    before = m.superblock(m.alpha).current
    m.write(m.alpha, 3, 7)
    m.partition()
    m.pause()
    assert m.dirty(m.alpha) == {3}
    assert same(m.superblock(m.alpha).peers[0].bitmap_id, before), "something is marked, so there must be a fork point"


def test_a_write_acknowledged_under_protocol_a_that_never_left_is_not_undone_without_a_split_brain() -> None:
    m = Mirror(primary=0, protocol="A", epoch_time_ns=LONG)
    m.stall(m.alpha)
    m.write(m.alpha, 3, 7)
    m.partition()
    m.done(m.alpha, "secondary")
    m.done(m.beta, "primary")
    m.write(m.beta, 9, 9)
    m.done(m.beta, "secondary")
    m.heal()
    m.pause(5 * SECOND)
    assert m.block(m.alpha, 3) == 7, "nobody crashed, so only an operator may throw it away"
    assert both_stand_alone(m)


@pytest.mark.parametrize("protocol", ["B", "C"])
def test_a_write_the_peer_lost_in_a_power_cut_is_not_undone_without_a_split_brain(protocol: str) -> None:
    m = Mirror(primary=0, protocol=protocol, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 7)
    m.world.network.partitioned = True
    m.power_cut(m.beta)
    m.run(lambda: not m.connection(m.alpha).connected)
    m.done(m.alpha, "secondary")
    m.restart(m.beta)
    m.run(lambda: m.disk(m.beta) == "UpToDate")
    m.done(m.beta, "primary")
    m.write(m.beta, 9, 9)
    m.done(m.beta, "secondary")
    m.heal()
    m.pause(5 * SECOND)
    assert m.block(m.alpha, 3) == 7, "alpha never crashed, so only an operator may throw it away"
