# SPDX-License-Identifier: Apache-2.0
"""Resync: a target and a source joined by hand over two small disks (decision 0001, "Resync")."""

from __future__ import annotations

import errno
import random
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.core.actions import FlushData, Notice, ReadData, WriteData, ZeroData
from replicator.core.bitmap import Bitmap
from replicator.core.context import Context
from replicator.core.events import DiskDone
from replicator.core.geometry import BLOCK, block_count, blocks_of, whole_blocks_of
from replicator.core.handshake_wire import unpack_ranges
from replicator.core.locks import Lock, LockKind, RangeLocks
from replicator.core.options import Options
from replicator.core.resync import (
    BUSY_PAUSE_NS,
    CHUNK,
    FLUSH_BYTES,
    RETRY_NS,
    SOURCE_BYTES_MAX,
    WINDOW_START,
    Copy,
    SourceRead,
    SyncSource,
    SyncTarget,
)
from replicator.core.wire import Flag, Frame, Kind, encode

SECOND = 1_000_000_000
MIB = 1 << 20
SIZE = 6 * MIB + 3 * 512  # the last block is a part of one
DiskAction = ReadData | WriteData | ZeroData | FlushData


class Node:
    """What a resync sees of its volume, with a disk in memory; `stable` is what a power cut leaves."""

    def __init__(self, node_id: int, data: bytes, *, checksum_sync: str = "never", rate: int = 0) -> None:
        self.number = 0
        self.size = len(data)
        options = Options(
            resource="r0", node_id=node_id, node_name="x", peers={1 - node_id: "y"}, volumes=(0,),
            checksum_sync=checksum_sync, resync_max_rate=rate,
        )  # fmt: skip
        self.context = Context(options, lambda: 1 << 40)
        self.context.now = 100 * SECOND
        self.data = bytearray(data)
        self.stable = bytearray(data)
        self.bitmap = Bitmap(block_count(self.size))
        self.busy = False
        self.errors: list[str] = []
        self.sent: list[Frame] = []
        self.fail: dict[type, int] = {}  # kind of action -> errno
        self.done: list[DiskAction] = []
        self.flushing: dict[int, bytes] = {}  # token -> what that flush covers, when a write came after it
        self.locks = RangeLocks(self._granted)

    @staticmethod
    def _granted(lock: Lock) -> None:
        if isinstance(lock.holder, Copy | SourceRead):
            lock.holder.lock_granted()

    suspect = False

    def next_dirty(self, peer: int, start: int, blocks_max: int) -> tuple[int, int] | None:
        return self.bitmap.next_run(start, blocks_max)

    def dirty_count(self, peer: int) -> int:
        return self.bitmap.dirty_count

    def confirm(self, peer: int, offset: int, size: int) -> None:
        self.bitmap.confirm(*whole_blocks_of(offset, size, self.size))

    def application_waits(self) -> bool:
        return self.busy

    def disk_error(self, what: str, error: int) -> None:
        self.errors.append(f"{what} {error}")

    def send(self, frame: Frame) -> None:
        encode(frame)  # what must not travel is an assertion there
        self.sent.append(frame)

    def asked(self) -> list[DiskAction]:
        """Operations handed to the disk and not over."""
        return [action for action in self.context.out if isinstance(action, DiskAction)]

    def run(self, action: DiskAction) -> None:
        """One operation ends."""
        self.context.out.remove(action)
        self.done.append(action)
        error, answer = self.fail.get(type(action), 0), b""
        if isinstance(action, WriteData | ZeroData):
            for flush in self.asked():
                if isinstance(flush, FlushData):
                    self.flushing.setdefault(flush.token, bytes(self.data))
        if error:
            pass
        elif isinstance(action, ReadData):
            answer = bytes(self.data[action.offset : action.offset + action.size])
        elif isinstance(action, WriteData):
            self.data[action.offset : action.offset + len(action.data)] = action.data
        elif isinstance(action, ZeroData):
            self.data[action.offset : action.offset + action.size] = bytes(action.size)
        else:
            self.stable[:] = self.flushing.pop(action.token, self.data)
        self.context.complete(DiskDone(action.token, error, answer))

    def run_all(self) -> None:
        while asked := self.asked():
            self.run(asked[0])

    def notices(self) -> list[str]:
        return [action.code for action in self.context.out if isinstance(action, Notice)]


class Mirror:
    """Source and target, and the link between them."""

    def __init__(
        self, source: bytes, target: bytes, *, checksum_sync: str = "never", rate: int = 0, full: bool = True
    ) -> None:
        self.source = Node(0, source)
        self.target = Node(1, target, checksum_sync=checksum_sync, rate=rate)
        self.finished = 0
        self.full = full
        self.requested: list[tuple[int, int]] = []
        self.answers: list[Kind] = []
        self.confirmed: list[tuple[int, int]] = []

    def dirty(self, *ranges: tuple[int, int]) -> Mirror:
        """Bytes that differ, or all of it."""
        for node in (self.source, self.target):
            for offset, size in ranges or ((0, node.size),):
                node.bitmap.mark(*blocks_of(offset, size))
        return self

    def begin(self) -> Mirror:
        def finished() -> None:
            assert not self.target.bitmap.dirty_count and self.target.stable == self.target.data
            self.finished += 1

        self.there = SyncSource(self.source, self.source.context, 1, self.source.send)
        self.here = SyncTarget(self.target, self.target.context, 0, self.target.send, finished, full=self.full)
        return self

    def to_source(self, frame: Frame) -> None:
        if frame.kind is Kind.RESYNC_REQUEST:
            self.requested.append((frame.offset, frame.size))
            assert self.there.on_request(frame) is None
            return
        assert frame.kind is Kind.RESYNC_CONFIRM
        for offset, size in unpack_ranges(frame.payload):
            end = offset + size
            assert self.target.stable[offset:end] == self.source.data[offset:end], "confirmed, not stable"
            assert self.there.answered(offset, size)
            assert not self.there.answered(offset, size), "an answer counts once"
            self.source.confirm(1, offset, size)
            self.confirmed.append((offset, size))

    def to_target(self, frame: Frame) -> None:
        self.answers.append(frame.kind)
        assert self.here.on_answer(frame) is None

    def one_answer(self) -> None:
        """The oldest request reaches the source, its answer the target."""
        self.here.pull()
        self.to_source(self.target.sent.pop(0))
        self.source.run_all()
        self.to_target(self.source.sent.pop(0))

    def exchange(self) -> None:
        """Everything that can happen without time passing."""
        self.here.pull()
        while self.source.sent or self.target.sent or self.source.asked() or self.target.asked():
            self.source.run_all()
            self.target.run_all()
            requests, self.target.sent = self.target.sent, []
            answers, self.source.sent = self.source.sent, []
            for frame in requests:
                self.to_source(frame)
            for frame in answers:
                self.to_target(frame)
            self.here.pull()

    def run(self) -> None:
        """To the end, with time passing when it must."""
        self.exchange()
        while not self.finished:
            assert self.here.deadline is not None, "stuck"
            self.target.context.now = self.source.context.now = self.here.deadline
            self.exchange()
        assert self.finished == 1
        assert self.source.bitmap.dirty_count == self.target.bitmap.dirty_count == 0
        assert self.source.locks.count == self.target.locks.count == 0
        assert not self.source.errors and not self.target.errors


def noise(seed: int, size: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(size)


def joined(ranges: list[tuple[int, int]]) -> tuple[int, int]:
    """(lowest offset, bytes in all) of ranges of which none is there twice."""
    ordered = sorted(ranges)
    assert all(offset + size <= after for (offset, size), (after, _) in pairwise(ordered)), "twice"
    return ordered[0][0], sum(size for _, size in ordered)


def test_a_full_sync_pulls_everything_once() -> None:
    mirror = Mirror(noise(1), noise(2)).dirty().begin()
    mirror.run()
    assert mirror.target.data == mirror.source.data
    assert joined(mirror.requested) == joined(mirror.confirmed) == (0, SIZE)
    assert all(size <= CHUNK for _, size in mirror.requested)


def test_only_dirty_blocks_are_copied_and_the_partial_last_one_counts() -> None:
    mirror = Mirror(noise(1), noise(2)).dirty((2 * BLOCK, BLOCK), (MIB + 5, 1), (SIZE - 512, 512)).begin()
    mirror.run()
    assert sorted(mirror.requested) == [(2 * BLOCK, BLOCK), (MIB, BLOCK), (6 * MIB, 3 * 512)]
    changed = sum(a != b for a, b in zip(mirror.target.data, noise(2), strict=True))
    assert 0 < changed <= 2 * BLOCK + 3 * 512


def test_nothing_dirty_is_finished_at_once_and_only_once() -> None:
    mirror = Mirror(noise(1), noise(1)).begin()
    mirror.here.pull()
    mirror.here.pull()
    assert mirror.finished == 1 and mirror.target.sent == [] and mirror.target.asked() == []


@settings(max_examples=15)
@given(st.integers(0, 1 << 32), st.sampled_from(["never", "always", "auto"]))
def test_whatever_order_disks_answer_in_the_copies_become_equal(seed: int, checksum_sync: str) -> None:
    draw = random.Random(seed)
    size = draw.choice([2 * MIB, 3 * MIB + 512, BLOCK])
    source = bytearray(noise(1, size))
    target = bytearray(source)
    mirror_ranges = []
    for _ in range(draw.randrange(1, 8)):
        offset = draw.randrange(size)
        length = min(draw.randrange(1, MIB), size - offset)
        mirror_ranges.append((offset, length))
        target[offset : offset + length] = draw.choice([bytes(length), draw.randbytes(length)])
    if draw.random() < 0.5:
        source[: size // 2] = bytes(size // 2)
        mirror_ranges.append((0, size // 2))
    mirror = Mirror(bytes(source), bytes(target), checksum_sync=checksum_sync).dirty(*mirror_ranges).begin()
    while True:
        mirror.here.pull()
        if mirror.finished:
            break
        choices: list[Callable[[], None]] = []
        for node in (mirror.source, mirror.target):
            choices += [partial(node.run, action) for action in node.asked()]
        if mirror.source.sent:
            choices.append(lambda: mirror.to_target(mirror.source.sent.pop(0)))
        if mirror.target.sent:
            choices.append(lambda: mirror.to_source(mirror.target.sent.pop(0)))
        draw.choice(choices)()  # nothing to choose from: stuck
    mirror.run()
    assert mirror.target.stable == mirror.source.data
    joined(mirror.confirmed)


def test_nothing_is_confirmed_or_cleared_before_a_flush_that_came_after_the_copy() -> None:
    mirror = Mirror(noise(1, CHUNK), noise(2, CHUNK)).dirty().begin()
    mirror.one_answer()
    (write,) = mirror.target.asked()
    mirror.here.pull()
    assert mirror.target.asked() == [write], "no flush while the copy is not on the disk"
    mirror.target.run(write)
    mirror.here.pull()
    (flush,) = mirror.target.asked()
    assert isinstance(flush, FlushData)
    assert mirror.target.sent == [] and mirror.target.bitmap.dirty_count and not mirror.finished
    mirror.target.run(flush)
    assert [frame.kind for frame in mirror.target.sent] == [Kind.RESYNC_CONFIRM]
    assert not mirror.target.bitmap.dirty_count
    mirror.run()


def test_a_source_counts_each_confirmation_once_and_none_that_it_did_not_answer() -> None:
    mirror = Mirror(noise(1), noise(2)).begin()
    assert not mirror.there.answered(0, CHUNK)
    mirror.there.on_request(Frame(Kind.RESYNC_REQUEST, sequence=1, offset=0, size=CHUNK))
    assert not mirror.there.answered(0, CHUNK), "asked for is not answered"
    mirror.source.run_all()
    assert not mirror.there.answered(0, BLOCK)
    assert mirror.there.answered(0, CHUNK) and not mirror.there.answered(0, CHUNK)


def test_a_failed_copy_or_flush_is_the_end_of_the_disk_and_nothing_is_confirmed() -> None:
    for kind, what in ((WriteData, "resync write"), (FlushData, "resync flush")):
        mirror = Mirror(noise(1, CHUNK), noise(2, CHUNK)).dirty().begin()
        mirror.target.fail = {kind: errno.EIO}
        mirror.one_answer()
        mirror.target.run_all()
        mirror.here.cancel() if mirror.target.errors else mirror.here.pull()
        mirror.target.run_all()
        assert mirror.target.errors == [f"{what} {errno.EIO}"]
        assert mirror.target.sent == [] and mirror.target.bitmap.dirty_count and not mirror.finished


def test_ranges_that_are_zero_at_the_source_travel_without_payload() -> None:
    source = bytes(CHUNK) + noise(1, CHUNK)
    mirror = Mirror(source, noise(2, 2 * CHUNK)).dirty().begin()
    mirror.run()
    assert sorted(mirror.answers) == [Kind.RESYNC_DATA, Kind.RESYNC_ZERO]
    assert mirror.target.data == source


def test_with_digests_equal_ranges_are_confirmed_and_not_transferred() -> None:
    source = noise(1)
    target = bytearray(source)
    target[MIB] ^= 1
    mirror = Mirror(source, bytes(target), checksum_sync="always").dirty().begin()
    mirror.run()
    assert mirror.answers.count(Kind.RESYNC_DATA) == 1
    assert mirror.answers.count(Kind.RESYNC_EQUAL) == len(mirror.answers) - 1 > 0
    assert mirror.here.same_blocks == mirror.here.total - (64 << 10) // BLOCK
    assert mirror.target.data == source


def test_a_block_that_the_target_cannot_read_is_simply_copied() -> None:
    mirror = Mirror(noise(1, CHUNK), noise(1, CHUNK), checksum_sync="always").dirty().begin()
    mirror.target.fail = {ReadData: errno.EIO}
    mirror.run()
    assert set(mirror.answers) == {Kind.RESYNC_DATA} and mirror.target.errors == []


def test_auto_tries_digests_on_a_full_sync_only_and_gives_them_up_when_nothing_is_equal() -> None:
    mirror = Mirror(noise(1), noise(2), checksum_sync="auto", full=False).dirty().begin()
    mirror.run()
    assert not any(isinstance(action, ReadData) for action in mirror.target.done)
    mirror = Mirror(noise(1), noise(2), checksum_sync="auto", full=True).dirty().begin()
    mirror.run()
    compared = sum(isinstance(action, ReadData) for action in mirror.target.done)
    assert 32 <= compared < len(mirror.requested)
    assert max(size for _, size in mirror.requested) == CHUNK


def test_a_long_stretch_of_equal_data_is_confirmed_now_and_then() -> None:
    data = bytes(FLUSH_BYTES + 8 * MIB)
    mirror = Mirror(data, data, checksum_sync="always").dirty().begin()
    mirror.here.pull()
    on_the_link: deque[Frame] = deque()
    while not mirror.finished:
        # One answer at a time: the window never runs dry, as on a real link.
        mirror.target.run_all()
        cleared = mirror.here.total - mirror.target.bitmap.dirty_count
        assert mirror.here.same_blocks - cleared <= FLUSH_BYTES // BLOCK
        on_the_link += mirror.target.sent
        mirror.target.sent.clear()
        mirror.to_source(on_the_link.popleft())
        mirror.source.run_all()
        if mirror.source.sent:
            mirror.to_target(mirror.source.sent.pop(0))
        mirror.here.pull()


def test_the_window_bounds_what_is_asked_for_at_once_and_opens_with_every_answer() -> None:
    mirror = Mirror(noise(1), noise(2)).dirty().begin()
    mirror.here.pull()
    assert sum(frame.size for frame in mirror.target.sent) == WINDOW_START
    mirror.here.pull()
    assert len(mirror.target.sent) == WINDOW_START // CHUNK
    mirror.one_answer()
    mirror.here.pull()
    assert len(mirror.target.sent) == WINDOW_START // CHUNK, "a copy being written still counts"
    mirror.target.run_all()
    mirror.here.pull()
    assert sum(frame.size for frame in mirror.target.sent) == WINDOW_START + CHUNK


def test_the_rate_is_not_exceeded_at_any_moment() -> None:
    rate = MIB
    mirror = Mirror(noise(1), noise(2), rate=rate).dirty().begin()
    start = mirror.target.context.now
    mirror.exchange()
    while not mirror.finished:
        elapsed = mirror.target.context.now - start
        asked = sum(size for _, size in mirror.requested)
        assert asked * SECOND <= rate * elapsed + CHUNK * SECOND
        deadline = mirror.here.deadline
        assert deadline is not None and deadline > mirror.target.context.now
        mirror.target.context.now = deadline
        mirror.exchange()
    seconds = (mirror.target.context.now - start) / SECOND
    assert seconds <= SIZE / rate + 1, "and it is used"


def test_a_waiting_application_slows_the_resync_down() -> None:
    mirror = Mirror(noise(1), noise(2)).dirty().begin()
    mirror.source.busy = True
    mirror.here.pull()
    mirror.to_source(mirror.target.sent.pop(0))
    mirror.source.run_all()
    assert mirror.source.sent[0].flags == Flag.BUSY
    before = len(mirror.target.sent)
    mirror.to_target(mirror.source.sent.pop())
    mirror.target.run_all()
    mirror.here.pull()
    assert len(mirror.target.sent) == before
    assert mirror.here.deadline == mirror.target.context.now + BUSY_PAUSE_NS
    mirror.target.context.now += BUSY_PAUSE_NS
    mirror.here.pull()
    assert len(mirror.target.sent) == before, "and the window is smaller than what is under way"
    mirror.source.busy = False
    mirror.run()


def test_a_paused_resync_asks_for_nothing_but_finishes_what_it_began() -> None:
    mirror = Mirror(noise(1), noise(2)).dirty().begin()
    mirror.here.pull()
    mirror.here.paused = True
    mirror.exchange()
    assert joined(mirror.requested) == joined(mirror.confirmed) == (0, WINDOW_START)
    assert mirror.here.deadline is None
    mirror.here.paused = False
    mirror.run()


def test_a_range_that_the_source_cannot_read_is_asked_for_again_later() -> None:
    mirror = Mirror(noise(1, 2 * CHUNK), noise(2, 2 * CHUNK)).dirty().begin()
    mirror.source.fail = {ReadData: errno.EIO}
    mirror.exchange()
    assert mirror.answers == [Kind.RESYNC_FAILED] * 2 and not mirror.finished
    assert mirror.here.failed_bytes == 2 * CHUNK
    assert mirror.target.notices() == ["resync-read-failed"] * 2
    assert mirror.source.notices() == ["read-error"] * 2
    assert mirror.target.bitmap.dirty_count == 2 * CHUNK // BLOCK and mirror.target.locks.count == 0
    assert mirror.here.deadline == mirror.target.context.now + RETRY_NS
    mirror.source.fail = {}
    mirror.exchange()
    assert len(mirror.requested) == 2, "not before its time"
    mirror.run()
    assert mirror.target.data == mirror.source.data


def test_a_failed_read_is_no_way_around_the_rate() -> None:
    mirror = Mirror(noise(1), noise(2), rate=CHUNK // 20).dirty().begin()
    mirror.source.fail = {ReadData: errno.EIO}
    start = mirror.target.context.now
    mirror.exchange()
    assert mirror.here.deadline is not None and mirror.here.deadline >= start + 20 * SECOND


def test_cancel_gives_back_every_range_and_ends_in_silence() -> None:
    mirror = Mirror(noise(1), noise(2)).dirty().begin()
    mirror.one_answer()
    mirror.here.cancel()
    mirror.target.sent.clear()
    assert mirror.target.locks.count == 1, "what is being written keeps its place until it is"
    mirror.target.run_all()
    mirror.here.pull()
    assert mirror.target.locks.count == 0 and mirror.target.sent == [] and not mirror.finished
    assert mirror.target.bitmap.dirty_count == block_count(SIZE) and mirror.here.deadline is None


def test_cancel_while_digests_are_read_or_a_flush_is_under_way_ends_in_silence() -> None:
    mirror = Mirror(noise(1, CHUNK), noise(2, CHUNK), checksum_sync="always").dirty().begin()
    mirror.here.pull()
    mirror.here.cancel()
    mirror.target.run_all()
    assert mirror.target.sent == [] and mirror.target.locks.count == 0
    mirror = Mirror(noise(1, CHUNK), noise(2, CHUNK)).dirty().begin()
    mirror.one_answer()
    mirror.target.run(mirror.target.asked()[0])
    mirror.here.pull()
    mirror.here.cancel()
    mirror.target.run_all()
    assert mirror.target.sent == [] and mirror.target.bitmap.dirty_count == CHUNK // BLOCK


def test_a_copy_that_waits_when_the_resync_is_cancelled_is_not_begun() -> None:
    mirror = Mirror(noise(1, CHUNK), noise(2, CHUNK)).dirty().begin()
    mirror.here.pull()
    replicated = Lock(LockKind.PEER, 0, BLOCK, None)
    assert mirror.target.locks.take(replicated)
    mirror.one_answer()
    assert mirror.target.asked() == []
    mirror.here.cancel()  # the disk failed: CloseDisk is on its way
    mirror.target.locks.release(replicated)
    assert mirror.target.asked() == [] and mirror.target.locks.count == 0


def test_a_read_that_waits_when_the_source_is_cancelled_is_not_begun() -> None:
    mirror = Mirror(noise(1), noise(2)).begin()
    write = Lock(LockKind.LOCAL, 0, BLOCK, None)
    assert mirror.source.locks.take(write)
    mirror.there.on_request(Frame(Kind.RESYNC_REQUEST, sequence=1, offset=0, size=CHUNK))
    mirror.there.cancel()
    mirror.source.locks.release(write)
    assert mirror.source.asked() == [] and mirror.source.locks.count == 0


def test_a_copy_waits_for_a_replicated_write_that_came_before_its_answer() -> None:
    mirror = Mirror(noise(1, CHUNK), noise(2, CHUNK)).dirty().begin()
    mirror.here.pull()
    replicated = Lock(LockKind.PEER, 0, BLOCK, None)
    assert mirror.target.locks.take(replicated), "a replicated write does not wait for a request"
    mirror.one_answer()
    assert mirror.target.asked() == []
    mirror.target.locks.release(replicated)
    assert [type(action) for action in mirror.target.asked()] == [WriteData]
    mirror.run()


def test_ranges_under_our_own_clients_writes_are_left_for_later() -> None:
    mirror = Mirror(noise(1, 2 * CHUNK), noise(2, 2 * CHUNK)).dirty().begin()
    write = Lock(LockKind.LOCAL, 0, BLOCK, None)
    mirror.target.locks.take(write)
    mirror.exchange()
    assert mirror.requested == [(CHUNK, CHUNK)] and not mirror.finished
    mirror.target.locks.release(write)
    mirror.run()


def test_an_answer_contains_the_writes_launched_before_the_read_and_no_unfinished_one() -> None:
    mirror = Mirror(noise(1), noise(2)).begin()
    write = Lock(LockKind.LOCAL, 0, BLOCK, None)
    mirror.source.locks.take(write)
    mirror.there.on_request(Frame(Kind.RESYNC_REQUEST, sequence=1, offset=0, size=CHUNK))
    assert mirror.source.asked() == []
    mirror.source.data[:BLOCK] = b"w" * BLOCK
    mirror.source.locks.release(write)
    later = Lock(LockKind.LOCAL, 0, BLOCK, None)
    assert not mirror.source.locks.take(later)
    mirror.source.run_all()
    assert bytes(mirror.source.sent[0].payload[:BLOCK]) == b"w" * BLOCK and later.granted


def test_a_source_refuses_what_lies_beyond_the_end() -> None:
    mirror = Mirror(noise(1), noise(2)).begin()
    beyond = Frame(Kind.RESYNC_REQUEST, sequence=1, offset=6 * MIB, size=BLOCK)
    assert "beyond the end" in (mirror.there.on_request(beyond) or "")
    last = Frame(Kind.RESYNC_REQUEST, sequence=1, offset=6 * MIB, size=3 * 512)
    assert mirror.there.on_request(last) is None
    assert len(mirror.source.asked()) == 1


def test_a_source_refuses_more_at_once_than_it_has_room_for() -> None:
    mirror = Mirror(noise(1), noise(2)).begin()
    for sequence in range(SOURCE_BYTES_MAX // MIB):
        request = Frame(Kind.RESYNC_REQUEST, sequence=sequence, offset=0, size=MIB)
        assert mirror.there.on_request(request) is None
    one_more = Frame(Kind.RESYNC_REQUEST, sequence=999, offset=0, size=BLOCK)
    assert "at once" in (mirror.there.on_request(one_more) or "")
    mirror.source.run_all()
    assert mirror.there.on_request(one_more) is None, "there is room again"


def test_an_answer_to_no_request_is_refused() -> None:
    mirror = Mirror(noise(1), noise(2)).dirty().begin()
    mirror.here.pull()
    first = mirror.target.sent[0]
    good = Frame(Kind.RESYNC_ZERO, sequence=first.sequence, offset=first.offset, size=first.size)
    for wrong in (
        Frame(Kind.RESYNC_ZERO, sequence=999, offset=good.offset, size=good.size),
        Frame(Kind.RESYNC_ZERO, sequence=good.sequence, offset=BLOCK, size=good.size),
        Frame(Kind.RESYNC_ZERO, sequence=good.sequence, offset=good.offset, size=BLOCK),
    ):
        assert "no resync request" in (mirror.here.on_answer(wrong) or "")
    equal = Frame(Kind.RESYNC_EQUAL, sequence=good.sequence, offset=good.offset, size=good.size)
    assert "no digest was sent" in (mirror.here.on_answer(equal) or "")
    assert mirror.here.on_answer(good) is None
    assert "no resync request" in (mirror.here.on_answer(good) or ""), "each is answered once"


@pytest.mark.parametrize("kind", [Kind.RESYNC_EQUAL, Kind.RESYNC_ZERO])
def test_an_answer_to_a_request_that_was_not_sent_yet_is_refused(kind: Kind) -> None:
    mirror = Mirror(noise(1), noise(2), checksum_sync="always").dirty().begin()
    mirror.here.pull()
    assert mirror.target.sent == []
    (first, *_) = mirror.target.asked()
    assert isinstance(first, ReadData)
    early = Frame(kind, sequence=1, offset=first.offset, size=first.size)
    assert mirror.here.on_answer(early) is not None
