# SPDX-License-Identifier: Apache-2.0
"""Kernel nbd over generic netlink: connect, reconfigure, disconnect, status.

The ioctl interface loses the device when the server dies.  The netlink interface keeps it: requests wait up
to DEAD_CONN_TIMEOUT for RECONFIGURE to bring new sockets, so a restart of the daemon is a pause and not an
EIO.

The upper half builds and parses messages and is pure; `Netlink` is the socket under it.  Numbers are those of
linux/netlink.h, linux/genetlink.h and linux/nbd-netlink.h; all of it is in host byte order.

    netlink header   u32 length, u16 type, u16 flags, u32 sequence, u32 port
    generic header   u8 command, u8 version, u16 reserved
    attribute        u16 length (with this header), u16 type, payload, padding to 4
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from replicator.errors import DiskError

NETLINK_GENERIC = 16
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
GENL_ID_CTRL = 16
CTRL_CMD_GETFAMILY = 3
CTRL_ATTR_FAMILY_ID = 1
CTRL_ATTR_FAMILY_NAME = 2
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

FAMILY_NAME = "nbd"
FAMILY_VERSION = 1

_NLMSGHDR = struct.Struct("=IHHII")
_GENLMSGHDR = struct.Struct("=BBH")
_NLATTR = struct.Struct("=HH")
_MESSAGE_BYTES_MAX = 1 << 16


class Command(IntEnum):
    """What the nbd family understands."""

    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3
    LINK_DEAD = 4
    STATUS = 5


class Attribute(IntEnum):
    """Attributes of the nbd family's messages."""

    INDEX = 1
    SIZE_BYTES = 2
    BLOCK_SIZE_BYTES = 3
    TIMEOUT = 4
    SERVER_FLAGS = 5
    CLIENT_FLAGS = 6
    SOCKETS = 7
    DEAD_CONN_TIMEOUT = 8
    DEVICE_LIST = 9
    BACKEND_IDENTIFIER = 10


_SOCK_ITEM = 1
_SOCK_FD = 1
_DEVICE_ITEM = 1
_DEVICE_INDEX = 1
_DEVICE_CONNECTED = 2


@dataclass(frozen=True, slots=True)
class Attachment:
    """What the kernel is told about one device.

    `identifier` names the export; the kernel shows it in /sys/block/nbdN/backend and refuses a RECONFIGURE
    that carries another one, so two resources can never take over each other's device.
    """

    size_bytes: int
    block_size_bytes: int
    server_flags: int
    timeout_s: int
    dead_conn_timeout_s: int
    identifier: str


@dataclass(frozen=True, slots=True)
class Message:
    """One netlink message taken apart: its type, its sequence number and what follows the netlink header."""

    kind: int
    sequence: int
    payload: bytes


# ------------------------------------------------------------------------------------------ building


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded."""
    length = _NLATTR.size + len(payload)
    assert length <= 0xFFFF, f"netlink attribute {kind} of {length} bytes"
    return _NLATTR.pack(length, kind) + payload + bytes(-length % 4)


def nested(kind: int, children: Sequence[bytes]) -> bytes:
    """An attribute made of attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(children))


def message(kind: int, sequence: int, command: int, version: int, body: bytes) -> bytes:
    """A whole generic netlink request that asks for an acknowledgement."""
    payload = _GENLMSGHDR.pack(command, version, 0) + body
    length = _NLMSGHDR.size + len(payload)
    return _NLMSGHDR.pack(length, kind, NLM_F_REQUEST | NLM_F_ACK, sequence, 0) + payload


def family_request(sequence: int, name: str) -> bytes:
    """Ask the controller for the number of a family."""
    body = attribute(CTRL_ATTR_FAMILY_NAME, name.encode("ascii") + b"\0")
    return message(GENL_ID_CTRL, sequence, CTRL_CMD_GETFAMILY, 1, body)


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def _u64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=Q", value))


def _sockets(fds: Sequence[int]) -> bytes:
    return nested(Attribute.SOCKETS, [nested(_SOCK_ITEM, [_u32(_SOCK_FD, fd)]) for fd in fds])


def _settings(attachment: Attachment) -> list[bytes]:
    """The attributes that CONNECT and RECONFIGURE share."""
    return [
        _u64(Attribute.SIZE_BYTES, attachment.size_bytes),
        _u64(Attribute.BLOCK_SIZE_BYTES, attachment.block_size_bytes),
        _u64(Attribute.TIMEOUT, attachment.timeout_s),
        _u64(Attribute.DEAD_CONN_TIMEOUT, attachment.dead_conn_timeout_s),
        attribute(Attribute.BACKEND_IDENTIFIER, attachment.identifier.encode() + b"\0"),
    ]


def connect_body(attachment: Attachment, fds: Sequence[int], *, index: int | None) -> bytes:
    """Attributes of CONNECT; without an index the kernel chooses one and answers with it."""
    assert fds, "nbd connect without a socket"
    parts = [] if index is None else [_u32(Attribute.INDEX, index)]
    parts += [*_settings(attachment), _u64(Attribute.SERVER_FLAGS, attachment.server_flags), _sockets(fds)]
    return b"".join(parts)


def reconfigure_body(attachment: Attachment, fds: Sequence[int], *, index: int) -> bytes:
    """Attributes of RECONFIGURE: new sockets replace dead ones; none means only a change of size."""
    parts = [_u32(Attribute.INDEX, index), *_settings(attachment)]
    if fds:
        parts.append(_sockets(fds))
    return b"".join(parts)


def index_body(index: int) -> bytes:
    """Attributes of DISCONNECT, and of STATUS for one device."""
    return _u32(Attribute.INDEX, index)


# ------------------------------------------------------------------------------------------- parsing


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by type, flags removed; of a repeated type the last one."""
    return dict(iter_attributes(data))


def iter_attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Attributes in order.  Raises ValueError when a length runs past the data or is too small."""
    at = 0
    while at + _NLATTR.size <= len(data):
        length, kind = _NLATTR.unpack_from(data, at)
        if length < _NLATTR.size or at + length > len(data):
            raise ValueError(f"netlink attribute of {length} bytes where {len(data) - at} are left")
        yield kind & NLA_TYPE_MASK, data[at + _NLATTR.size : at + length]
        at += (length + 3) & ~3


def messages(data: bytes) -> Iterator[Message]:
    """The messages of one datagram.  Raises ValueError when a length makes no sense."""
    at = 0
    while at + _NLMSGHDR.size <= len(data):
        length, kind, _flags, sequence, _port = _NLMSGHDR.unpack_from(data, at)
        if length < _NLMSGHDR.size or at + length > len(data):
            raise ValueError(f"netlink message of {length} bytes where {len(data) - at} are left")
        yield Message(kind, sequence, data[at + _NLMSGHDR.size : at + length])
        at += (length + 3) & ~3


def errno_of(acknowledgement: Message) -> int:
    """The errno that an NLMSG_ERROR carries; 0 is the plain acknowledgement."""
    assert acknowledgement.kind == NLMSG_ERROR
    if len(acknowledgement.payload) < 4:
        raise ValueError("netlink acknowledgement without an error number")
    (negative,) = struct.unpack_from("=i", acknowledgement.payload)
    return -int(negative)


def body_of(answer: Message) -> bytes:
    """The attributes of a generic netlink answer."""
    return answer.payload[_GENLMSGHDR.size :]


def number(payload: bytes) -> int:
    """An unsigned attribute of any width, in host order."""
    width = {1: "=B", 2: "=H", 4: "=I", 8: "=Q"}.get(len(payload))
    if width is None:
        raise ValueError(f"netlink number of {len(payload)} bytes")
    (value,) = struct.unpack(width, payload)
    return int(value)


def device_list(body: bytes) -> dict[int, bool]:
    """A STATUS answer: device index -> is it connected."""
    devices: dict[int, bool] = {}
    for kind, item in iter_attributes(attributes(body).get(Attribute.DEVICE_LIST, b"")):
        if kind == _DEVICE_ITEM:
            fields = attributes(item)
            devices[number(fields[_DEVICE_INDEX])] = number(fields[_DEVICE_CONNECTED]) != 0
    return devices


# ------------------------------------------------------------------------------------------- talking


class Netlink:
    """The nbd family on a netlink socket.  Calls block; they are made from a worker thread.

    Raises DiskError when the kernel refuses, with the kernel's reason.
    """

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
        except OSError as error:
            raise DiskError(f"cannot open a generic netlink socket: {error.strerror}") from error
        self._socket.settimeout(30.0)
        self._sequence = 0
        self._family = 0
        try:
            self._socket.bind((0, 0))
            self._family = self._find_family()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the socket; devices stay as they are."""
        self._socket.close()

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self, attachment: Attachment, fds: Sequence[int], *, index: int | None = None) -> int:
        """Make a device of these sockets; its index."""
        answers = self._ask(Command.CONNECT, connect_body(attachment, fds, index=index))
        for answer in answers:
            fields = attributes(body_of(answer))
            if Attribute.INDEX in fields:
                return number(fields[Attribute.INDEX])
        if index is None:
            raise DiskError("the kernel connected an nbd device and did not say which")
        return index

    def reconfigure(self, index: int, attachment: Attachment, fds: Sequence[int]) -> None:
        """Give a living device new sockets for its dead ones, or another size."""
        self._ask(Command.RECONFIGURE, reconfigure_body(attachment, fds, index=index))

    def disconnect(self, index: int) -> None:
        """End a device; requests still queued in the kernel fail."""
        self._ask(Command.DISCONNECT, index_body(index))

    def status(self) -> dict[int, bool]:
        """Every nbd device, and whether it is connected."""
        found: dict[int, bool] = {}
        for answer in self._ask(Command.STATUS, b""):
            found.update(device_list(body_of(answer)))
        return found

    def _find_family(self) -> int:
        self._sequence += 1
        request = family_request(self._sequence, FAMILY_NAME)
        for answer in self._exchange(request, f"look up the netlink family {FAMILY_NAME!r}"):
            fields = attributes(body_of(answer))
            if CTRL_ATTR_FAMILY_ID in fields:
                return number(fields[CTRL_ATTR_FAMILY_ID])
        raise DiskError("the kernel's netlink controller did not give the nbd family's number")

    def _ask(self, command: Command, body: bytes) -> list[Message]:
        self._sequence += 1
        request = message(self._family, self._sequence, command, FAMILY_VERSION, body)
        return self._exchange(request, f"nbd {command.name.lower()}")

    def _exchange(self, request: bytes, what: str) -> list[Message]:
        """Send, and collect answers up to the acknowledgement of this very request."""
        try:
            self._socket.send(request)
            answers: list[Message] = []
            while True:
                for answer in messages(self._socket.recv(_MESSAGE_BYTES_MAX)):
                    if answer.sequence != self._sequence:
                        continue  # the tail of a request that timed out
                    if answer.kind == NLMSG_DONE:
                        return answers
                    if answer.kind != NLMSG_ERROR:
                        answers.append(answer)
                        continue
                    errno = errno_of(answer)
                    if errno == 0:
                        return answers
                    raise DiskError(f"{what} failed: {os.strerror(errno)}")
        except TimeoutError as error:
            raise DiskError(f"{what}: the kernel did not answer within 30 s") from error
        except (OSError, ValueError) as error:
            raise DiskError(f"{what} failed: {error}") from error
