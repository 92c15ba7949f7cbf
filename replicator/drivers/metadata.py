# SPDX-License-Identifier: Apache-2.0
"""The metadata area on a real device: make it, read it for the core, show it to an operator.

The bytes are the core's business (docs/disk-format.md, `core/superblock`, `activity`, `bitmap`); this driver
knows where they are and what else may be there.

Invariants:
- `create_metadata` overwrites nothing it recognises (our own metadata, file systems, volume managers) unless
  it is forced, and names what it found.
- Interrupted anywhere, it leaves no superblock, or one that is refused, or a complete area: the fixed part is
  zeroed, then the bitmaps are written, then the fixed part, each stable before the next.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from replicator.core import activity, bitmap, sealed, superblock
from replicator.core.generations import JUST_CREATED
from replicator.core.geometry import (
    ACTIVITY_BLOCKS,
    ACTIVITY_OFFSET,
    BLOCK,
    FIXED_BYTES,
    PAGE,
    PAGE_BLOCKS,
    SUPERBLOCK_OFFSETS,
    Layout,
    align_down,
    area_bytes,
    block_count,
    external_layout,
    internal_layout,
)
from replicator.drivers.backing import BUFFER_SIZE, Backing, absent, aligned_buffer, open_backing, put
from replicator.errors import DiskError, FormatError, Refused

#: Room for the GPT, btrfs and GFS2 at the start of a device; the most that any signature needs.
HEAD_BYTES = 128 << 10
RAID_MAGIC = (0xA92B4EFC).to_bytes(4, "little")
_FORCE = "if nothing of it is needed, run `replicator create-md --force`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a volume lies on this node, from the configuration."""

    disk: str  #: block device or regular file with the data
    metadata: str | None = None  #: device or file of its own; None: internal, at the tail of `disk`
    io: str = "direct"  #: or "buffered"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedDisk:
    """Both stores, open, and what core `DiskOpened` carries (`layout.data_size` is its `size`)."""

    data: Backing
    metadata: Backing  #: the same object as `data` when internal
    layout: Layout
    fixed: bytes
    bitmaps: dict[int, bytes]


def create_metadata(
    place: Place,
    *,
    volume: int,
    node_id: int,
    peer_ids: Sequence[int],
    slots: int,
    resource_id: bytes = superblock.UNKNOWN_RESOURCE,
    al_extents: int = activity.ACTIVITY_DEFAULT,
    force: bool = False,
) -> superblock.Superblock:
    """Write a fresh metadata area: a copy that is JustCreated and Inconsistent.  Returns what was written.

    An external metadata file that is absent (or empty) is made, with its space allocated.  Raises `Refused`
    (code "metadata-exists" or "would-overwrite"; overridden by `force`) and `DiskError`.
    """
    assert len(peer_ids) <= slots, (peer_ids, slots)
    with _stores(place, create_for_slots=slots) as (data, metadata):
        if metadata is data:
            layout = internal_layout(data.size, slots)
        else:
            layout = external_layout(metadata.size, data.size, slots)
        if not force:
            _refuse_what_would_be_lost(data, metadata, layout)
        free = [superblock.PeerSlot()] * (slots - len(peer_ids))
        fresh = superblock.Superblock(
            resource_id=resource_id,
            volume=volume,
            node_id=node_id,
            size_bytes=0,
            device_bytes=align_down(layout.data_size, 512),
            slot_bytes=layout.slot_bytes,
            current=JUST_CREATED,
            peers=(*(superblock.PeerSlot(node_id=peer) for peer in peer_ids), *free),
            al_extents=al_extents,
        )
        try:
            _write_area(metadata, layout, superblock.fresh_fixed_part(fresh))
        except OSError as error:
            raise DiskError(f"the metadata cannot be written to {metadata.path}: {error.strerror}") from error
    return fresh


def open_disk(place: Place, *, volume: int, node_id: int) -> OpenedDisk:
    """Open both stores for ourselves alone and read the metadata area.

    Blocks while it reads (32 MiB per TiB and slot).  Raises `DiskError` (cannot be opened, too small) and
    `FormatError` (no metadata, damaged, or of another volume or node); then nothing stays open.
    """
    data = open_backing(place.disk, io=place.io)
    metadata = data
    try:
        if place.metadata is not None:
            metadata = open_backing(place.metadata, io=place.io)
        opened, found = _read_area(data, metadata)
        if (found.volume, found.node_id) != (volume, node_id):
            raise FormatError(
                f"the metadata on {metadata.path} belongs to volume {found.volume} of node {found.node_id}, "
                f"not to volume {volume} of node {node_id}",
                hint="check the configured devices and node ids",
            )
    except BaseException:
        metadata.close()
        data.close()
        raise
    return opened


def dump(place: Place) -> dict[str, object]:
    """Everything the metadata area says, as plain JSON values; generation ids are 16 hexadecimal digits.

    Raises as `open_disk`; a disk that a running process has attached is in use.
    """
    with _stores(place, read_only=True) as (data, metadata):
        opened, found = _read_area(data, metadata)
        chosen = superblock.choose(*_copies(opened.fixed))
        hot = activity.recover(opened.fixed[ACTIVITY_OFFSET : ACTIVITY_OFFSET + ACTIVITY_BLOCKS * PAGE])
        blocks = block_count(found.size_bytes or opened.layout.data_size)
        return {
            "format_version": found.format_version,
            "place": "internal" if metadata is data else "external",
            "disk": place.disk,
            "metadata": metadata.path,
            "resource_id": found.resource_id.hex(),
            "volume": found.volume,
            "node_id": found.node_id,
            "size_bytes": found.size_bytes,
            "device_bytes": found.device_bytes,
            "data_bytes": opened.layout.data_size,
            "slot_bytes": found.slot_bytes,
            "slot_count": found.slot_count,
            "sequence": chosen.sequence,
            "notes": [*chosen.notes, *hot.notes],
            "current": f"{found.current:016x}",
            "history": [f"{generation:016x}" for generation in found.history],
            "flags": {
                name: getattr(found, name)
                for name in ("consistent", "was_up_to_date", "primary_indicator", "crashed_primary")
            },
            "peers": [
                _dump_peer(slot, peer, opened.bitmaps[slot], blocks)
                for slot, peer in enumerate(found.peers)
                if peer.node_id != superblock.NO_NODE
            ],
            "activity_log": {
                "extents_max": found.al_extents,
                "sequence": hot.sequence,
                "unknown": hot.unknown,
                "hot_extents": list(hot.extents),
            },
        }


def _dump_peer(slot: int, peer: superblock.PeerSlot, raw: bytes, blocks: int) -> dict[str, object]:
    bits, damaged = bitmap.Bitmap.decode(raw, blocks, slot)
    return {
        "node_id": peer.node_id,
        "slot": slot,
        "bitmap_id": f"{peer.bitmap_id:016x}",
        "full_sync": peer.full_sync,
        "outdated": peer.outdated,
        "survivor": peer.survivor,
        "dirty_blocks": blocks if peer.full_sync else bits.dirty_count,
        "damaged_sectors": damaged,
    }


# -- the area -------------------------------------------------------------------------------------------


@contextmanager
def _stores(place: Place, *, read_only: bool = False, create_for_slots: int = 0) -> Iterator[tuple[Backing, Backing]]:
    data = open_backing(place.disk, io=place.io, read_only=read_only)
    metadata = data
    try:
        if place.metadata is not None:
            if create_for_slots and absent(place.metadata):
                _create_file(place.metadata, area_bytes(data.size, create_for_slots))
            metadata = open_backing(place.metadata, io=place.io, read_only=read_only)
        yield data, metadata
    except OSError as error:
        raise DiskError(f"{metadata.path} cannot be read: {error.strerror}") from error
    finally:
        metadata.close()
        data.close()


def _create_file(path: str, size: int) -> None:
    """A metadata file with its space allocated: it must not run out of space later."""
    if Path(path).parts[:2] == ("/", "dev"):
        raise DiskError(f"the metadata device {path} does not exist")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
            os.fsync(fd)
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
        directory = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise DiskError(f"the metadata file {path} cannot be made: {error.strerror}") from error


def _fixed_base(area: Backing) -> int:
    base = align_down(area.size, PAGE) - FIXED_BYTES
    if base < 0:
        raise DiskError(
            f"{area.path} with {area.size} bytes is too small to hold metadata",
            hint="check whether the device was replaced or cut",
        )
    return base


def _copies(fixed: bytes) -> tuple[bytes, bytes]:
    first, second = (fixed[offset : offset + PAGE] for offset in SUPERBLOCK_OFFSETS)
    return first, second


def _read_area(data: Backing, metadata: Backing) -> tuple[OpenedDisk, superblock.Superblock]:
    try:
        base = _fixed_base(metadata)
        fixed = metadata.read(base, FIXED_BYTES)
        found = superblock.choose(*_copies(fixed)).superblock
        layout = _layout_of(found, base, data, internal=metadata is data)
        bitmaps = {slot: metadata.read(layout.slot_base(slot), layout.slot_bytes) for slot in range(layout.slots)}
    except FormatError as error:
        raise FormatError(f"{metadata.path}: {error.message}", hint=error.hint) from error
    except OSError as error:
        raise DiskError(f"the metadata on {metadata.path} cannot be read: {error.strerror}") from error
    opened = OpenedDisk(data=data, metadata=metadata, layout=layout, fixed=fixed, bitmaps=bitmaps)
    return opened, found


def _layout_of(found: superblock.Superblock, base: int, data: Backing, *, internal: bool) -> Layout:
    """The layout that the superblock describes, on the device as it is today."""
    room = base - found.slot_count * found.slot_bytes
    if room < 0:
        raise FormatError(
            f"{found.slot_count} bitmap slots of {found.slot_bytes} bytes do not fit below the superblock",
            hint="check whether the metadata device was replaced or cut",
        )
    described = found.slot_bytes // PAGE * PAGE_BLOCKS * BLOCK  # what the bitmap slots can describe
    data_size = align_down(min(room if internal else data.size, described), 512)
    if data_size < found.size_bytes:
        raise DiskError(
            f"{data.path} offers {data_size} bytes, but the volume has {found.size_bytes}",
            hint="check whether the device was replaced or has shrunk",
        )
    return Layout(data_size=data_size, fixed_base=base, slot_bytes=found.slot_bytes, slots=found.slot_count)


def _write_area(metadata: Backing, layout: Layout, fixed: bytes) -> None:
    bounce, lock = aligned_buffer(), threading.Lock()

    def write(offset: int, content: bytes) -> None:
        put(metadata, offset, [memoryview(content)], bounce, lock, False)

    write(layout.fixed_base, bytes(FIXED_BYTES))
    metadata.sync()
    for slot in range(layout.slots):
        pages = bitmap.fresh_pages(slot, layout.slot_bytes)
        offset = layout.slot_base(slot)
        while chunk := b"".join(islice(pages, BUFFER_SIZE // PAGE)):
            write(offset, chunk)
            offset += len(chunk)
    metadata.sync()
    write(layout.fixed_base, fixed)
    metadata.sync()


# -- what is there already ----------------------------------------------------------------------------------


def _refuse_what_would_be_lost(data: Backing, metadata: Backing, layout: Layout) -> None:
    copies = _copies(metadata.read(layout.fixed_base, FIXED_BYTES))
    verdicts = sealed.newest(superblock.MAGIC, copies).verdicts
    if any(isinstance(verdict, sealed.Sealed | sealed.Torn | sealed.Damaged) for verdict in verdicts):
        message = f"{metadata.path} holds metadata of this program already"
        raise Refused("metadata-exists", message, hint=f"new metadata means a full sync; {_FORCE}")
    head = metadata.read(0, min(HEAD_BYTES, metadata.size))
    tail_at = max(0, metadata.size - HEAD_BYTES)
    tail = metadata.read(tail_at, metadata.size - tail_at)
    found = find_signature(head, tail, metadata.size)
    if found is None:
        foreign = any(isinstance(verdict, sealed.Foreign) for verdict in verdicts)
        if foreign and metadata is not data:
            message = f"the metadata device {metadata.path} is not empty"
            raise Refused("would-overwrite", message, hint=_FORCE)
        return
    name, end = found
    if metadata is not data:
        raise Refused("would-overwrite", f"the metadata device {metadata.path} holds {name}", hint=_FORCE)
    if end is None:
        message = f"{data.path} holds {name}, which may use the end of the device where the metadata would go"
        raise Refused("would-overwrite", message, hint=f"use external metadata; or, {_FORCE}")
    if end > layout.data_size:
        left = f"beside internal metadata only {layout.data_size} bytes are left"
        message = f"{data.path} holds {name} of {end} bytes, but {left}"
        hint = f"shrink it by {end - layout.data_size} bytes, or use external metadata; or, {_FORCE}"
        raise Refused("would-overwrite", message, hint=hint)


def find_signature(head: bytes, tail: bytes, size: int) -> tuple[str, int | None] | None:
    """What lies on a device, by its first and last bytes, and where that ends (None: unknown)."""

    def at_end(offset: int) -> bytes:
        at = offset - (size - len(tail))
        return tail[at:] if at >= 0 else b""

    if any(at_end(offset).startswith(b"EFI PART") for offset in (size - 512, size - 4096)):
        return "a GUID partition table", None
    raid_ends = (align_down(size, 65536) - 65536, align_down(size - 8192, 4096))  # formats 0.90 and 1.0
    if any(at_end(offset).startswith(RAID_MAGIC) for offset in raid_ends):
        return "a software RAID member", None
    for name, magic, offsets, end_of in _HEAD_MARKS:
        if any(head[offset : offset + len(magic)] == magic for offset in offsets):
            return name, None if end_of is None else end_of(head)
    return None


def _number(head: bytes, offset: int, size: int) -> int:
    return int.from_bytes(head[offset : offset + size], "little")


def _end_of_ext(head: bytes) -> int:
    blocks = _number(head, 1024 + 4, 4)
    if _number(head, 1024 + 96, 4) & 0x80:  # INCOMPAT_64BIT
        blocks |= _number(head, 1024 + 0x150, 4) << 32
    return blocks << (10 + _number(head, 1024 + 24, 4) % 32)


def _end_of_xfs(head: bytes) -> int:
    return int.from_bytes(head[4:8], "big") * int.from_bytes(head[8:16], "big")


def _end_of_btrfs(head: bytes) -> int:
    return _number(head, 65536 + 0xD1, 8)  # of this device, which is one of perhaps several


def _end_of_swap(head: bytes) -> int:
    return (_number(head, 1024 + 4, 4) + 1) * 4096


def _end_of_ntfs(head: bytes) -> int:
    return (_number(head, 0x28, 8) + 1) * _number(head, 11, 2)


#: Name, magic, places, how to find the end of what has this magic.  Containers before what they may contain.
_HEAD_MARKS: tuple[tuple[str, bytes, tuple[int, ...], Callable[[bytes], int] | None], ...] = (
    ("a GUID partition table", b"EFI PART", (512, 4096), None),
    ("an LVM physical volume", b"LABELONE", (0, 512, 1024, 1536), None),
    ("a LUKS container", b"LUKS\xba\xbe", (0,), None),
    ("a software RAID member", RAID_MAGIC, (0, 4096), None),
    ("an ext2/3/4 file system", b"\x53\xef", (1024 + 56,), _end_of_ext),
    ("an XFS file system", b"XFSB", (0,), _end_of_xfs),
    ("a btrfs file system", b"_BHRfS_M", (65536 + 64,), _end_of_btrfs),
    ("a swap area", b"SWAPSPACE2", (4096 - 10,), _end_of_swap),
    ("an NTFS file system", b"NTFS    ", (3,), _end_of_ntfs),
    ("a GFS2 file system", (0x01161970).to_bytes(4, "big"), (65536,), None),
    ("an OCFS2 file system", b"OCFSV2", (1024, 2048, 4096, 8192), None),
    ("an F2FS file system", (0xF2F52010).to_bytes(4, "little"), (1024,), None),
    ("a partition table or boot sector", b"\x55\xaa", (510,), None),
)
