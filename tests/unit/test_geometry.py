# SPDX-License-Identifier: Apache-2.0
"""Alignment arithmetic against naive models; layouts for many sizes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.core import geometry
from replicator.core.geometry import BLOCK, EXTENT, FIXED_BYTES, PAGE
from replicator.errors import DiskError

SIZES = st.integers(0, 40 * 512).map(lambda n: n * 512)


@given(SIZES, SIZES)
def test_blocks_of_covers_exactly_the_blocks_with_a_byte_in_the_range(offset: int, size: int) -> None:
    first, count = geometry.blocks_of(offset, size)
    touched = {byte // BLOCK for byte in range(offset, offset + size, 512)}
    assert set(range(first, first + count)) == touched


@given(SIZES, SIZES, SIZES)
def test_whole_blocks_of_takes_only_blocks_without_a_byte_outside(offset: int, size: int, tail: int) -> None:
    device = offset + size + tail
    first, count = geometry.whole_blocks_of(offset, size, device)
    whole = {
        block
        for block in range(geometry.block_count(device))
        if size and offset <= block * BLOCK and min((block + 1) * BLOCK, device) <= offset + size
    }
    assert set(range(first, first + count)) == whole


def test_the_partial_last_block_is_whole_only_when_the_range_reaches_the_end() -> None:
    device = 3 * BLOCK + 512
    assert geometry.whole_blocks_of(BLOCK, 2 * BLOCK + 512, device) == (1, 3)
    assert geometry.whole_blocks_of(BLOCK, 2 * BLOCK, device) == (1, 2)
    assert geometry.whole_blocks_of(512, BLOCK, device) == (1, 0)


def test_extents_of_the_largest_unaligned_request_are_nine() -> None:
    assert geometry.extents_of(EXTENT - 512, 32 << 20) == range(9)
    assert geometry.extents_of(0, 32 << 20) == range(8)
    assert list(geometry.extents_of(EXTENT, 0)) == []
    assert geometry.extent_count(EXTENT + 1) == 2


def test_the_last_extent_of_a_volume_is_cut_at_its_end() -> None:
    assert geometry.blocks_of_extent(0, 5000) == (0, 1024)
    assert geometry.blocks_of_extent(4, 5000) == (4096, 904)
    assert geometry.blocks_of_extent(5, 5000)[1] == 0


@settings(max_examples=300)
@given(st.integers(0, 1 << 46), st.integers(1, 32))
def test_internal_layout_fits_never_overlaps_and_leaves_the_most_for_data(device: int, slots: int) -> None:
    try:
        layout = geometry.internal_layout(device, slots)
    except DiskError:
        assert device < geometry.area_bytes(BLOCK, slots) + BLOCK + PAGE
        return
    assert layout.data_size > 0 and layout.data_size % BLOCK == 0
    assert layout.slot_bytes == geometry.slot_bytes_for(layout.data_size)
    assert layout.data_size <= layout.slot_base(slots - 1)
    assert layout.slot_base(0) + layout.slot_bytes == layout.fixed_base
    assert layout.fixed_base % PAGE == 0
    assert device - PAGE < layout.fixed_base + FIXED_BYTES <= device
    more = layout.data_size + BLOCK
    assert more + slots * geometry.slot_bytes_for(more) > layout.fixed_base


def test_internal_layout_around_the_boundary_of_a_bitmap_page_is_the_best_of_all() -> None:
    for slots in (1, 3):
        boundary = geometry.PAGE_BLOCKS * BLOCK + slots * PAGE + FIXED_BYTES
        for device in range(boundary - 3 * PAGE, boundary + 8 * PAGE, PAGE):
            base = device - FIXED_BYTES
            best = max(
                data
                for data in range(base - 12 * PAGE, base, BLOCK)
                if data + slots * geometry.slot_bytes_for(data) <= base
            )
            assert geometry.internal_layout(device, slots).data_size == best


def test_a_device_too_small_for_internal_metadata_is_refused_with_the_size_it_needs() -> None:
    smallest = geometry.area_bytes(BLOCK, 2) + BLOCK
    assert geometry.internal_layout(smallest, 2).data_size == BLOCK
    with pytest.raises(DiskError, match=f"needs at least {smallest} bytes"):
        geometry.internal_layout(smallest - 1, 2)


@given(st.integers(1, 1 << 40), st.integers(1, 32), st.integers(0, 3 * PAGE))
def test_external_layout_accepts_exactly_areas_of_the_needed_size(size: int, slots: int, extra: int) -> None:
    needed = geometry.area_bytes(size, slots)
    layout = geometry.external_layout(needed + extra, size, slots)
    assert layout.slot_base(slots - 1) >= 0 and layout.fixed_base + FIXED_BYTES <= needed + extra
    assert layout.slot_bytes // PAGE * geometry.PAGE_BLOCKS >= geometry.block_count(size)
    with pytest.raises(DiskError, match=f"it needs {needed} bytes"):
        geometry.external_layout(needed - 1, size, slots)


@pytest.mark.parametrize("slots", [0, 33])
def test_an_impossible_number_of_peers_is_refused(slots: int) -> None:
    with pytest.raises(DiskError, match=f"{slots} peers"):
        geometry.internal_layout(1 << 30, slots)
    with pytest.raises(DiskError, match=f"{slots} peers"):
        geometry.external_layout(1 << 30, 1 << 30, slots)


def test_an_empty_data_device_is_refused() -> None:
    with pytest.raises(DiskError, match="nothing to replicate"):
        geometry.external_layout(1 << 30, 0, 1)


def test_align() -> None:
    assert [geometry.align_down(n, 8) for n in (0, 7, 8, 9)] == [0, 0, 8, 8]
    assert [geometry.align_up(n, 8) for n in (0, 7, 8, 9)] == [0, 8, 8, 16]


def test_an_empty_range_touches_no_block() -> None:
    assert geometry.blocks_of(3 * BLOCK + 5, 0) == (3, 0)


def test_an_area_too_small_for_its_bitmaps_is_refused_with_the_size_it_needs() -> None:
    needed = geometry.area_bytes(1 << 40, 2)
    with pytest.raises(DiskError, match=f"it needs {needed} bytes"):
        geometry.external_layout(needed - PAGE, 1 << 40, 2)
