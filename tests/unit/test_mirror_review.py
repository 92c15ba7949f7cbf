# SPDX-License-Identifier: Apache-2.0
"""Races that a review of the core found: events that meet in the middle of each other (decision 0001).

Each test holds one side at a chosen frame or lets one device operation fail late, and then asks for the outcome that
the invariants promise: a write is answered truthfully, nothing waits for ever, and what a disk lacks is marked.
"""

from __future__ import annotations

import errno
import struct

from replicator.core.actions import Action, CloseLink, Send, WriteData, WriteMeta
from replicator.core.events import Io, Tick
from replicator.core.generations import same
from replicator.core.handshake_wire import VolumeState
from replicator.core.states import Disk
from replicator.core.wire import Frame, Kind
from tests.sim.node import Node
from tests.sim.world import MS, SECOND
from tests.unit.mirror import MIB, Mirror, noise

LONG = 1000 * SECOND
SIZE_AT = 2  # of size_bytes in a VOLUME_STATE, behind the disk state and the flags


def fail_data_late(m: Mirror, node: Node, after_ns: int) -> None:
    """Data writes of this node end with EIO, after a while."""
    m.fail(node, lambda action: isinstance(action, WriteData), after_ns=after_ns)


def fail_metadata_of(m: Mirror, node: Node, volume: int) -> None:
    """Metadata writes of one volume end with EIO; everything else works."""
    m.fail(node, lambda action: isinstance(action, WriteMeta) and action.volume == volume)


def claim_no_size(m: Mirror, node: Node) -> None:
    """What this node sends as VOLUME_STATE names a disk of no bytes."""
    perform = m.world.perform

    def other(who: Node, action: Action) -> None:
        if who is node and isinstance(action, Send) and action.frame.kind is Kind.VOLUME_STATE:
            frame, payload = action.frame, bytearray(action.frame.payload)
            assert VolumeState.unpack(payload).disk != Disk.DISKLESS
            struct.pack_into("!Q", payload, SIZE_AT, 0)
            forged = Frame(frame.kind, frame.volume, sequence=frame.sequence, payload=bytes(payload))
            action = Send(action.link, forged)
        perform(who, action)

    m.world.perform = other  # type: ignore[method-assign]


# --- what a write is answered


def test_a_write_that_fails_here_after_the_link_is_gone_is_an_error() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    fail_data_late(m, m.alpha, 900 * MS)
    asked = m.ask(m.alpha, Io.WRITE, 3, value=7)
    m.pause(200 * MS)
    assert asked.reply is None and m.block(m.beta, 3) == 7, "the peer has acknowledged it"
    m.partition()
    assert m.wait(asked).error == errno.EIO, "no copy that can be reached has it"
    m.run(lambda: m.disk(m.alpha) == "Diskless")


def test_a_write_that_fails_here_while_the_peer_is_inconsistent_is_an_error() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.fill(m.alpha, noise(5, MIB))
    m.done(m.alpha, "pause-sync")
    m.done(m.beta, "invalidate", volume=0)
    m.run(lambda: m.replication(m.alpha) == "PausedSyncS")
    fail_data_late(m, m.alpha, 500 * MS)
    asked = m.ask(m.alpha, Io.WRITE, 3, value=7)
    assert m.wait(asked).error == errno.EIO, "a copy that lacks other blocks vouches for nothing"
    m.run(lambda: m.disk(m.alpha) == "Diskless")
    assert m.disk(m.beta) == "Inconsistent"


def test_a_write_freed_by_a_cancelled_resync_is_marked_at_the_peer() -> None:
    m = Mirror(primary=1, epoch_time_ns=LONG)
    m.done(m.beta, "detach")
    for block in range(10, 20):
        m.write(m.beta, block, block + 1)
    m.stall_at(Kind.RESYNC_DATA, m.alpha)
    m.done(m.beta, "attach")
    m.run(lambda: m.replication(m.beta) == "SyncTarget" and bool(m._held))
    asked = m.ask(m.beta, Io.WRITE, 19, blocks=200, value=9)
    m.pause(100 * MS)
    assert asked.reply is None and m.block(m.alpha, 100) == 0, "it waits for the resync of block 19"
    m.volume(m.beta).disk_error("flush", errno.EIO)
    m.beta.step(Tick())
    m.pause(50 * MS)
    m.stall(m.alpha, stalled=False)
    assert m.wait(asked).error == 0, "its good peer has it, and has marked it"
    m.pause(SECOND)
    assert m.disk(m.beta) == "Diskless"
    assert (m.block(m.alpha, 100), m.block(m.beta, 100)) == (9, 0), "only the peer has it"
    assert set(range(19, 219)) <= m.dirty(m.alpha)
    m.done(m.beta, "attach")
    m.establish()
    assert m.identical() and m.block(m.beta, 100) == 9


# --- nothing waits for ever


def test_detach_and_attach_before_the_peer_answers_leave_no_write_waiting() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.stall_at(Kind.DISK_STATE_ACK, m.beta)
    m.done(m.alpha, "detach")
    m.done(m.alpha, "attach")
    m.stall(m.beta, stalled=False)
    m.establish()
    m.write(m.alpha, 3, 7)
    assert m.block(m.alpha, 3) == m.block(m.beta, 3) == 7


def test_a_write_goes_on_when_another_volume_fails_in_their_joint_fork_point() -> None:
    m = Mirror(primary=0, volumes=(0, 1), epoch_time_ns=LONG)
    for volume in (0, 1):
        m.write(m.alpha, 3, 1, volume=volume)
    before = m.superblock(m.alpha).current
    fail_metadata_of(m, m.alpha, 1)
    m.partition()
    m.write(m.alpha, 3, 7)
    assert (m.disk(m.alpha, 0), m.disk(m.alpha, 1)) == ("UpToDate", "Diskless")
    assert same(m.superblock(m.alpha).peers[0].bitmap_id, before), "its own fork point is on the disk"


def test_a_disk_that_fails_while_it_records_a_survivor_can_be_attached_again() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    m.write(m.alpha, 3, 1)
    works = m.world.perform
    m.fail_metadata(m.beta)
    m.partition()
    m.run(lambda: m.disk(m.beta) == "Diskless")
    m.world.perform = works  # type: ignore[method-assign]
    m.heal()
    m.run(lambda: m.replication(m.beta) == "Established")
    m.done(m.beta, "attach")
    m.establish()
    assert m.identical()


def test_detach_does_not_wait_for_the_writes_of_other_volumes() -> None:
    m = Mirror(primary=0, volumes=(0, 1))
    load: list[bool] = [True]

    def again(block: int = 0) -> None:
        if load:
            m.ask(m.alpha, Io.WRITE, block % 200, value=1, volume=1)
            m.world.after(MS // 5, lambda: again(block + 1))

    again()
    m.pause(20 * MS)
    detach = m.begin(m.alpha, "detach", volume=0)
    write = m.ask(m.alpha, Io.WRITE, 3, value=7)
    m.run(lambda: bool(detach.answers), SECOND)
    assert detach.answer.ok and m.disk(m.alpha, 0) == "Diskless" and m.disk(m.alpha, 1) == "UpToDate"
    assert m.wait(write).error == 0 and m.block(m.beta, 3) == 7, "what came meanwhile goes to the peer"
    load.clear()


# --- states that cross


def test_a_disk_lost_while_a_round_is_under_way_ends_the_round() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    held = m.stall_at(Kind.VOLUME_STATE, m.alpha)
    m.replica(m.alpha).begin_round()
    m.alpha.step(Tick())
    m.run(lambda: bool(held))
    m.lose_disk(m.beta)
    m.pause(20 * MS)
    m.stall(m.alpha, stalled=False)
    m.run(lambda: m.disk(m.beta) == "Diskless" and m.replication(m.alpha) == "Established")
    m.write(m.alpha, 3, 7)
    assert 3 in m.dirty(m.alpha), "alpha goes on alone and marks"


def test_a_disk_that_fails_during_promotion_makes_no_primary() -> None:
    m = Mirror()
    m.fail_metadata(m.alpha)
    m.partition()
    answer = m.command(m.alpha, "primary")
    assert (answer.ok, answer.code) == (False, "in-transient-state")
    assert m.role(m.alpha) == "Secondary"
    m.run(lambda: m.disk(m.alpha) == "Diskless")
    assert m.role(m.alpha) == "Secondary"


def test_a_primary_whose_peer_lost_acknowledged_unflushed_writes_has_a_fork_point() -> None:
    m = Mirror(primary=0, epoch_time_ns=LONG)
    before = m.superblock(m.alpha).current
    m.write(m.alpha, 3, 7)
    assert (m.block(m.beta, 3), m.stable(m.beta, 3)) == (7, 0), "acknowledged, and only in the cache of the peer"
    assert not m.dirty(m.alpha) and m.superblock(m.alpha).peers[0].bitmap_id == 0
    m.lose_disk(m.beta)
    m.run(lambda: m.superblock(m.alpha).peers[0].bitmap_id != 0)
    found = m.superblock(m.alpha)
    assert same(found.peers[0].bitmap_id, before) and not same(found.current, before)
    assert m.dirty(m.alpha) == {3} and m.disk(m.alpha) == "UpToDate"


def test_a_volume_state_of_a_disk_without_a_size_is_a_protocol_error() -> None:
    m = Mirror(start="booted")
    claim_no_size(m, m.beta)
    closed = m.actions("CloseLink")
    m.replica(m.beta).begin_round()
    m.beta.step(Tick())
    m.run(lambda: any(node == m.alpha.id for node, _ in closed))
    action = next(action for node, action in closed if node == m.alpha.id)
    assert isinstance(action, CloseLink) and "size of 0 bytes" in action.reason
    assert m.disk(m.alpha) == "Inconsistent"


def test_writes_wait_here_before_a_slow_peer_objects_to_their_number() -> None:
    m = Mirror(primary=0, unwritten_bytes_max=MIB // 4)
    m.stall(m.alpha)
    asked = [m.ask(m.alpha, Io.WRITE, block, value=block % 250 + 1) for block in range(200)]
    m.pause(100 * MS)
    assert m.connection(m.alpha).unwritten_bytes == MIB // 4 and all(one.reply is None for one in asked)
    m.stall(m.alpha, stalled=False)
    for one in asked:
        assert m.wait(one).error == 0
    assert m.identical()


def test_a_primary_reads_nothing_locally_before_it_knows_what_its_new_disk_lacks() -> None:
    """Found by the simulator (seed 7073): between the decision and the source's bitmap the old blocks looked clean."""
    m = Mirror(primary=1)
    m.done(m.beta, "detach")
    m.write(m.beta, 10, 7)
    m.stall_at(Kind.BITMAP, m.alpha)
    m.done(m.beta, "attach")
    m.run(lambda: m.replication(m.beta) == "WFBitMapT")
    asked = m.ask(m.beta, Io.READ, 10)
    m.pause(50 * MS)
    assert asked.reply is None, "the answer has to come from the peer"
    m.stall(m.alpha, stalled=False)
    answer = bytes(m.wait(asked).data)
    m.establish()
    assert answer == m.read(m.beta, 10)
    assert m.identical() and m.block(m.beta, 10) == 7
