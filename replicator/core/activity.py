# SPDX-License-Identifier: Apache-2.0
"""The activity log: the extents where writes may be in flight when we crash.

On disk each transaction holds the whole table of hot extents, so there is no replay: the newest valid one is
the truth, and one that was interrupted was never relied on.  Format and crash rules: docs/disk-format.md.

In memory (`ActivityLog`) an extent is *cold*, *pending* (wanted by a request that waits), *being added* (the
transaction is on its way to the disk) or *hot*.  Invariants:

- A write is held only on a hot extent, and hot means: in a transaction that is stable (V4).
- An extent is evicted only when nothing holds it and the last epoch that wrote it has retired.  The caller
  writes the changed bitmap pages over `Transaction.evict` first, stable, and then the transaction's block.
- One transaction at a time.
- A request gets all the extents it wants in one transaction or none, and requests are served in order.  If
  two requests could each get half of what both need, neither would ever go on.

The caller of a write: `is_hot` for each of its extents; if one is cold, `want(all of them)` and wait.  When a
transaction is stable: `done()`, then every waiting request that is hot now is launched *in the same turn*
(`hold`), before the next `plan`.  After local completion: `release`.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from replicator.core import sealed
from replicator.core.geometry import ACTIVITY_BLOCKS, ACTIVITY_OFFSET, PAGE

MAGIC = b"RPLACTIV"
ACTIVITY_MAX = 1008  #: extents that one transaction can name (4 GiB of hot data)
ACTIVITY_MIN = 9  #: extents that the largest request needs: 32 MiB that begin inside an extent
ACTIVITY_DEFAULT = ACTIVITY_MAX
EXTENT_NUMBER_MAX = (1 << 32) - 1

#: Extents evicted beyond need when eviction happens at all: not every cold write has to close an epoch.
SPARE_MAX = 16


@dataclass(frozen=True, slots=True)
class Transaction:
    """One change of the log.  `offset` is where `block` goes, relative to the fixed part."""

    sequence: int
    add: tuple[int, ...]
    evict: tuple[int, ...]
    block: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """What the log says after a crash.

    `sequence` goes into `ActivityLog` (and `fresh_ring`): everything up to it may be on the disk.  `unknown`:
    the hot set is lost, every block towards every peer must be marked; then the ring must be written anew.
    """

    extents: tuple[int, ...]
    sequence: int
    unknown: bool
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Use:
    holds: int
    last_epoch: int


class ActivityLog:
    """The running side of the log of one volume; starts empty, `sequence` is the last one used."""

    def __init__(self, extents_max: int, sequence: int) -> None:
        assert ACTIVITY_MIN <= extents_max <= ACTIVITY_MAX, f"activity log of {extents_max} extents"
        self.extents_max = extents_max
        self.sequence = sequence
        self.starved = False  #: the last plan had no room: close an epoch, plan again when it has retired
        self._spare = min(SPARE_MAX, extents_max // 8)
        self._hot: OrderedDict[int, _Use] = OrderedDict()  # least recently used first
        self._pending: OrderedDict[tuple[int, ...], None] = OrderedDict()  # in order of asking
        self._flight: Transaction | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a transaction waits for `done`."""
        return self._flight is not None

    @property
    def pending(self) -> bool:
        """Whether a request waits for extents that are in no transaction yet."""
        return bool(self._pending)

    @property
    def hot_count(self) -> int:
        """How many extents are hot."""
        return len(self._hot)

    def hot(self) -> Iterator[int]:
        """Iterate over the hot extents, least recently used first."""
        return iter(self._hot)

    def is_hot(self, extent: int) -> bool:
        """Return whether a write in this extent may be launched."""
        return extent in self._hot

    def hold(self, extent: int, epoch: int) -> None:
        """A write in a hot extent is launched in `epoch`."""
        use = self._hot[extent]
        use.holds += 1
        use.last_epoch = max(use.last_epoch, epoch)
        self._hot.move_to_end(extent)

    def release(self, extent: int) -> None:
        """A write held on the extent is done."""
        use = self._hot[extent]
        use.holds -= 1
        assert use.holds >= 0, f"extent {extent} was released more often than held"

    def want(self, extents: Iterable[int]) -> None:
        """A request waits for these extents (hot ones included): it gets all in one transaction."""
        group = tuple(dict.fromkeys(extents))
        assert 0 < len(group) <= self.extents_max, f"{len(group)} extents of {self.extents_max} wanted"
        assert all(0 <= extent <= EXTENT_NUMBER_MAX for extent in group), f"extents {group}"
        self._pending[group] = None

    def plan(self, retired_epoch: int) -> Transaction | None:
        """Return the next transaction, or None: one is in flight, nothing waits, or no room (`starved`).

        `retired_epoch`: writes of this and earlier epochs are stable here and confirmed or marked for
        every peer.  Evicted extents are cold at once, added ones are hot after `done`.  When starved,
        plan again after a `release` or when an epoch (which the caller closes now) has retired.
        """
        self.starved = False
        if self._flight is not None:
            return None
        self._drop_satisfied()
        victims: dict[int, None] = {}  # collected when room is first lacking
        adding: dict[int, None] = {}
        keep: set[int] = set()  # hot extents that a granted request needs
        evict = 0
        while self._pending:
            group = next(iter(self._pending))
            cold = [extent for extent in group if extent not in self._hot and extent not in adding]
            kept = keep.union(extent for extent in group if extent in self._hot)
            lacking = len(self._hot) + len(adding) + len(cold) - self.extents_max
            if lacking > 0 and not victims:
                victims = dict.fromkeys(self._victims(retired_epoch))
            if lacking > 0 and lacking > len(victims) - len(kept & victims.keys()):
                self.starved = True
                break
            del self._pending[group]
            adding.update(dict.fromkeys(cold))
            keep = kept
            evict = max(0, lacking)
        if not adding:
            return None
        if evict:
            evict += self._spare
        return self._begin(tuple(adding), tuple([v for v in victims if v not in keep][:evict]))

    def plan_empty(self, retired_epoch: int) -> Transaction | None:
        """Return a transaction that empties the log (clean demotion, shutdown, after recovery).

        None while one is in flight, a request waits, or an extent cannot be evicted yet (then `starved`).
        """
        self.starved = False
        if self._flight is not None or self._pending:
            return None
        victims = self._victims(retired_epoch)
        if len(victims) < len(self._hot):
            self.starved = True
            return None
        return self._begin((), tuple(victims))

    def done(self) -> tuple[int, ...]:
        """The transaction in flight is stable: its extents are hot.  Returns them."""
        assert self._flight is not None, "no activity log transaction is in flight"
        added = self._flight.add
        self._flight = None
        for extent in added:
            self._hot[extent] = _Use(0, 0)
        self._drop_satisfied()
        return added

    def _victims(self, retired_epoch: int) -> list[int]:
        return [extent for extent, use in self._hot.items() if not use.holds and use.last_epoch <= retired_epoch]

    def _drop_satisfied(self) -> None:
        # Only from the front: a request further back may lose an extent to one before it and must stay known.
        while self._pending and all(extent in self._hot for extent in next(iter(self._pending))):
            self._pending.popitem(last=False)

    def _begin(self, add: tuple[int, ...], evict: tuple[int, ...]) -> Transaction:
        for extent in evict:
            del self._hot[extent]
        assert len(self._hot) + len(add) <= self.extents_max, "the activity log overflows"
        self.sequence += 1
        block = encode((*self._hot, *add), self.sequence)
        self._flight = Transaction(self.sequence, add, evict, block, ring_offset(self.sequence))
        return self._flight


def encode(extents: Iterable[int], sequence: int) -> bytes:
    """Return the 4096 bytes of a transaction that names exactly these extents."""
    numbers = sorted(extents)
    assert len(numbers) <= ACTIVITY_MAX, f"{len(numbers)} extents in one transaction"
    return sealed.seal(MAGIC, sequence, struct.pack(f">{len(numbers)}L", *numbers))


def ring_offset(sequence: int) -> int:
    """Return where a transaction lies, relative to the fixed part."""
    return ACTIVITY_OFFSET + sequence % ACTIVITY_BLOCKS * PAGE


def fresh_ring(sequence: int) -> tuple[bytes, int]:
    """Return a whole ring of empty transactions after `sequence`, and the last sequence used in it."""
    last = sequence + ACTIVITY_BLOCKS
    blocks = {number % ACTIVITY_BLOCKS: encode((), number) for number in range(sequence + 1, last + 1)}
    return b"".join(blocks[place] for place in range(ACTIVITY_BLOCKS)), last


def recover(ring: bytes) -> Recovered:
    """Return what was hot, from the 32 KiB of the ring."""
    assert len(ring) == ACTIVITY_BLOCKS * PAGE, f"ring of {len(ring)} bytes"
    result = sealed.newest(MAGIC, [ring[at : at + PAGE] for at in range(0, len(ring), PAGE)])
    sequence = result.next_sequence - 1
    if result.sealed is None:
        return Recovered((), sequence, True, ("no transaction of the activity log is valid",))
    if result.damaged_newer:
        note = f"a transaction of the activity log newer than {result.sealed.sequence} may be lost"
        return Recovered((), sequence, True, (note,))
    extents = _decode(result.sealed.body)
    if extents is None:
        note = f"transaction {result.sealed.sequence} of the activity log is impossible"
        return Recovered((), sequence, True, (note,))
    torn = [place for place, verdict in enumerate(result.verdicts) if isinstance(verdict, sealed.Torn)]
    notes = tuple(f"block {place} of the activity log is torn (an interrupted write)" for place in torn)
    return Recovered(extents, sequence, False, notes)


def _decode(body: bytes) -> tuple[int, ...] | None:
    count, rest = divmod(len(body), 4)
    if rest or count > ACTIVITY_MAX:
        return None
    extents = struct.unpack(f">{count}L", body)
    ascending = all(a < b for a, b in pairwise(extents))
    return extents if ascending else None
