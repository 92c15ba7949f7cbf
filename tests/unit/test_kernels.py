# SPDX-License-Identifier: Apache-2.0
"""The hot loops against a set of ints."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.core import kernels

BITS = 4096


def bits_of(members: set[int], size: int = BITS) -> bytearray:
    bits = bytearray(size // 8)
    for member in members:
        bits[member // 8] |= 1 << member % 8
    return bits


RANGES = st.tuples(st.integers(0, BITS), st.integers(0, BITS)).map(lambda r: (r[0], min(r[1], BITS - r[0])))
SMALL_RANGES = st.tuples(st.integers(0, BITS - 40), st.integers(0, 40))
MEMBERS = st.lists(RANGES | SMALL_RANGES, max_size=6).map(
    lambda ranges: {bit for first, count in ranges for bit in range(first, first + count)}
)


@settings(max_examples=200)
@given(MEMBERS, RANGES | SMALL_RANGES)
def test_set_clear_count_any_agree_with_a_set(members: set[int], where: tuple[int, int]) -> None:
    first, count = where
    inside = set(range(first, first + count))
    bits = bits_of(members)
    assert kernels.count_range(bits, first, count) == len(members & inside)
    assert kernels.any_in_range(bits, first, count) == bool(members & inside)
    assert kernels.set_range(bits, first, count) == len(inside - members)
    assert bits == bits_of(members | inside)
    bits = bits_of(members)
    assert kernels.clear_range(bits, first, count) == len(members & inside)
    assert bits == bits_of(members - inside)


@settings(max_examples=200)
@given(MEMBERS, st.integers(0, BITS), st.integers(0, BITS), st.integers(1, BITS))
def test_next_run_finds_the_first_run_cut_to_limit_and_count(
    members: set[int], start: int, limit: int, max_count: int
) -> None:
    first = next((bit for bit in range(start, limit) if bit in members), None)
    expected = None
    if first is not None:
        end = first
        while end in members and end < limit and end - first < max_count:
            end += 1
        expected = (first, end - first)
    assert kernels.next_run(bits_of(members), start, limit, max_count) == expected


@given(MEMBERS, MEMBERS, st.integers(0, BITS // 16))
def test_or_bytes_merges_and_counts_the_new_ones(ours: set[int], theirs: set[int], at: int) -> None:
    theirs = {bit for bit in theirs if bit < BITS // 2}
    bits = bits_of(ours)
    moved = {bit + at * 8 for bit in theirs}
    assert kernels.or_bytes(bits, at, bytes(bits_of(theirs, BITS // 2))) == len(moved - ours)
    assert bits == bits_of(ours | moved)


@pytest.mark.parametrize("position", [0, 1, 15, 16, 255, 256, 4095, 4097, 65535, 65536, 65537, 200000])
def test_long_scans_stop_at_the_one_byte_that_differs(position: int) -> None:
    size = 200001
    bits = bytearray(size)
    bits[position] = 0x10
    assert kernels.zero_bytes_end(bits, 0, size) == position
    assert kernels.next_run(bits, 0, size * 8, 99) == (position * 8 + 4, 1)
    bits = bytearray(b"\xff" * size)
    bits[position] = 0xEF
    assert kernels.ones_bytes_end(bits, 0, size) == position
    assert kernels.next_run(bits, 0, size * 8, size * 8) == (0, position * 8 + 4)
    assert kernels.count_range(bits, 0, size * 8) == size * 8 - 1


def test_scans_end_at_their_end_although_more_would_follow() -> None:
    assert kernels.zero_bytes_end(bytearray(100000), 5, 70000) == 70000
    assert kernels.next_run(bytearray(b"\xff" * 20), 3, 17, 1000) == (3, 14)
    assert kernels.next_run(bytearray(b"\0\0\xff"), 0, 16, 8) is None


def test_a_range_of_no_bits_has_none_and_changes_none() -> None:
    bits = bits_of({0, 1, 2, 3})
    before = bytes(bits)
    assert kernels.set_range(bits, 4, 0) == kernels.clear_range(bits, 0, 0) == kernels.count_range(bits, 0, 0) == 0
    assert kernels.any_in_range(bits, 0, 0) is False
    assert bits == before


def test_bits_of_one_byte_are_told_from_their_neighbours() -> None:
    bits = bits_of({8, 15})
    assert kernels.count_range(bits, 9, 6) == 0 and kernels.any_in_range(bits, 9, 6) is False
    assert kernels.set_range(bits, 9, 6) == 6 and kernels.count_range(bits, 8, 8) == 8
    assert kernels.clear_range(bits, 9, 6) == 6 and bits == bits_of({8, 15})
