# SPDX-License-Identifier: Apache-2.0
"""The disk driver on real files, and on loop devices where they can be had."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replicator.core import activity, superblock
from replicator.core.actions import FlushData, ReadData, WriteData, WriteMeta, ZeroData
from replicator.core.bitmap import Bitmap
from replicator.core.events import DiskClosed, DiskDone, Event
from replicator.core.geometry import Layout
from replicator.core.superblock import Superblock
from replicator.drivers.backing import Backing, open_backing
from replicator.drivers.disk import Disk
from replicator.drivers.loop import Loop
from replicator.drivers.metadata import Place, create_metadata, dump, open_disk
from replicator.errors import DiskError, FormatError, Refused

SIZE = 8 << 20
META = SIZE  # the metadata of these tests: behind the data of the same file, as with internal metadata
MODES = ("direct", "buffered")


class Rig:
    """A loop, an open disk and what came back from it."""

    def __init__(self, backing: Backing, threads: int = 4) -> None:
        self.loop = Loop()
        layout = Layout(data_size=SIZE, fixed_base=META + 8192, slot_bytes=4096, slots=1)
        self.backing = backing
        self.disk = Disk(self.loop, 0, backing, backing, layout, threads=threads)
        self.done: dict[int, DiskDone] = {}
        self.closed = False
        self.token = 0

    def run(self, *actions: ReadData | WriteData | ZeroData | FlushData | WriteMeta) -> list[DiskDone]:
        """Submit as one batch and turn until all are answered."""
        wanted = [action.token for action in actions]
        for action in actions:
            self.disk.submit(action)

        def turn(events: list[Event], now_ns: int) -> None:
            for event in events:
                assert isinstance(event, DiskDone)
                assert event.token not in self.done, "answered twice"
                self.done[event.token] = event
            if all(token in self.done for token in wanted):
                self.loop.stop()

        self.loop.wake()  # so that an empty batch takes a turn, too
        self.loop.run(turn, lambda: None)
        return [self.done[token] for token in wanted]

    def next(self) -> int:
        self.token += 1
        return self.token

    def write(self, offset: int, data: bytes, fua: bool = False) -> WriteData:
        return WriteData(0, self.next(), offset, data, fua)

    def read(self, offset: int, size: int) -> ReadData:
        return ReadData(0, self.next(), offset, size)

    def zero(self, offset: int, size: int, punch: bool = True, fua: bool = False) -> ZeroData:
        return ZeroData(0, self.next(), offset, size, punch, fua)

    def flush(self) -> FlushData:
        return FlushData(0, self.next())

    def content(self, offset: int, size: int) -> bytes:
        (done,) = self.run(self.read(offset, size))
        assert done.error == 0
        return bytes(done.data)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.disk.close()
            events: list[Event] = []

            def turn(new: list[Event], now_ns: int) -> None:
                events.extend(new)
                if events:
                    self.loop.stop()

            self.loop.run(turn, lambda: None)
            assert events == [DiskClosed(0)]
            self.loop.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(b"\xa5" * (SIZE + 16384))
    return path


@pytest.fixture(params=MODES)
def rig(request: pytest.FixtureRequest, path: Path) -> Iterator[Rig]:
    rig = Rig(open_backing(str(path), io=request.param))
    yield rig
    rig.close()


@pytest.fixture
def loop_device(path: Path) -> Iterator[str]:
    """A real block device with 4 KiB logical blocks."""
    command = ["losetup", "--find", "--show", "--sector-size", "4096", str(path)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("losetup is not installed")
    if made.returncode:
        pytest.skip(f"no loop device can be made here: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def test_a_batch_is_answered_completely_and_reads_back(rig: Rig) -> None:
    blocks = {number * 12288: bytes([number]) * 4096 for number in range(64)}
    done = rig.run(*(rig.write(offset, data) for offset, data in blocks.items()), rig.flush())
    assert {event.error for event in done} == {0}
    read = rig.run(*(rig.read(offset, 4096) for offset in blocks))
    assert [bytes(event.data) for event in read] == list(blocks.values())
    assert rig.content(4096, 8192) == b"\xa5" * 8192


def test_neighbouring_writes_in_any_order_land_where_they_belong(rig: Rig) -> None:
    order = [3, 0, 2, 1, 7, 5, 6, 4]
    done = rig.run(*(rig.write(number * 4096, bytes([number]) * 4096) for number in order))
    assert [event.error for event in done] == [0] * 8
    assert rig.content(0, 8 * 4096) == b"".join(bytes([number]) * 4096 for number in range(8))


def test_neighbouring_writes_are_joined_only_within_their_kind(rig: Rig) -> None:
    done = rig.run(rig.write(0, b"a" * 4096), rig.write(4096, b"b" * 4096, fua=True), rig.write(8192, b"c" * 4096))
    assert [event.error for event in done] == [0, 0, 0]
    assert rig.content(0, 12288) == b"a" * 4096 + b"b" * 4096 + b"c" * 4096


def test_large_requests_pass_through_the_bounded_buffer(rig: Rig) -> None:
    data = os.urandom(3 << 20)
    (done,) = rig.run(rig.write(4096 * 3, data, fua=True))
    assert done.error == 0
    assert rig.content(4096 * 3, len(data)) == data


def test_source_buffers_need_no_alignment(rig: Rig) -> None:
    memory = bytearray(os.urandom(4096 + 7))
    (done,) = rig.run(WriteData(0, rig.next(), 8192, memoryview(memory)[7:], False))
    assert done.error == 0
    assert rig.content(8192, 4096) == bytes(memory[7:])


@pytest.mark.parametrize("punch", [True, False])
@pytest.mark.parametrize(("offset", "size"), [(4096, 1 << 20), (512, 512), (3584, 9216), (0, SIZE)])
def test_a_zeroed_range_reads_as_zeroes_and_its_neighbours_stay(rig: Rig, punch: bool, offset: int, size: int) -> None:
    (done,) = rig.run(rig.zero(offset, size, punch, fua=True))
    assert done.error == 0
    assert rig.content(0, SIZE) == (b"\xa5" * offset + bytes(size) + b"\xa5" * (SIZE - offset - size))


def test_trim_gives_the_space_back(rig: Rig, path: Path) -> None:
    before = path.stat().st_blocks
    rig.run(rig.zero(0, 4 << 20, punch=True), rig.flush())
    assert path.stat().st_blocks <= before - (3 << 20) // 512


def test_zeroing_falls_back_to_writing_zeroes(rig: Rig) -> None:
    rig.backing._refused = {1 | 2, 1 | 16}  # as on a file system that knows neither mode
    (done,) = rig.run(rig.zero(4096, 3 << 20))
    assert done.error == 0
    assert rig.content(0, 4 << 20) == b"\xa5" * 4096 + bytes(3 << 20) + b"\xa5" * ((1 << 20) - 4096)


def test_metadata_pieces_are_placed_relative_to_the_fixed_part(rig: Rig, path: Path) -> None:
    pieces = [(-8192, b"s" * 4096), (0, b"f" * 4096)]
    (done,) = rig.run(WriteMeta(0, rig.next(), pieces))
    (alone,) = rig.run(WriteMeta(0, rig.next(), [(4096, b"g" * 4096)]))
    assert (done.error, alone.error) == (0, 0)
    assert path.read_bytes()[META:] == b"s" * 4096 + b"\xa5" * 4096 + b"f" * 4096 + b"g" * 4096


def test_flushes_of_one_batch_are_one_call_and_all_are_answered(rig: Rig) -> None:
    calls = 0
    sync = rig.backing.sync

    def counted() -> None:
        nonlocal calls
        calls += 1
        sync()

    rig.backing.sync = counted  # type: ignore[method-assign]
    done = rig.run(*(rig.flush() for _ in range(20)))
    assert [event.error for event in done] == [0] * 20
    assert calls == 1


def test_a_flush_that_failed_once_fails_for_ever(path: Path) -> None:
    backing = open_backing(str(path))
    rig = Rig(backing)
    good, (broken, other) = backing.fd, os.pipe()
    backing.fd = broken  # fdatasync on a pipe: EINVAL
    assert [event.error for event in rig.run(rig.flush())] == [errno.EINVAL]
    backing.fd = good
    assert [event.error for event in rig.run(rig.flush())] == [errno.EINVAL]
    for fd in (broken, other):
        os.close(fd)
    rig.close()


@pytest.mark.parametrize("io", MODES)
def test_an_error_is_told_to_each_member_of_a_joined_write_and_to_nobody_else(path: Path, io: str) -> None:
    """Writes beyond the file size limit fail with EFBIG, those before it succeed."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    rig = Rig(open_backing(str(path), io=io))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, limit[1]))
    try:
        good = [rig.write(number * 8192, b"g" * 4096) for number in range(4)]
        bad = [rig.write((4 << 20) + number * 4096, b"b" * 4096) for number in range(3)]
        done = rig.run(*good, *bad, rig.read(5 << 20, 4096))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [event.error for event in done] == [0] * 4 + [errno.EFBIG] * 3 + [0]
    assert rig.content(4 << 20, 12288) == b"\xa5" * 12288
    rig.close()


def test_a_read_only_store_refuses_writes_and_still_reads(path: Path) -> None:
    rig = Rig(open_backing(str(path), read_only=True))
    done = rig.run(rig.write(0, b"x" * 4096), rig.read(0, 4096), rig.zero(0, 4096))
    assert [event.error for event in done] == [errno.EBADF, 0, errno.EBADF]
    assert bytes(done[0].data) == b""
    rig.close()


def test_reading_past_the_end_is_an_error(rig: Rig) -> None:
    os.ftruncate(rig.backing.fd, 8192)
    done = rig.run(rig.read(4096, 8192), rig.read(0, 4096))
    assert [event.error for event in done] == [errno.EIO, 0]
    assert bytes(done[0].data) == b""
    (alone,) = rig.run(rig.read(1 << 20, 4096))
    assert alone.error == errno.EIO


def test_close_answers_everything_first(path: Path) -> None:
    rig = Rig(open_backing(str(path)))
    events: list[Event] = []
    for number in range(50):
        rig.disk.submit(rig.write(number * 4096, b"z" * 4096))
    rig.disk.submit(rig.flush())
    rig.disk.close()

    def turn(new: list[Event], now_ns: int) -> None:
        events.extend(new)
        if DiskClosed(0) in events:
            rig.loop.stop()

    rig.loop.run(turn, lambda: None)
    assert events[-1] == DiskClosed(0)
    assert {event.error for event in events[:-1] if isinstance(event, DiskDone)} == {0}
    assert len(events) == 52
    for thread in rig.disk._threads:
        thread.join()
    rig.loop.close()
    assert path.read_bytes()[: 50 * 4096] == b"z" * (50 * 4096)
    open_backing(str(path)).close()


def test_drain_waits_without_the_loop_turning(path: Path) -> None:
    rig = Rig(open_backing(str(path)))
    for number in range(10):
        rig.disk.submit(rig.write(number * 4096, b"d" * 4096))
    rig.disk.drain()
    assert path.read_bytes()[: 10 * 4096] == b"d" * (10 * 4096)
    assert len(rig.run()) == 0
    assert len(rig.done) == 10
    rig.close()


def test_an_action_for_a_closed_disk_is_a_broken_invariant(path: Path) -> None:
    rig = Rig(open_backing(str(path)))
    rig.close()
    with pytest.raises(AssertionError, match="closed disk"):
        rig.disk.submit(rig.flush())


def test_a_broken_invariant_in_a_thread_ends_the_loop(path: Path) -> None:
    rig = Rig(open_backing(str(path)))
    with pytest.raises(AssertionError):
        rig.run(WriteMeta(0, 1, [(1, b"unaligned")]))
    assert sum(thread.is_alive() for thread in rig.disk._threads) <= 4
    rig.backing.close()
    rig.loop.close()


def test_small_operations_on_a_buffered_store_never_meet_a_thread(path: Path) -> None:
    rig = Rig(open_backing(str(path), io="buffered"))
    written = rig.run(rig.write(4096, b"i" * 4096))
    assert written[0].error == 0
    assert rig.disk._done.empty()
    assert not rig.disk._signalled
    assert rig.content(4096, 4096) == b"i" * 4096
    rig.close()


operation = st.tuples(
    st.sampled_from(["write", "write", "zero", "trim"]),
    st.integers(0, 255),
    st.integers(1, 40),
    st.integers(1, 255),
    st.booleans(),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(operation, max_size=12), min_size=1, max_size=6))
def test_any_batches_of_sectors_leave_what_a_plain_array_would(
    rig: Rig, batches: list[list[tuple[str, int, int, int, bool]]]
) -> None:
    """Sectors on a store that may want larger blocks; ranges within a batch do not overlap (V9)."""
    size = 300 * 512
    rig.backing.block_size = 4096  # what a 4Kn disk asks for
    rig.run(rig.write(0, b"\xa5" * size))
    model = bytearray(b"\xa5" * size)
    for batch in batches:
        taken: set[int] = set()
        actions: list[WriteData | ZeroData] = []
        for kind, sector, count, fill, fua in batch:
            sectors = set(range(sector, sector + count))
            if sectors & taken:
                continue
            taken |= sectors
            offset, length = sector * 512, count * 512
            data = bytes([fill]) * length if kind == "write" else bytes(length)
            model[offset : offset + length] = data
            if kind == "write":
                actions.append(rig.write(offset, data, fua))
            else:
                actions.append(rig.zero(offset, length, kind == "trim", fua))
        assert {event.error for event in rig.run(*actions)} <= {0}
    assert rig.content(0, size) == bytes(model)
    assert rig.content(512, 512) == bytes(model[512:1024])


def test_two_processes_cannot_open_the_same_file(path: Path) -> None:
    backing = open_backing(str(path))
    script = f"from replicator.drivers.backing import open_backing; open_backing({str(path)!r})"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert "DiskError" in other.stderr
    assert f"process {os.getpid()}" in other.stderr
    backing.close()
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("io", MODES)
def test_what_cannot_be_a_store_is_refused_with_a_reason(tmp_path: Path, io: str) -> None:
    with pytest.raises(DiskError, match="no such file"):
        open_backing(str(tmp_path / "absent"), io=io)
    with pytest.raises(DiskError):
        open_backing(str(tmp_path), io=io)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DiskError):
        open_backing(str(tmp_path / "fifo"), io=io)
    (tmp_path / "file").write_bytes(bytes(8192))
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(DiskError, match="symbolic link"):
        open_backing(str(tmp_path / "link"), io=io)


def test_a_block_device_is_opened_alone_and_names_its_user(loop_device: str, tmp_path: Path) -> None:
    backing = open_backing(loop_device)
    assert (backing.block_size, backing.size, backing.device) == (4096, SIZE + 16384, True)
    with pytest.raises(DiskError, match="in use"):
        open_backing(loop_device)
    backing.close()


def test_a_block_device_takes_sectors_zeroes_and_trims(loop_device: str) -> None:
    rig = Rig(open_backing(loop_device))
    done = rig.run(rig.write(512, b"s" * 512), rig.write(2048, b"t" * 512), rig.zero(8192, 1 << 20), rig.flush())
    assert [event.error for event in done] == [0] * 4
    expected = b"\xa5" * 512 + b"s" * 512 + b"\xa5" * 1024 + b"t" * 512 + b"\xa5" * 1536
    assert rig.content(0, 4096) == expected
    assert rig.content(4096, (1 << 20) + 8192) == b"\xa5" * 4096 + bytes(1 << 20) + b"\xa5" * 4096
    (done_fua,) = rig.run(rig.zero(0, 4096, punch=False, fua=True))
    assert done_fua.error == 0
    assert rig.content(0, 4096) == bytes(4096)
    rig.close()


# -- metadata -----------------------------------------------------------------------------------------------


def create(place: Place, force: bool = False) -> Superblock:
    return create_metadata(place, volume=3, node_id=1, peer_ids=[2], slots=2, resource_id=b"r" * 16, force=force)


@pytest.fixture(params=["internal", "external"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    disk = tmp_path / "data"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    return Place(disk=str(disk), metadata=str(tmp_path / "meta") if request.param == "external" else None)


def test_fresh_metadata_reads_back_for_the_core(place: Place) -> None:
    written = create(place)
    opened = open_disk(place, volume=3, node_id=1)
    chosen = superblock.choose(opened.fixed[:4096], opened.fixed[4096:8192])
    assert chosen.superblock == written
    assert (opened.metadata is opened.data) == (place.metadata is None)
    assert opened.layout.data_size == written.device_bytes
    assert sorted(opened.bitmaps) == [0, 1]
    for slot, raw in opened.bitmaps.items():
        bits, damaged = Bitmap.decode(raw, opened.layout.data_size // 4096, slot)
        assert (bits.dirty_count, damaged) == (0, 0)
    opened.metadata.close()
    opened.data.close()


def test_the_core_finds_what_the_disk_driver_wrote_as_metadata(place: Place) -> None:
    create(place)
    opened = open_disk(place, volume=3, node_id=1)
    loop = Loop()
    disk = Disk(loop, 3, opened.data, opened.metadata, opened.layout)
    changed = replace(superblock.choose(opened.fixed[:4096], opened.fixed[4096:8192]).superblock, current=77)
    bits = Bitmap(opened.layout.data_size // 4096, slot=0)
    bits.mark(5, 7)
    base = opened.layout.slot_base(0) - opened.layout.fixed_base
    pages = [(base + page * 4096, raw) for page, raw in bits.take_changed(10)]
    disk.submit(WriteMeta(3, 1, [*pages, (superblock.copy_offset(3), superblock.encode(changed, 3))]))
    disk.submit(WriteMeta(3, 2, [(activity.ring_offset(9), activity.encode([1, 4], 9))]))
    disk.close()
    disk.drain()
    loop.close()
    said = dump(place)
    assert (said["current"], said["sequence"]) == ("000000000000004d", 3)
    assert said["activity_log"] == {
        "extents_max": 1008, "sequence": 9, "unknown": False, "hot_extents": [1, 4]
    }  # fmt: skip
    assert said["peers"] == [
        {
            "node_id": 2, "slot": 0, "bitmap_id": "0" * 16, "full_sync": False, "outdated": False,
            "survivor": False, "dirty_blocks": 7, "damaged_sectors": 0,
        }
    ]  # fmt: skip


def test_existing_metadata_is_kept_unless_forced(place: Place) -> None:
    create(place)
    with pytest.raises(Refused) as refusal:
        create(place)
    assert refusal.value.code == "metadata-exists"
    create(place, force=True)


def test_metadata_of_another_volume_is_refused_and_nothing_stays_open(place: Place) -> None:
    create(place)
    with pytest.raises(FormatError, match="volume 3 of node 1, not to volume 4"):
        open_disk(place, volume=4, node_id=1)
    opened = open_disk(place, volume=3, node_id=1)
    opened.metadata.close()
    opened.data.close()


def test_a_disk_without_metadata_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(1 << 20))
    with pytest.raises(FormatError, match="create-md"):
        open_disk(Place(disk=str(tmp_path / "data")), volume=0, node_id=0)


def test_a_disk_that_shrank_below_the_volume_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(8 << 20))
    place = Place(disk=str(tmp_path / "data"), metadata=str(tmp_path / "meta"))
    written = replace(create(place), size_bytes=8 << 20)
    opened = open_disk(place, volume=3, node_id=1)
    base = opened.layout.fixed_base
    opened.metadata.close()
    opened.data.close()
    with open(tmp_path / "meta", "r+b") as file:
        file.seek(base)
        file.write(superblock.fresh_fixed_part(written))
    os.truncate(tmp_path / "data", 4 << 20)
    with pytest.raises(DiskError, match="offers 4194304 bytes, but the volume has 8388608"):
        open_disk(place, volume=3, node_id=1)


def test_a_file_system_that_reaches_into_the_metadata_is_not_overwritten(tmp_path: Path) -> None:
    disk = tmp_path / "data"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(disk)], check=True)
    place = Place(disk=str(disk))
    with pytest.raises(Refused, match=r"holds an ext2/3/4 file system of 67108864 bytes") as refusal:
        create(place)
    assert refusal.value.code == "would-overwrite"
    create(Place(disk=str(disk), metadata=str(tmp_path / "meta")))  # overwrites nothing of it
    subprocess.run(["mkfs.ext4", "-q", "-F", str(disk), "60M"], check=True)
    create(place)  # a file system that leaves room is what one has after shrinking it
    assert subprocess.run(["e2fsck", "-fn", str(disk)], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("offset", "magic", "name"),
    [
        (512, b"EFI PART", "GUID"),
        ((1 << 20) - 512, b"EFI PART", "GUID"),
        (512, b"LABELONE", "LVM"),
        (0, b"LUKS\xba\xbe", "LUKS"),
        (4096, b"\xfc\x4e\x2b\xa9", "RAID"),
        ((1 << 20) - 65536, b"\xfc\x4e\x2b\xa9", "RAID"),
        ((1 << 20) - 8192, b"\xfc\x4e\x2b\xa9", "RAID"),
        (65536 + 64, b"_BHRfS_M", "btrfs"),
        (0, b"XFSB", "XFS"),
        (510, b"\x55\xaa", "boot sector"),
    ],
)
def test_a_metadata_device_that_holds_something_is_not_overwritten(
    tmp_path: Path, offset: int, magic: bytes, name: str
) -> None:
    (tmp_path / "data").write_bytes(bytes(1 << 20))
    with open(tmp_path / "meta", "wb") as file:
        file.truncate(1 << 20)
        file.seek(offset)
        file.write(magic)
    before = (tmp_path / "meta").read_bytes()
    with pytest.raises(Refused, match=name):
        create(Place(disk=str(tmp_path / "data"), metadata=str(tmp_path / "meta")))
    assert (tmp_path / "meta").read_bytes() == before
