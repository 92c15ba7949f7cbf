# SPDX-License-Identifier: Apache-2.0
"""Decisions drawn from bytes, so that a fuzzer that changes a byte changes a decision.

Like the data providers of other fuzzers, but pure Python and part of this tree: the same bytes give the same
decisions under hypothesis, under atheris and in ten years.  Bytes are taken from the front; when they are used up
every draw is 0, and `left` is 0, which ends the loops of whoever draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

#: Numbers where lengths and offsets go wrong.
EXTREMES = (0, 1, 511, 512, 513, 4095, 4096, 4097, 1 << 20, (1 << 20) + 1, (32 << 20) + 512, (1 << 31) - 1, 1 << 31,
            (1 << 32) - 1, 1 << 32, (1 << 63) - 512, 1 << 63, (1 << 64) - 512, (1 << 64) - 1)  # fmt: skip


class Dice:
    """Draws from `data`."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not used yet."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """That many bytes, zeroes behind the end."""
        taken = self._data[self._at : self._at + count]
        self._at = min(len(self._data), self._at + count)
        return taken.ljust(count, b"\0")

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(self.left)

    def byte(self) -> int:
        """0 to 255."""
        return self.take(1)[0]

    def below(self, limit: int) -> int:
        """0 to `limit` - 1; one byte where that is enough."""
        width = 1 if limit <= 256 else 2 if limit <= 65536 else 8
        return int.from_bytes(self.take(width), "big") % limit

    def chance(self, of_256: int) -> bool:
        """True in so many of 256 cases; false when the bytes are used up."""
        return self.left > 0 and 255 - self.byte() < of_256

    def pick(self, choices: Sequence[T]) -> T:
        """One of them."""
        return choices[self.below(len(choices))]

    def number(self, bits: int) -> int:
        """A number of at most so many bits: small, extreme or anything."""
        how = self.byte()
        if how < 128:
            return how % 8
        if how < 192:
            return EXTREMES[how % len(EXTREMES)] & ((1 << bits) - 1)
        return int.from_bytes(self.take(bits // 8), "big")
