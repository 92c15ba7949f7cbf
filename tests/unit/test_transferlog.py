# SPDX-License-Identifier: Apache-2.0
"""Epochs (decision 0001, V10): when they close, when they retire, what a lost peer leaves marked."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from replicator.core.transferlog import EPOCHS_MAX, Epoch, TransferLog

ONE, TWO = 1, 2  # node ids of peers
Range = tuple[int, int, int]


class Fake:
    """The resource around a log: a disk that flushes when told, and a record of everything asked for."""

    def __init__(self, *, writes_max: int = 3, wait_for_peers: bool = True) -> None:
        self.waits = wait_for_peers
        self.barriers: list[tuple[int, int]] = []
        self.flushes: list[Epoch] = []
        self.marked: list[tuple[int, Range]] = []
        self.answered: list[tuple[int, int]] = []
        self.log = TransferLog(
            writes_max=writes_max,
            wait_for_peers=lambda: self.waits,
            barrier=lambda peers, number: self.barriers.append((peers, number)),
            flush=self.flush,
            mark=lambda peer, *where: self.marked.append((peer, where)),
            flush_done=lambda volume, token: self.answered.append((volume, token)),
        )

    def flush(self, epoch: Epoch) -> None:
        assert not epoch.unfinished and epoch.closed
        epoch.flushing = len(epoch.volumes)
        if epoch.flushing:
            self.flushes.append(epoch)

    def flushed(self) -> None:
        """The oldest flush is done on all disks."""
        epoch = self.flushes.pop(0)
        for _ in range(epoch.flushing):
            self.log.flushed(epoch)

    def add(self, block: int, peers: int = 1 << ONE, *, volume: int = 0, local: bool = True) -> Epoch:
        return self.log.add(volume, block * 4096, 4096, peers, 7, local=local)

    def write(self, block: int, peers: int = 1 << ONE, *, volume: int = 0) -> Epoch:
        epoch = self.add(block, peers, volume=volume)
        self.log.written(epoch)
        return epoch

    def blocks_marked(self, peer: int, volume: int = 0) -> list[int]:
        return [where[1] // 4096 for who, where in self.marked if who == peer and where[0] == volume]


def test_an_epoch_closes_when_it_has_its_number_of_writes() -> None:
    fake = Fake(writes_max=3)
    epochs = [fake.add(block) for block in range(4)]
    assert [epoch.number for epoch in epochs] == [1, 1, 1, 2]
    assert fake.barriers == [(1 << ONE, 1)] and epochs[0].closed and not epochs[3].closed
    assert fake.flushes == [], "its writes are not complete yet"
    for _ in range(3):
        fake.log.written(epochs[0])
    assert fake.flushes == [epochs[0]]


def test_a_barrier_goes_only_to_peers_that_got_writes_of_the_epoch() -> None:
    fake = Fake()
    fake.write(0, peers=0)
    fake.log.close()
    fake.write(1, peers=1 << TWO)
    fake.log.close()
    assert fake.barriers == [(1 << TWO, 2)]


def test_closing_an_empty_epoch_does_nothing() -> None:
    fake = Fake()
    fake.log.close()
    assert fake.log.idle and fake.log.open.number == 1 and fake.barriers == []


def test_the_age_of_an_epoch_is_that_of_its_first_write() -> None:
    fake = Fake()
    fake.log.add(0, 0, 512, 0, 7, local=True)
    fake.log.add(0, 0, 512, 0, 9, local=True)
    assert fake.log.open.since == 7


def test_a_flush_is_answered_when_everything_before_is_stable_here_and_confirmed() -> None:
    fake = Fake()
    fake.write(0)
    fake.log.flush(0, 71)
    assert fake.answered == [] and fake.barriers == [(1 << ONE, 1)]
    fake.flushed()
    assert fake.answered == [], "the peer has not confirmed"
    assert fake.log.confirm(ONE, 1)
    assert fake.answered == [(0, 71)] and fake.log.retired == 1 and fake.log.idle


def test_a_flush_waits_for_the_local_disk_as_much_as_for_the_peer() -> None:
    fake = Fake()
    fake.write(0)
    fake.log.flush(0, 71)
    fake.log.confirm(ONE, 1)
    assert fake.answered == []
    fake.flushed()
    assert fake.answered == [(0, 71)]


def test_under_protocol_a_a_flush_does_not_wait_for_peers_but_the_epoch_does() -> None:
    fake = Fake(wait_for_peers=False)
    fake.write(0)
    fake.log.flush(0, 71)
    fake.flushed()
    assert fake.answered == [(0, 71)]
    assert fake.log.retired == 0 and not fake.log.idle, "it may not leave the activity log yet"
    fake.log.confirm(ONE, 1)
    assert fake.log.retired == 1


def test_a_flush_without_writes_is_answered_at_once_and_one_behind_open_epochs_waits_for_them() -> None:
    fake = Fake()
    fake.log.flush(0, 70)
    assert fake.answered == [(0, 70)]
    fake.write(0)
    fake.log.close()
    fake.log.flush(0, 71)  # nothing new, but epoch 1 was acknowledged to clients and is not stable
    assert fake.answered == [(0, 70)]
    fake.flushed()
    fake.log.confirm(ONE, 1)
    assert fake.answered == [(0, 70), (0, 71)]


def test_a_flush_is_not_answered_while_an_earlier_epoch_is_not_stable() -> None:
    fake = Fake()
    first, second = fake.write(0), None
    fake.log.close()
    second = fake.write(1)
    fake.log.flush(0, 71)
    assert fake.flushes == [first, second]
    fake.log.flushed(second)
    fake.log.confirm(ONE, 2)
    assert fake.answered == [] and fake.log.retired == 0
    fake.log.flushed(first)
    assert fake.answered == [(0, 71)] and fake.log.retired == 2


def test_a_later_epoch_is_not_flushed_while_a_write_of_an_earlier_one_is_under_way() -> None:
    fake = Fake()
    slow = fake.add(0)
    fake.log.close()
    quick = fake.write(1)
    fake.log.close()
    assert fake.flushes == []
    fake.log.written(slow)
    assert fake.flushes == [slow, quick]


def test_an_epoch_over_two_volumes_is_stable_when_both_disks_are_flushed() -> None:
    fake = Fake()
    epoch = fake.write(0, peers=0, volume=0)
    fake.write(0, peers=0, volume=1)
    fake.log.flush(1, 71)
    assert epoch.flushing == 2
    fake.log.flushed(epoch)
    assert fake.answered == []
    fake.log.flushed(epoch)
    assert fake.answered == [(1, 71)]


def test_writes_that_never_touch_a_local_disk_need_no_local_flush() -> None:
    fake = Fake()
    fake.add(0, local=False)
    fake.log.flush(0, 71)
    assert fake.flushes == [] and fake.answered == []
    fake.log.confirm(ONE, 1)
    assert fake.answered == [(0, 71)]


def test_one_barrier_confirms_all_epochs_before_it() -> None:
    fake = Fake()
    for block in range(3):
        fake.write(block)
        fake.log.close()
        fake.flushed()
    assert fake.log.confirm(ONE, 3) and fake.log.retired == 3


def test_a_confirmation_of_a_barrier_that_is_not_out_is_refused() -> None:
    fake = Fake()
    fake.write(0)
    assert not fake.log.confirm(ONE, 1), "the epoch is still open"
    fake.log.close()
    assert not fake.log.confirm(ONE, 2)
    assert fake.log.confirm(ONE, 1)


def test_losing_a_peer_marks_what_it_has_not_confirmed_and_nothing_else() -> None:
    fake = Fake()
    for block in range(3):
        fake.write(block, peers=1 << ONE | 1 << TWO)
        fake.log.close()
    fake.write(3, peers=1 << TWO)
    fake.log.close()
    fake.write(4)
    fake.log.confirm(ONE, 1)
    assert fake.log.lose(ONE) == {0}
    assert fake.blocks_marked(ONE) == [1, 2, 4] and fake.blocks_marked(TWO) == []
    assert fake.log.lose(ONE) == set(), "it is lost only once"


def test_losing_a_peer_lets_go_what_waited_for_it() -> None:
    fake = Fake()
    fake.write(0)
    fake.log.flush(0, 71)
    fake.flushed()
    fake.log.lose(ONE)
    assert fake.answered == [(0, 71)] and fake.log.retired == 1


def test_a_late_confirmation_after_a_loss_changes_nothing() -> None:
    fake = Fake()
    fake.write(0, peers=1 << ONE | 1 << TWO)
    fake.log.close()
    fake.flushed()
    fake.log.lose(ONE)
    marked = list(fake.marked)
    assert fake.log.confirm(ONE, 1)
    assert fake.marked == marked and fake.log.retired == 0, "the other peer still counts"


def test_losing_a_peer_for_one_volume_marks_that_volume_and_the_link_goes_on() -> None:
    fake = Fake()
    fake.write(0, volume=0)
    fake.write(1, volume=1)
    fake.log.flush(0, 71)
    fake.flushed()
    assert fake.log.lose(ONE, 1) == {1}
    assert fake.blocks_marked(ONE, 1) == [1] and fake.blocks_marked(ONE, 0) == []
    assert fake.answered == [], "the peer has not confirmed the write of volume 0"
    fake.log.confirm(ONE, 1)
    assert fake.answered == [(0, 71)]


def test_the_log_is_bounded() -> None:
    fake = Fake(writes_max=1)
    for block in range(EPOCHS_MAX):
        assert not fake.log.full
        fake.write(block)
        fake.flushed()
    assert fake.log.full
    fake.log.confirm(ONE, 1)
    assert not fake.log.full


@given(st.integers(0, 1 << 32), st.booleans())
def test_whatever_order_things_end_in_nothing_is_forgotten(seed: int, waits: bool) -> None:
    """Epochs retire in order; a range is confirmed, marked, or in the log; every flush is answered once."""
    draw = random.Random(seed)
    fake = Fake(writes_max=draw.randrange(1, 5), wait_for_peers=waits)
    log = fake.log
    running: list[Epoch] = []
    epoch_of: dict[int, Epoch] = {}
    confirmed = asked = retired = 0

    def one_flush() -> None:
        epoch = draw.choice(fake.flushes)
        log.flushed(epoch)
        if not epoch.flushing:
            fake.flushes.remove(epoch)

    for block in range(60):
        what = draw.randrange(6)
        if what <= 1:
            running.append(fake.add(block))
            epoch_of[block] = running[-1]
        elif what == 2 and running:
            log.written(running.pop(draw.randrange(len(running))))
        elif what == 3:
            asked += 1
            log.flush(0, asked)
        elif what == 4 and fake.flushes:
            one_flush()
        elif what == 5 and log.open.number - 1 > confirmed:
            confirmed = draw.randrange(confirmed, log.open.number - 1) + 1
            assert log.confirm(ONE, confirmed)
        assert log.retired >= retired
        retired = log.retired
        for number in (epoch.number for epoch in epoch_of.values() if epoch.number <= retired):
            assert number <= confirmed, "retired without the peer"
        assert all(epoch.stable for epoch in epoch_of.values() if epoch.number <= retired)
    expected = [block for block, epoch in epoch_of.items() if epoch.number > confirmed]
    log.lose(ONE)
    assert fake.blocks_marked(ONE) == expected
    for epoch in running:
        log.written(epoch)
    log.close()
    while fake.flushes:
        one_flush()
    assert log.idle and fake.answered == [(0, token) for token in range(1, asked + 1)]
