# SPDX-License-Identifier: Apache-2.0
"""A scripted peer that may lie, and the real Primary it lies to.

`Evil` is one clear connection to alpha, made as beta would make it, from the wire's own building blocks.
`Victim` is alpha with its client: `serves` checks what no lie may change.
"""

from __future__ import annotations

import os
import re
import select
import socket
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Final, Self

from replicator.control.client import call
from replicator.core import handshake_wire as hw
from replicator.core.handshake_wire import Hello, VolumeState, agree_hash
from replicator.core.wire import Frame, FrameDecoder, Kind, encode
from replicator.drivers.nbd_client import NbdClient
from tests.integration.cluster import GIVE_UP_S, MIB, Status, TwoNodes

BLOCK: Final = 4096
DIRTY: Final = 8  # blocks the killed peer lacks: the first ones
#: A peer may have 64 MiB of reads under way, and there is more than one buffer on the way to it.
RSS_GROWTH_MAX: Final = 160 * MIB


class Evil:
    """One connection to alpha, as beta would make it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._decoder = FrameDecoder(handshake_only=False)
        self._frames: list[Frame] = []
        self.nonce = os.urandom(32)
        # A source that failed is not heard for a moment; whoever is refused at the door knocks again.
        deadline = time.monotonic() + GIVE_UP_S
        while True:
            self.sock = socket.create_connection(("127.0.0.1", port), GIVE_UP_S)
            try:
                self.theirs = Hello.unpack(self.expect(Kind.HELLO).payload)
                return
            except (ConnectionError, EOFError):
                self.sock.close()
                assert time.monotonic() < deadline, "alpha lets nobody in"
                select.select([], [], [], 0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    # -- frames --------------------------------

    def raw(self, data: bytes) -> None:
        """Send bytes; alpha may have hung up already, which is its good right."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def send(self, *frames: Frame) -> None:
        self.raw(b"".join(bytes(part) for frame in frames for part in encode(frame)))

    def receive(self) -> Frame:
        """The next frame; EOFError when alpha has hung up."""
        while not self._frames:
            data = self.sock.recv(1 << 18)
            if not data:
                raise EOFError
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    def expect(self, kind: Kind) -> Frame:
        """The next frame of a kind; others are overheard."""
        while (frame := self.receive()).kind is not kind:
            pass
        return frame

    def ended(self) -> list[Frame]:
        """Everything until alpha hangs up."""
        frames: list[Frame] = []
        try:
            while True:
                frames.append(self.receive())
        except (EOFError, ConnectionResetError):
            return frames

    # -- being beta --------------------------------

    def hello(self) -> Hello:
        """What beta would say."""
        return replace(
            self.theirs, node="beta", node_id=1, peer_node_id=0, nonce=self.nonce, features=hw.FEATURE_DIGESTS
        )

    def agree(self) -> None:
        """The whole handshake; then both may say anything."""
        ours = self.hello().pack()
        self.send(Frame(Kind.HELLO, payload=ours))
        self.expect(Kind.AGREE)
        self.send(Frame(Kind.AGREE, payload=agree_hash(ours, self.theirs.pack())))
        self.send(Frame(Kind.ROLE, payload=hw.pack_role(False)))

    def state_of_alpha(self) -> Frame:
        """What alpha says, with the number of the next round.  A Primary lets the peer speak first: as if diskless."""
        self.send(Frame(Kind.VOLUME_STATE, sequence=1, payload=VolumeState(disk=0).pack()))
        frame = self.expect(Kind.VOLUME_STATE)
        return replace(frame, sequence=frame.sequence + 1)

    def compare(self) -> None:
        """The round: this copy is the killed peer's, so alpha becomes source of a short resync."""
        frame = self.state_of_alpha()
        alpha = VolumeState.unpack(frame.payload)
        self.send(Frame(Kind.VOLUME_STATE, sequence=frame.sequence, payload=state_of_beta(alpha).pack()))

    def sync(self) -> None:
        """Up to the point where beta may pull."""
        self.agree()
        self.compare()
        self.expect(Kind.BITMAP_END)
        self.send(Frame(Kind.BITMAP_END), Frame(Kind.SYNC_READY))
        self.expect(Kind.SYNC_START)


def state_of_beta(alpha: VolumeState) -> VolumeState:
    assert alpha.bitmap_id, alpha
    return VolumeState(disk=9, size_bytes=alpha.size_bytes, current=alpha.bitmap_id, history=alpha.history)


class Victim:
    """alpha, and what must not change about it."""

    def __init__(self, nodes: TwoNodes) -> None:
        self.nodes = nodes
        self.pid = nodes.processes["alpha"].pid
        text = (nodes.config_dir("alpha") / "r0.toml").read_text()
        self.port = int(text.partition('address = "127.0.0.1:')[2].partition('"')[0])
        self.client: NbdClient = nodes.nbd("alpha")
        self.size_bytes = self.client.size_bytes
        self._log_read = 0
        self._number = 0
        self.rss = self.resident_bytes()

    def evil(self) -> Evil:
        return Evil(self.port)

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024

    def serves(self) -> None:
        """The same process is Primary, keeps its promises to its client, and knows what the peer lacks."""
        assert self.nodes.processes["alpha"].poll() is None, self.nodes.logs()
        self._number += 1
        data = struct.pack(">Q", self._number) * (BLOCK // 8)
        for block in range(DIRTY):  # these are dirty already
            self.client.write(block * BLOCK, data)
        assert self.client.read(0, DIRTY * BLOCK) == data * DIRTY
        self.client.flush()
        status = self.status()
        assert status["role"] == "Primary" and status["pid"] == self.pid
        assert status["devices"][0]["disk-state"] == "UpToDate"
        dirty = status["connections"][0]["peer_devices"][0]["out-of-sync"] * 1024
        assert dirty == DIRTY * BLOCK, f"{dirty} bytes are dirty\n{self.nodes.logs()}"
        assert self.resident_bytes() - self.rss < RSS_GROWTH_MAX, f"{self.resident_bytes()} bytes, at first {self.rss}"

    def status(self) -> Status:
        return call(self.nodes.control("alpha"), "status", timeout_s=GIVE_UP_S)

    def says(self, pattern: str) -> Status:
        """Wait until the reason why the peer is not connected matches."""
        return self.nodes.wait("alpha", lambda status: re.search(pattern, status["connections"][0]["reason"]))

    def connect(self) -> None:
        """After StandAlone."""
        call(self.nodes.control("alpha"), "connect", timeout_s=GIVE_UP_S)
        self.nodes.wait("alpha", lambda status: status["connections"][0]["connection-state"] == "Connecting")

    def new_log(self) -> str:
        text = (self.nodes.base / "alpha.log").read_text()
        new, self._log_read = text[self._log_read :], len(text)
        return new
