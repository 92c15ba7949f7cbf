# SPDX-License-Identifier: Apache-2.0
"""What clients, operators and administrators send: NBD sessions, control lines, TOML, certificates.

As in `formats`: any bytes, one documented error, the same outcome however the stream is cut.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

from replicator.config import ResourceConfig, parse
from replicator.config.schema import Device, Disk, Net, Options, specs
from replicator.control import messages
from replicator.control.messages import LineSplitter, Reply, Request
from replicator.drivers import keys
from replicator.errors import ConfigError, ProtocolError
from replicator.nbd import constants as c
from replicator.nbd.constants import Chunk, Command
from replicator.nbd.negotiation import Export
from replicator.nbd.requests import Abilities, Kind, judge
from replicator.nbd.requests import Request as Piece
from replicator.nbd.session import NbdSession, State
from tests.fuzz.dice import Dice

MIB = 1 << 20
EXPORTS: Final = (
    Export(name="r0/0", size_bytes=256 * MIB, description="volume 0"),
    Export(name="r0/1", size_bytes=1000 * 4096, read_only=True, block_min=4096),
    Export(name="r0/2", size_bytes=0, refused="r0 is Secondary here"),
)
NAMES: Final = {"": EXPORTS[0], **{export.name: export for export in EXPORTS}}
_ZEROES: Final = memoryview(bytes(c.IO_MAX))

# --------------------------------------------------------------------------------------------------------- NBD


class _Server:
    """A session, what it offered, and the stream it produced (payloads of reads as their lengths only)."""

    def __init__(self) -> None:
        self.session = NbdSession(NAMES, itertools.count(1))
        self.pieces: list[Piece] = []
        self.said: list[bytes | int] = []
        self._seen: set[int] = set()

    def collect(self) -> None:
        """Take what the session offers and check every piece of it."""
        session = self.session
        for piece in session.take_requests():
            export = session.export
            assert export is not None and piece.token not in self._seen
            self._seen.add(piece.token)
            self.pieces.append(piece)
            writes = piece.kind in (Kind.WRITE, Kind.TRIM, Kind.ZERO)
            assert not (writes and export.read_only), "a change of a read-only export"
            assert piece.offset + piece.size <= export.size_bytes
            assert not (piece.offset | piece.size) % export.block_min
            limit = c.IO_MAX if piece.kind in (Kind.READ, Kind.WRITE) else c.ZERO_MAX
            assert (0 < piece.size <= limit) if piece.kind is not Kind.FLUSH else not piece.size
            assert len(piece.data) == (piece.size if piece.kind is Kind.WRITE else 0)
        # An honest request beyond the limit and one piece list are allowed on top (session's invariants).
        assert session.in_flight_bytes <= c.IN_FLIGHT_BYTES_MAX + c.PAYLOAD_MAX
        assert session.in_flight_count <= c.IN_FLIGHT_COUNT_MAX + (1 << 32) // c.ZERO_MAX
        assert (session.export is None) == (session.state in (State.FLAGS, State.OPTIONS)) or session.closing

    def drain(self) -> None:
        """Everything leaves at once."""
        for part in self.session.take_output():
            if isinstance(part, memoryview):
                self.said.append(len(part))
            elif self.said and isinstance(self.said[-1], bytes):
                self.said[-1] += bytes(part)
            else:
                self.said.append(bytes(part))
        self.session.sent(self.session.unsent_bytes)

    def answer(self, piece: Piece, error: int = 0) -> None:
        """One piece is done."""
        data = _ZEROES[: piece.size] if piece.kind is Kind.READ and not error else b""
        self.session.reply(piece.token, error, data)

    def settle(self) -> None:
        """Answer everything, in order, until nothing more comes."""
        self.collect()
        done = 0
        while done < len(self.pieces):
            for piece in self.pieces[done:]:
                self.answer(piece)
                done += 1
                self.drain()
            self.collect()
        self.drain()
        session = self.session
        assert not session.in_flight_count and not session.unsent_bytes
        arriving = session._incoming
        held = arriving.size if arriving is not None and arriving.fault is None else 0
        assert session.closing or session.in_flight_bytes == held, "room that is never given back"


def nbd_stream(data: bytes) -> None:
    """A client's bytes: the same requests, the same answers and the same end, however they are cut."""
    results = []
    for step in (max(1, len(data)), 1, 11):
        server = _Server()
        for at in range(0, len(data), step):
            server.session.receive(data[at : at + step])
        server.settle()
        session = server.session
        pieces = [replace(piece, data=bytes(piece.data)) for piece in server.pieces]
        results.append((pieces, server.said, session.state, session.fault, session.finished))
        if session.closing:
            assert session.finished and not session.wants_data
            session.receive(data)
            server.collect()
            assert len(server.pieces) == len(pieces), "a closed session goes on"
    assert results[0] == results[1] == results[2]


class _Client:
    """Well-formed requests, in any order, with answers in any order: each request is answered once, rightly."""

    def __init__(self, dice: Dice) -> None:
        self.dice = dice
        self.server = _Server()
        self.asked: dict[int, tuple[int, int, int, int]] = {}  # cookie -> command, flags, offset, size
        self.errors: dict[int, bool] = {}  # cookie -> a piece of it failed
        self.open: list[Piece] = []
        self.cookies = itertools.count(1)
        self.structured = dice.chance(128)
        self.export = EXPORTS[1] if dice.chance(64) else EXPORTS[0]
        self.allocation = self.structured and dice.chance(128)
        self._read = 0  # items of `said` parsed

    def run(self) -> None:
        self._negotiate()
        for _ in range(200):
            if not self.dice.left or self.server.session.closing:
                break
            self._step()
        self._end()

    def _negotiate(self) -> None:
        session = self.server.session
        name = self.export.name.encode()
        counted = struct.pack(">I", len(name)) + name
        session.receive(b"\0\0\0\3")
        if self.structured:
            session.receive(_option(8))
        if self.allocation:
            query = b"base:allocation"
            session.receive(_option(10, counted + struct.pack(">II", 1, len(query)) + query))
        session.receive(_option(7, counted + b"\0\0"))
        assert session.state is State.TRANSMISSION
        session.take_output()
        session.sent(session.unsent_bytes)

    def _step(self) -> None:
        dice, server = self.dice, self.server
        how = dice.byte() % 8
        if how < 5:
            server.session.receive(self._request())
        elif how == 5:
            server.drain()
        elif self.open:
            piece = self.open.pop(dice.below(len(self.open)))
            server.answer(piece, dice.pick((0, 0, 0, 5, 28, 110)) if dice.chance(64) else 0)
        before = len(server.pieces)
        server.collect()
        self.open += server.pieces[before:]

    def _request(self) -> bytes:
        dice = self.dice
        command = dice.pick((0, 0, 1, 1, 3, 4, 6, 7, 5, 2 if dice.chance(32) else 0))
        flags = dice.pick((0, 0, 0, 1, 2, 4, 8, 3, 5, dice.number(16)))
        size = dice.number(32) if dice.chance(64) else dice.below(9) * 4096
        offset = dice.number(64) if dice.chance(64) else dice.below(1000) * 4096
        if command == Command.WRITE and size > 1 << 16 and not dice.chance(16):
            size = 4096
        cookie = next(self.cookies)
        if command != Command.DISC:
            self.asked[cookie] = (command, flags, offset, size)
        body = bytes(size) if command == Command.WRITE and size <= c.SKIP_MAX else b""
        return c.REQUEST.pack(c.REQUEST_MAGIC, flags, command, cookie, offset, size) + body

    def _end(self) -> None:
        server = self.server
        session = server.session
        while self.open:
            server.answer(self.open.pop())
            server.drain()
            before = len(server.pieces)
            server.collect()
            self.open += server.pieces[before:]
        server.drain()
        too_long = any(cmd == Command.WRITE and size > c.SKIP_MAX for cmd, _, _, size in self.asked.values())
        assert not session.fault or too_long, session.fault
        answered = dict(self._answers())
        if not session.closing:
            assert answered.keys() == self.asked.keys(), "a request was not answered"
        able = Abilities(self.export, self.structured, self.allocation)
        for cookie, error in answered.items():
            fault = judge(able, *self.asked[cookie])
            assert fault is None or error == fault.error, (self.asked[cookie], error, fault)

    def _answers(self) -> Iterator[tuple[int, int]]:
        """(cookie, error) of every reply in the stream; each cookie once, every length right."""
        stream = iter(self._flat())
        seen: set[int] = set()
        for head in stream:
            (magic,) = struct.unpack_from(">I", head)
            structured = magic == c.STRUCTURED_MAGIC
            assert structured or magic == c.SIMPLE_MAGIC, hex(magic)
            if structured:
                _, flags, kind, cookie, length = c.CHUNK.unpack(head)
                assert flags == c.CHUNK_FLAG_DONE and self.structured
                error = self._chunk(kind, cookie, length, stream)
            else:
                _, error, cookie = c.SIMPLE.unpack(head)
                if self.asked[cookie][0] == Command.READ:
                    assert not self.structured
                    self._payload(stream, 0 if error else self.asked[cookie][3])
            assert cookie not in seen, "answered twice"
            seen.add(cookie)
            yield cookie, error

    def _chunk(self, kind: int, cookie: int, length: int, stream: Iterator[bytes]) -> int:
        command, _, offset, size = self.asked[cookie]
        if kind == Chunk.NONE:
            assert not length
            return 0
        if kind == Chunk.OFFSET_DATA:
            assert command == Command.READ and length == size + 8
            assert struct.unpack(">Q", next(stream)) == (offset,)
            self._payload(stream, size)
            return 0
        if kind == Chunk.BLOCK_STATUS:
            context, extent, status = c.CHUNK_STATUS.unpack(next(stream))
            assert command == Command.BLOCK_STATUS and self.allocation and length == 12
            assert (context, status) == (c.META_ALLOCATION_ID, 0) and 0 < extent <= size
            return 0
        assert kind == Chunk.ERROR, kind
        error, text = c.CHUNK_ERROR.unpack(next(stream))
        assert length == 6 + text and error
        next(stream).decode()
        return int(error)

    @staticmethod
    def _payload(stream: Iterator[bytes], size: int) -> None:
        while size > 0:
            size -= int.from_bytes(next(stream), "big")
        assert not size

    def _flat(self) -> Iterator[bytes]:
        """The stream cut where a reader of it would cut."""
        buffer = b""
        for item in self.server.said:
            if isinstance(item, int):
                assert not buffer, "a payload in the middle of a header"
                yield item.to_bytes(4, "big")
                continue
            buffer += item
            while buffer:
                if len(buffer) < 4:
                    break
                structured = struct.unpack_from(">I", buffer)[0] == c.STRUCTURED_MAGIC
                size = c.CHUNK.size if structured else c.SIMPLE.size
                yield buffer[:size]
                kind, length = (struct.unpack_from(">HQI", buffer, 6)[::2]) if structured else (0, 0)
                buffer = buffer[size:]
                cuts = {Chunk.OFFSET_DATA: [8], Chunk.BLOCK_STATUS: [12], Chunk.ERROR: [6, length - 6]}
                for cut in cuts.get(kind, []):
                    yield buffer[:cut]
                    buffer = buffer[cut:]
        assert not buffer


def _option(code: int, body: bytes = b"") -> bytes:
    return c.OPTION.pack(c.IHAVEOPT, code, len(body)) + body


def nbd_requests(data: bytes) -> None:
    """The client that the bytes describe."""
    _Client(Dice(data)).run()


# ----------------------------------------------------------------------------------------------------- control


def control_lines(data: bytes) -> None:
    """Lines of the control socket: cut alike in every split, and each a message or ProtocolError."""
    outcomes = []
    for step in (max(1, len(data)), 1, 5):
        splitter = LineSplitter(messages.REQUEST_BYTES_MAX)
        lines: list[bytes] = []
        fault = ""
        try:
            for at in range(0, len(data), step):
                lines += splitter.feed(data[at : at + step])
        except ProtocolError as error:
            fault = str(error)
        outcomes.append((None if fault else lines, fault))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    for line in outcomes[0][0] or data.split(b"\n")[:1]:
        _message(line, messages.decode_request)
        _message(line, messages.decode_reply)


def _message(line: bytes, decode: Any) -> None:
    try:
        message: Request | Reply = decode(line)
    except ProtocolError as error:
        assert str(error).isprintable()
        return
    try:
        again = messages.encode(message)
    except ProtocolError as error:  # escaped, it takes more room than it did
        assert "longer" in str(error) and len(line) > messages.REQUEST_BYTES_MAX // 12, error
        return
    assert again.count(b"\n") == 1 and again.endswith(b"\n")
    assert decode(again[:-1]) == message


# ------------------------------------------------------------------------------------- configuration and keys

PATH: Final = Path("/etc/replicator/r0.toml")


def configuration(data: bytes) -> None:
    """TOML text: a configuration that is right, or every fault at once, each one printable line."""
    try:
        config = parse(data, PATH)
    except ConfigError as error:
        assert error.faults and error.exit_code == 10
        for fault in error.faults:
            assert fault.startswith(f"{PATH}: ") and fault.isprintable(), fault
        return
    assert len(config.nodes) == 2 and config.volumes
    for node in config.nodes:
        assert config.node(node.name) is node
        assert node.volumes.keys() == config.volumes.keys()
        assert len(config.peer_ids(node)) == 1
    assert parse(_shown(config).encode(), PATH) == config, "what is written back means something else"


def _shown(config: ResourceConfig) -> str:
    lines = [f'protocol = "{config.protocol}"']
    for name, section in (
        ("options", config.options),
        ("net", config.net),
        ("disk", config.disk),
        ("device", config.device),
        *((f"volume.{number}", volume) for number, volume in config.volumes.items()),
        *((f'node."{node.name}"', node) for node in config.nodes),
        *(
            (f'node."{node.name}".volume.{number}', volume)
            for node in config.nodes
            for number, volume in node.volumes.items()
        ),
    ):
        lines.append(f"[{name}]")
        for key, (item, spec) in specs(type(section)).items():
            value = getattr(section, item.name)
            if value is not None:
                lines.append(f"{key} = {spec.kind.show(value)}")
    return "\n".join(lines) + "\n"


#: Every setting must have come through `_shown`; this keeps the list of sections honest.
SECTIONS: Final = {item.name for item in fields(ResourceConfig)} - {"name", "path", "protocol"}
assert {"options", "net", "disk", "device", "volumes", "nodes"} == SECTIONS, (Options, Net, Disk, Device)


def certificates(data: bytes) -> None:
    """The text of a file in peers/: certificates, or ConfigError, which never repeats what was in the file."""
    try:
        found = keys._parse_certificates(PATH, data.decode("utf-8", "replace"), "ask the peer again")
    except ConfigError as error:
        assert str(error).isprintable() and len(str(error)) < 300
        return
    assert 0 < len(found) <= keys.CERTIFICATES_MAX
    assert all(len(keys.fingerprint(certificate)) == 95 for certificate in found)
    assert b"PRIVATE KEY" not in data


CLIENTS: Final[dict[str, Any]] = {
    "nbd-stream": nbd_stream,
    "nbd-requests": nbd_requests,
    "control": control_lines,
    "config": configuration,
    "certificates": certificates,
}
