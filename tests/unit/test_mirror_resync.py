# SPDX-License-Identifier: Apache-2.0
"""A resync between two running cores: what is copied, what survives an interruption (decision 0001, "Resync")."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from replicator.core.events import Io
from replicator.core.geometry import BLOCK
from replicator.core.wire import Kind
from tests.sim.node import Node
from tests.sim.world import MS, SECOND
from tests.unit.mirror import MIB, Mirror, noise

FRAMES = [
    (Kind.BITMAP_END, 0), (Kind.BITMAP_END, 1), (Kind.SYNC_READY, 1), (Kind.SYNC_START, 0), (Kind.RESYNC_REQUEST, 1),
    (Kind.RESYNC_DATA, 0), (Kind.RESYNC_CONFIRM, 1), (Kind.RESYNC_DONE, 1), (Kind.VOLUME_STATE, 0),
    (Kind.VOLUME_STATE, 1),
]  # fmt: skip


def apart(blocks: range = range(10, 20), **options: Any) -> Mirror:
    """alpha, Primary, wrote these blocks alone; nobody is connected."""
    m = Mirror(primary=0, **options)
    m.partition()
    for block in blocks:
        m.write(m.alpha, block, block + 1)
    return m


def copied(m: Mirror, node: Node) -> int:
    """Bytes of resync payload that a target got."""
    return m.replica(node).received_bytes


def different(m: Mirror, node: Node, seed: int = 5) -> None:
    """Fill a disk behind the program's back, so that only a full sync makes the copies equal."""
    m.fill(node, noise(seed, node.disks[0].size))


def full_sync(m: Mirror) -> None:
    """beta is to be filled from alpha."""
    different(m, m.alpha)
    m.done(m.beta, "invalidate", volume=0)


# --- what is copied


def test_a_bitmap_sync_copies_the_dirty_blocks_and_nothing_else() -> None:
    m = apart(range(10, 20))
    before = copied(m, m.beta)
    m.heal()
    m.establish()
    assert copied(m, m.beta) - before == 10 * BLOCK
    assert m.identical() and m.dirty(m.alpha) == m.dirty(m.beta) == set()


def test_bits_of_both_sides_are_merged() -> None:
    """beta crashed as Primary (its hot extent is dirty); alpha, the survivor, wrote alone."""
    m = Mirror(primary=1, size=12 * MIB, epoch_time_ns=1000 * SECOND)
    m.write(m.beta, 3, 7)
    m.world.network.partitioned = True
    m.kill(m.beta)
    m.pause()
    m.done(m.alpha, "primary")
    m.write(m.alpha, 2048, 8)
    m.beta.disks[0].data.seen[3 * BLOCK : 4 * BLOCK] = bytes(BLOCK)  # an unfinished write never came
    m.heal()
    m.restart(m.beta)
    m.establish()
    assert m.identical() and m.block(m.beta, 3) == 7 and m.block(m.beta, 2048) == 8


def test_zero_ranges_travel_without_payload() -> None:
    m = apart(range(0))
    m.write(m.alpha, 10, 0, 10)
    m.fill(m.beta, noise(1, m.beta.disks[0].size))
    before = copied(m, m.beta)
    m.heal()
    m.establish()
    assert m.sent(Kind.RESYNC_ZERO) >= 1 and m.sent(Kind.RESYNC_DATA) == 0
    assert copied(m, m.beta) == before
    assert m.block(m.beta, 10) == m.block(m.beta, 19) == 0


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_a_full_sync_of_equal_data_moves_no_payload(mode: str) -> None:
    m = Mirror(start="booted", checksum_sync=mode)
    for node in (m.alpha, m.beta):
        different(m, node)
    before = copied(m, m.beta)
    m.done(m.alpha, "primary", force=True)
    m.establish()
    assert copied(m, m.beta) == before and m.sent(Kind.RESYNC_DATA) == 0
    assert m.sent(Kind.RESYNC_EQUAL) == MIB // (64 << 10)


def test_without_checksums_a_full_sync_copies_everything() -> None:
    m = Mirror(checksum_sync="never")
    before = copied(m, m.beta)
    full_sync(m)
    m.establish()
    assert copied(m, m.beta) - before == MIB and m.identical()


@pytest.mark.parametrize("odd", [512, 4096 - 512])
def test_a_volume_that_ends_in_a_part_of_a_block_is_copied_to_its_end(odd: int) -> None:
    m = Mirror(size=MIB + odd)
    full_sync(m)
    m.establish()
    assert m.identical() and m.dirty(m.alpha) == m.dirty(m.beta) == set()


# --- interruptions


@pytest.mark.parametrize(("kind", "sender"), FRAMES)
def test_a_sync_cut_before_any_frame_converges(kind: Kind, sender: int) -> None:
    m = apart()
    cut = m.cut_at(kind, m.node(sender))
    m.heal()
    m.establish()
    assert cut and m.identical() and m.block(m.beta, 10) == 11
    assert m.dirty(m.alpha) == m.dirty(m.beta) == set()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize(("kind", "sender"), FRAMES)
def test_a_sync_in_which_a_node_dies_converges(kind: Kind, sender: int, power: bool, victim: int) -> None:
    m = apart()
    m.flush(m.alpha)
    node = m.node(victim)
    hit = m.on_frame(kind, lambda: m.world.after(0, lambda: node.die(power=power)), m.node(sender))
    m.heal()
    m.run(lambda: bool(hit) and not node.up)
    m.restart(node)
    m.establish()
    assert m.identical() and m.block(m.beta, 10) == 11


@pytest.mark.parametrize("who", ["source", "target", "both"])
@pytest.mark.parametrize("power", [False, True])
def test_a_full_sync_goes_on_after_a_crash(who: str, power: bool) -> None:
    m = Mirror(checksum_sync="never", resync_max_rate=4 * MIB, size=4 * MIB)
    full_sync(m)
    m.run(lambda: m.sent(Kind.RESYNC_DATA) >= 2)
    victims = {"source": [m.alpha], "target": [m.beta], "both": [m.alpha, m.beta]}[who]
    for node in victims:
        node.die(power=power)
    m.restart(*victims)
    m.pause(50 * MS)
    assert m.disk(m.beta) == "Inconsistent"
    m.establish()
    assert m.identical()


def test_a_target_without_power_is_durably_inconsistent_cannot_be_promoted_and_goes_on() -> None:
    m = apart(range(10, 200))
    m.on_frame(Kind.RESYNC_CONFIRM, lambda: m.world.after(0, lambda: m.power_cut(m.beta)))
    m.heal()
    m.run(lambda: not m.beta.up)
    assert not m.superblock(m.beta).consistent
    m.world.network.partitioned = True
    m.restart(m.beta)
    m.run(lambda: m.disk(m.beta) == "Inconsistent")
    assert m.command(m.beta, "primary").number == -2
    assert "inconsistent" in m.reasons(m.beta)
    m.heal()
    m.establish()
    assert m.identical()


def test_a_target_is_durably_inconsistent_before_its_first_block_is_written() -> None:
    m = apart()
    seen: list[bool] = []

    def look(node: Node, action: object) -> None:
        if node is m.beta and type(action).__name__ in ("WriteData", "ZeroData"):
            seen.append(m.superblock(m.beta).consistent)

    m.watch(look)
    m.heal()
    m.establish()
    assert seen and not any(seen)


def test_a_copy_is_uptodate_only_when_all_of_it_is_stable() -> None:
    m = apart()
    seen: list[bool] = []
    disk = m.beta.disks[0].data
    m.on_frame(Kind.RESYNC_DONE, lambda: seen.append(disk.seen == disk.stable and m.superblock(m.beta).was_up_to_date))
    m.heal()
    m.establish()
    assert seen == [True]


def test_a_source_that_writes_alone_in_between_is_followed_by_bitmap() -> None:
    m = apart()
    m.cut_at(Kind.RESYNC_CONFIRM)

    def partition(_: int, kind: Kind) -> bool:
        m.world.network.partitioned = m.world.network.partitioned or kind is Kind.RESYNC_CONFIRM
        return False

    m.hooks.append(partition)
    m.heal()
    m.run(lambda: not m.connection(m.alpha).connected and m.world.network.partitioned)
    m.write(m.alpha, 100, 9)
    before = copied(m, m.beta)
    m.heal()
    m.establish()
    assert m.identical() and copied(m, m.beta) - before <= 11 * BLOCK


# --- the target


def syncing(**options: Any) -> Mirror:
    """beta copies from alpha, slowly; alpha is Primary."""
    m = Mirror(primary=0, checksum_sync="never", resync_max_rate=4 * MIB, size=4 * MIB, **options)
    full_sync(m)
    m.run(lambda: m.replication(m.beta) == "SyncTarget")
    return m


def test_a_target_refuses_reads_of_the_peer() -> None:
    m = syncing()
    m.alpha.disks[0].broken = True
    assert m.wait(m.ask(m.alpha, Io.READ, 900)).error == errno.EIO


@pytest.mark.parametrize("force", [False, True])
def test_a_connected_target_serves_through_its_source_when_promoted(force: bool) -> None:
    m = Mirror(checksum_sync="never", resync_max_rate=4 * MIB, size=4 * MIB)
    full_sync(m)
    m.run(lambda: m.replication(m.beta) == "SyncTarget")
    m.done(m.beta, "primary", force=force)
    expected = bytes(m.alpha.disks[0].data.seen[900 * BLOCK : 901 * BLOCK])
    assert m.read(m.beta, 900) == expected
    m.write(m.beta, 900, 9)
    m.establish()
    assert m.identical() and m.block(m.alpha, 900) == 9


def test_a_primary_target_that_loses_its_source_ends_in_errors() -> None:
    m = Mirror(checksum_sync="never", resync_max_rate=4 * MIB, size=4 * MIB)
    full_sync(m)
    m.run(lambda: m.replication(m.beta) == "SyncTarget")
    m.done(m.beta, "primary")
    m.partition()
    assert m.wait(m.ask(m.beta, Io.WRITE, 3, value=1)).error == errno.EIO
    assert m.wait(m.ask(m.beta, Io.READ, 900)).error == errno.EIO
    m.heal()
    m.establish()
    assert m.identical()


@pytest.mark.parametrize("primary", [0, 1])
@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_writes_on_either_side_during_a_resync_are_kept_on_both(primary: int, protocol: str) -> None:
    m = Mirror(checksum_sync="never", resync_max_rate=16 * MIB, size=2 * MIB, protocol=protocol)
    full_sync(m)
    m.run(lambda: m.replication(m.beta) == "SyncTarget")
    node = m.node(primary)
    m.done(node, "primary")
    asked = []
    for number in range(1, 60):
        asked.append(m.ask(node, Io.WRITE, number * 37 % 500, 3, value=number))
        m.pause(MS)
    assert all(m.wait(each).error == 0 for each in asked)
    m.establish()
    m.pause(2 * SECOND)
    assert m.identical() and m.block(node, 59 * 37 % 500) == 59


# --- operators


@pytest.mark.parametrize("by", [(0,), (1,), (0, 1)])
def test_a_resync_paused_by_either_side_or_both_stands_still_until_all_resume(by: tuple[int, ...]) -> None:
    m = Mirror(checksum_sync="never", resync_max_rate=4 * MIB, size=4 * MIB)
    full_sync(m)
    m.run(lambda: m.sent(Kind.RESYNC_DATA) >= 1)
    for node_id in by:
        m.done(m.node(node_id), "pause-sync")
    m.pause(SECOND // 2)
    assert (m.replication(m.alpha), m.replication(m.beta)) == ("PausedSyncS", "PausedSyncT")
    assert "paused" in m.reasons(m.alpha) and "paused" in m.reasons(m.beta)
    before = m.sent(Kind.RESYNC_REQUEST)
    m.pause(5 * SECOND)
    assert m.sent(Kind.RESYNC_REQUEST) == before
    for node_id in by[1:]:
        m.done(m.node(node_id), "resume-sync")
        m.pause()
        assert m.sent(Kind.RESYNC_REQUEST) == before, "the other one still wants it paused"
    m.done(m.node(by[0]), "resume-sync")
    m.establish()
    assert m.identical()


@pytest.mark.parametrize("by", [0, 1])
def test_a_pause_is_remembered_over_a_lost_link(by: int) -> None:
    m = Mirror(checksum_sync="never", resync_max_rate=4 * MIB, size=4 * MIB)
    m.done(m.node(by), "pause-sync")
    full_sync(m)
    m.pause()
    assert m.replication(m.beta) == "PausedSyncT"
    m.cut()
    m.run(lambda: m.connection(m.beta).connected)
    m.pause(5 * SECOND)
    assert (m.replication(m.alpha), m.replication(m.beta)) == ("PausedSyncS", "PausedSyncT")
    assert m.sent(Kind.RESYNC_DATA) == 0


def test_the_rate_limit_holds() -> None:
    m = Mirror(checksum_sync="never", resync_max_rate=2 * MIB, size=4 * MIB)
    full_sync(m)
    begun = m.world.now
    m.establish()
    seconds = (m.world.now - begun) / SECOND
    assert 1.8 <= seconds <= 3.0, "4 MiB at 2 MiB/s, the first piece at once"


def test_invalidate_fills_this_copy_again() -> None:
    m = Mirror(primary=0, checksum_sync="never")
    m.write(m.alpha, 3, 7)
    m.fill(m.beta, noise(1, MIB))
    m.done(m.beta, "invalidate", volume=0)
    m.establish()
    assert m.identical() and m.block(m.beta, 3) == 7


def test_invalidate_of_a_primary_serves_from_the_peer_meanwhile() -> None:
    m = Mirror(primary=0, checksum_sync="never", resync_max_rate=4 * MIB)
    m.write(m.alpha, 3, 7)
    m.fill(m.alpha, noise(1, MIB))
    m.done(m.alpha, "invalidate", volume=0)
    assert m.read(m.alpha, 3)[0] == 7
    m.establish()
    assert m.identical() and m.block(m.alpha, 3) == 7


def test_invalidate_without_a_good_peer_is_refused() -> None:
    m = Mirror()
    m.partition()
    answer = m.command(m.alpha, "invalidate", volume=0)
    assert (answer.ok, answer.number) == (False, -2) and m.disk(m.alpha) == "UpToDate"


def test_invalidate_remote_fills_the_peer_from_here() -> None:
    m = Mirror(primary=0, checksum_sync="never")
    m.write(m.alpha, 3, 7)
    m.fill(m.beta, noise(1, MIB))
    m.done(m.alpha, "invalidate-remote", volume=0)
    m.pause(MS)
    m.establish()
    assert m.identical() and m.block(m.beta, 3) == 7


def test_invalidate_remote_of_a_primary_is_refused() -> None:
    m = Mirror(primary=0)
    m.pause()
    answer = m.command(m.beta, "invalidate-remote", volume=0)
    assert not answer.ok and answer.hint
    assert m.disk(m.alpha) == "UpToDate"


@pytest.mark.parametrize("verb", ["invalidate", "invalidate-remote"])
@pytest.mark.parametrize("kind", [Kind.VOLUME_STATE, Kind.SYNC_READY, Kind.SYNC_START, Kind.RESYNC_CONFIRM])
def test_an_interrupted_invalidation_still_copies_everything(verb: str, kind: Kind) -> None:
    m = Mirror(checksum_sync="never")
    m.fill(m.beta, noise(1, MIB))
    m.fill(m.alpha, noise(2, MIB))
    good = bytes(m.alpha.disks[0].data.seen)
    cut = m.cut_at(kind)
    m.done(m.beta if verb == "invalidate" else m.alpha, verb, volume=0)
    m.run(lambda: bool(cut))
    m.pause()
    m.establish()
    assert m.beta.disks[0].data.seen == good == m.alpha.disks[0].data.seen


# --- faults of disks


def test_a_block_the_source_cannot_read_stays_dirty_and_is_asked_for_again() -> None:
    m = apart(range(10, 12))
    perform = m.world.perform
    m.fail_reads(m.alpha)
    m.heal()
    m.run(lambda: bool(m.notices(m.beta, "resync-read-failed")))
    assert m.dirty(m.alpha) == {10, 11} and m.disk(m.beta) == "Inconsistent"
    m.world.perform = perform  # type: ignore[method-assign]
    m.establish()
    assert m.identical()


@pytest.mark.parametrize("fail_flush", [False, True])
def test_a_target_whose_disk_fails_is_diskless_and_starts_again_when_attached(fail_flush: bool) -> None:
    m = syncing()
    m.run(lambda: m.sent(Kind.RESYNC_DATA) >= 2)
    if fail_flush:
        m.beta.disks[0].fail_flush = True
    else:
        m.beta.disks[0].broken = True
    m.run(lambda: m.disk(m.beta) == "Diskless")
    m.write(m.alpha, 900, 9)
    m.beta.disks[0].broken = m.beta.disks[0].fail_flush = False
    m.done(m.beta, "attach")
    m.establish()
    assert m.identical()


def test_progress_of_a_resync_is_in_the_status() -> None:
    m = syncing()
    m.run(lambda: m.sent(Kind.RESYNC_CONFIRM) >= 1 or m.sent(Kind.RESYNC_DATA) >= 8)
    entry = m.resource(m.beta).status()["connections"][0]["peer_devices"][0]  # type: ignore[index]
    assert entry["has-sync-details"] and entry["sync-kind"] in ("full", "bitmap", "checksum")
    assert 0 <= entry["percent-resync-done"] <= 100
