# SPDX-License-Identifier: Apache-2.0
"""The disks of one resource: opened beside the loop, used through `drivers.disk`, closed when idle.

Opening reads the whole metadata area (32 MiB per TiB and peer), so it happens in a thread of its own.

Invariant: each `OpenDisk` is answered once, by DiskOpened, DiskOpenFailed or, when `CloseDisk` overtook it,
by DiskClosed; each `CloseDisk` by one DiskClosed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from replicator.config import Node, ResourceConfig
from replicator.core.actions import CloseDisk, OpenDisk
from replicator.core.events import DiskClosed, DiskOpened, DiskOpenFailed
from replicator.drivers.disk import Disk, DiskAction
from replicator.drivers.loop import Loop
from replicator.drivers.metadata import OpenedDisk, Place, open_disk
from replicator.errors import ReplicatorError


@dataclass(frozen=True, slots=True)
class DiskPlace:
    """Where a volume lies, and how much of it may be used (None: all)."""

    place: Place
    size_bytes_max: int | None


def places(config: ResourceConfig, node: Node) -> dict[int, DiskPlace]:
    """Where each volume of the resource lies on `node`."""
    found = {}
    for number, volume in config.volumes.items():
        there = node.volumes[number]
        metadata = None if there.metadata == "internal" else there.metadata
        place = Place(disk=there.disk, metadata=metadata, io=config.disk.io)
        found[number] = DiskPlace(place, volume.size_bytes)
    return found


class Disks:
    """Everything is called in the loop's thread."""

    def __init__(self, loop: Loop, where: Mapping[int, DiskPlace], node_id: int) -> None:
        self._loop = loop
        self._where = where
        self._node_id = node_id
        self._open: dict[int, Disk] = {}
        self._unopened: set[int] = set()  # opening failed; the core closes what it tried to open
        self._opening: dict[int, bool] = {}  # volume -> it is to be closed as soon as it is open

    def open(self, action: OpenDisk) -> None:
        """Begin to open a disk."""
        volume = action.volume
        assert volume not in self._open and volume not in self._opening, f"disk {volume} is opened twice"
        self._opening[volume] = False
        self._unopened.discard(volume)
        threading.Thread(target=self._open_beside, args=(volume,), name=f"open-{volume}", daemon=True).start()

    def submit(self, action: DiskAction) -> None:
        """Hand an operation to its disk."""
        self._open[action.volume].submit(action)

    def close(self, action: CloseDisk) -> None:
        """Close a disk when everything submitted is done."""
        if action.volume in self._opening:
            self._opening[action.volume] = True
        elif action.volume in self._unopened:
            self._unopened.discard(action.volume)
            self._loop.post(DiskClosed(action.volume))
        else:
            self._open.pop(action.volume).close()

    def finish(self) -> None:
        """The process ends in order: block until everything submitted is on its disk."""
        for disk in self._open.values():
            disk.drain()

    # -- opening --------------------------------

    def _open_beside(self, volume: int) -> None:
        """In a thread of its own."""
        try:
            opened = open_disk(self._where[volume].place, volume=volume, node_id=self._node_id)
        except ReplicatorError as error:
            self._loop.call_from_thread(partial(self._failed, volume, str(error)))
        else:
            self._loop.call_from_thread(partial(self._opened, volume, opened))

    def _opened(self, volume: int, opened: OpenedDisk) -> None:
        if self._opening.pop(volume):
            opened.metadata.close()
            opened.data.close()
            self._loop.post(DiskClosed(volume))
            return
        self._open[volume] = Disk(self._loop, volume, opened.data, opened.metadata, opened.layout)
        size_max = self._where[volume].size_bytes_max
        size = opened.layout.data_size if size_max is None else min(size_max, opened.layout.data_size)
        self._loop.post(DiskOpened(volume, size, opened.fixed, opened.bitmaps))

    def _failed(self, volume: int, error: str) -> None:
        if self._opening.pop(volume):
            self._loop.post(DiskClosed(volume))
            return
        self._unopened.add(volume)
        self._loop.post(DiskOpenFailed(volume, error))
