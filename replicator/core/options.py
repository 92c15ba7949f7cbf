# SPDX-License-Identifier: Apache-2.0
"""What a resource is told once: its configuration as the core needs it.

Times are nanoseconds, sizes bytes.  The driver builds this from the TOML file; the simulator makes its own.
"""

from __future__ import annotations

from dataclasses import dataclass

SECOND_NS = 1_000_000_000
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One resource on one node.  `peers` and `volumes` are fixed while the process runs."""

    resource: str
    node_id: int
    node_name: str
    peers: dict[int, str]  # node id -> name
    volumes: tuple[int, ...]
    protocol: str = "C"  # A, B or C: when a write is complete
    matching: tuple[tuple[str, str], ...] = ()  # settings both nodes must have alike
    fencing: str = "dont-care"  # or resource-only, resource-and-stonith
    connect_interval_ns: int = 3 * SECOND_NS  # between attempts to dial
    handshake_timeout_ns: int = 10 * SECOND_NS
    ping_interval_ns: int = 10 * SECOND_NS
    ping_timeout_ns: int = 2 * SECOND_NS
    timeout_ns: int = 6 * SECOND_NS
    ko_count: int = 7
    epoch_writes_max: int = 2048
    epoch_time_ns: int = SECOND_NS
    activity_extents: int = 1008
    send_window_bytes: int = 8 * MIB  # protocols A and B: unwritten bytes at the peer before writes wait for it
    unwritten_bytes_max: int = 128 * MIB  # all protocols: before writes wait here; a peer takes twice as much
    resync_max_rate: int = 0  # bytes per second, 0 = no limit
    resync_latency_target_ns: int = 20_000_000
    checksum_sync: str = "auto"  # always, never
    listens_for: frozenset[int] = frozenset()  # peers that dial us (their node id is higher)
