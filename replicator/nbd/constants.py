# SPDX-License-Identifier: Apache-2.0
"""The numbers of the NBD protocol (fixed newstyle), and our own limits with their reasons.

All integers on the wire are unsigned and in network byte order.  Names follow the protocol's documentation
with the `NBD_` prefix taken off.  Server and client share this file, so a wrong number here is found by the
literal bytes of the unit tests and the foreign clients of the integration tests, not by our own client.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct

KIB = 1 << 10
MIB = 1 << 20

# -- our limits --------------------------------

IO_MAX = MIB  #: longest piece of a READ or WRITE handed on: one frame of the peer link holds it
ZERO_MAX = 32 * MIB  #: longest piece of a TRIM or WRITE_ZEROES: bounds how long one piece holds its range
PAYLOAD_MAX = 32 * MIB  #: longest READ or WRITE of a client; what the protocol says every server should take
SKIP_MAX = 64 * MIB  #: longest payload of a refused WRITE that is skipped; beyond, the client is dropped
OPTION_LENGTH_MAX = 16 * KIB  #: longest option: two names of 4096 bytes and a generous rest
OPTION_COUNT_MAX = 1000  #: options before a client must have chosen; a haggling client is dropped
NAME_LENGTH_MAX = 4096  #: longest string, set by the protocol
MESSAGE_LENGTH_MAX = 1024  #: longest human text in an error, in bytes
IN_FLIGHT_BYTES_MAX = 64 * MIB  #: payload in flight plus unsent answers of a client before reading stops
IN_FLIGHT_COUNT_MAX = 1024  #: pieces in flight of a client before reading stops

# -- handshake --------------------------------

NBDMAGIC = 0x4E42444D41474943  #: "NBDMAGIC"
IHAVEOPT = 0x49484156454F5054  #: "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9

GREETING = Struct(">QQH")  #: NBDMAGIC, IHAVEOPT, handshake flags
CLIENT_FLAGS = Struct(">I")
OPTION = Struct(">QII")  #: IHAVEOPT, option, length
OPTION_REPLY = Struct(">QIII")  #: magic, option, reply type, length
EXPORT_NAME_REPLY = Struct(">QH")  #: size, transmission flags; 124 zeroes follow unless NO_ZEROES
EXPORT_NAME_PADDING = 124
INFO_EXPORT = Struct(">HQH")  #: type 0, size, transmission flags
INFO_BLOCK_SIZE = Struct(">HIII")  #: type 3, minimum, preferred, maximum payload
U16 = Struct(">H")
U32 = Struct(">I")

FLAG_FIXED_NEWSTYLE = 1  #: handshake flag, both directions
FLAG_NO_ZEROES = 2  #: handshake flag, both directions

REP_ERROR = 0x8000_0000  #: set in the type of every negative option reply


class Option(IntEnum):
    """What a client may ask during negotiation."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Rep(IntEnum):
    """Types of option replies."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = REP_ERROR | 1
    ERR_POLICY = REP_ERROR | 2
    ERR_INVALID = REP_ERROR | 3
    ERR_UNKNOWN = REP_ERROR | 6


class Info(IntEnum):
    """What INFO and GO can tell about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Transmission(IntFlag):
    """Transmission flags: what an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8


META_ALLOCATION = "base:allocation"  #: the one metadata context there is
META_ALLOCATION_ID = 1

# -- transmission --------------------------------

REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
STRUCTURED_MAGIC = 0x668E33EF

REQUEST = Struct(">IHHQQI")  #: magic, flags, command, cookie, offset, length
SIMPLE = Struct(">IIQ")  #: magic, error, cookie
CHUNK = Struct(">IHHQI")  #: magic, flags, type, cookie, length
CHUNK_DATA = Struct(">IHHQIQ")  #: a CHUNK followed by the offset of its data
CHUNK_ERROR = Struct(">IH")  #: error, length of the text that follows
CHUNK_STATUS = Struct(">III")  #: context id, extent length, extent status

CHUNK_FLAG_DONE = 1


class Chunk(IntEnum):
    """Types of structured reply chunks that we send."""

    NONE = 0
    OFFSET_DATA = 1
    BLOCK_STATUS = 5
    ERROR = 0x8001


class Command(IntEnum):
    """What a client asks in transmission."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1
CMD_FLAG_DF = 1 << 2
CMD_FLAG_REQ_ONE = 1 << 3


class Errno(IntEnum):
    """Error numbers of the protocol: Linux's values, on every platform."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


#: Errors a disk can return that the protocol cannot say; everything else becomes EIO.
ERRNO_OTHER = {13: Errno.EPERM, 30: Errno.EPERM, 27: Errno.ENOSPC, 122: Errno.ENOSPC}
ERRNO_KNOWN = frozenset(int(number) for number in Errno)


def protocol_errno(error: int) -> int:
    """The protocol's number for an errno of the system; 0 stays 0."""
    if error == 0 or error in ERRNO_KNOWN:
        return error
    return ERRNO_OTHER.get(error, Errno.EIO)
