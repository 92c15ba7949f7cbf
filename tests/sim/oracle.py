# SPDX-License-Identifier: Apache-2.0
"""What a client may see: per sector, the values that a read (or the disk at the end) is allowed to show.

Every write carries its own number in every sector.  `possible` holds, per sector, the last acknowledged value and every
value that may still come out instead of it (unanswered writes).  An acknowledgement removes what it certainly
overwrote.  What was removed since the last FLUSH is remembered: when the only good copy loses power, it is possible
again.

A `Branch` is one history of the data.  There is one, until somebody promotes a copy that the others did not wait for;
then there are two, each with its own oracle, and they may not be merged silently (I-9).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from replicator.core.geometry import SECTOR

GARBAGE = (1 << 64) - 59  # what an unsynchronised copy is filled with before the first sync


@dataclass(slots=True)
class Issued:
    """One write of the workload."""

    number: int
    first: int  # sector
    count: int
    issued: int  # time
    zero: bool = False
    fua: bool = False
    acked: int | None = None
    over: bool = False  # answered, or its Primary died
    epoch: int = 0  # FLUSHes that were acknowledged before it was issued

    @property
    def value(self) -> int:
        """What its sectors show."""
        return 0 if self.zero else self.number


def fill(number: int, sectors: int) -> bytes:
    """The payload of a write."""
    return number.to_bytes(8, "big") * (SECTOR // 8) * sectors


def shown(area: bytearray | bytes, sector: int) -> int:
    """What a sector shows; -1: it is torn inside."""
    raw = area[sector * SECTOR : (sector + 1) * SECTOR]
    return int.from_bytes(raw[:8], "big") if raw == raw[:8] * (len(raw) // 8) else -1


class Oracle:
    """Registers for every sector of one volume."""

    def __init__(self) -> None:
        self.writes: dict[int, Issued] = {0: Issued(0, 0, 0, -1, acked=-1, over=True)}
        self.possible: dict[int, set[int]] = {}  # sector -> write numbers
        self.removed: list[tuple[int, int, set[int]]] = []  # when, sector, write numbers
        self.acked = 0
        self.flushes = 0

    def issue(self, write: Issued) -> None:
        """It may show from now on."""
        write.epoch = self.flushes
        self.writes[write.number] = write
        for sector in range(write.first, write.first + write.count):
            self.possible.setdefault(sector, {0}).add(write.number)

    def ack(self, write: Issued, now: int) -> None:
        """It must show, unless something concurrent or newer does."""
        write.acked, write.over = now, True
        self.acked += 1
        for sector in range(write.first, write.first + write.count):
            self._settle(sector, write.number, write.issued, now, stable=write.fua)

    def _settle(self, sector: int, number: int, since: int, now: int, *, stable: bool) -> None:
        keep: set[int] = {number}
        gone: set[int] = set()
        for other in self.possible[sector]:
            if other == number:
                continue
            write = self.writes[other]
            concurrent = not write.over or (write.acked is not None and write.acked >= since)
            (keep if write.issued > since or concurrent else gone).add(other)
        self.possible[sector] = keep
        if gone and not stable:
            self.removed.append((now, sector, gone))

    def flushed(self, issued: int) -> None:
        """A FLUSH sent at `issued` was acknowledged: what was acknowledged before is stable."""
        self.removed = [entry for entry in self.removed if entry[0] >= issued]
        self.flushes += 1

    def settled(self) -> None:
        """Nothing is in flight, and what was acknowledged is stable wherever it is."""
        self.died()
        self.removed.clear()

    def last_copy_lost_power(self) -> None:
        """What was not flushed may be undone."""
        for _, sector, gone in self.removed:
            self.possible[sector] |= gone
        self.removed.clear()

    def died(self) -> None:
        """The Primary is gone: nothing of it will be answered."""
        for write in self.writes.values():
            write.over = True

    def wrong(self, first: int, data: bytes | bytearray) -> str | None:
        """Check content that starts at sector `first`; a sentence about the first sector that may not be so."""
        for index in range(len(data) // SECTOR):
            sector = first + index
            value = shown(data, index)
            if value < 0:
                return f"sector {sector} is torn inside"
            numbers = self.possible.get(sector)
            if numbers is None:
                if value:
                    return f"sector {sector} shows {value}, but was never written"
            elif value not in numbers and value not in [self.writes[number].value for number in numbers]:
                allowed = sorted({self.writes[number].value for number in numbers})
                return f"sector {sector} shows {value}, allowed are {allowed}"
        return None

    def read(self, first: int, data: bytes, started: int, now: int) -> str | None:
        """A read was answered: check it, and whatever it showed may not be taken back (I-31)."""
        fault = self.wrong(first, data)
        if fault is not None:
            return fault
        for index in range(len(data) // SECTOR):
            sector = first + index
            numbers = self.possible.get(sector)
            if numbers is None or len(numbers) < 2 or any(not self.writes[number].over for number in numbers):
                continue
            value = int.from_bytes(data[index * SECTOR : index * SECTOR + 8], "big")
            right = {number for number in numbers if self.writes[number].value == value}
            if all(self.writes[number].issued < started for number in numbers):
                self.possible[sector] = right
                self.removed.append((now, sector, numbers - right))
        return None

    def fork(self, area: bytearray) -> Oracle:
        """A history that begins with what a copy shows now."""
        new = Oracle()
        new.flushes = self.flushes
        for sector in self.possible:
            value = shown(area, sector)
            if value and value not in self.writes:
                self.writes[value] = Issued(value, sector, 1, -1, acked=-1, over=True)
            new.possible[sector] = {value}
            new.writes[value] = replace(self.writes[value], acked=-1, over=True, zero=value == 0, issued=-1)
        return new

    def lacks(self, area: bytearray) -> bool:
        """This copy does not show everything that was acknowledged."""
        return any(
            shown(area, sector) not in {self.writes[number].value for number in numbers}
            for sector, numbers in self.possible.items()
        )

    def hole(self, area: bytearray) -> str | None:
        """I-4: what this copy lacks of the acknowledged writes is a suffix by FLUSH epochs; else a sentence."""
        newest = -1
        lost: Issued | None = None
        for sector, numbers in self.possible.items():
            value = shown(area, sector)
            if value in self.writes and value:
                newest = max(newest, self.writes[value].epoch)
            if value in {self.writes[number].value for number in numbers}:
                continue
            for number in numbers:
                write = self.writes[number]
                if write.acked is not None and number and (lost is None or write.epoch < lost.epoch):
                    lost = write
        if lost is not None and newest > lost.epoch:
            return f"write {lost.number} of epoch {lost.epoch} is lost, but one of epoch {newest} is there"
        return None


class Branch:
    """One history, and who is in it.

    Per volume, `holding` are the nodes whose disk shows every acknowledged write, and `stable` those that had every one
    of them written when it was acknowledged: a power cut takes a node out of the first set only.  When the last one of
    the first set loses power as well, all of the second are equally good: what was FLUSHed is on each.
    """

    def __init__(self, nodes: set[int], oracles: dict[int, Oracle], parent: Branch | None = None) -> None:
        self.nodes = nodes
        self.oracles = oracles
        self.holding = {number: set(nodes) for number in oracles}
        self.stable = {number: set(nodes) for number in oracles}
        self.parent = parent
        self.local_flush: bool = parent.local_flush if parent is not None else False  # FLUSH says nothing of the peer
        self.complete = True  # at the fork it had all that the parent had acknowledged
        self.parent_acked = parent.acked if parent is not None else 0

    @property
    def acked(self) -> int:
        """Writes acknowledged."""
        return sum(oracle.acked for oracle in self.oracles.values())

    @property
    def authority(self) -> set[int]:
        """Nodes that hold everything."""
        return set.intersection(*self.holding.values())

    def has_all_of(self, other: Branch) -> bool:
        """Nothing acknowledged in `other` is missing here."""
        if other is self:
            return True
        if self.parent is other:
            return self.complete and other.acked == self.parent_acked
        if other.parent is self:
            return other.acked == 0
        return False

    def lies_on(self, number: int, nodes: set[int]) -> None:
        """What is acknowledged now is on these nodes."""
        self.holding[number] &= nodes
        self.stable[number] &= nodes

    def flushed_on(self, number: int, nodes: set[int]) -> None:
        """What was acknowledged before is stable on these nodes; on others that lost power it may be gone."""
        self.stable[number] &= nodes | self.holding[number]

    def caught_up(self, number: int, nodes: set[int]) -> None:
        """These have everything."""
        self.holding[number] |= nodes
        self.stable[number] |= nodes

    def loses(self, node: int, number: int) -> bool:
        """This copy may lack something; the only good one stays what it is, also on a disk that was let go (False)."""
        if self.holding[number] == {node}:
            return False
        self.leaves(node, number)
        return True

    def leaves(self, node: int, number: int) -> None:
        """This copy is none of this history any more."""
        self.holding[number].discard(node)
        self.stable[number].discard(node)

    def lost_power(self, node: int, number: int) -> bool:
        """A power cut; True if it was the last good copy: then what was not FLUSHed may be undone."""
        if node in self.stable[number] and not self.oracles[number].removed and not self.local_flush:
            return False  # everything is stable
        if self.holding[number] != {node}:
            self.holding[number].discard(node)
            return False
        self.all_lost_power(number)
        return True

    def all_lost_power(self, number: int) -> None:
        """Every good copy lost power."""
        self.oracles[number].last_copy_lost_power()
        self.holding[number] |= self.stable[number]
