# SPDX-License-Identifier: Apache-2.0
"""What a peer may not say: well-formed frames that make no sense now.

Each is answered in one way: the fault is told with its values, the link is dropped, and nothing that the frame asked
for has happened.  What depended on the link is asked of it anew or answered; the next link makes all good again.
"""

from __future__ import annotations

import errno

import pytest

from replicator.core import receiver
from replicator.core.actions import CloseLink, Send
from replicator.core.connection import GOODBYE_DISCONNECT, GOODBYE_REFUSED
from replicator.core.events import Io, LinkFrames, LinkUp
from replicator.core.handshake_wire import (
    RoleAnswer,
    VolumeState,
    pack_disk_state,
    pack_errno,
    pack_generation,
    pack_goodbye,
    pack_ranges,
    pack_role,
    pack_role_reply,
    pack_sequences,
)
from replicator.core.receiver import UNFINISHED_BYTES_MAX
from replicator.core.replica import ROUNDS_AHEAD_MAX
from replicator.core.states import Disk, Role
from replicator.core.wire import Flag, Frame, Kind
from tests.sim.node import Node
from tests.sim.world import MS, SECOND
from tests.unit.mirror import MIB, Mirror, noise

BLOCK = 4096
LATE = 1 << 40  # a sequence that nothing has reached
SECTOR = bytes(512)


def hear(m: Mirror, node: Node, *frames: Frame) -> None:
    """These frames arrive at a node over its agreed link."""
    link = m.connection(node).link
    assert link is not None
    node.step(LinkFrames(link, frames))
    m.pause(MS // 10)


def fault(m: Mirror, node: Node, *frames: Frame) -> str:
    """What a node says is wrong with these frames; it has dropped the link for it."""
    before = m.connection(node).link
    closed = m.actions(CloseLink.__name__)
    hear(m, node, *frames)
    (told,) = m.notices(node, "protocol-error")
    reason = str(told.fields["reason"])
    assert [(who, action.link, action.reason) for who, action in closed] == [
        (node.id, before, f"protocol error: {reason}")
    ]
    return reason


def state(**changes: object) -> bytes:
    fields: dict[str, object] = {"disk": Disk.UP_TO_DATE, "size_bytes": MIB, "current": 77, **changes}
    return VolumeState(**fields).pack()  # type: ignore[arg-type]


SENSELESS = {
    "a volume nobody has": (Frame(Kind.BITMAP_END, volume=7), "BITMAP_END for volume 7, which does not exist"),
    "a kind for nobody": (Frame(Kind.HELLO, payload=bytes(66)), "HELLO has no meaning here"),
    "a write to a Primary": (
        Frame(Kind.WRITE, sequence=LATE, size=512, payload=SECTOR),
        "WRITE from a peer that may not write",
    ),
    "received, under protocol C": (
        Frame(Kind.RECEIVED, payload=pack_sequences([LATE])),
        "RECEIVED, which belongs to protocol B",
    ),
    "written, never sent": (Frame(Kind.WRITTEN, payload=pack_sequences([LATE])), f"WRITTEN for write {LATE}"),
    "failed, never sent": (Frame(Kind.FAILED, payload=pack_sequences([LATE])), f"FAILED for write {LATE}"),
    "a barrier that was not": (Frame(Kind.BARRIER_ACK, sequence=99), "BARRIER_ACK 99 for no barrier of ours"),
    "a read beyond the end": (
        Frame(Kind.READ, sequence=1, offset=MIB, size=512),
        f"READ beyond the end: {MIB}+512 of {MIB}",
    ),
    "data nobody asked for": (
        Frame(Kind.READ_DATA, sequence=LATE, size=512, payload=SECTOR),
        f"READ_DATA {LATE} for no read of ours",
    ),
    "a disk state of a disk that is there": (
        Frame(Kind.DISK_STATE, sequence=1, payload=pack_disk_state(Disk.OUTDATED)),
        "DISK_STATE Outdated: only the loss of a disk is told this way",
    ),
    "a lost disk larger than the volume": (
        Frame(Kind.DISK_STATE, sequence=1, payload=pack_disk_state(Disk.DISKLESS, [(MIB, BLOCK)])),
        "DISK_STATE with a range beyond the end",
    ),
    "a generation that is none": (
        Frame(Kind.NEW_GENERATION, sequence=1, payload=pack_generation(0, clear_bitmap=False)),
        "NEW_GENERATION that cannot be",
    ),
    "a clear bitmap over data": (
        Frame(Kind.NEW_GENERATION, sequence=1, payload=pack_generation(99, clear_bitmap=True)),
        "NEW_GENERATION that clears the bitmap of data with a history",
    ),
    "a generation nobody made": (Frame(Kind.NEW_GENERATION_ACK, sequence=1), "NEW_GENERATION_ACK without"),
    "round 0": (Frame(Kind.VOLUME_STATE, payload=state()), "round 0 after round"),
    "a round out of reach": (
        Frame(Kind.VOLUME_STATE, sequence=LATE + ROUNDS_AHEAD_MAX, payload=state()),
        f"round {LATE + ROUNDS_AHEAD_MAX} when ours is",
    ),
    "a copy of no generation": (
        Frame(Kind.VOLUME_STATE, sequence=9, payload=state(current=1)),
        "VOLUME_STATE without a current generation",
    ),
    "a bitmap after the round": (
        Frame(Kind.BITMAP, size=BLOCK, payload=b"\x02"),
        "BITMAP while Established",
    ),
    "the end of a bitmap after the round": (Frame(Kind.BITMAP_END), "BITMAP_END while Established"),
    "ready for nothing": (Frame(Kind.SYNC_READY), "SYNC_READY while Established"),
    "the start of nothing": (Frame(Kind.SYNC_START), "SYNC_START while Established"),
    "a request of no resync": (
        Frame(Kind.RESYNC_REQUEST, sequence=1, size=BLOCK),
        "RESYNC_REQUEST while Established",
    ),
    "an answer of no resync": (
        Frame(Kind.RESYNC_DATA, sequence=1, size=BLOCK, payload=bytes(BLOCK)),
        "RESYNC_DATA while Established",
    ),
    "a confirmation of no resync": (
        Frame(Kind.RESYNC_CONFIRM, payload=pack_ranges([(0, BLOCK)])),
        "RESYNC_CONFIRM while Established",
    ),
    "the end of no resync": (Frame(Kind.RESYNC_DONE), "RESYNC_DONE while Established"),
}


@pytest.mark.parametrize("case", SENSELESS)
def test_a_frame_without_sense_costs_the_link_and_nothing_else(case: str) -> None:
    frame, text = SENSELESS[case]
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.flush(m.alpha)
    before = m.superblock(m.alpha)
    assert fault(m, m.alpha, frame).startswith(text)
    m.establish()
    assert m.superblock(m.alpha).current == before.current, "nothing was lost, so nothing forked"
    assert m.identical() and m.block(m.alpha, 3) == 7 and m.sent(Kind.RESYNC_REQUEST) == 0


def test_a_write_that_was_never_sent_cannot_be_received() -> None:
    m = Mirror(primary=0, protocol="B")
    text = f"RECEIVED for write {LATE}, which is not under way"
    assert fault(m, m.alpha, Frame(Kind.RECEIVED, payload=pack_sequences([LATE]))) == text
    m.establish()


def test_frames_behind_a_fault_or_a_goodbye_are_not_looked_at() -> None:
    m = Mirror(primary=1)
    bad = Frame(Kind.BARRIER_ACK, sequence=99)
    write = Frame(Kind.WRITE, sequence=LATE, size=BLOCK, payload=b"\x55" * BLOCK)
    fault(m, m.alpha, bad, write, bad)
    m.establish()
    leave = Frame(Kind.GOODBYE, flags=Flag.GRACEFUL, payload=pack_goodbye(GOODBYE_DISCONNECT, "bye"))
    hear(m, m.alpha, leave, write, bad)
    assert len(m.notices(m.alpha, "protocol-error")) == 1 and "bye" in m.connection(m.alpha).reason
    m.establish()
    assert m.block(m.alpha, 0) == 0


# --- writes of a Primary


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        (
            [Frame(Kind.WRITE, sequence=LATE, offset=MIB - 512, size=1024, payload=bytes(1024))],
            f"WRITE beyond the end: {MIB - 512}+1024 of {MIB}",
        ),
        (
            [Frame(Kind.TRIM, sequence=LATE, size=512), Frame(Kind.ZERO, sequence=LATE, size=512)],
            f"ZERO with sequence {LATE} after {LATE}",
        ),
    ],
)
def test_a_write_that_cannot_be_costs_the_link(frames: list[Frame], text: str) -> None:
    m = Mirror(primary=0)
    assert fault(m, m.beta, *frames) == text
    m.establish()
    assert m.identical()


def test_a_write_before_the_copies_were_compared_costs_the_link() -> None:
    m = Mirror(primary=0)
    m.done(m.beta, "detach")
    m.slow_disks(2_000_000)
    attach = m.begin(m.beta, "attach")
    m.pause(10 * MS)
    m.fast_disks()
    m.cut()
    m.run(lambda: m.connection(m.beta).role is Role.PRIMARY)
    assert m.disk(m.beta) == "Attaching", "so it has said nothing of its copy"
    early = Frame(Kind.WRITE, sequence=1, size=BLOCK, payload=b"\x55" * BLOCK)
    assert fault(m, m.beta, early) == "WRITE before the copies were compared"
    m.run(lambda: bool(attach.answers))
    m.establish()
    assert m.block(m.beta, 0) == 0


def test_a_peer_cannot_make_us_hold_more_than_a_bound_of_unfinished_writes() -> None:
    m = Mirror(primary=0)
    m.slow_disks()
    data = b"\x66" * MIB
    count = UNFINISHED_BYTES_MAX // MIB + 1
    frames = [Frame(Kind.WRITE, sequence=LATE + number, size=MIB, payload=data) for number in range(count)]
    hear(m, m.beta, *frames[:-1])
    assert m.notices(m.beta, "protocol-error") == []
    assert fault(m, m.beta, frames[-1]) == f"more than {UNFINISHED_BYTES_MAX} bytes of unacknowledged writes"


@pytest.mark.parametrize("kind", [Kind.TRIM, Kind.BARRIER])
def test_a_peer_cannot_make_us_remember_more_than_a_bound_of_writes_and_barriers(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "UNFINISHED_COUNT_MAX", 20)
    m = Mirror(primary=0)
    m.slow_disks()
    hear(m, m.beta, *(Frame(Kind.TRIM, sequence=LATE + number, size=512) for number in range(20)))
    assert m.notices(m.beta, "protocol-error") == []
    size = 512 if kind is Kind.TRIM else 0
    assert fault(m, m.beta, Frame(kind, sequence=LATE + 20, size=size)).startswith("more than 20 un")


def test_what_waits_behind_barriers_when_the_disk_fails_is_refused_in_order_however_much_it_is() -> None:
    """Under protocol A; more than a stack holds."""
    pairs = 3000
    m = Mirror(primary=0, protocol="A")
    m.beta.disks[0].fail_flush = True
    m.stall(m.beta)  # alpha did not send this
    sent: list[Frame] = []
    m.watch(lambda who, action: sent.append(action.frame) if who is m.beta and isinstance(action, Send) else None)
    frames = []
    for number in range(pairs):
        frames += [Frame(Kind.TRIM, sequence=LATE + number, size=512), Frame(Kind.BARRIER, sequence=LATE + number)]
    hear(m, m.beta, *frames)
    m.pause(20 * MS)
    first, second = LATE, LATE + 1
    shown = [(frame.kind, frame.sequence, bytes(frame.payload)) for frame in sent if frame.kind is not Kind.DISK_STATE]
    assert shown[:4] == [
        (Kind.WRITTEN, 0, pack_sequences([first])),
        (Kind.BARRIER_ACK, first, b""),
        (Kind.FAILED, 0, pack_sequences([second])),
        (Kind.BARRIER_ACK, second, b""),
    ]
    assert [frame.sequence for frame in sent if frame.kind is Kind.BARRIER_ACK] == [LATE + n for n in range(pairs)]
    assert m.disk(m.beta) in ("Failed", "Diskless")


# --- reads of a diskless Primary


def test_a_peer_cannot_make_us_read_more_than_a_bound_at_once() -> None:
    m = Mirror()
    m.slow_disks()
    count = receiver.READ_BYTES_MAX // MIB
    frames = [Frame(Kind.READ, sequence=LATE + number, size=MIB) for number in range(count + 1)]
    hear(m, m.alpha, *frames[:-1])
    assert m.notices(m.alpha, "protocol-error") == []
    assert fault(m, m.alpha, frames[-1]) == f"more than {receiver.READ_BYTES_MAX} bytes of reads at once"


def test_a_copy_that_is_not_good_is_not_read_for_the_peer() -> None:
    m = syncing()
    sent: list[Frame] = []
    m.watch(lambda who, action: sent.append(action.frame) if who is m.beta and isinstance(action, Send) else None)
    hear(m, m.beta, Frame(Kind.READ, sequence=LATE, size=BLOCK))
    assert sent == [Frame(Kind.READ_FAILED, sequence=LATE, payload=pack_errno(errno.EIO))]
    assert m.state(m.beta) == "Connected"


def test_a_read_that_ends_after_its_link_is_not_answered_on_the_next_one() -> None:
    m = Mirror()
    m.slow_disks(2_000_000)
    hear(m, m.alpha, Frame(Kind.READ, sequence=1, size=BLOCK))
    m.fast_disks()
    m.cut()
    m.run(lambda: m.replication(m.alpha) == m.replication(m.beta) == "Established")
    m.pause(5 * SECOND)
    assert m.sent(Kind.READ_DATA) == 0 and m.state(m.beta) == "Connected"
    now = m.connection(m.alpha).receiver
    assert now is not None and now._read_bytes == 0, "the next link has the whole bound again"


WRONG_ANSWERS = {
    "another volume": (Frame(Kind.READ_FAILED, volume=1, payload=pack_errno(5)), "for no read of ours"),
    "another range": (Frame(Kind.READ_DATA, size=512, payload=SECTOR), "READ_DATA of 0+512 for a read of 12288+4096"),
    "a failure without a reason": (Frame(Kind.READ_FAILED, payload=bytes(4)), "with errno 0"),
}


@pytest.mark.parametrize("case", WRONG_ANSWERS)
def test_a_read_that_is_answered_wrongly_is_not_forgotten(case: str) -> None:
    frame, text = WRONG_ANSWERS[case]
    m = Mirror(primary=0, volumes=(0, 1))
    m.done(m.alpha, "detach", volume=0)
    m.stall_at(Kind.READ_DATA, m.beta)
    asked_for: list[int] = []

    def look(_: Node, action: object) -> None:
        if isinstance(action, Send) and action.frame.kind is Kind.READ:
            asked_for.append(action.frame.sequence)

    m.watch(look)
    asked = m.ask(m.alpha, Io.READ, 3)
    m.run(lambda: bool(m._held))
    frame = Frame(frame.kind, frame.volume, 0, asked_for[0], frame.offset, frame.size, frame.payload)
    assert text in fault(m, m.alpha, frame)
    assert m.wait(asked).error == errno.EIO, "the only good copy is out of reach"


# --- resync


def syncing(source_until: Kind = Kind.RESYNC_DATA) -> Mirror:
    """alpha is the source of a full sync whose frames from this kind on do not arrive."""
    m = Mirror(primary=0, checksum_sync="never")
    m.fill(m.alpha, noise(3, MIB))
    m.stall_at(source_until, m.alpha)
    m.done(m.beta, "invalidate", volume=0)
    m.run(lambda: bool(m._held))
    m.pause(10 * MS)
    return m


RESYNC = {
    "beyond the end": (
        Frame(Kind.RESYNC_CONFIRM, payload=pack_ranges([(MIB, BLOCK)])),
        f"RESYNC_CONFIRM beyond the end: {MIB}+{BLOCK} of {MIB}",
    ),
    "never copied": (
        Frame(Kind.RESYNC_CONFIRM, payload=pack_ranges([(0, BLOCK)])),
        f"RESYNC_CONFIRM of 0+{BLOCK}, which was never copied",
    ),
    "done too early": (Frame(Kind.RESYNC_DONE), "RESYNC_DONE with 256 blocks not confirmed"),
    "an answer to the source": (
        Frame(Kind.RESYNC_DATA, sequence=1, size=BLOCK, payload=bytes(BLOCK)),
        "RESYNC_DATA while SyncSource",
    ),
}


@pytest.mark.parametrize("case", RESYNC)
def test_a_target_that_lies_clears_no_bit(case: str) -> None:
    frame, text = RESYNC[case]
    m = syncing()
    assert m.replication(m.alpha) == "SyncSource"
    dirty = m.dirty(m.alpha)
    assert fault(m, m.alpha, frame) == text
    assert m.dirty(m.alpha) == dirty == set(range(256))
    m.hooks.clear()
    m.stall(m.alpha, stalled=False)
    m.establish()
    assert m.identical()


def test_a_confirmation_of_a_part_of_a_block_clears_nothing() -> None:
    m = syncing()
    hear(m, m.alpha, Frame(Kind.RESYNC_REQUEST, sequence=LATE, size=512))
    m.pause(10 * MS)
    hear(m, m.alpha, Frame(Kind.RESYNC_CONFIRM, payload=pack_ranges([(0, 512)])))
    assert m.notices(m.alpha, "protocol-error") == [] and 0 in m.dirty(m.alpha)


def test_a_bitmap_beyond_the_end_costs_the_link_and_the_sync_begins_again() -> None:
    m = syncing(Kind.BITMAP_END)
    assert m.replication(m.beta) == "WFBitMapT"
    frame = Frame(Kind.BITMAP, offset=MIB - BLOCK, size=2 * BLOCK, payload=b"\x02")
    assert fault(m, m.beta, frame) == f"BITMAP beyond the end: {MIB - BLOCK}+{2 * BLOCK} of {MIB}"
    m.hooks.clear()
    m.stall(m.alpha, stalled=False)
    m.establish()
    assert m.identical()


def test_a_generation_for_copies_that_are_not_equal_is_refused() -> None:
    m = syncing()
    frame = Frame(Kind.NEW_GENERATION, sequence=1, payload=pack_generation(99, clear_bitmap=False))
    assert fault(m, m.alpha, frame) == "NEW_GENERATION for copies that are not equal"
    assert m.superblock(m.alpha).current != 99


# --- roles


def test_a_peer_that_asks_a_primary_is_told_so() -> None:
    m = Mirror(primary=0)
    sent: list[Frame] = []
    m.watch(lambda _, action: sent.append(action.frame) if isinstance(action, Send) else None)
    hear(m, m.alpha, Frame(Kind.ROLE_REQUEST, sequence=9))
    assert sent == [Frame(Kind.ROLE_REPLY, sequence=9, payload=pack_role_reply(RoleAnswer.I_AM_PRIMARY))]


def test_a_second_primary_on_a_living_link_ends_it_on_both_sides() -> None:
    m = Mirror(primary=0)
    hear(m, m.alpha, Frame(Kind.ROLE, payload=pack_role(True)))
    m.run(lambda: m.state(m.alpha) == m.state(m.beta) == "StandAlone")
    assert "both nodes are Primary" in m.reasons(m.alpha)["standalone"]
    assert "alpha refused: both nodes are Primary" in m.reasons(m.beta)["standalone"]
    assert m.role(m.alpha) == "Primary"


def test_a_peer_that_refuses_an_agreed_link_is_not_dialled_again() -> None:
    m = Mirror()
    hear(m, m.beta, Frame(Kind.GOODBYE, payload=pack_goodbye(GOODBYE_REFUSED, "your data is odd")))
    m.pause(10 * SECOND)
    assert m.state(m.beta) == "StandAlone" and m.reasons(m.beta)["standalone"].endswith("refused: your data is odd")


# --- links that have not agreed


def test_a_hello_that_makes_no_sense_refuses_the_link_and_keeps_the_old_one() -> None:
    m = Mirror()
    old = m.connection(m.alpha).link
    m.alpha.step(LinkUp(999, 1, False, bytes(32)))
    m.pause(MS // 10)
    m.alpha.step(LinkFrames(999, [Frame(Kind.HELLO, payload=bytes(65) + b"\x09")]))
    m.pause(MS // 10)
    assert "HELLO" in m.notices(m.alpha, "link-refused")[-1].fields["reason"]
    assert m.connection(m.alpha).link == old
    sent = m.actions(Send.__name__)
    m.alpha.step(LinkFrames(999, [Frame(Kind.AGREE, payload=bytes(32))]))  # it was on its way
    m.pause(MS // 10)
    assert sent == [] and m.connection(m.alpha).link == old
