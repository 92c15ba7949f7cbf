# SPDX-License-Identifier: Apache-2.0
"""Clients that write down what they did and what they were told.

Each client is a thread with a connection of its own.  It reads and writes few blocks, so that clients meet; no two
writes have the same value.  A write whose answer does not come (the connection ends) or is an error has an
unknown outcome: it may take effect at any later time, or never.  After that the client waits until it is told where
the Primary is now (`follow`); so a client never turns in a circle, and the test decides when it goes on.

The unit that a disk writes at once is a sector, not a block: a read beside a write, or after a crash, may see
sectors of both.  Such a torn read is kept sector by sector, and that block is judged as eight registers.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Final

from replicator.drivers.nbd_client import NbdClient
from tests.faults.linearizable import INITIAL, Kind, Operation, Violation, violations
from tests.integration.cluster import GIVE_UP_S

BLOCK: Final = 4096
SECTOR: Final = 512
SECTORS: Final = BLOCK // SECTOR
ONCE_SHARE: Final = 0.15
_STAMP: Final = struct.Struct(">8sQQ")
_MAGIC: Final = b"history."


def content(block: int, value: int) -> bytes:
    """The bytes that stand for `value`, or for the initial one."""
    if value == INITIAL:
        return bytes(BLOCK)
    return _STAMP.pack(_MAGIC, block, value).ljust(SECTOR, b".") * SECTORS


def values_of(block: int, data: bytes) -> tuple[int, ...]:
    """The value in each sector of a block.  Bytes that nobody wrote there are a failure of their own."""
    found = []
    for start in range(0, BLOCK, SECTOR):
        sector = data[start : start + SECTOR]
        _, where, value = _STAMP.unpack_from(sector)
        if not any(sector):
            where, value = block, INITIAL
        assert where == block and sector == content(block, value)[:SECTOR], f"garbage in block {block}: {sector[:32]!r}"
        found.append(value)
    return tuple(found)


@dataclass
class History:
    """What happened, as far as the clients know.  Appending is safe from any thread."""

    operations: list[Operation] = field(default_factory=list)
    torn: dict[int, list[tuple[Operation, tuple[int, ...]]]] = field(default_factory=dict)
    flushes: list[tuple[int, int]] = field(default_factory=list)  # answered: invoked, returned
    stable: set[int] = field(default_factory=set)  # values of writes with FUA that were answered

    def add(self, operation: Operation) -> None:
        self.operations.append(operation)

    def add_read(self, operation: Operation, values: tuple[int, ...]) -> None:
        """A read that was answered with these values, one per sector."""
        if len(set(values)) == 1:
            self.operations.append(replace(operation, value=values[0]))
        else:
            self.torn.setdefault(operation.block, []).append((operation, values))

    def registers(self) -> Iterable[Operation]:
        """All operations, each on a register: a block, or a sector where a torn read was seen."""
        for operation in self.operations:
            if operation.block in self.torn:
                yield from _by_sector(operation, (operation.value,) * SECTORS)
            else:
                yield replace(operation, block=operation.block * SECTORS)
        for torn in self.torn.values():
            for operation, values in torn:
                yield from _by_sector(operation, values)

    def violations(self) -> list[Violation]:
        """What no single disk could have done; empty: linearizable."""
        return violations(self.registers())

    def count(self, kind: Kind, *, answered: bool = True) -> int:
        return sum(o.kind is kind and (o.returned_ns is not None) is answered for o in self.operations)


def _by_sector(operation: Operation, values: tuple[int, ...]) -> Iterable[Operation]:
    for sector, value in enumerate(values):
        yield replace(operation, block=operation.block * SECTORS + sector, value=value)


class Clients:
    """`number` clients at work from `start` to `stop`.

    Values count up across all `Clients` that share `values`.  Blocks of `once` are written one time each, now and
    then: what a copy lacks of the others may be made good by the next write, of these it is not.
    """

    def __init__(
        self,
        history: History,
        connect: Callable[[], NbdClient],
        *,
        blocks: Iterable[int],
        seed: int,
        number: int = 4,
        flush_share: float = 0.05,
        values: Iterable[int] | None = None,
        once: Iterable[int] = (),
    ) -> None:
        self.history = history
        self._connect = connect
        self._blocks = list(blocks)
        self._flush_share = flush_share
        self._values = iter(values if values is not None else count(1))
        self._once = iter(once)
        self._change = threading.Condition()
        self._place = 1  # counts up with each `follow`
        self._parked: set[int] = set()
        self._troubles: list[str] = []
        self._stopping = False
        self._answers = 0
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, args=(name, random.Random(f"{seed}/{name}")), name=f"client-{name}")
            for name in range(number)
        ]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    # -- what the test asks --------------------------------

    def answered(self, more: int) -> None:
        """Wait until `more` further operations were answered."""
        with self._change:
            goal = self._answers + more
            self._wait(lambda: self._answers >= goal, f"{more} answers")

    def parked(self) -> None:
        """Wait until every client lost its connection or got an error, and waits for `follow`."""
        with self._change:
            self._wait(lambda: len(self._parked) == len(self._threads), "all clients to lose their connection")

    def some_parked(self) -> None:
        """Wait until at least one client did."""
        with self._change:
            self._wait(lambda: bool(self._parked), "a client to lose its connection")

    def follow(self, connect: Callable[[], NbdClient] | None = None) -> None:
        """Clients that lost their connection go on: over there, or where they were."""
        with self._change:
            if connect is not None:
                self._connect = connect
            self._place += 1
            self._parked.clear()
            self._troubles.clear()
            self._change.notify_all()

    def stop(self) -> None:
        """Let every client finish what it does, and end."""
        with self._change:
            self._stopping = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join(GIVE_UP_S)
            assert not thread.is_alive(), f"{thread.name} does not end"
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """As `stop`, without waiting: the test is over, however it ended."""
        with self._change:
            self._stopping = True
            self._change.notify_all()

    def _wait(self, true: Callable[[], bool], what: str) -> None:
        done = self._change.wait_for(lambda: true() or self._error is not None, GIVE_UP_S)
        if self._error is not None:
            raise AssertionError(f"a client failed: {self._error}") from self._error
        assert done, f"waited in vain for {what}; {self._answers} answers, {len(self._parked)} parked"

    @property
    def lost(self) -> list[str]:
        """What clients lost their connection for (or what error they got) since the last `follow`."""
        with self._change:
            return list(self._troubles)

    # -- a client's thread --------------------------------

    def _work(self, name: int, drawn: random.Random) -> None:
        try:
            place = 0
            while (here := self._wait_for_place(name, place)) is not None:
                place, connect = here
                try:
                    with connect() as client:
                        while not self._stopping:
                            self._step(name, client, drawn)
                except OSError as error:  # what it means is recorded where it happened
                    with self._change:
                        self._troubles.append(f"client {name}: {error}")
        except BaseException as error:
            with self._change:
                self._error = error
                self._change.notify_all()

    def _wait_for_place(self, name: int, seen: int) -> tuple[int, Callable[[], NbdClient]] | None:
        with self._change:
            if self._place <= seen:
                self._parked.add(name)
                self._change.notify_all()
            self._change.wait_for(lambda: self._stopping or self._place > seen)
            return None if self._stopping else (self._place, self._connect)

    def _step(self, name: int, client: NbdClient, drawn: random.Random) -> None:
        dice = drawn.random()
        if dice < self._flush_share:
            invoked_ns = time.monotonic_ns()
            client.flush()
            self.history.flushes.append((invoked_ns, time.monotonic_ns()))
        elif dice < 0.5:
            read_block(self.history, client, name, drawn.choice(self._blocks))
        else:
            block = drawn.choice(self._blocks)
            with self._change:
                value = next(self._values)
                if drawn.random() < ONCE_SHARE:
                    block = next(self._once, block)
            write_block(self.history, client, name, block, value, fua=drawn.random() < 0.05)
        with self._change:
            self._answers += 1
            self._change.notify_all()


def read_block(history: History, client: NbdClient, name: int, block: int) -> tuple[int, ...]:
    """Read a block and record it; the value of each sector.  An error says nothing, and is raised."""
    invoked_ns = time.monotonic_ns()
    data = client.read(block * BLOCK, BLOCK)
    returned_ns = time.monotonic_ns()
    values = values_of(block, data)
    history.add_read(Operation(name, Kind.READ, block, INITIAL, invoked_ns, returned_ns), values)
    return values


def write_block(history: History, client: NbdClient, name: int, block: int, value: int, *, fua: bool = False) -> None:
    """Write a block and record it; with an error its outcome is unknown, and the error is raised."""
    data = content(block, value)
    invoked_ns = time.monotonic_ns()
    try:
        client.write(block * BLOCK, data, fua=fua)
    except OSError:
        history.add(Operation(name, Kind.WRITE, block, value, invoked_ns, None))
        raise
    returned_ns = time.monotonic_ns()
    history.add(Operation(name, Kind.WRITE, block, value, invoked_ns, returned_ns))
    if fua:
        history.stable.add(value)
