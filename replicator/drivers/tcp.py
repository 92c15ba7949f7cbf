# SPDX-License-Identifier: Apache-2.0
"""TCP sockets to and from peers: numeric addresses only, never blocking, tuned for a mirror.

No name service is asked, here or anywhere on the link: a resolver that hangs would hang the mirror.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from typing import Final, TypeAlias, cast

from replicator.errors import ConfigError, ProtocolError

BACKLOG: Final = 64
_KEEPALIVE_IDLE_S: Final = 10
_KEEPALIVE_INTERVAL_S: Final = 5
_KEEPALIVE_PROBES: Final = 3
_USER_TIMEOUT_MS: Final = 30_000  # unacknowledged data; the core's own ping timeout is shorter

SocketAddress: TypeAlias = tuple[str, int] | tuple[str, int, int, int]


def address(host: str, port: int) -> tuple[socket.AddressFamily, SocketAddress]:
    """Family and socket address of a numeric IPv4 or IPv6 address; no name service is ever asked.

    Raises ConfigError when it is not one.
    """
    try:
        ipaddress.ip_address(host)
        if not 1 <= port <= 65535:
            raise ValueError
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (ValueError, OSError):
        raise ConfigError(
            [f"{host!r} port {port} is not a numeric address and a port from 1 to 65535"],
            hint="write an IPv4 or IPv6 address, not a name",
        ) from None
    family, _, _, _, where = found[0]
    return family, cast(SocketAddress, where)


def is_loopback(host: str) -> bool:
    """Whether a numeric address never leaves this machine."""
    return ipaddress.ip_address(host).is_loopback


def listening_socket(host: str, port: int) -> socket.socket:
    """A listening, non-blocking socket.  Raises ConfigError."""
    family, where = address(host, port)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ConfigError([f"cannot listen on {host} port {port}: {error.strerror}"]) from None
    return sock


def dialing_socket(local: str, host: str, port: int) -> socket.socket:
    """A non-blocking socket that is connecting, from `local` where that can be.  Raises ProtocolError."""
    family, where = address(host, port)
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ProtocolError(f"cannot connect to {host} port {port}: {error.strerror}") from None
    try:
        sock.setblocking(False)
        tune(sock)
        here = ipaddress.ip_address(local)
        if not here.is_unspecified and here.version == ipaddress.ip_address(host).version:
            # The peer should see the address it knows us by, whatever route the packets take.
            sock.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
            sock.bind((local, 0))
        code = sock.connect_ex(where)
    except OSError as error:
        code = error.errno or errno.EIO
    if code not in (0, errno.EINPROGRESS):
        sock.close()
        raise ProtocolError(f"cannot connect to {host} port {port}: {os.strerror(code)}")
    return sock


def connect_fault(sock: socket.socket) -> str:
    """Why a connect that has ended did not succeed; "" when it did."""
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        return os.strerror(code)
    try:
        if sock.getpeername() == sock.getsockname():
            return "the connection met itself (dial ports below the ephemeral range)"
    except OSError as error:
        return os.strerror(error.errno or errno.EIO)
    return ""


def tune(sock: socket.socket) -> None:
    """Send small frames at once, and notice a dead peer even when nothing is said."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
