# SPDX-License-Identifier: Apache-2.0
"""Is what the clients saw possible with one disk that does one thing after the other?

A block is a register.  Every write has a value of its own, so a read says which write it saw, and the question has
an answer in O(n log n) (P. B. Gibbons and E. Korach, Testing Shared Memories, SIAM J. Comput. 26, 1997).  All
operations on one value form a *zone*: `first` is the earliest end among them, `last` the latest begin.  Value u has
to come before value v when `u.first < v.last`: some operation on u was over before some operation on v began.
So the history is possible unless

- a read returned what nobody wrote, or was over before the write of its value began, or
- two values would each have to come before the other: two *forward* zones (`first < last`: the value was certainly
  there between the two) overlap, or a *backward* zone lies inside a forward one.

An operation without an answer has no end.  Such a write counts when somebody saw its value, and may as well not have
happened otherwise; such a read says nothing.

`by_search` answers the same question by trying every order (J. M. Wing and C. Gong, 1993): slow, obviously
right, and the oracle of this module's tests.  Nothing here does I/O.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

#: The value of a block before anybody wrote to it.
INITIAL = 0


class Kind(Enum):
    """What a client did."""

    READ = "read"
    WRITE = "write"


@dataclass(frozen=True, slots=True)
class Operation:
    """One read or write of one register.  Times are from one monotonic clock; `returned_ns` None: no answer came."""

    client: int
    kind: Kind
    block: int
    value: int
    invoked_ns: int
    returned_ns: int | None

    def __str__(self) -> str:
        end = "?" if self.returned_ns is None else str(self.returned_ns)
        return f"client {self.client} {self.kind.value} {self.value} [{self.invoked_ns}..{end}]"


@dataclass(frozen=True, slots=True)
class Violation:
    """Why a history is impossible, with the operations that show it."""

    block: int
    why: str
    operations: tuple[Operation, ...]

    def __str__(self) -> str:
        shown = "; ".join(map(str, self.operations))
        return f"block {self.block}: {self.why}: {shown}"


@dataclass(frozen=True, slots=True)
class _Zone:
    first: float
    last: float
    ends_first: Operation | None  # None: the write of the initial value, before everything
    begins_last: Operation | None

    @property
    def forward(self) -> bool:
        return self.first < self.last

    @property
    def witnesses(self) -> tuple[Operation, ...]:
        return tuple(found for found in (self.ends_first, self.begins_last) if found is not None)


def violations(operations: Iterable[Operation]) -> list[Violation]:
    """What is impossible in a history over any number of blocks; empty: it is linearizable.

    Blocks are independent (linearizability is local); of each the first contradiction is reported.
    """
    blocks: dict[int, list[Operation]] = {}
    for operation in operations:
        blocks.setdefault(operation.block, []).append(operation)
    found = (_violation(history) for _, history in sorted(blocks.items()))
    return [violation for violation in found if violation is not None]


def _end(operation: Operation) -> float:
    return math.inf if operation.returned_ns is None else operation.returned_ns


def _violation(history: Sequence[Operation]) -> Violation | None:
    """Of one block."""
    block = history[0].block
    writes: dict[int, Operation] = {}
    for operation in history:
        if operation.kind is Kind.WRITE:
            assert operation.value != INITIAL and operation.value not in writes, f"not a value of its own: {operation}"
            writes[operation.value] = operation
    reads: dict[int, list[Operation]] = {}
    for operation in history:
        if operation.kind is Kind.READ and operation.returned_ns is not None:
            reads.setdefault(operation.value, []).append(operation)
    for value, seen in reads.items():
        write = writes.get(value)
        if write is None and value != INITIAL:
            return Violation(block, "nobody wrote what was read", (seen[0],))
        for read in seen:
            if write is not None and _end(read) < write.invoked_ns:
                return Violation(block, "read before it was written", (read, write))
    zones = [_zone(None, reads.get(INITIAL, []))]
    zones += [
        _zone(write, reads.get(value, []))
        for value, write in writes.items()
        if write.returned_ns is not None or value in reads
    ]
    return _contradiction(block, zones)


def _zone(write: Operation | None, reads: Sequence[Operation]) -> _Zone:
    if write is None:  # the initial value was written before everything
        latest = max(reads, key=lambda read: read.invoked_ns, default=None)
        return _Zone(-math.inf, -math.inf if latest is None else latest.invoked_ns, None, latest)
    ends_first = min((write, *reads), key=_end)
    begins_last = max((write, *reads), key=lambda operation: operation.invoked_ns)
    return _Zone(_end(ends_first), begins_last.invoked_ns, ends_first, begins_last)


def _contradiction(block: int, zones: Sequence[_Zone]) -> Violation | None:
    forward = sorted((zone for zone in zones if zone.forward), key=lambda zone: (zone.first, zone.last))
    for one, other in pairwise(forward):
        if other.first < one.last:
            why = "each of two values was there before the other"
            return Violation(block, why, one.witnesses + other.witnesses)
    # The forward zones do not overlap, so the last one that begins before `last` also ends last.
    firsts = [zone.first for zone in forward]
    for zone in zones:
        if zone.forward:
            continue
        place = bisect_left(firsts, zone.last) - 1
        if place >= 0 and zone.first < forward[place].last:
            why = "a value came and went while another one was there"
            return Violation(block, why, zone.witnesses + forward[place].witnesses)
    return None


def by_search(history: Sequence[Operation]) -> bool:
    """Whether one register's history is linearizable, by trying every order.  For a dozen operations."""
    known = [operation for operation in history if operation.kind is Kind.WRITE or operation.returned_ns is not None]
    everything = frozenset(range(len(known)))
    dead: set[tuple[frozenset[int], int]] = set()

    def possible(left: frozenset[int], value: int) -> bool:
        if all(known[index].returned_ns is None for index in left):
            return True  # what is left has no answer: it may never happen
        if (left, value) in dead:
            return False
        earliest_end = min(_end(known[index]) for index in left)
        for index in left:
            operation = known[index]
            if operation.invoked_ns > earliest_end:
                continue  # something else was over before this began
            if operation.kind is Kind.WRITE:
                if possible(left - {index}, operation.value):
                    return True
            elif operation.value == value and possible(left - {index}, value):
                return True
        dead.add((left, value))
        return False

    return possible(everything, INITIAL)


def unflushed(
    history: Iterable[Operation], flushes: Iterable[tuple[int, int]], stable: Container[int] = ()
) -> dict[int, set[int]]:
    """What each block may hold after a power cut of every copy: block -> values.

    `flushes` are the answered ones, (invoked, returned).  A write that was answered before such a flush was asked for
    is stable, and so are the values in `stable` (FUA); a value is impossible when its write was over before a
    stable write began.  Anything else, answered or not, may be there or not.
    """
    last_flush_ns = max((invoked for invoked, _ in flushes), default=-1)
    blocks: dict[int, list[Operation]] = {}
    for operation in history:
        writes = blocks.setdefault(operation.block, [])
        if operation.kind is Kind.WRITE:
            writes.append(operation)
    result = {}
    for block, writes in blocks.items():
        newest_stable_ns = max(
            (write.invoked_ns for write in writes if _end(write) < last_flush_ns or write.value in stable), default=-1
        )
        values = {write.value for write in writes if _end(write) >= newest_stable_ns}
        result[block] = values if newest_stable_ns >= 0 else values | {INITIAL}
    return result


def prefixes(order: Sequence[tuple[int, int]], held: dict[int, int], *, stable: int = 0) -> list[int]:
    """For which lengths k >= `stable` is `held` (block -> value) the result of the first k writes of `order`?

    `order` is (block, value), one after the other; what an asynchronous mirror may lose is a suffix.
    """
    found = []
    state = dict.fromkeys(held, INITIAL)
    differing = sum(state[block] != held[block] for block in held)
    for length in range(len(order) + 1):
        if length:
            block, value = order[length - 1]
            differing -= state[block] != held[block]
            state[block] = value
            differing += state[block] != held[block]
        if not differing and length >= stable:
            found.append(length)
    return found


def epoch_prefixes(epochs: Sequence[Sequence[tuple[int, int]]], held: dict[int, int]) -> list[int]:
    """For which k is `held` the result of the first k epochs and of any part of the next one?

    A power cut of an asynchronous mirror's only survivor leaves that: what is between two flushes may be lost in
    any order, but nothing of an epoch is there when something of an earlier one is missing.
    """
    found = []
    state = dict.fromkeys(held, INITIAL)
    for number, epoch in enumerate([*epochs, ()]):
        possible = {block: {value} for block, value in state.items()}
        for block, value in epoch:
            possible.setdefault(block, set()).add(value)
        if all(held[block] in possible[block] for block in held):
            found.append(number)
        state |= dict(epoch)
    return found
