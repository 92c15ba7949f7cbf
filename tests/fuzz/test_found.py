# SPDX-License-Identifier: Apache-2.0
"""What fuzzing found, told as a story each; most of it happens between honest nodes too, only more rarely.

A crasher file stops reproducing as soon as the generator that reads it changes; these do not.
"""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from replicator.core import activity, sealed, superblock
from replicator.core.events import Io
from replicator.core.geometry import ACTIVITY_BLOCKS, PAGE
from replicator.core.handshake_wire import pack_ranges
from replicator.core.locks import Lock, LockKind, RangeLocks
from replicator.core.wire import Frame, Kind
from replicator.errors import FormatError
from tests.fuzz import hostile
from tests.fuzz.hostile import BLOCK, GENERATION, GOOD, NEWER
from tests.fuzz.seed_corpus import superblocks
from tests.fuzz.victim import MIB, SECOND, Victim

WRITE = Frame(Kind.WRITE, sequence=1, offset=0, size=BLOCK, payload=bytes(BLOCK))


def gone(victim: Victim) -> bool:
    """The core has ended the connection."""
    return victim.wire is None and not victim.connection.connected


def test_a_sequence_that_leaves_no_room_to_count_on_is_not_believed() -> None:
    pair = dict(superblocks())["sequence-max"]
    with pytest.raises(FormatError, match="something else"):
        superblock.choose(pair[:PAGE], pair[PAGE:])
    last = sealed.SEQUENCE_MAX
    ring = bytearray(activity.fresh_ring(0)[0])
    place = last % ACTIVITY_BLOCKS
    ring[place * PAGE : (place + 1) * PAGE] = activity.encode((1,), last)
    found = activity.recover(bytes(ring))
    assert found.unknown and activity.fresh_ring(found.sequence)


def test_a_state_said_twice_in_a_round_cannot_make_writes_disappear() -> None:
    victim = hostile.primary("C")
    again = victim.heard(Kind.VOLUME_STATE)[-1].sequence
    victim.say([Frame(Kind.VOLUME_STATE, sequence=again, payload=replace(GOOD, disk=3).pack())])
    assert gone(victim)
    victim.ask(Io.WRITE, 0, BLOCK)
    victim.finish()  # and there: what was written is dirty
    assert victim.volume.dirty_count(1) == 1


def test_writes_before_the_copies_were_compared_end_the_link() -> None:
    victim = hostile.primary("C")
    victim.say([Frame(Kind.GOODBYE, flags=16, payload=b"\1")])
    victim.ask(Io.WRITE, MIB, BLOCK)  # the fork point is on its way to the disk, so no round can begin
    victim.command("secondary")
    victim.greet(victim.link_up(), primary=True)
    assert not victim.heard(Kind.VOLUME_STATE)
    victim.say([WRITE])
    assert gone(victim)
    victim.finish()


def test_a_link_that_comes_and_goes_during_a_superblock_write_does_not_keep_it_writing() -> None:
    victim = hostile.primary("C")
    victim.say([Frame(Kind.GOODBYE, flags=16, payload=b"\1")])
    victim.ask(Io.WRITE, 0, BLOCK)
    victim.greet(victim.link_up())
    victim.compare(GOOD)
    victim.greet(victim.link_up())
    victim.compare(GOOD)
    victim.complete()  # the fork point; the two that waited for it have asked for a write of their own
    victim.greet(victim.link_up())
    victim.compare(GOOD)
    victim.complete_all()
    assert victim.heard(Kind.VOLUME_STATE)
    victim.finish()


def test_a_round_does_not_begin_on_a_link_that_is_being_lost() -> None:
    victim = hostile.secondary("C")
    victim.link_down(victim.wires.popitem()[0])
    victim.greet(victim.link_up(), primary=True)
    unrelated = replace(GOOD, current=0x7770, history=())
    victim.say([WRITE, Frame(Kind.VOLUME_STATE, sequence=2, payload=unrelated.pack())])  # the round waits for the write
    assert victim.wire is not None
    victim.link_down(victim.wire.number)
    assert victim.resource.status()["connections"]
    victim.finish()


def test_a_promotion_waits_for_the_writes_of_a_primary_that_came_and_went() -> None:
    victim = hostile.secondary("C")
    victim.command("primary")
    asked = victim.heard(Kind.ROLE_REQUEST)[-1]
    victim.say([Frame(Kind.ROLE_REPLY, sequence=asked.sequence, payload=b"\0")])
    victim.say([Frame(Kind.VOLUME_STATE, sequence=2, payload=replace(GOOD, primary=True).pack())])
    victim.say([Frame(Kind.ROLE, payload=b"\1"), WRITE])
    assert len(victim.pending) == 2 and victim.wire is not None
    victim.link_down(victim.wire.number)
    victim.complete()  # PrimaryIndicator; the write is still under way
    assert victim.resource.roles.role.value == "Secondary"
    victim.complete_all()
    assert victim.resource.primary
    victim.ask(Io.WRITE, 0, BLOCK)
    victim.finish()


def test_a_disk_that_goes_in_the_middle_of_a_round_ends_the_round() -> None:
    victim = hostile.handshake("C")
    assert victim.wire is not None
    victim.greet(victim.wire)
    victim.volume.disk_error("flush", errno.EIO)
    victim.tick(1)
    newer = replace(GOOD, current=NEWER, bitmap_id=GENERATION, dirty_count=1)
    victim.say([Frame(Kind.VOLUME_STATE, sequence=1, payload=newer.pack())])
    victim.complete_all()
    assert len(victim.heard(Kind.VOLUME_STATE)) == 2, "when the disk is closed, a new round says so"
    victim.finish()


def test_a_detach_lets_writes_go_on_that_others_wait_for() -> None:
    victim = hostile.primary("C")
    first = victim.ask(Io.WRITE, 0, 2 * BLOCK)  # holds its range, waits for the activity log
    second = victim.ask(Io.WRITE, BLOCK, 2 * BLOCK)  # waits for the first
    victim.command("detach")
    victim.complete_all()
    victim.finish()
    assert {victim.replies[first].error, victim.replies[second].error} == {0}


def test_several_downs_and_an_attach_are_all_answered() -> None:
    victim = hostile.target("C")
    victim.command("invalidate")
    for verb in ("down", "down", "attach", "down", "attach"):
        victim.command(verb)
    victim.complete_all()
    victim.finish()
    victim.command("attach")
    victim.command("down")
    victim.finish()
    assert len(victim.answers) == 2 + 1 + 5 + 2


def test_a_write_waits_for_a_copy_that_began_behind_the_write_before_it() -> None:
    granted: list[Lock] = []
    locks = RangeLocks(granted.append)
    copy, first, second = (Lock(kind, 0, BLOCK, None) for kind in (LockKind.WANTED, LockKind.PEER, LockKind.PEER))
    assert locks.take(copy) and locks.take(first)
    assert not locks.become_copy(copy)
    assert not locks.take(second)
    locks.release(first)
    assert granted == [copy]
    locks.release(copy)
    assert granted == [copy, second]


def test_a_queue_on_one_block_is_a_chain() -> None:
    locks = RangeLocks(lambda _: None)
    queue = [Lock(LockKind.PEER, 0, BLOCK, None) for _ in range(100)]
    assert [locks.take(lock) for lock in queue] == [True] + [False] * 99
    assert [lock.blockers for lock in queue] == [0] + [1] * 99
    for lock in queue:
        locks.release(lock)
    assert not locks.count


@pytest.mark.parametrize("volume", [[], {}, [0], True, 0.0, "0", -1])
def test_a_volume_that_is_none_is_refused(volume: object) -> None:
    victim = hostile.secondary("C")
    token = victim.command("detach", volume=volume)
    assert victim.answers[token].code == "no-such-volume"


def test_a_confirmation_counts_once_and_only_for_what_was_sent() -> None:
    # Not a bug that was found: the oracle of the fuzzer must notice one.
    victim = hostile.source("C")
    victim.say([Frame(Kind.RESYNC_REQUEST, sequence=1, size=4 * BLOCK)])
    victim.complete_all()
    confirm = Frame(Kind.RESYNC_CONFIRM, payload=pack_ranges([(0, 4 * BLOCK)]))
    victim.say([confirm])
    assert victim.volume.dirty_count(1) == 36
    attached = victim.volume.attached
    assert attached is not None
    attached.bitmaps[1].confirm(10, 1)
    with pytest.raises(AssertionError, match="are cleared"):
        victim.tick(SECOND)
