# SPDX-License-Identifier: Apache-2.0
"""Several volumes of one resource: one fate (decision 0006)."""

from __future__ import annotations

import errno

import pytest

from replicator.core.events import Io
from replicator.core.generations import same
from replicator.core.wire import Kind
from tests.sim.world import SECOND
from tests.unit.mirror import Mirror

TWO = (0, 1)


def test_writes_to_different_volumes_on_the_two_sides_are_a_split_brain_of_both() -> None:
    m = Mirror(volumes=TWO)
    m.partition()
    for node, number in ((m.alpha, 0), (m.beta, 1)):
        m.done(node, "primary")
        m.write(node, 3, 7 + number, volume=number)
        m.done(node, "secondary")
    m.heal()
    m.run(lambda: m.state(m.alpha) == m.state(m.beta) == "StandAlone")
    assert m.sent(Kind.RESYNC_REQUEST) == m.sent(Kind.SYNC_READY) == 0
    for node in (m.alpha, m.beta):
        text = m.reasons(node)["split-brain"]
        assert "volume 0: split brain (bitmap-both)" in text and "volume 1: split brain (bitmap-both)" in text


def test_a_lone_write_forks_every_volume_before_its_reply() -> None:
    m = Mirror(volumes=TWO, primary=0)
    before = [m.superblock(m.alpha, number).current for number in TWO]
    m.partition()
    found = []
    m.on_reply(m.alpha, lambda: found.append([m.superblock(m.alpha, number) for number in TWO]))
    m.write(m.alpha, 3, 7, volume=1)
    for number in TWO:
        assert same(found[0][number].peers[0].bitmap_id, before[number])


def test_one_disk_lost_at_the_peer_forks_only_that_volume() -> None:
    m = Mirror(volumes=TWO, primary=0)
    before = [m.superblock(m.alpha, number).current for number in TWO]
    m.done(m.beta, "detach", volume=1)
    m.write(m.alpha, 3, 7, volume=1)
    m.write(m.alpha, 3, 7, volume=0)
    assert same(m.superblock(m.alpha, 1).peers[0].bitmap_id, before[1])
    assert m.superblock(m.alpha, 0).peers[0].bitmap_id == 0
    assert m.block(m.beta, 3, 0) == 7 and m.block(m.beta, 3, 1) == 0


def test_volumes_are_synced_together_and_each_by_its_bits() -> None:
    m = Mirror(volumes=TWO, primary=0)
    m.partition()
    m.write(m.alpha, 3, 7, volume=0)
    m.write(m.alpha, 4, 8, volume=1)
    m.heal()
    m.establish()
    assert m.identical(0) and m.identical(1)
    assert (m.block(m.beta, 3, 0), m.block(m.beta, 4, 1)) == (7, 8)


def test_disks_that_failed_on_different_sides_leave_each_volume_one_good_copy() -> None:
    m = Mirror(volumes=TWO, primary=0)
    m.alpha.disks[0].broken = True
    m.write(m.alpha, 3, 7, volume=0)
    m.beta.disks[1].broken = True
    m.write(m.alpha, 4, 8, volume=1)
    assert m.read(m.alpha, 3, volume=0)[0] == 7 and m.read(m.alpha, 4, volume=1)[0] == 8
    for node in (m.alpha, m.beta):
        for disk in node.disks.values():
            disk.broken = False
        m.command(node, "attach")
    m.establish()
    assert m.identical(0) and m.identical(1)
    assert (m.block(m.alpha, 3, 0), m.block(m.beta, 4, 1)) == (7, 8)


def test_a_link_lost_while_each_side_has_the_only_copy_of_a_volume_ends_in_errors_only_there() -> None:
    m = Mirror(volumes=TWO, primary=0)
    m.done(m.alpha, "detach", volume=0)
    m.partition()
    assert m.wait(m.ask(m.alpha, Io.WRITE, 3, value=1, volume=0)).error == errno.EIO
    m.write(m.alpha, 3, 7, volume=1)


def test_a_flush_covers_both_volumes() -> None:
    m = Mirror(volumes=TWO, primary=0, epoch_time_ns=1000 * SECOND)
    m.write(m.alpha, 3, 7, volume=0)
    m.write(m.alpha, 4, 8, volume=1)
    m.flush(m.alpha)
    assert all(m.stable(node, 3, 0) == 7 and m.stable(node, 4, 1) == 8 for node in (m.alpha, m.beta))


@pytest.mark.parametrize("cut", [Kind.SYNC_READY, Kind.SYNC_START, Kind.BITMAP_END, Kind.RESYNC_DONE])
def test_a_sync_of_two_volumes_that_is_cut_converges(cut: Kind) -> None:
    m = Mirror(volumes=TWO, primary=0)
    m.partition()
    m.write(m.alpha, 3, 7, volume=0)
    m.write(m.alpha, 4, 8, volume=1)
    happened = m.cut_at(cut)
    m.heal()
    m.establish()
    assert happened and m.identical(0) and m.identical(1)


def test_detaching_and_attaching_one_volume_leaves_the_other_mirrored() -> None:
    m = Mirror(volumes=TWO, primary=0)
    m.done(m.alpha, "detach", volume=0)
    m.write(m.alpha, 3, 7, volume=1)
    m.write(m.alpha, 4, 8, volume=0)
    assert m.replication(m.alpha, 1) == "Established"
    m.done(m.alpha, "attach", volume=0)
    m.establish()
    assert m.identical(0) and m.identical(1)
