# SPDX-License-Identifier: Apache-2.0
"""A node made by kernel nbd.

The kernel is the NBD client; it gets sockets on which we have already shaken hands.  Two times matter:

- DEAD_CONN_TIMEOUT: how long requests wait when no connection is left.  A daemon that is restarted within it
  finds its device by the identifier in /sys/block/nbdN/backend and hands it new sockets: a pause, not an EIO.
- TIMEOUT: after how long a request that was in flight on a dead connection is sent again.  The same timer
  takes a *slow* connection for a dead one, for instance while I/O is suspended until fencing is done; `mend`
  sees the hang-up and brings a new connection well within DEAD_CONN_TIMEOUT, so a suspended write waits and
  does not fail.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from replicator.drivers.nbd_netlink import Attachment
from replicator.drivers.node import Export, make_link, remove_link, wait_until
from replicator.errors import DiskError

NBD_FLAG_CAN_MULTI_CONN = 1 << 8
_APPEAR_S = 10.0


@dataclass(frozen=True, slots=True)
class Dialled:
    """A connection to an NBD server that is past its handshake."""

    socket: socket.socket
    size_bytes: int
    flags: int


class Kernel(Protocol):
    """The four calls of `nbd_netlink.Netlink` that a device needs."""

    def connect(self, attachment: Attachment, fds: list[int], *, index: int | None = None) -> int: ...
    def reconfigure(self, index: int, attachment: Attachment, fds: list[int]) -> None: ...
    def disconnect(self, index: int) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernel treats the device; times in seconds."""

    connections: int = 2
    timeout_s: int = 5
    dead_conn_timeout_s: int = 60
    block_size_bytes: int = 512  # what DRBD shows too: data that was made for 512-byte sectors stays readable


class KernelNbd:
    """One volume's /dev/nbdN."""

    def __init__(
        self,
        export: Export,
        dial: Callable[[], Dialled],
        kernel: Callable[[], Kernel],
        tuning: Tuning = Tuning(),
        sys_block: Path = Path("/sys/block"),
        dev: Path = Path("/dev"),
    ) -> None:
        self._export = export
        self._dial = dial
        self._kernel = kernel
        self._tuning = tuning
        self._sys_block = sys_block
        self._dev = dev
        self._index: int | None = None
        self._size_bytes = 0
        self._server_flags = 0
        # Our own handles of the sockets that the kernel uses: a hang-up shows here when it gives one up.
        self._sockets: list[socket.socket] = []

    def attach(self) -> Path:
        """See `Device.attach`.  A device that an earlier run left is taken over, open files and all."""
        assert self._index is None, f"{self._export.identifier} is attached twice"
        fresh = self._dial_all()
        kernel = self._kernel()
        try:
            index = self._adopt(kernel, fresh)
            if index is None:
                index = kernel.connect(self._attachment(), [s.fileno() for s in fresh])
            self._index, self._sockets = index, fresh
            node = self._dev / f"nbd{index}"
            if not wait_until(lambda: node.exists() and self._kernel_size() > 0, seconds=_APPEAR_S):
                raise DiskError(f"{node} did not appear with its size within {_APPEAR_S:.0f} s")
            make_link(self._export, node)
        except BaseException:
            self._undo(kernel, fresh)
            raise
        finally:
            kernel.close()
        return node

    def detach(self) -> None:
        """See `Device.detach`.  Also ends a device that an earlier run left."""
        remove_link(self._export)
        index = self._left_over() if self._index is None else self._index
        if index is not None:
            kernel = self._kernel()
            try:
                kernel.disconnect(index)
            finally:
                kernel.close()
            self._index = None
            if not wait_until(lambda: self._left_over() != index, seconds=_APPEAR_S):
                raise DiskError(f"/dev/nbd{index} was disconnected and is still in use after {_APPEAR_S:.0f} s")
        self._close_sockets()

    def mend(self) -> bool:
        """Replace connections that the kernel or the server gave up."""
        dead = [s for s in self._sockets if _hung_up(s)]
        if self._index is None or not dead:
            return False
        fresh: list[socket.socket] = []
        kernel = self._kernel()
        try:
            fresh.extend(self._dial().socket for _ in dead)
            kernel.reconfigure(self._index, self._attachment(), [s.fileno() for s in fresh])
        except BaseException:
            _close(fresh)
            raise
        finally:
            kernel.close()
        self._sockets = [s for s in self._sockets if s not in dead] + fresh
        _close(dead)
        return True

    def resize(self, size_bytes: int) -> None:
        """See `Device.resize`; open files see the new size at once."""
        self._size_bytes = size_bytes
        if self._index is None:
            return
        kernel = self._kernel()
        try:
            kernel.reconfigure(self._index, self._attachment(), [])
        finally:
            kernel.close()

    def _dial_all(self) -> list[socket.socket]:
        """As many connections as we want, or one when the server cannot share."""
        first = self._dial()
        self._size_bytes, self._server_flags = first.size_bytes, first.flags
        sockets = [first.socket]
        count = self._tuning.connections if first.flags & NBD_FLAG_CAN_MULTI_CONN else 1
        try:
            sockets.extend(self._dial().socket for _ in range(count - 1))
        except BaseException:
            _close(sockets)
            raise
        return sockets

    def _adopt(self, kernel: Kernel, fresh: list[socket.socket]) -> int | None:
        """Give a device of an earlier run our sockets; None when there is none or it is past saving."""
        index = self._left_over()
        if index is None:
            return None
        try:
            kernel.reconfigure(index, self._attachment(), [s.fileno() for s in fresh])
        except DiskError:
            kernel.disconnect(index)  # its users have had their errors; a new one takes its place
            return None
        return index

    def _left_over(self) -> int | None:
        """The index of the device that carries our identifier."""
        for backend in sorted(self._sys_block.glob("nbd*/backend")):
            try:
                if backend.read_text().strip() == self._export.identifier:
                    return int(backend.parent.name.removeprefix("nbd"))
            except OSError:
                continue  # disconnected while we looked
        return None

    def _kernel_size(self) -> int:
        try:
            return int((self._sys_block / f"nbd{self._index}" / "size").read_text())
        except OSError:
            return 0

    def _attachment(self) -> Attachment:
        return Attachment(
            size_bytes=self._size_bytes,
            block_size_bytes=self._tuning.block_size_bytes,
            server_flags=self._server_flags,
            timeout_s=self._tuning.timeout_s,
            dead_conn_timeout_s=self._tuning.dead_conn_timeout_s,
            identifier=self._export.identifier,
        )

    def _undo(self, kernel: Kernel, fresh: list[socket.socket]) -> None:
        remove_link(self._export)
        index, self._index = self._index, None
        self._sockets = []
        try:
            if index is not None:
                kernel.disconnect(index)
        finally:
            _close(fresh)

    def _close_sockets(self) -> None:
        sockets, self._sockets = self._sockets, []
        _close(sockets)


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)  # POLLHUP and POLLERR come unasked
    return bool(poll.poll(0))


def _close(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()
