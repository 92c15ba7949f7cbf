# SPDX-License-Identifier: Apache-2.0
"""Give mutated bytes right checksums, so that the fuzzer gets past the first check.

Only checksums (and what must be there to find them: magic numbers and tags) are changed, never a length or a value.
"""

from __future__ import annotations

import struct
import zlib

from replicator.core import sealed, wire
from replicator.core.geometry import PAGE, SECTOR

_CRC_AT = wire.HEADER_SIZE - 4


def frames(data: bytes) -> bytes:
    """Every header that can be found by walking from the front gets magic, version and both checksums."""
    out = bytearray(data)
    at = 0
    while len(out) - at >= wire.HEADER_SIZE:
        struct.pack_into("!IB", out, at, wire.MAGIC, wire.VERSION)
        struct.pack_into("!H", out, at + 10, 0)
        (length,) = struct.unpack_from("!I", out, at + 32)
        payload = bytes(out[at + wire.HEADER_SIZE : at + wire.HEADER_SIZE + length])
        struct.pack_into("!I", out, at + 36, zlib.crc32(payload))
        struct.pack_into("!I", out, at + _CRC_AT, zlib.crc32(out[at : at + _CRC_AT]))
        at += wire.HEADER_SIZE + length
    return bytes(out)


def sealed_block(magic: bytes, data: bytes) -> bytes:
    """4096 bytes whose checksum is right for what stands at the place of sequence, length and body.

    The tags are left as they are: the body goes on across them.
    """
    block = bytearray(data[:PAGE].ljust(PAGE, b"\0"))
    content = bytearray(b"".join(bytes(block[at : at + sealed.PIECE]) for at in range(0, PAGE, SECTOR)))
    content[:8] = magic
    (length,) = struct.unpack_from(">L", content, 16)
    end = min(24 + length, len(content))
    content[end:] = bytes(len(content) - end)
    crc = zlib.crc32(bytes(content[24:end]), zlib.crc32(bytes(content[:20])))
    struct.pack_into(">L", content, 20, crc)
    for number, at in enumerate(range(0, PAGE, SECTOR)):
        block[at : at + sealed.PIECE] = content[number * sealed.PIECE : (number + 1) * sealed.PIECE]
    return bytes(block)


def bitmap_sectors(data: bytes, slot: int) -> bytes:
    """Every whole sector of a bitmap slot gets the checksum of its place."""
    out = bytearray(data)
    for sector in range(len(out) // SECTOR):
        at = sector * SECTOR
        piece = bytes(out[at : at + SECTOR - 4])
        crc = zlib.crc32(piece, zlib.crc32(struct.pack(">LL", slot, sector)))
        struct.pack_into(">L", out, at + SECTOR - 4, crc or 0xFFFFFFFF)
    return bytes(out)
