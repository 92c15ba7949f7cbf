# SPDX-License-Identifier: Apache-2.0
"""The operator's verbs at bad moments: each is answered once and truthfully; what is refused has changed nothing."""

from __future__ import annotations

import errno

import pytest

from replicator.core import activity
from replicator.core.actions import Action, CommandDone, WriteMeta
from replicator.core.events import Io, Tick
from replicator.core.generations import same
from replicator.core.geometry import ACTIVITY_BLOCKS, ACTIVITY_OFFSET, PAGE, SUPERBLOCK_OFFSETS
from replicator.core.wire import Kind
from tests.sim.node import Node
from tests.sim.world import MS, SECOND
from tests.unit.mirror import MIB, Asked, Mirror, noise

LONG = 1000 * SECOND


def refused(answer: CommandDone) -> tuple[str, int]:
    """Code and number of a refusal, which says why and what to do."""
    assert not answer.ok and answer.message and answer.hint, answer
    return answer.code, answer.number


def busy_disk(m: Mirror, block: int = 3) -> Asked:
    """A write that is under way on slow disks; what comes after it finds fast ones."""
    m.write(m.alpha, block, 6)  # so that the extent is hot
    m.slow_disks(1_000_000)
    asked = m.ask(m.alpha, Io.WRITE, block, value=7)
    m.pause(10 * MS)
    m.fast_disks()
    return asked


def syncing_target() -> Mirror:
    """beta is Inconsistent and gets nothing from alpha."""
    m = Mirror()
    m.fill(m.alpha, noise(3, MIB))
    m.stall_resync(m.alpha)
    m.done(m.beta, "invalidate", volume=0)
    m.run(lambda: m.replication(m.beta) == "SyncTarget")
    return m


# --- what is refused


def test_a_verb_that_does_not_exist_is_refused() -> None:
    m = Mirror()
    answer = m.command(m.alpha, "explode")
    assert refused(answer) == ("unknown-verb", 0) and "explode" in answer.message


@pytest.mark.parametrize("verb", ["invalidate", "invalidate-remote", "new-current-uuid"])
def test_a_verb_for_one_volume_is_refused_where_it_cannot_be_meant(verb: str) -> None:
    m = Mirror(volumes=(0, 1))
    before = [m.superblock(m.alpha, number) for number in (0, 1)]
    assert refused(m.command(m.alpha, verb)) == ("which-volume", 0)
    m.done(m.alpha, "detach", volume=1)
    assert refused(m.command(m.alpha, verb, volume=1)) == ("no-disk", 0)
    m.begin(m.alpha, "primary")
    assert refused(m.command(m.alpha, verb, volume=0)) == ("in-transient-state", -18)
    m.pause()
    assert m.superblock(m.alpha, 0).current == before[0].current and not m.dirty(m.alpha, 0)


def test_attach_is_refused_while_the_disk_is_being_let_go() -> None:
    m = Mirror()
    m.slow_disks(1_000_000)
    m.volume(m.alpha).ledger.save(lambda found: found, lambda: None)  # something that the device has to finish
    m.lose_disk(m.alpha)
    m.run(lambda: m.disk(m.alpha) == "Failed")
    assert refused(m.command(m.alpha, "attach")) == ("in-transient-state", -18)
    m.fast_disks()
    m.run(lambda: m.disk(m.alpha) == "Diskless")
    m.alpha.disks[0].broken = False
    m.done(m.alpha, "attach")
    m.establish()


def test_a_metadata_write_that_fails_while_attaching_refuses_the_attach_and_says_why() -> None:
    m = Mirror()
    m.done(m.alpha, "detach")
    works = m.world.perform
    m.fail_metadata(m.alpha)
    answer = m.command(m.alpha, "attach")
    assert refused_attach(answer) == "volume 0: a metadata write failed with errno 5"
    assert m.disk(m.alpha) == "Diskless" and "errno 5" in m.reasons(m.alpha)["diskless"]
    m.world.perform = works  # type: ignore[method-assign]
    m.done(m.alpha, "attach")
    m.establish()


def refused_attach(answer: CommandDone) -> str:
    assert (answer.ok, answer.code) == (False, "attach-failed")
    return answer.message


def test_connecting_and_disconnecting_twice_change_nothing() -> None:
    m = Mirror()
    link = m.connection(m.alpha).link
    m.done(m.alpha, "connect")
    m.pause()
    assert m.connection(m.alpha).link == link
    m.done(m.alpha, "disconnect")
    goodbyes, reason = m.sent(Kind.GOODBYE), m.connection(m.alpha).reason
    m.done(m.alpha, "disconnect")
    assert (m.sent(Kind.GOODBYE), m.connection(m.alpha).reason) == (goodbyes, reason)


def test_a_pause_before_the_connection_holds_the_first_resync() -> None:
    m = Mirror(primary=0)
    m.partition()
    m.write(m.alpha, 3, 7)
    m.done(m.beta, "pause-sync")
    m.heal()
    m.run(lambda: m.replication(m.beta) == "PausedSyncT")
    m.pause(5 * SECOND)
    assert m.sent(Kind.RESYNC_REQUEST) == 0 and m.replication(m.alpha) == "PausedSyncS"
    m.done(m.beta, "resume-sync")
    m.establish()
    assert m.block(m.beta, 3) == 7


# --- roles, one after the other


def test_a_node_that_is_becoming_primary_is_not_told_that_it_is_secondary() -> None:
    m = Mirror()
    promotion = m.begin(m.alpha, "primary")
    for verb in ("secondary", "down"):
        assert refused(m.command(m.alpha, verb)) == ("in-transient-state", -18)
    m.run(lambda: bool(promotion.answers))
    assert promotion.answer.ok and m.role(m.alpha) == "Primary" and m.state(m.alpha) == "Connected"


def test_a_node_that_is_becoming_secondary_is_not_told_that_it_is_primary() -> None:
    m = Mirror(primary=0)
    write = busy_disk(m)
    demotion = m.begin(m.alpha, "secondary")
    for verb in ("primary", "secondary", "down"):
        assert refused(m.command(m.alpha, verb)) == ("in-transient-state", -18)
    m.run(lambda: bool(demotion.answers))
    assert demotion.answer.ok and m.role(m.alpha) == "Secondary" and m.wait(write).error == 0


def test_a_diskless_node_with_a_good_peer_serves_and_is_demoted() -> None:
    m = Mirror()
    m.done(m.alpha, "detach")
    m.done(m.alpha, "primary")
    m.write(m.alpha, 3, 7)
    assert m.read(m.alpha, 3)[0] == m.block(m.beta, 3) == 7
    m.done(m.alpha, "secondary")
    assert m.role(m.alpha) == "Secondary"
    m.done(m.alpha, "attach")
    m.establish()
    assert m.identical()


# --- detach


def test_a_disk_that_fails_while_its_detach_drains_is_detached() -> None:
    m = Mirror(primary=0, volumes=(0, 1), epoch_time_ns=LONG)
    write = busy_disk(m)
    asked = m.begin(m.alpha, "detach", volume=0)
    m.pause(10 * MS)
    m.lose_disk(m.alpha)
    m.run(lambda: bool(asked.answers))
    assert asked.answer.ok and m.wait(write).error == 0
    assert (m.disk(m.alpha, 0), m.disk(m.alpha, 1)) == ("Diskless", "UpToDate")
    m.write(m.alpha, 4, 8)
    assert m.block(m.beta, 4) == 8, "nothing is held back any more"


# --- down


def test_down_of_a_diskless_node_ends() -> None:
    m = Mirror()
    m.done(m.alpha, "detach")
    m.done(m.alpha, "down")
    assert (m.disk(m.alpha), m.state(m.alpha)) == ("Diskless", "StandAlone")


def test_down_waits_for_the_peers_writes_that_arrived_and_takes_no_other_verb_meanwhile() -> None:
    m = Mirror(primary=0)
    write = busy_disk(m)
    asked = m.begin(m.beta, "down")
    m.pause(10 * MS)
    assert not asked.answers and m.state(m.beta) == "StandAlone"
    for verb in ("connect", "attach", "primary"):
        assert refused(m.command(m.beta, verb)) == ("in-transient-state", -18)
    again = m.begin(m.beta, "down")
    m.run(lambda: bool(asked.answers and again.answers))
    assert asked.answer.ok and again.answer.ok and m.wait(write).error == 0
    assert (m.disk(m.beta), m.state(m.beta), m.block(m.beta, 3)) == ("Diskless", "StandAlone", 7)
    assert not m.superblock(m.beta).primary_indicator


def test_two_downs_at_once_that_wait_for_the_same_superblock_both_end() -> None:
    m = Mirror(primary=0, fencing="resource-only")
    perform = m.world.perform

    def late(who: Node, action: Action) -> None:
        superblock = isinstance(action, WriteMeta) and action.pieces[0][0] in SUPERBLOCK_OFFSETS
        if who is m.beta and superblock:
            m.world.after(100 * MS, lambda: perform(who, action))
        else:
            perform(who, action)

    m.world.perform = late  # type: ignore[method-assign]
    asked = [m.begin(m.beta, "down") for _ in range(2)]
    m.run(lambda: all(each.answers for each in asked))
    assert all(each.answer.ok for each in asked) and m.disk(m.beta) == "Diskless"
    assert m.superblock(m.beta).outdated, "the superblock that was waited for is on the disk"


def test_down_leaves_an_empty_activity_log() -> None:
    m = Mirror()
    m.done(m.alpha, "detach")
    m.done(m.alpha, "primary")
    m.write(m.alpha, 3, 7)  # only beta has it, so beta logs it
    m.done(m.alpha, "secondary")
    assert hot_extents(m, m.beta) == (0,)
    m.done(m.beta, "down")
    assert hot_extents(m, m.beta) == ()


def hot_extents(m: Mirror, node: Node) -> tuple[int, ...]:
    """What a node that starts now would take for hot."""
    disk = node.disks[0]
    ring = disk.meta.stable[disk.fixed_base + ACTIVITY_OFFSET :][: ACTIVITY_BLOCKS * PAGE]
    found = activity.recover(bytes(ring))
    assert not found.unknown
    return found.extents


def test_after_down_the_same_process_can_be_used_again() -> None:
    m = Mirror(primary=0)
    m.done(m.beta, "down")
    m.write(m.alpha, 3, 7)
    m.done(m.beta, "attach")
    m.done(m.beta, "connect")
    m.establish()
    assert m.block(m.beta, 3) == 7


# --- new-current-uuid


def test_a_new_generation_alone_forks_from_the_peer() -> None:
    m = Mirror()
    before = m.superblock(m.alpha).current
    m.partition()
    m.done(m.alpha, "new-current-uuid", volume=0)
    found = m.superblock(m.alpha)
    assert not same(found.current, before) and same(found.peers[0].bitmap_id, before)
    m.heal()
    m.establish()
    assert same(m.superblock(m.beta).current, found.current) and m.rule(m.beta) == "bitmap-peer"


def test_a_new_generation_is_refused_where_there_is_no_good_copy_to_begin_it() -> None:
    m = Mirror(start="booted")
    assert refused(m.command(m.alpha, "new-current-uuid", volume=0)) == ("just-created", 0)
    m = Mirror(primary=0, fencing="resource-only")
    m.done(m.alpha, "disconnect")
    m.run(lambda: m.disk(m.beta) == "Outdated")
    m.pause()
    before = m.superblock(m.beta)
    assert refused(m.command(m.beta, "new-current-uuid", volume=0)) == ("no-up-to-date-data", -2)
    assert m.superblock(m.beta).current == before.current


def test_a_target_keeps_the_generation_it_is_being_made_into() -> None:
    m = syncing_target()
    assert refused(m.command(m.beta, "new-current-uuid", volume=0)) == ("no-up-to-date-data", -2)
    assert m.state(m.beta) == "Connected" and same(m.superblock(m.beta).current, m.superblock(m.alpha).current)


def test_a_source_begins_no_generation_before_the_copies_are_equal() -> None:
    m = syncing_target()
    assert refused(m.command(m.alpha, "new-current-uuid", volume=0)) == ("in-transient-state", -18)


def test_a_link_lost_while_a_new_generation_is_written_tells_the_peer_nothing_and_the_operator_why() -> None:
    m = Mirror()
    before, sent = m.superblock(m.beta).current, m.sent(Kind.NEW_GENERATION)
    m.slow_disks(1_000_000)
    asked = m.begin(m.alpha, "new-current-uuid", volume=0)
    m.pause(10 * MS)
    m.fast_disks()
    m.cut()
    m.run(lambda: bool(asked.answers))
    assert refused(asked.answer) == ("connection-lost", 0)
    m.establish()
    assert m.sent(Kind.NEW_GENERATION) == sent
    assert same(m.superblock(m.alpha).current, m.superblock(m.beta).current)
    assert not same(m.superblock(m.beta).current, before), "this node was the source, as the hint says"


# --- commands that wait for a disk


def test_an_invalidation_goes_on_when_another_volume_loses_its_disk() -> None:
    m = Mirror(volumes=(0, 1))
    m.fill(m.beta, noise(3, MIB))
    m.slow_disks(1_000_000)
    asked = m.begin(m.alpha, "invalidate", volume=0)
    m.pause(10 * MS)
    m.fast_disks()
    m.volume(m.alpha, 1).disk_error("flush", errno.EIO)
    m.alpha.step(Tick())
    m.run(lambda: bool(asked.answers))
    assert asked.answer.ok
    m.run(lambda: m.disk(m.alpha, 0) == "UpToDate" and m.replication(m.alpha, 0) == "Established")
    assert m.identical(0) and m.disk(m.alpha, 1) == "Diskless"
