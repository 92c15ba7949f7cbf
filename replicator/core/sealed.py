# SPDX-License-Identifier: Apache-2.0
"""A sealed block: 4 KiB that say whether they are whole, and if not, why.

A power cut leaves any mixture of old and new sectors; rot changes what was whole.  The first is expected
and harmless (that write was never acknowledged), the second must not take us back in time.  A checksum
alone cannot tell them apart.  So every 512-byte sector ends in a tag made from the block's sequence: tags
that differ are an interrupted write, tags that agree around a wrong checksum are a write that completed and
rotted.

Invariant: no mixture of two sealed blocks is ever accepted as content.  Format: docs/disk-format.md.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from replicator.core.geometry import PAGE, SECTOR

SECTORS = PAGE // SECTOR
TAG_BYTES = 4
PIECE = SECTOR - TAG_BYTES  #: bytes of content in one sector
CONTENT_BYTES = SECTORS * PIECE
_HEAD = struct.Struct(">8sQL")
_CRC = struct.Struct(">L")
_TAG = struct.Struct(">L")
_BODY_AT = _HEAD.size + _CRC.size
BODY_MAX = CONTENT_BYTES - _BODY_AT
SEQUENCE_MAX = (1 << 64) - 1
#: Above it nobody counts: a million writes a second for 290,000 years.  What says so is not ours; believing it would
#: leave no room to count on.
SEQUENCE_BELIEVED_MAX = (1 << 63) - 1
_TAG_CYCLE = (1 << 32) - 1
_BLANK_BLOCK = bytes(PAGE)

#: How far the sectors of an interrupted write may lie behind its sequence.  The previous write to the
#: same place is 2 (superblock) or 8 (activity log) behind, and each further crash in a row adds as
#: much; 1024 is beyond what can happen and far below what a sector of garbage shows.
TEAR_WINDOW = 1024


@dataclass(frozen=True, slots=True)
class Sealed:
    """A whole block."""

    sequence: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Blank:
    """4096 zeroes: never written."""


@dataclass(frozen=True, slots=True)
class Torn:
    """An interrupted write; `tag` is its newest tag, `tags` are those of all its sectors."""

    tag: int
    tags: frozenset[int] = field(default=frozenset(), compare=False)


@dataclass(frozen=True, slots=True)
class Damaged:
    """A write that completed and rotted; `tag` stands for its sequence (most frequent tag)."""

    tag: int


@dataclass(frozen=True, slots=True)
class Foreign:
    """Not a block of this kind, or not at this place."""


Verdict = Sealed | Blank | Torn | Damaged | Foreign


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest valid block of several places, and what the others say.

    `damaged_newer`: a block at least as new as `sealed` may have been there and is lost.  `next_sequence` is
    the only one that may be written next.  `index` and `sealed` are None when no block is valid.
    """

    index: int | None
    sealed: Sealed | None
    damaged_newer: bool
    next_sequence: int
    verdicts: tuple[Verdict, ...]


def tag_of(sequence: int) -> int:
    """Return the tag of a sequence: its low bits, but never 0 (a sector never written has tag 0)."""
    return (sequence - 1) % _TAG_CYCLE + 1


def seal(magic: bytes, sequence: int, body: bytes) -> bytes:
    """Return the 4096 bytes of a block; `magic` has 8 bytes, `body` at most `BODY_MAX`."""
    assert len(magic) == 8, f"magic of {len(magic)} bytes"
    assert len(body) <= BODY_MAX, f"body of {len(body)} bytes"
    assert 1 <= sequence <= SEQUENCE_MAX, f"sequence {sequence}"
    head = _HEAD.pack(magic, sequence, len(body))
    crc = zlib.crc32(body, zlib.crc32(head))
    content = b"".join((head, _CRC.pack(crc), body)).ljust(CONTENT_BYTES, b"\0")
    tag = _TAG.pack(tag_of(sequence))
    return b"".join(content[at : at + PIECE] + tag for at in range(0, CONTENT_BYTES, PIECE))


def unseal(magic: bytes, block: bytes) -> Verdict:
    """Return what 4096 bytes are; see the table in docs/disk-format.md."""
    assert len(block) == PAGE, f"block of {len(block)} bytes"
    if block == _BLANK_BLOCK:
        return Blank()
    content = b"".join(block[at : at + PIECE] for at in range(0, PAGE, SECTOR))
    found, sequence, length = _HEAD.unpack_from(content)
    if length <= BODY_MAX and sequence and _is_whole(content, length):
        return Sealed(sequence, content[_BODY_AT : _BODY_AT + length]) if found == magic else Foreign()
    if found != magic and block[:SECTOR].strip(b"\0"):
        return Foreign()
    return _why_broken(block)


def newest(magic: bytes, blocks: Sequence[bytes]) -> Newest:
    """Compare the blocks of all places; a block with sequence n belongs to place n % len(blocks)."""
    places = len(blocks)
    verdicts = [unseal(magic, block) for block in blocks]
    for place, verdict in enumerate(verdicts):
        if isinstance(verdict, Sealed) and (
            verdict.sequence % places != place or verdict.sequence > SEQUENCE_BELIEVED_MAX
        ):
            verdicts[place] = Foreign()
    valid = {place: verdict for place, verdict in enumerate(verdicts) if isinstance(verdict, Sealed)}
    index = max(valid, key=lambda place: valid[place].sequence, default=None)
    best = None if index is None else valid[index]
    base = 0 if best is None else best.sequence
    seen = base
    lost = False
    for place, verdict in enumerate(verdicts):
        if isinstance(verdict, Torn | Damaged):
            ahead = _ahead(verdict.tag, base)
            seen = max(seen, base + ahead)
            # A completed write, or one so far ahead that others must have completed before it, is missing.
            lost |= ahead > (0 if isinstance(verdict, Damaged) else TEAR_WINDOW) or verdict.tag == 0
            lost |= isinstance(verdict, Torn) and not _only_of(verdict.tags, place, places, base)
        elif isinstance(verdict, Foreign):
            lost = True
        elif isinstance(verdict, Blank):
            # Place p is first written with sequence p (place 0: with `places`).
            lost |= base >= (place or places)
    following = seen + 1
    if index is not None and following % places == index:
        following += 1
    return Newest(index, best, lost, following, tuple(verdicts))


def _is_whole(content: bytes, length: int) -> bool:
    end = _BODY_AT + length
    crc = zlib.crc32(content[_BODY_AT:end], zlib.crc32(content[: _HEAD.size]))
    return crc == _CRC.unpack_from(content, _HEAD.size)[0] and not content[end:].strip(b"\0")


def _why_broken(block: bytes) -> Torn | Damaged:
    tags = [_TAG.unpack_from(block, at + PIECE)[0] for at in range(0, PAGE, SECTOR)]
    highest = max(tags, key=lambda tag: sum(_ahead(tag, other) > 0 for other in tags))
    if len(set(tags)) > 1 and all(_behind(tag, highest) <= TEAR_WINDOW for tag in tags):
        return Torn(highest, frozenset(tags))
    counts = Counter(tags)
    return Damaged(max(counts, key=lambda tag: (counts[tag], _ahead(tag, highest))))


def _only_of(tags: frozenset[int], place: int, places: int, base: int) -> bool:
    """Return whether interrupted writes to this place can have left these tags.

    Each is of a sequence that belongs here.  A sector never written (0) was left by create-md or not at all: later
    than the round of writes after it, something has wiped that sector.
    """
    sequences = (base + (_ahead(tag, base) or -_behind(tag, tag_of(base))) for tag in tags if base and tag)
    return all(sequence % places == place for sequence in sequences) and (0 not in tags or base <= places)


def _ahead(tag: int, base: int) -> int:
    """Return how many sequences `tag` is ahead of sequence (or tag) `base`; 0 when it is not ahead.

    Tags come round after 2^32 - 1 sequences; the nearer direction counts.
    """
    if tag == 0:
        return 0
    distance = tag if base == 0 else (tag - tag_of(base)) % _TAG_CYCLE
    return distance if base == 0 or distance <= _TAG_CYCLE // 2 else 0


def _behind(tag: int, highest: int) -> int:
    if tag == 0:
        return highest  # never written: as if sequence 0
    return (highest - tag) % _TAG_CYCLE
