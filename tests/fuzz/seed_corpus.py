# SPDX-License-Identifier: Apache-2.0
"""Make the seeds of the corpus: ``python -m tests.fuzz.seed_corpus``.

Seeds are what the product itself writes (frames, superblocks, negotiations, the example configuration), and the same
with a length field at its limits.  Nothing is drawn at random, so the files are the same on every machine; files that
are not made here (what a fuzzer found, kept under a name that tells its story) are left alone.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from typing import Final

from replicator.config.reference import EXAMPLE
from replicator.core import activity, superblock
from replicator.core import handshake_wire as hw
from replicator.core.bitmap import Bitmap
from replicator.core.geometry import ACTIVITY_BLOCKS, PAGE, slot_bytes_for
from replicator.core.superblock import PeerSlot, Superblock
from replicator.core.wire import MAGIC, RULES, VERSION, Frame, Kind
from replicator.nbd import constants as c
from tests.fuzz import repair
from tests.fuzz.formats import PAYLOAD_KINDS, joined
from tests.fuzz.hostile import STARTS, VERBS
from tests.fuzz.targets import CORPUS
from tests.unit.frames import HELLO, STATE
from tests.unit.nbd_bytes import CLIENT, META, ask, counted, go, option

MIB: Final = 1 << 20
PAYLOADS: Final[dict[Kind, bytes]] = {
    Kind.HELLO: HELLO.pack(),
    Kind.AGREE: bytes(range(32)),
    Kind.GOODBYE: hw.pack_goodbye(1, "disconnected by the operator"),
    Kind.ROLE: b"\1",
    Kind.ROLE_REPLY: b"\3",
    Kind.VOLUME_STATE: STATE.pack(),
    Kind.BITMAP: b"\2",
    Kind.DISK_STATE: hw.pack_disk_state(0, [(0, 4 * MIB), (8 * MIB, 512)]),
    Kind.NEW_GENERATION: hw.pack_generation(0x1234, clear_bitmap=True),
    Kind.CURRENT_GENERATION: hw.pack_current_generation(0x1234),
    Kind.RELY_REPLY: b"\1",
    Kind.RECEIVED: hw.pack_sequences([1]),
    Kind.WRITTEN: hw.pack_sequences([1, 2, 1 << 63]),
    Kind.FAILED: hw.pack_sequences([3]),
    Kind.READ_FAILED: hw.pack_errno(5),
    Kind.RESYNC_REQUEST: bytes(16),
    Kind.RESYNC_FAILED: hw.pack_errno(5),
    Kind.RESYNC_CONFIRM: hw.pack_ranges([(0, MIB), (2 * MIB, 4096)]),
    Kind.SYNC_PAUSE: b"\1",
}


def frame(kind: Kind) -> Frame:
    """A legal frame of a kind, with every field that it may use."""
    rule = RULES[kind]
    size = 512 if rule.size_max else 0
    payload = bytes(range(256)) * 2 if rule.length_is_size else PAYLOADS.get(kind, b"")
    return Frame(
        kind, volume=0 if rule.link_wide else 1, flags=rule.flags, sequence=7 if rule.sequence else 0,
        offset=8192 if size else 0, size=size, payload=payload,
    )  # fmt: skip


def _header(kind: Kind, length: int) -> bytes:
    rule = RULES[kind]
    size = 4096 if rule.size_max else 0
    head = struct.pack("!IBBHHHIQQIII", MAGIC, VERSION, kind, 0, 0, 0, size, 0, 0, length, 0, 0)
    return repair.frames(head)


def frames() -> Iterator[tuple[str, bytes]]:
    """One of each kind, a whole link, and lengths at their limits."""
    for kind in Kind:
        yield kind.name.lower(), joined(frame(kind))
    link = [frame(Kind.HELLO), frame(Kind.AGREE), frame(Kind.ROLE), frame(Kind.VOLUME_STATE), frame(Kind.WRITE)]
    yield "link", joined(*link)
    yield "link-cut", joined(*link)[:-100]
    for kind in (Kind.HELLO, Kind.WRITE, Kind.DISK_STATE, Kind.WRITTEN):
        limit = RULES[kind].length_max
        for length in (0, limit, limit + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1):
            yield f"length-{kind.name.lower()}-{length}", _header(kind, length)


def payloads() -> Iterator[tuple[str, bytes]]:
    """One of each parser, and counts at their limits."""
    for index, kind in enumerate(PAYLOAD_KINDS):
        yield kind.name.lower(), bytes([index]) + PAYLOADS[kind]
    which = PAYLOAD_KINDS.index(Kind.DISK_STATE)
    for count in (0, (1 << 31) - 1, 1 << 31, (1 << 32) - 1):
        yield f"disk-state-count-{count}", struct.pack("!BBI", which, 0, count) + bytes(12)
    packed = bytearray(PAYLOADS[Kind.HELLO])
    packed[62] = 255
    yield "hello-name-255", bytes([PAYLOAD_KINDS.index(Kind.HELLO)]) + bytes(packed)


def _superblock() -> Superblock:
    return Superblock(
        resource_id=bytes(range(16)), volume=0, node_id=0, size_bytes=MIB, device_bytes=MIB,
        slot_bytes=slot_bytes_for(MIB), current=0x1234, history=(0x99,), consistent=True, was_up_to_date=True,
        peers=(PeerSlot(node_id=1, bitmap_id=0x77), PeerSlot()),
    )  # fmt: skip


def superblocks() -> Iterator[tuple[str, bytes]]:
    """Fresh, torn, rotten, blank; bodies; a sequence beyond all counting."""
    found = _superblock()
    both = superblock.fresh_fixed_part(found)[: 2 * PAGE]
    newer = superblock.encode(found, 3)
    yield "fresh", both
    yield "torn", both[:PAGE] + newer[:512] + both[PAGE + 512 :]
    yield "rotten", both[:300] + b"\xff" + both[301:]
    yield "blank-and-valid", bytes(PAGE) + both[PAGE:]
    yield "body", found.pack()
    yield "sequence-max", superblock.encode(found, (1 << 64) - 2) + superblock.encode(found, (1 << 64) - 1)


def sealed_blocks() -> Iterator[tuple[str, bytes]]:
    """As the superblocks, and a body as long as can be."""
    found = _superblock()
    yield "pair", superblock.encode(found, 2) + superblock.encode(found, 1)
    for length in (0, 4040, 4041, (1 << 31) - 1, 1 << 31, (1 << 32) - 1):
        yield f"length-{length}", superblock.MAGIC + struct.pack(">QL", 5, length) + bytes(64)


def activity_logs() -> Iterator[tuple[str, bytes]]:
    """Raw rings, and a description of one."""
    block = activity.encode((1, 2, 500), 9)
    ring = activity.fresh_ring(0)[0]
    yield "ring-front", (ring[:PAGE] + block)[: PAGE + 64]
    yield "described", bytes(range(1, 200))
    yield "sequence-max", b"\1" + b"\xc0" * 8 + b"\xff" * 80
    yield "empty", b""
    assert len(ring) == ACTIVITY_BLOCKS * PAGE


def bitmap_pages() -> Iterator[tuple[str, bytes]]:
    """Right pages, one page too few, one rotten sector."""
    bitmap = Bitmap(2000, 3)
    bitmap.mark(10, 100)
    head = struct.pack(">HB", 1999, 3)
    page = bitmap.encode_page(0)
    yield "page", head + page
    yield "short", head + page[:700]
    yield "rotten", head + page[:5] + b"\xff" + page[6:]


def bitmap_chunks() -> Iterator[tuple[str, bytes]]:
    """Draws that lead to every encoding."""
    for name, how in (("ones", 0), ("zlib", 1), ("raw", 4), ("any", 7)):
        yield name, bytes([4, 0, 0, 0, 0, 8, 0, 0, 64, 0, how, 1, 2, 3, 4, 5, 6, 7, 8, 9]) * 4
    yield "bomb", bytes([4, 0, 0, 0, 0, 8, 0, 0, 255, 1, 255]) * 3


def nbd_streams() -> Iterator[tuple[str, bytes]]:
    """Negotiations and requests as clients send them, and lengths at their limits."""
    ready = CLIENT + go()
    yield "export-name", CLIENT + option(1) + ask(0, 0, 512) + ask(2)
    yield "all-options", CLIENT + b"".join(option(code, counted(b"")) for code in range(1, 12))
    yield "structured", CLIENT + META + go(b"r0/1", infos=(1, 2, 3)) + ask(7, 0, 8192) + ask(0, 0, 4096) + ask(2)
    yield "every-command", ready + b"".join(ask(n, 0, 512, bytes(512) if n == 1 else b"") for n in (0, 1, 3, 4, 6, 5))
    yield "many-pieces", ready + ask(4, 0, 200 * MIB) * 3
    yield "refused-write", CLIENT + go(b"r0/1") + ask(1, 0, 4096, bytes(4096)) + ask(0, 0, 4096)
    for length in (0, 32 * MIB, 32 * MIB + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1):
        for command in (0, 1, 4):
            yield f"length-{command}-{length}", ready + ask(command, 0, length, bytes(64))
        yield f"option-length-{length}", CLIENT + struct.pack(">QII", c.IHAVEOPT, 7, length) + bytes(32)
        yield f"name-length-{length}", CLIENT + option(7, struct.pack(">I", length) + bytes(8))


def control() -> Iterator[tuple[str, bytes]]:
    """Requests and replies, and JSON that readers disagree about."""
    yield "status", b'{"verb":"status"}\n'
    yield "primary", json.dumps({"verb": "primary", "args": {"force": True}, "id": 7}).encode() + b"\n"
    yield "reply", b'{"ok":true,"code":"ok","number":0,"message":"","hint":"","data":{"a":[1]},"final":true,"id":1}\n'
    yield "refusal", b'{"ok":false,"final":true,"code":"no-up-to-date-data","number":-2,"message":"Need"}\n'
    yield "two-lines-and-a-half", b'{"verb":"ping","id":1}\n{"verb":"gi","id":2}\n{"verb"'
    yield "twice", b'{"verb":"status","verb":"down"}\n'
    yield "numbers", b'{"verb":"status","args":{"a":1e400,"b":NaN,"c":-0,"d":' + b"9" * 100 + b"}}\n"
    yield "surrogate", b'{"verb":"status","args":{"a":"\\ud800"}}\n'
    yield "deep", b'{"verb":"status","args":' + b"[" * 900 + b"]" * 900 + b"}\n"


def configurations() -> Iterator[tuple[str, bytes]]:
    """The example, with everything set, and what TOML allows and we do not."""
    yield "example", EXAMPLE.encode()
    everything = EXAMPLE.replace('timeout = "6s"', 'timeout = "5s"\nping-interval = "20s"\nfencing = "resource-only"')
    yield "more", everything.replace("[volume.0]", '[volume.0]\nsize = "1GiB"').encode()
    yield "wrong", EXAMPLE.replace('"6s"', '"6 weeks"').replace("id = 1", "id = 0").encode()
    yield "dates", b"protocol = 1979-05-27T07:32:00Z\nnet = [[]]\n[volume]\n0 = 1\n[node.a]\n[node.b]\n"
    yield "dotted", b'node."a b".volume.0.disk = 1\nnode.b = {id = 0x1F, address = "::1"}\nvolume.00 = {}\n'
    yield "numbers", b"[options]\n[disk]\nal-extents = 99999999999999999999\nresync-max-rate = inf\n"


def certificates() -> Iterator[tuple[str, bytes]]:
    """What looks like one."""
    begin, end = b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n"
    yield "empty-certificate", begin + b"AAAA\n" + end
    yield "nine-certificates", (begin + b"AAAA\n" + end) * 9
    yield "bad-base64", begin + b"A\n" + end
    yield "private-key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
    yield "only-begin", begin


def _scripts(name: str, length: int) -> Iterator[tuple[str, bytes]]:
    """Each state to begin in, with decisions that are as good as any."""
    for index, start in enumerate(STARTS):
        for turn in range(2):
            decisions = hashlib.shake_128(f"{name} {start.__name__} {turn}".encode()).digest(length)
            yield f"{start.__name__}-{turn}", bytes([index, turn * 3]) + decisions


def seeds() -> dict[str, dict[str, bytes]]:
    """target -> file name -> content"""
    assert len(VERBS) == 12
    return {
        "frames": dict(frames()),
        "payloads": dict(payloads()),
        "sealed": dict(sealed_blocks()),
        "superblock": dict(superblocks()),
        "activity": dict(activity_logs()),
        "bitmap-pages": dict(bitmap_pages()),
        "bitmap-chunks": dict(bitmap_chunks()),
        "nbd-stream": dict(nbd_streams()),
        "nbd-requests": {
            f"client-{n}": hashlib.shake_128(b"%d" % n).digest(120) for n in range(6)
        },
        "control": dict(control()),
        "config": dict(configurations()),
        "certificates": dict(certificates()),
        "peer": dict(_scripts("peer", 160)),
        "operator": dict(_scripts("operator", 120)),
    }  # fmt: skip


def main() -> int:
    """Write what is not there or not the same."""
    written = 0
    for target, files in seeds().items():
        directory = CORPUS / target
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            path = directory / name
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
                written += 1
    print(f"{written} seeds written to {CORPUS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
