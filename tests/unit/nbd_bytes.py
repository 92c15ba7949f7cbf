# SPDX-License-Identifier: Apache-2.0
"""An NBD client as a few functions that return the bytes it would send, or the ones it expects."""

from __future__ import annotations

import itertools
import struct

from replicator.nbd.negotiation import Export
from replicator.nbd.session import NbdSession, State

MIB = 1 << 20
SIZE = 256 * MIB
EXPORT = Export(name="r0/0", size_bytes=SIZE)
GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
BASIC_FLAGS = 0x16D  # HAS_FLAGS FLUSH FUA TRIM WRITE_ZEROES MULTI_CONN
CLIENT = b"\0\0\0\x03"


def make(export: Export = EXPORT) -> NbdSession:
    return NbdSession({"": export, export.name: export}, itertools.count(1))


def drain(session: NbdSession) -> bytes:
    data = b"".join(session.take_output())
    session.sent(len(data))
    return data


def option(code: int, body: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", code, len(body)) + body


def counted(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def answer(code: int, kind: int, body: bytes = b"") -> bytes:
    return bytes.fromhex("0003e889045565a9") + struct.pack(">III", code, kind, len(body)) + body


def go(name: bytes = b"", code: int = 7, infos: tuple[int, ...] = ()) -> bytes:
    return option(code, counted(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos))


META = option(8) + option(10, counted(b"") + struct.pack(">I", 1) + counted(b"base:allocation"))


def transmission(before: bytes = b"", export: Export = EXPORT) -> NbdSession:
    session = make(export)
    session.receive(CLIENT + before + go())
    assert session.state is State.TRANSMISSION
    drain(session)
    return session


def ask(command: int, offset: int = 0, size: int = 0, data: bytes = b"", flags: int = 0, cookie: int = 0x11) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, size) + data


def simple(error: int = 0, cookie: int = 0x11) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie)


def chunk(kind: int, body: bytes = b"", cookie: int = 0x11) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, 1, kind, cookie, len(body)) + body
