# SPDX-License-Identifier: Apache-2.0
"""What the demonstration writes, and how it knows afterwards what must be there.

`Ledger` notes each write when its answer arrives.  A block may later hold what was acknowledged last, or a
write that was on its way when the Primary was killed (nobody was told about that one), and nothing else.
"""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from replicator.drivers.nbd_client import NbdClient

BLOCK: Final = 4096
MIB: Final = 1 << 20
DEPTH: Final = 16
WAIT_S: Final = 30.0


def content(block: int, number: int) -> bytes:
    """What write `number` puts into `block`: no two writes have equal content."""
    return struct.pack(">QQ", block, number) * (BLOCK // 16)


@dataclass
class Ledger:
    """Block -> number of the write whose content it must have."""

    acknowledged: dict[int, int] = field(default_factory=dict)
    doubtful: dict[int, int] = field(default_factory=dict)  # submitted, and the answer never came
    answers: int = 0
    _number: int = 0

    def next_number(self) -> int:
        """A number for one more write."""
        self._number += 1
        return self._number

    def acknowledge(self, block: int, number: int) -> None:
        """The answer came: from now on this block must hold this write."""
        self.acknowledged[block] = number
        self.doubtful.pop(block, None)
        self.answers += 1

    def wrong(self, read: Callable[[int, int], bytes]) -> list[int]:
        """Blocks that hold neither what was acknowledged last nor what is in doubt; `read(offset, size)`."""
        found = []
        for block in sorted(self.acknowledged.keys() | self.doubtful.keys()):
            number = self.acknowledged.get(block)
            allowed = [bytes(BLOCK) if number is None else content(block, number)]
            if block in self.doubtful:
                allowed.append(content(block, self.doubtful[block]))
            if read(block * BLOCK, BLOCK) not in allowed:
                found.append(block)
        return found


class Load(threading.Thread):
    """Random 4 KiB writes, many in flight, as fast as the mirror takes them, until told or cut off.

    `ended_by` says after the end what cut it off, or None.
    """

    def __init__(self, path: str, export: str, ledger: Ledger, span_bytes: int) -> None:
        super().__init__(daemon=True)
        self._path = path
        self._export = export
        self._ledger = ledger
        self._blocks = span_bytes // BLOCK
        self._asked_to_end = threading.Event()
        self._in_flight: dict[int, tuple[int, int]] = {}  # cookie -> (block, number)
        self.ended_by: OSError | None = None

    def finish(self) -> None:
        """Let what is in flight be answered, and end.  Raises TimeoutError."""
        self._asked_to_end.set()
        self.join(WAIT_S)
        if self.is_alive():
            raise TimeoutError(f"writes are not answered for {WAIT_S:.0f} s")

    def run(self) -> None:
        """The thread."""
        try:
            with NbdClient(self._path, self._export, timeout_s=WAIT_S) as client:
                while client.in_flight or not self._asked_to_end.is_set():
                    self._submit(client)
                    self._answered(client.poll(0.1))
        except OSError as error:
            self.ended_by = error
        for block, number in self._in_flight.values():
            self._ledger.doubtful[block] = number

    def _submit(self, client: NbdClient) -> None:
        busy = {block for block, _ in self._in_flight.values()}
        while client.in_flight < DEPTH and not self._asked_to_end.is_set():
            block = random.randrange(self._blocks)  # noqa: S311 - no secret
            if block in busy:
                continue  # two writes of one block at once may be applied in either order
            busy.add(block)
            number = self._ledger.next_number()
            # Noted before it is sent: a write that was cut off in the middle is in doubt as well.
            self._in_flight[-number] = (block, number)
            cookie = client.submit_write(block * BLOCK, content(block, number))
            self._in_flight[cookie] = self._in_flight.pop(-number)

    def _answered(self, answers: list[tuple[int, int]]) -> None:
        for cookie, error in answers:
            block, number = self._in_flight[cookie]
            if error:
                raise OSError(error, os.strerror(error), f"block {block}")
            del self._in_flight[cookie]
            self._ledger.acknowledge(block, number)


def difference(left: Path, right: Path, size_bytes: int) -> int | None:
    """The first byte at which two files differ within `size_bytes`, or one ends; None if they are equal."""
    with left.open("rb") as one, right.open("rb") as other:
        for offset in range(0, size_bytes, MIB):
            length = min(MIB, size_bytes - offset)
            a, b = one.read(length), other.read(length)
            if a != b or len(a) != length:
                differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
                return offset + next(differing, min(len(a), len(b)))
    return None
