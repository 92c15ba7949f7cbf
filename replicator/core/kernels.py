# SPDX-License-Identifier: Apache-2.0
"""The few hot loops over bitmaps, as free functions on bytearrays.

Bit i is bit `i % 8` of byte `i // 8`, least significant first.  Every function takes and returns bit
numbers; the caller has checked that they lie inside `bits`.  Functions that change bits return how many
really changed, so that a count can be kept without ever counting again.

The bulk of the work is done by C code of the interpreter: `startswith` compares long stretches without a
copy, `int.bit_count` counts, slice assignment fills.  A scan over the 32 MiB of a clean 1 TiB volume takes
milliseconds.  This file is the seam for a compiled version.
"""

from __future__ import annotations

#: Stretches that a scan tries to skip, longest first: each level is tried at most 16 times before the next.
_ZEROES = tuple(bytes(size) for size in (65536, 4096, 256, 16, 1))
_ONES = tuple(b"\xff" * size for size in (65536, 4096, 256, 16, 1))

#: Bytes counted at once: keeps the temporary integer small.
_COUNT_CHUNK = 65536


def set_range(bits: bytearray, first: int, count: int) -> int:
    """Set `count` bits from `first`; return how many of them were clear before."""
    if count <= 0:
        return 0
    low, low_mask, high, high_mask = _span(first, count)
    if low == high:
        mask = low_mask & high_mask
        old = bits[low]
        bits[low] = old | mask
        return (mask & ~old).bit_count()
    fresh = (low_mask & ~bits[low]).bit_count() + (high_mask & ~bits[high]).bit_count()
    bits[low] |= low_mask
    bits[high] |= high_mask
    middle = high - low - 1
    if middle:
        fresh += middle * 8 - _ones_in(bits, low + 1, high)
        bits[low + 1 : high] = b"\xff" * middle
    return fresh


def clear_range(bits: bytearray, first: int, count: int) -> int:
    """Clear `count` bits from `first`; return how many of them were set before."""
    if count <= 0:
        return 0
    low, low_mask, high, high_mask = _span(first, count)
    if low == high:
        mask = low_mask & high_mask
        old = bits[low]
        bits[low] = old & ~mask
        return (mask & old).bit_count()
    cleared = (low_mask & bits[low]).bit_count() + (high_mask & bits[high]).bit_count()
    bits[low] &= ~low_mask
    bits[high] &= ~high_mask
    middle = high - low - 1
    if middle:
        cleared += _ones_in(bits, low + 1, high)
        bits[low + 1 : high] = bytes(middle)
    return cleared


def count_range(bits: bytearray, first: int, count: int) -> int:
    """Return how many of `count` bits from `first` are set."""
    if count <= 0:
        return 0
    low, low_mask, high, high_mask = _span(first, count)
    if low == high:
        return (bits[low] & low_mask & high_mask).bit_count()
    ends = (bits[low] & low_mask).bit_count() + (bits[high] & high_mask).bit_count()
    return ends + _ones_in(bits, low + 1, high)


def any_in_range(bits: bytearray, first: int, count: int) -> bool:
    """Return whether one of `count` bits from `first` is set; cheaper than counting."""
    if count <= 0:
        return False
    low, low_mask, high, high_mask = _span(first, count)
    if low == high:
        return bits[low] & low_mask & high_mask != 0
    if bits[low] & low_mask or bits[high] & high_mask:
        return True
    return zero_bytes_end(bits, low + 1, high) < high


def next_run(bits: bytearray, start: int, limit: int, max_count: int) -> tuple[int, int] | None:
    """Return (first, count) of the first run of set bits in [start, limit), cut to `max_count`, or None."""
    first = _find(bits, start, limit, invert=0)
    if first >= limit:
        return None
    end = min(limit, first + max_count)
    return first, _find(bits, first, end, invert=0xFF) - first


def or_bytes(bits: bytearray, start_byte: int, more: bytes) -> int:
    """Set in `bits`, from byte `start_byte`, every bit that is set in `more`; return how many were clear."""
    end = start_byte + len(more)
    old = int.from_bytes(bits[start_byte:end], "little")
    merged = old | int.from_bytes(more, "little")
    bits[start_byte:end] = merged.to_bytes(len(more), "little")
    return (merged ^ old).bit_count()


def zero_bytes_end(bits: bytearray, index: int, end: int) -> int:
    """Return the index of the first byte in [index, end) that is not 0, or `end`."""
    return _skip(bits, index, end, _ZEROES)


def ones_bytes_end(bits: bytearray, index: int, end: int) -> int:
    """Return the index of the first byte in [index, end) that is not 0xff, or `end`."""
    return _skip(bits, index, end, _ONES)


def _span(first: int, count: int) -> tuple[int, int, int, int]:
    """Return (first byte, mask in it, last byte, mask in it) of a range of at least one bit."""
    last = first + count - 1
    return first >> 3, (0xFF << (first & 7)) & 0xFF, last >> 3, 0xFF >> (7 - (last & 7))


def _find(bits: bytearray, start: int, limit: int, invert: int) -> int:
    """Return the first set (`invert` 0) or clear (`invert` 0xff) bit in [start, limit), or `limit`."""
    if start >= limit:
        return limit
    index = start >> 3
    byte = (bits[index] ^ invert) & (0xFF << (start & 7))
    if not byte:
        index = _skip(bits, index + 1, (limit + 7) >> 3, _ONES if invert else _ZEROES)
        if index << 3 >= limit:
            return limit
        byte = bits[index] ^ invert
    return min(limit, (index << 3) + (byte & -byte).bit_length() - 1)


def _skip(bits: bytearray, index: int, end: int, stretches: tuple[bytes, ...]) -> int:
    for stretch in stretches:
        size = len(stretch)
        while index + size <= end and bits.startswith(stretch, index):
            index += size
    return index


def _ones_in(bits: bytearray, low: int, high: int) -> int:
    """Return the number of set bits in bytes [low, high)."""
    total = 0
    while low < high:
        low = zero_bytes_end(bits, low, high)
        chunk_end = min(high, low + _COUNT_CHUNK)
        total += int.from_bytes(bits[low:chunk_end], "little").bit_count()
        low = chunk_end
    return total
