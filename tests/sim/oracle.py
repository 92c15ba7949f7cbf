# SPDX-License-Identifier: Apache-2.0
"""What a client may see: per sector, the values that a read (or the disk at the end) is allowed to show.

Every write carries its own number in every sector.  `possible` holds, per sector, the last acknowledged value and every
value that may still come out instead of it (unanswered writes).  An acknowledgement removes what it certainly
overwrote.  What was removed since the last FLUSH is remembered: when the only good copy loses power, it is possible
again.
"""

from __future__ import annotations

from dataclasses import dataclass

from replicator.core.geometry import SECTOR


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

    @property
    def value(self) -> int:
        """What its sectors show."""
        return 0 if self.zero else self.number


def fill(number: int, sectors: int) -> bytes:
    """The payload of a write."""
    return number.to_bytes(8, "big") * (SECTOR // 8) * sectors


class Oracle:
    """Registers for every sector of one volume."""

    def __init__(self) -> None:
        self.writes: dict[int, Issued] = {0: Issued(0, 0, 0, -1, acked=-1, over=True)}
        self.possible: dict[int, set[int]] = {}  # sector -> write numbers
        self.removed: list[tuple[int, int, set[int]]] = []  # when, sector, write numbers
        self.acked = 0

    def issue(self, write: Issued) -> None:
        """It may show from now on."""
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
        for other in self.possible[sector] - {number}:
            write = self.writes[other]
            concurrent = not write.over or (write.acked is not None and write.acked >= since)
            (keep if write.issued > since or concurrent else gone).add(other)
        self.possible[sector] = keep
        if gone and not stable:
            self.removed.append((now, sector, gone))

    def flushed(self, issued: int) -> None:
        """A FLUSH sent at `issued` was acknowledged: what was acknowledged before is stable."""
        self.removed = [entry for entry in self.removed if entry[0] >= issued]

    def last_copy_lost_power(self) -> None:
        """What was not flushed may be undone."""
        for _, sector, gone in self.removed:
            self.possible[sector] |= gone
        self.removed.clear()

    def died(self) -> None:
        """The Primary is gone: nothing of it will be answered."""
        for write in self.writes.values():
            write.over = True

    def wrong(self, first: int, data: bytes) -> str | None:
        """Check content that starts at sector `first`; a sentence about the first sector that may not be so."""
        for index in range(len(data) // SECTOR):
            sector = first + index
            raw = data[index * SECTOR : (index + 1) * SECTOR]
            value = int.from_bytes(raw[:8], "big")
            if raw != raw[:8] * (SECTOR // 8):
                return f"sector {sector} is torn inside"
            allowed = {self.writes[number].value for number in self.possible.get(sector, {0})}
            if value not in allowed:
                return f"sector {sector} shows {value}, allowed are {sorted(allowed)}"
        return None

    def read(self, first: int, data: bytes, started: int, now: int) -> str | None:
        """A read was answered: check it, and whatever it showed may not be taken back (I-31)."""
        fault = self.wrong(first, data)
        if fault is not None:
            return fault
        for index in range(len(data) // SECTOR):
            sector = first + index
            value = int.from_bytes(data[index * SECTOR : index * SECTOR + 8], "big")
            numbers = self.possible.get(sector)
            if numbers is None or any(not self.writes[number].over for number in numbers):
                continue
            shown = [number for number in numbers if self.writes[number].value == value]
            if len(numbers) > 1 and all(self.writes[number].issued < started for number in numbers):
                gone = numbers - set(shown)
                self.possible[sector] = set(shown)
                self.removed.append((now, sector, gone))
        return None
