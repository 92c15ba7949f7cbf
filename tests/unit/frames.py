# SPDX-License-Identifier: Apache-2.0
"""What the tests of frames and the tests of payloads share: examples, and frames to bytes and back."""

from __future__ import annotations

from replicator.core import handshake_wire as payloads
from replicator.core import wire
from replicator.core.handshake_wire import Hello, VolumeState
from replicator.core.wire import Frame, FrameDecoder

HELLO = Hello(
    version_min=1,
    version_max=2,
    features=payloads.FEATURE_DIGESTS | payloads.FEATURE_TWO_PRIMARIES,
    resource_id=bytes(range(16)),
    nonce=bytes(range(32)),
    node_id=1,
    peer_node_id=0,
    resource="r0",
    node="büro",
    options=(("protocol", "C"), ("fencing", "")),
    volumes=(0, 300),
)
STATE = VolumeState(
    disk=9, survived=True, paused=True, size_bytes=1 << 30, current=7, bitmap_id=5, dirty_count=3,
    exposed=6, history=(4, 2),
)  # fmt: skip


def encoded(*frames: Frame) -> bytes:
    return b"".join(bytes(part) for frame in frames for part in wire.encode(frame))


def opened() -> FrameDecoder:
    return FrameDecoder(handshake_only=False)
