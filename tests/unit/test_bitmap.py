# SPDX-License-Identifier: Apache-2.0
"""Bitmaps against a set of ints: counting, pages on disk, chunks on the wire."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.core.bitmap import CHUNK_BLOCKS_MAX, CHUNK_BYTES_MAX, Bitmap, fresh_pages
from replicator.core.geometry import PAGE, PAGE_BLOCKS, SECTOR
from replicator.errors import ProtocolError

COUNTS = st.sampled_from([1, 7, 8, 9, 4064, 4065, 20003, PAGE_BLOCKS, PAGE_BLOCKS + 1, 2 * PAGE_BLOCKS + 5])
RANGES = st.lists(st.tuples(st.integers(0, 2**17), st.integers(0, 2**15), st.booleans()), max_size=8)


def fit(block_count: int, first: int, count: int) -> tuple[int, int]:
    first %= block_count
    return first, min(count, block_count - first)


def members(bitmap: Bitmap) -> set[int]:
    found: set[int] = set()
    at = 0
    while (run := bitmap.next_run(at, 1 << 40)) is not None:
        found.update(range(run[0], sum(run)))
        at = sum(run)
    return found


def on_disk(bitmap: Bitmap) -> bytearray:
    return bytearray(b"".join(bitmap.encode_page(page) for page in range(bitmap.page_count)))


@settings(max_examples=60)
@given(COUNTS, RANGES)
def test_marks_and_confirmations_agree_with_a_set_and_the_disk_keeps_them(
    block_count: int, ranges: list[tuple[int, int, bool]]
) -> None:
    bitmap, model = Bitmap(block_count, 3), set[int]()
    disk = on_disk(bitmap)
    for raw_first, raw_count, marks in ranges:
        first, count = fit(block_count, raw_first, raw_count)
        inside = set(range(first, first + count))
        if marks:
            assert bitmap.mark(first, count) == len(inside - model)
            model |= inside
        else:
            assert bitmap.confirm(first, count) == len(inside & model)
            model -= inside
        assert bitmap.dirty_count == len(model)
        assert bitmap.any_dirty(first, count) == bool(model & inside)
        assert bitmap.count_dirty(first, count) == len(model & inside)
        for page, data in bitmap.take_pages(bitmap.changed_pages_over(first, count)):
            disk[page * PAGE : (page + 1) * PAGE] = data
    assert bitmap.changed_page_count == 0
    assert members(bitmap) == model
    decoded, damaged = Bitmap.decode(bytes(disk), block_count, 3)
    assert (members(decoded), decoded.dirty_count, damaged) == (model, len(model), 0)


@settings(max_examples=60)
@given(COUNTS, RANGES, RANGES, st.sampled_from([2, 100, 4000, 65536]))
def test_a_peer_that_merges_what_is_exported_has_both_sets(
    block_count: int, ours: list[tuple[int, int, bool]], theirs: list[tuple[int, int, bool]], payload_max: int
) -> None:
    source, target = Bitmap(block_count), Bitmap(block_count)
    for bitmap, ranges in ((source, ours), (target, theirs)):
        for raw_first, raw_count, marks in ranges:
            first, count = fit(block_count, raw_first, raw_count)
            (bitmap.mark if marks else bitmap.confirm)(first, count)
    expected = members(source) | members(target)
    before = target.dirty_count
    fresh = last = 0
    for first, count, payload in source.export_chunks(payload_max):
        assert first % 8 == 0 and first >= last and count > 0 and len(payload) <= payload_max
        assert count <= CHUNK_BLOCKS_MAX and first + count <= block_count
        last = first + count
        fresh += target.merge_chunk(first, count, payload)
    assert members(target) == expected
    assert target.dirty_count == len(expected) == before + fresh


def test_a_clean_bitmap_exports_nothing_and_a_full_one_a_few_bytes() -> None:
    bitmap = Bitmap(5 * CHUNK_BLOCKS_MAX + 13)
    assert list(bitmap.export_chunks()) == []
    bitmap.mark_all()
    chunks = list(bitmap.export_chunks())
    assert [payload for _, _, payload in chunks] == [b"\x02"] * 6
    assert sum(count for _, count, _ in chunks) == bitmap.block_count


def test_scattered_bits_travel_compressed_and_long_clean_stretches_not_at_all() -> None:
    bitmap = Bitmap(4 << 20)
    for block in (*range(0, 8000, 16), *range(3 << 20, (3 << 20) + 8000, 16)):
        bitmap.mark(block, 1)
    chunks = list(bitmap.export_chunks())
    assert [first for first, _, _ in chunks] == [0, 3 << 20]
    assert all(payload[0] == 1 and len(payload) < 100 for _, _, payload in chunks)


@pytest.mark.parametrize(
    "first, count, payload",
    [
        (0, 8, b""),
        (0, 8, b"\x03\xff"),  # unknown encoding
        (0, 8, b"\x02\xff"),  # ones with more bytes
        (0, 8, b"\x00"),  # too short
        (0, 8, b"\x00\xff\xff"),  # too long
        (0, 7, b"\x00\xff"),  # a bit beyond
        (4, 8, b"\x00\xff"),  # not on a byte
        (0, 0, b"\x02"),
        (-8, 8, b"\x02"),
        (1 << 20, 8, b"\x02"),  # past the end
        ((1 << 20) - 8, 9, b"\x02"),
        (0, 8, b"\x01garbage"),
        (0, 8, b"\x01" + zlib.compress(b"\xff\xff")),  # expands too far
        (0, 16, b"\x01" + zlib.compress(b"\xff")),  # not far enough
        (0, 8, b"\x01" + zlib.compress(b"\xff")[:-1]),  # cut
        (0, 8, b"\x01" + zlib.compress(b"\xff") + b"x"),  # trailing bytes
        (0, 64, b"\x01" + zlib.compress(bytes(60_000_000))),  # a bomb
        (0, CHUNK_BLOCKS_MAX + 8, b"\x00" + bytes(CHUNK_BYTES_MAX + 1)),
    ],
)
def test_a_malformed_chunk_is_refused_and_changes_nothing(first: int, count: int, payload: bytes) -> None:
    bitmap = Bitmap(1 << 20)
    with pytest.raises(ProtocolError, match="bitmap chunk"):
        bitmap.merge_chunk(first, count, payload)
    assert bitmap.dirty_count == 0 and bitmap.changed_page_count == 0


def test_a_merged_chunk_counts_what_is_new_and_changes_its_pages() -> None:
    bitmap = Bitmap(3 * PAGE_BLOCKS)
    bitmap.mark(0, 4)
    bitmap.take_changed(99)
    assert bitmap.merge_chunk(0, 8, b"\x00\xf8") == 4
    assert bitmap.merge_chunk(2 * PAGE_BLOCKS, 8, b"\x02") == 8
    assert bitmap.dirty_count == 16
    assert [page for page, _ in bitmap.take_changed(99)] == [0, 2]


def test_only_pages_that_really_changed_are_written_and_each_once() -> None:
    bitmap = Bitmap(4 * PAGE_BLOCKS)
    bitmap.mark(PAGE_BLOCKS - 1, 2)
    assert bitmap.changed_pages_over(0, 4 * PAGE_BLOCKS) == [0, 1]
    assert bitmap.changed_pages_over(PAGE_BLOCKS, 1) == [1]
    assert bitmap.changed_pages_over(2 * PAGE_BLOCKS, 5) == []
    assert [page for page, _ in bitmap.take_changed(1)] == [0]
    assert [page for page, _ in bitmap.take_changed(9)] == [1]
    bitmap.mark(PAGE_BLOCKS - 1, 2)
    bitmap.confirm(7, 5)
    assert bitmap.take_changed(9) == []


def test_the_golden_first_sector_of_a_page() -> None:
    bitmap = Bitmap(100, slot=2)
    bitmap.mark(0, 1)
    bitmap.mark(10, 2)
    page = bitmap.encode_page(0)
    bits = b"\x01\x0c" + bytes(506)
    assert page[:508] == bits
    assert page[508:512] == zlib.crc32(bytes([0, 0, 0, 2, 0, 0, 0, 0]) + bits).to_bytes(4, "big")
    assert page[1020:1024] == zlib.crc32(bytes([0, 0, 0, 2, 0, 0, 0, 1]) + bytes(508)).to_bytes(4, "big")


def test_a_torn_page_is_a_mixture_of_right_sectors() -> None:
    bitmap = Bitmap(PAGE_BLOCKS)
    old = bitmap.encode_page(0)
    bitmap.mark_all()
    new = bitmap.encode_page(0)
    for subset in range(256):
        torn = b"".join((new if subset >> n & 1 else old)[n * SECTOR : (n + 1) * SECTOR] for n in range(8))
        decoded, damaged = Bitmap.decode(torn, PAGE_BLOCKS, 0)
        assert (decoded.dirty_count, damaged) == (4064 * subset.bit_count(), 0)


@given(st.integers(0, 2 * PAGE * 8 - 1))
def test_a_damaged_sector_counts_as_all_dirty_and_its_page_as_changed(bit: int) -> None:
    raw = bytearray(on_disk(Bitmap(2 * PAGE_BLOCKS)))
    raw[bit // 8] ^= 1 << bit % 8
    decoded, damaged = Bitmap.decode(bytes(raw), 2 * PAGE_BLOCKS, 0)
    sector = bit // 8 // SECTOR
    assert damaged == 1
    assert decoded.next_run(0, 1 << 30) == (sector * 4064, 4064) and decoded.dirty_count == 4064
    assert [page for page, _ in decoded.take_changed(9)] == [sector // 8]


def test_zeroes_are_not_a_clean_bitmap_and_fresh_pages_are() -> None:
    count = PAGE_BLOCKS + 1
    decoded, damaged = Bitmap.decode(bytes(2 * PAGE), count, 1)
    assert (decoded.dirty_count, damaged) == (count, 9)
    decoded, damaged = Bitmap.decode(b"".join(fresh_pages(1, 2 * PAGE)), count, 1)
    assert (decoded.dirty_count, damaged) == (0, 0)
    assert b"".join(fresh_pages(1, 2 * PAGE)) == on_disk(Bitmap(count, 1))


def test_sectors_of_another_slot_or_place_are_damaged() -> None:
    raw = on_disk(Bitmap(PAGE_BLOCKS, 1))
    assert Bitmap.decode(bytes(raw), PAGE_BLOCKS, 0)[1] == 8
    raw[:SECTOR], raw[SECTOR : 2 * SECTOR] = raw[SECTOR : 2 * SECTOR], raw[:SECTOR]
    assert Bitmap.decode(bytes(raw), PAGE_BLOCKS, 1)[1] == 2


def test_a_slot_too_short_is_dirty_where_it_is_missing_and_one_too_long_is_cut() -> None:
    decoded, damaged = Bitmap.decode(bytes(on_disk(Bitmap(PAGE_BLOCKS))), PAGE_BLOCKS + 50, 0)
    assert (members(decoded), damaged) == (set(range(PAGE_BLOCKS, PAGE_BLOCKS + 50)), 1)
    larger = Bitmap(2 * PAGE_BLOCKS)
    larger.mark_all()
    decoded, damaged = Bitmap.decode(bytes(on_disk(larger)), 100, 0)
    assert (decoded.dirty_count, damaged) == (100, 0)
    assert members(decoded) == set(range(100))


def test_asserted_identical_clears_everything() -> None:
    bitmap = Bitmap(1000)
    assert bitmap.mark_all() == 1000
    assert bitmap.clear_all_asserted_identical() == 1000
    assert bitmap.dirty_count == 0 and bitmap.next_run(0, 1) is None


def test_runs_are_cut_to_what_was_asked_for() -> None:
    bitmap = Bitmap(1000)
    bitmap.mark(10, 100)
    assert bitmap.next_run(0, 64) == (10, 64)
    assert bitmap.next_run(74, 64) == (74, 36)
    assert bitmap.next_run(110, 64) is None
    assert bitmap.next_run(5000, 64) is None


@pytest.mark.parametrize("first, count", [(-1, 1), (0, 1001), (1000, 1), (5, -1)])
def test_a_range_outside_the_volume_is_a_broken_invariant(first: int, count: int) -> None:
    with pytest.raises(AssertionError):
        Bitmap(1000).mark(first, count)
    with pytest.raises(AssertionError):
        Bitmap(1000).confirm(first, count)
