# SPDX-License-Identifier: Apache-2.0
"""create-md, interrupted everywhere, on a real file.

The writes of `create_metadata` go through `metadata._write_area` and a `Backing`; a backing that keeps a list of what
it was told shows them in order.  (The list is complete: the file that `create_metadata` itself makes is compared with
the list's last image.)  What a power cut may leave is then put into a file, opened as the daemon opens it, and created
again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from replicator.core import superblock
from replicator.core.geometry import FIXED_BYTES, SECTOR, Layout, align_down, external_layout, internal_layout
from replicator.drivers import metadata
from replicator.drivers.backing import Backing, open_backing
from replicator.drivers.metadata import OpenedDisk, Place, create_metadata
from replicator.errors import FormatError, Refused
from tests.crash.enumerate import subsets

NODE, PEERS, SLOTS, IDENTITY = 0, (1,), 1, bytes(range(16))


class Noted(Backing):
    """A real file, and what was asked of it: (offset, bytes), or None for a sync."""

    def note(self) -> None:
        """Begin."""
        self.asked: list[tuple[int, bytes] | None] = []

    def write(self, buffers: list[memoryview], offset: int) -> None:
        self.asked.append((offset, b"".join(buffers)))
        super().write(buffers, offset)

    def sync(self) -> None:
        self.asked.append(None)
        super().sync()


@dataclass(frozen=True, slots=True)
class Left:
    """What one power cut leaves in the file that holds the metadata."""

    moment: int
    content: bytes


def place_of(directory: Path, *, internal: bool) -> Place:
    """Where the volume is."""
    return Place(disk=str(directory / "disk"), metadata=None if internal else str(directory / "disk.md"), io="buffered")


def create(place: Place, *, force: bool = True) -> superblock.Superblock:
    """What `replicator create-md --force` does."""
    return create_metadata(
        place, volume=0, node_id=NODE, peer_ids=PEERS, slots=SLOTS, resource_id=IDENTITY, force=force
    )


def asked_by_create(place: Place, before: bytes) -> list[tuple[int, bytes] | None]:
    """The writes and syncs of create-md over `before`, in order."""
    path = Path(place.metadata or place.disk)
    path.write_bytes(before)
    fresh = create(place)
    through_the_command = path.read_bytes()
    path.write_bytes(before)
    opened = open_backing(str(path), io="buffered")
    noted = Noted(opened.path, os.dup(opened.fd), direct=False, block_size=512, size=opened.size, device=False)
    noted.note()
    layout = layout_of(place, opened.size)
    metadata._write_area(noted, layout, superblock.fresh_fixed_part(fresh))
    noted.close()
    opened.close()
    assert path.read_bytes() == through_the_command, "create-md writes something that was not noted"
    assert noted.asked[-1] is None and noted.asked.count(None) >= 3
    return noted.asked


def layout_of(place: Place, size: int) -> Layout:
    """Where the area lies in a file of this size."""
    if place.metadata is None:
        return internal_layout(size, SLOTS)
    return external_layout(size, Path(place.disk).stat().st_size, SLOTS)


def power_cuts(before: bytes, asked: list[tuple[int, bytes] | None]) -> Iterator[Left]:
    """Every prefix, every subset of the sectors that were not synced."""
    stable = bytearray(before)
    units: list[tuple[int, bytes]] = []
    for moment, step in enumerate(asked):
        if step is None:
            for offset, data in units:
                stable[offset : offset + SECTOR] = data
            units = []
        else:
            offset, data = step
            pieces = [(offset + at, data[at : at + SECTOR]) for at in range(0, len(data), SECTOR)]
            units += [(at, piece) for at, piece in pieces if stable[at : at + SECTOR] != piece]
        for mask in subsets(len(units)):
            content = bytearray(stable)
            for number, (offset, data) in enumerate(units):
                if mask >> number & 1:
                    content[offset : offset + SECTOR] = data
            yield Left(moment, bytes(content))


def what_is_left(place: Place, content: bytes) -> tuple[OpenedDisk | None, str]:
    """Open as the daemon does; the bytes, or the refusal."""
    Path(place.metadata or place.disk).write_bytes(content)
    try:
        opened = metadata.open_disk(place, volume=0, node_id=NODE)
    except FormatError as error:
        assert error.hint and "create-md" in error.hint, error
        return None, error.message
    opened.data.close()
    opened.metadata.close()
    return opened, ""


def fixed_of(content: bytes) -> bytes:
    """The fixed part of a file."""
    base = align_down(len(content), 4096) - FIXED_BYTES
    return content[base : base + FIXED_BYTES]


def created_again(place: Place) -> bool:
    """create-md without --force works, or says that metadata is there; with --force it works."""
    try:
        create(place, force=False)
    except Refused as refusal:
        assert refusal.code in ("metadata-exists", "would-overwrite") and refusal.hint, refusal
        create(place)
    opened = metadata.open_disk(place, volume=0, node_id=NODE)
    opened.data.close()
    opened.metadata.close()
    return True
