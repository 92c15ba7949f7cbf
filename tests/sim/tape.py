# SPDX-License-Identifier: Apache-2.0
"""The tape of a run: all that is going to be asked and broken, drawn from the seed before the run begins.

A run is a function of its tape: the settings (`Swarm`), what the clients ask (`Op`), what breaks and what the operator
does (`Fault`), and the seed of the delays.  A failing tape is shrunk by leaving entries out, and kept as a small file.
Swarm testing: each run draws which kinds of faults exist in it at all; a run with every kind reaches less.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from replicator.core.geometry import EXTENT, SECTOR

MS = 1_000_000
MIB = 1 << 20

#: kind -> how often, relative to the others, in a run that has it
KINDS: dict[str, float] = {
    "kill": 2,
    "kill_both": 1,
    "power": 2,
    "power_both": 1,
    "fence": 1,
    "away": 0.5,
    "cut": 3,
    "cut_at_byte": 2,
    "damage": 1,
    "half_open": 1,
    "stall": 2,
    "slow": 1,
    "partition": 2,
    "one_way": 1,
    "stop": 1,
    "clock": 1,
    "switch": 2,
    "race": 1,
    "unwise": 0.7,
    "disconnect": 1,
    "pause": 1,
    "invalidate": 1,
    "detach": 1,
    "blank": 0.5,
    "rot": 1,
    "disk_broken": 1,
    "disk_flush": 0.7,
    "disk_meta": 0.7,
    "disk_read": 1,
    "disk_write": 0.7,
    "freeze": 0.7,
    "trap": 6,
}


@dataclass(frozen=True, slots=True)
class Op:
    """What a client asks after a pause; `first` and `count` are sectors."""

    pause_us: int
    kind: str  # write, trim, zero, read, flush
    volume: int
    first: int
    count: int
    fua: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """Something happens at a time; `a`, `b`, `c` in 0..1 choose the details (who, how long, which)."""

    at_us: int
    kind: str
    a: float
    b: float
    c: float


@dataclass(frozen=True, kw_only=True)
class Swarm:
    """The settings of a run."""

    protocol: str = "C"
    checksum_sync: str = "auto"
    epoch_writes_max: int = 2048
    epoch_time_ms: int = 50
    activity_extents: int = 1008
    resync_max_rate: int = 0
    size_bytes: int = MIB
    volumes: tuple[int, ...] = (0,)
    first_sync: str = "skip"  # or full
    disk_us: int = 100
    net_us: int = 100
    duration_ms: int = 1000
    kinds: tuple[str, ...] = ()

    @classmethod
    def draw(cls, rng: random.Random) -> Swarm:
        """Each kind of fault exists in about a third of the runs."""
        large = rng.random() < 0.25
        return cls(
            protocol=rng.choice("CCCBA"),
            checksum_sync=rng.choice(("auto", "always", "never")),
            epoch_writes_max=rng.choice((1, 4, 64, 2048)),
            epoch_time_ms=rng.choice((5, 50, 1000)),
            activity_extents=rng.choice((9, 9, 1008)) if large else 1008,
            resync_max_rate=rng.choice((0, 0, 0, 8 * MIB)),
            size_bytes=12 * EXTENT if large else rng.choice((MIB, 2 * MIB, MIB + 3 * SECTOR)),
            volumes=(0, 1) if not large and rng.random() < 0.25 else (0,),
            first_sync="full" if not large and rng.random() < 0.15 else "skip",
            disk_us=rng.choice((50, 200, 1000)),
            net_us=rng.choice((50, 200, 1000)),
            duration_ms=rng.choice((300, 800, 1500)),
            kinds=tuple(kind for kind in KINDS if rng.random() < 0.33),
        )

    @property
    def options(self) -> dict[str, object]:
        """For `replicator.core.options.Options`; timeouts are short, so that simulated seconds are few."""
        return {
            "protocol": self.protocol,
            "checksum_sync": self.checksum_sync,
            "epoch_writes_max": self.epoch_writes_max,
            "epoch_time_ns": self.epoch_time_ms * MS,
            "activity_extents": self.activity_extents,
            "resync_max_rate": self.resync_max_rate,
            "connect_interval_ns": 100 * MS,
            "ping_interval_ns": 250 * MS,
            "ping_timeout_ns": 150 * MS,
            "timeout_ns": 150 * MS,
            "ko_count": 3,
            "handshake_timeout_ns": 400 * MS,
        }

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Tape:
    """Everything a run needs."""

    seed: int
    swarm: Swarm
    clients: tuple[tuple[Op, ...], ...]
    faults: tuple[Fault, ...]
    why: str = field(default="", compare=False)

    @classmethod
    def draw(cls, seed: int) -> Tape:
        """The tape of a seed."""
        rng = random.Random(f"tape {seed}")
        swarm = Swarm.draw(rng)
        count = rng.choice((10, 25, 50))
        clients = tuple(
            tuple(_op(rng, swarm, swarm.duration_ms * 1000 // count) for _ in range(count))
            for _ in range(rng.choice((1, 2, 4)))
        )
        weights = [KINDS[kind] for kind in swarm.kinds]
        number = rng.choice((1, 3, 6, 10)) if swarm.kinds else 0
        faults = sorted(
            (
                Fault(
                    rng.randrange(swarm.duration_ms * 1000),
                    rng.choices(swarm.kinds, weights)[0],
                    *(rng.randrange(10_000) / 10_000 for _ in range(3)),
                )
                for _ in range(number)
            ),
            key=lambda fault: fault.at_us,
        )
        return cls(seed, swarm, clients, tuple(faults))

    def without(self, *, faults: set[int] = frozenset(), ops: set[tuple[int, int]] = frozenset()) -> Tape:  # type: ignore[assignment]
        """The tape without some entries."""
        return replace(
            self,
            faults=tuple(fault for number, fault in enumerate(self.faults) if number not in faults),
            clients=tuple(
                tuple(op for number, op in enumerate(client) if (who, number) not in ops)
                for who, client in enumerate(self.clients)
            ),
        )

    @property
    def size(self) -> int:
        """Entries."""
        return len(self.faults) + sum(len(client) for client in self.clients)

    # --- as a file

    def dump(self) -> str:
        """JSON, one entry a line."""
        lines = [
            f'"why": {json.dumps(self.why)}',
            f'"seed": {self.seed}',
            f'"swarm": {json.dumps(asdict(self.swarm))}',
            '"faults": [\n  ' + ",\n  ".join(json.dumps(_values(fault)) for fault in self.faults) + "\n]",
            '"clients": [\n' + ",\n".join(_line(client) for client in self.clients) + "\n]",
        ]
        return "{" + ",\n".join(lines) + "}\n"

    @classmethod
    def load(cls, text: str) -> Tape:
        """What `dump` made; a file with only `seed` and `why` stands for the tape of that seed."""
        found: Mapping[str, Any] = json.loads(text)
        if "swarm" not in found:
            return replace(cls.draw(found["seed"]), why=found["why"])
        swarm: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in found["swarm"].items()
        }
        return cls(
            found["seed"],
            Swarm(**swarm),
            tuple(tuple(Op(*op) for op in client) for client in found["clients"]),
            tuple(Fault(*fault) for fault in found["faults"]),
            found["why"],
        )


def _line(client: tuple[Op, ...]) -> str:
    return "  [" + ",\n   ".join(json.dumps(_values(op)) for op in client) + "]"


def _values(entry: Op | Fault) -> list[object]:
    return list(asdict(entry).values())


def _op(rng: random.Random, swarm: Swarm, mean_us: int) -> Op:
    """Hot spots, block aligned and not, sometimes large; on a large volume spread over its extents."""
    kind = rng.choices(("write", "read", "flush", "trim", "zero"), (60, 22, 9, 5, 4))[0]
    sectors = swarm.size_bytes // SECTOR
    if rng.random() < 0.25:
        count = rng.randint(1, 63)
        first = rng.randrange(sectors - 64)
    else:
        count = 8
        first = rng.randrange(0, sectors - 8, 8)
    if swarm.size_bytes > EXTENT:  # few places in each extent: many extents, and still collisions
        extent = EXTENT // SECTOR
        first = first // extent * extent + first % 64
        if rng.random() < 0.1:
            first = max(extent, first // extent * extent) - 4  # across a border
        if first + count > sectors:
            first = sectors - 64
    elif rng.random() < 0.4:
        first = first % 256
    pause_us = 0 if rng.random() < 0.2 else int(rng.expovariate(1) * mean_us)
    return Op(pause_us, kind, rng.choice(swarm.volumes), first, count, rng.random() < 0.1)
