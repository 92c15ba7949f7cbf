# SPDX-License-Identifier: Apache-2.0
"""How frames, metadata and generations read in a trace.

A generation id is called g1, g2, ... in the order in which a trace first names it; `new` is the id of a copy that never
held data, `-` is none.  Ranges are block numbers; one that does not consist of whole blocks is given in bytes.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from dataclasses import dataclass

from replicator.core import activity, sealed, superblock
from replicator.core.generations import JUST_CREATED, PRIMARY_BIT, UNSET
from replicator.core.geometry import ACTIVITY_OFFSET, BLOCK, PAGE, SECTOR
from replicator.core.handshake_wire import (
    RelyAnswer,
    RoleAnswer,
    VolumeState,
    unpack_current_generation,
    unpack_disk_state,
    unpack_errno,
    unpack_generation,
    unpack_goodbye,
    unpack_ranges,
    unpack_rely_reply,
    unpack_role,
    unpack_role_reply,
    unpack_sequences,
    unpack_sync_pause,
)
from replicator.core.states import Disk
from replicator.core.superblock import PeerSlot, Superblock
from replicator.core.wire import Flag, Frame, Kind

NAMES = ("alpha", "beta")
#: Runs of these become one line: "WRITE 0-15 x16".
STREAM = frozenset({
    Kind.WRITE, Kind.TRIM, Kind.ZERO, Kind.RECEIVED, Kind.WRITTEN, Kind.FAILED, Kind.READ, Kind.READ_DATA,
    Kind.READ_FAILED, Kind.RESYNC_REQUEST, Kind.RESYNC_DATA, Kind.RESYNC_ZERO, Kind.RESYNC_EQUAL, Kind.RESYNC_FAILED,
    Kind.RESYNC_CONFIRM, Kind.BITMAP, Kind.PING, Kind.PONG,
})  # fmt: skip
_HEX = re.compile(r"\b[0-9a-f]{16}\b")
_FLAGS = {Flag.FUA: "FUA", Flag.KEEP: "KEEP"}
_STATE_FLAGS = ("crashed_primary", "survived", "full_sync", "primary", "discard", "paused")
_SUPERBLOCK_FLAGS = ("consistent", "was_up_to_date", "primary_indicator", "crashed_primary")
_SLOT_FLAGS = ("full_sync", "outdated", "survivor")


class Generations:
    """Names for ids."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {JUST_CREATED | PRIMARY_BIT: "new"}

    def name(self, generation: int) -> str:
        """g1, g2, ...; the primary bit carries no identity."""
        if generation == UNSET:
            return "-"
        key = generation | PRIMARY_BIT
        if key not in self._names:
            self._names[key] = f"g{len(self._names)}"
        return self._names[key]

    def in_text(self, text: str) -> str:
        """The same text with names for the ids in it."""
        return _HEX.sub(lambda found: self.name(int(found[0], 16)), text)


@dataclass(slots=True)
class Said:
    """A frame as words: `what`, then the blocks it concerns (None: not in whole blocks, then `more` says it)."""

    what: str
    blocks: set[int] | None = None
    more: str = ""


def blocks_of(offset: int, size: int) -> set[int] | None:
    """Whole blocks, or None."""
    if offset % BLOCK or size % BLOCK:
        return None
    return set(range(offset // BLOCK, (offset + size) // BLOCK))


def spans(blocks: Iterable[int]) -> str:
    """{0, 1, 2, 7} is 0-2,7."""
    parts: list[list[int]] = []
    for block in sorted(blocks):
        if parts and parts[-1][1] == block - 1:
            parts[-1][1] = block
        else:
            parts.append([block, block])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "none"


def range_words(offset: int, size: int) -> str:
    """Blocks, or bytes if they are not whole."""
    blocks = blocks_of(offset, size)
    return f"bytes {offset}+{size}" if blocks is None else spans(blocks)


def errno_word(number: int) -> str:
    """EIO, or ok."""
    return errno.errorcode[number] if number else "ok"


def frame_words(frame: Frame, names: Generations, written: dict[int, tuple[int, int]]) -> Said:
    """What a frame says; `written` maps the sequences of the peer's writes to (offset, size)."""
    kind, payload = frame.kind, frame.payload
    what = " ".join([kind.name, *(word for flag, word in _FLAGS.items() if frame.flags & flag)])
    if kind in (Kind.RECEIVED, Kind.WRITTEN, Kind.FAILED):
        return _ranges(what, [written.get(sequence, (0, 1)) for sequence in unpack_sequences(payload)])
    if kind is Kind.RESYNC_CONFIRM:
        return _ranges(what, unpack_ranges(payload))
    if kind is Kind.DISK_STATE:
        disk, ranges = unpack_disk_state(payload)
        text = f"{what} {Disk(disk).word}"
        return Said(text, more=f"hot {' '.join(range_words(*one) for one in ranges)}" if ranges else "")
    if kind in (Kind.BITMAP, Kind.PING, Kind.PONG):
        return Said(what)
    if kind in (Kind.READ_FAILED, Kind.RESYNC_FAILED):
        return Said(f"{what} {errno_word(unpack_errno(payload))}", blocks_of(frame.offset, frame.size))
    if kind is Kind.RESYNC_REQUEST and payload:
        what += " digest"
    if frame.size:
        return _ranges(what, [(frame.offset, frame.size)])
    return Said(what, more=_control_words(frame, names))


def _control_words(frame: Frame, names: Generations) -> str:
    payload = frame.payload
    match frame.kind:
        case Kind.VOLUME_STATE:
            return f"round {frame.sequence}: {_state_words(VolumeState.unpack(payload), names)}"
        case Kind.ROLE:
            return "Primary" if unpack_role(payload) else "Secondary"
        case Kind.ROLE_REPLY:
            return RoleAnswer(unpack_role_reply(payload)).name.lower().replace("_", " ")
        case Kind.RELY_REPLY:
            return RelyAnswer(unpack_rely_reply(payload)).name.lower().replace("_", " ")
        case Kind.SYNC_PAUSE:
            return "on" if unpack_sync_pause(payload) else "off"
        case Kind.GOODBYE:
            return f"{'in good order: ' if frame.flags & Flag.GRACEFUL else ''}{unpack_goodbye(payload)[1]}"
        case Kind.NEW_GENERATION:
            fresh, clear = unpack_generation(payload)
            return names.name(fresh) + (" clear bitmap" if clear else "")
        case Kind.CURRENT_GENERATION:
            return names.name(unpack_current_generation(payload))
        case Kind.BARRIER | Kind.BARRIER_ACK:
            return str(frame.sequence)
    return ""


def _ranges(what: str, ranges: list[tuple[int, int]]) -> Said:
    every: set[int] = set()
    for offset, size in ranges:
        blocks = blocks_of(offset, size)
        if blocks is None:
            return Said(what, more=" ".join(range_words(*one) for one in ranges))
        every |= blocks
    return Said(what, every)


def _state_words(state: VolumeState, names: Generations) -> str:
    parts = [f"{Disk(state.disk).word} {names.name(state.current)}"]
    if state.bitmap_id:
        parts.append(f"fork {names.name(state.bitmap_id)}")
    if state.exposed:
        parts.append(f"exposed {names.name(state.exposed)}")
    if state.history:
        parts.append(f"history {' '.join(map(names.name, state.history))}")
    if state.dirty_count:
        parts.append(f"{state.dirty_count} dirty")
    parts += [flag.replace("_", " ") for flag in _STATE_FLAGS if getattr(state, flag)]
    return ", ".join(parts)


# --- metadata


def decode_superblock(page: bytes) -> Superblock:
    """One copy."""
    found = sealed.unseal(superblock.MAGIC, page)
    assert isinstance(found, sealed.Sealed), found
    return superblock.unpack(found.body)


def superblock_words(old: Superblock, new: Superblock, names: Generations) -> str:
    """What a superblock says that the one before did not."""
    parts = []
    if new.current != old.current:
        parts.append(f"current {names.name(new.current)}")
    for before, after in zip(old.peers, new.peers, strict=True):
        parts += _slot_words(before, after, names)
    parts += [f"history +{names.name(one)}" for one in new.history if one not in old.history]
    parts += [f"history -{names.name(one)}" for one in old.history if one not in new.history]
    parts += _flag_words(old, new, _SUPERBLOCK_FLAGS)
    if new.size_bytes != old.size_bytes:
        parts.append(f"size {new.size_bytes // 1024} KiB")
    if new.resource_id != old.resource_id:
        parts.append("resource id")
    return "superblock: " + (", ".join(parts) or "as before")


def _slot_words(old: PeerSlot, new: PeerSlot, names: Generations) -> list[str]:
    parts = [] if old.bitmap_id == new.bitmap_id else [f"fork {names.name(new.bitmap_id)}"]
    return parts + _flag_words(old, new, _SLOT_FLAGS)


def _flag_words(old: object, new: object, flags: tuple[str, ...]) -> list[str]:
    changed = [flag for flag in flags if getattr(old, flag) != getattr(new, flag)]
    return [("+" if getattr(new, flag) else "-") + flag.replace("_", "-") for flag in changed]


def superblock_facts(found: Superblock, names: Generations) -> str:
    """All of it that matters."""
    parts = [f"current {names.name(found.current)}"]
    parts += [f"fork {names.name(slot.bitmap_id)}" for slot in found.peers]
    parts.append(f"history {' '.join(map(names.name, found.history)) or '-'}")
    parts += [flag.replace("_", "-") for flag in _SUPERBLOCK_FLAGS if getattr(found, flag)]
    parts += [flag.replace("_", "-") for slot in found.peers for flag in _SLOT_FLAGS if getattr(slot, flag)]
    return ", ".join(parts)


def activity_words(page: bytes) -> str:
    """Which extents are hot."""
    found = sealed.unseal(activity.MAGIC, page)
    assert isinstance(found, sealed.Sealed), found
    numbers = [int.from_bytes(found.body[at : at + 4], "big") for at in range(0, len(found.body), 4)]
    return f"activity log: {'hot ' + spans(numbers) if numbers else 'empty'}"


def pages_words(offset: int, data: bytes, fixed_slot_bytes: int) -> str:
    """Bitmap pages: how many bits are set in them."""
    page = (offset + fixed_slot_bytes) // PAGE
    ones = sum(int.from_bytes(data[at : at + SECTOR - 4], "big").bit_count() for at in range(0, len(data), SECTOR))
    pages = len(data) // PAGE
    where = f"page {page}" if pages == 1 else f"pages {page}-{page + pages - 1}"
    return f"bitmap {where}: {ones} dirty"


def meta_words(pieces: list[tuple[int, bytes]], old: Superblock, names: Generations) -> tuple[list[str], Superblock]:
    """What one metadata write said, and the superblock after it."""
    said: list[str] = []
    for offset, data in sorted(pieces):
        if offset < 0:
            said.append(pages_words(offset, data, old.slot_bytes))
        elif offset < ACTIVITY_OFFSET:
            new = decode_superblock(data[:PAGE])
            said.append(superblock_words(old, new, names))
            old = new
        else:
            last = max(
                (data[at : at + PAGE] for at in range(0, len(data), PAGE)),
                key=lambda page: int.from_bytes(page[8:16], "big"),
            )
            said.append(activity_words(last))
    return said, old
