# SPDX-License-Identifier: Apache-2.0
"""What every kind of /dev node has in common: the export it stands for, its interface, its stable name.

The node itself (/dev/nbd3, /dev/loop7) is whatever the kernel had free; what users write into fstab and
resource definitions is the link /dev/replicated/RES/VOL.  The link exists exactly while the node is attached:
it is made last and removed first, and always in one atomic step, so nobody ever opens a node that belongs to
someone else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

DEV_DIR = Path("/dev/replicated")
RUN_DIR = Path("/run/replicator")
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Export:
    """One volume as our NBD server offers it, and where its node's names go."""

    resource: str
    volume: int
    socket: Path
    name: str = ""  # the NBD export name
    dev_dir: Path = DEV_DIR
    run_dir: Path = RUN_DIR

    def __post_init__(self) -> None:
        assert self.resource and "/" not in self.resource and self.resource not in (".", "..")

    @property
    def link(self) -> Path:
        """The stable name of the node."""
        return self.dev_dir / self.resource / str(self.volume)

    @property
    def identifier(self) -> str:
        """How the kernel remembers whose device it is."""
        return f"replicator:{self.resource}/{self.volume}"


class Device(Protocol):
    """One volume's node.  All calls block up to seconds; they are made from one worker thread.

    They raise DiskError when the kernel or a tool refuses; then nothing is left half done.
    """

    def attach(self) -> Path:
        """Make the node and its link; adopts or removes what an earlier run left.  The node's path."""
        ...

    def detach(self) -> None:
        """Remove link and node.  Detaching what is not attached is not an error.

        The caller knows that nobody holds the node (`holders`) or wants its users cut off.  Kernel nbd cuts
        them off; a loop device cannot: DiskError names its users, and everything stays as it was.
        """
        ...

    def mend(self) -> bool:
        """Look after an attached node; True when something had to be repaired."""
        ...

    def resize(self, size_bytes: int) -> None:
        """Tell the kernel the new size."""
        ...


def make_link(export: Export, node: Path) -> None:
    """Point the link at the node, atomically."""
    link = export.link
    link.parent.mkdir(parents=True, exist_ok=True)
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(node)
    fresh.replace(link)


def remove_link(export: Export) -> None:
    """Remove the link, and its directory when it was the last one."""
    export.link.unlink(missing_ok=True)
    try:
        export.link.parent.rmdir()
    except OSError:
        pass  # other volumes' links, or it never existed


def wait_until(true: Callable[[], bool], *, seconds: float) -> bool:
    """Poll a condition of the kernel's; False when the time is over."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True
