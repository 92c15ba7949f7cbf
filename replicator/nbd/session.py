# SPDX-License-Identifier: Apache-2.0
"""One NBD client, from its first byte to its last, without I/O.

Theory of operation.  `receive` takes bytes in any split.  A request is judged once (`requests.judge`), cut
into pieces of bounded size, and offered by `take_requests`; each piece has a token, and `reply(token, …)`
answers it.  When the last piece of a request is answered its one NBD reply is composed; the first error wins.
`take_output` gives the buffers to send, payloads passed through uncopied; `sent` tells how much has left.

Invariants
- Whatever the bytes, `receive` raises nothing: the answer is an error reply or `State.CLOSING` and a `fault`.
- Memory is bounded: no new request is begun while payload in flight plus unsent answers exceed
  `IN_FLIGHT_BYTES_MAX`, or `IN_FLIGHT_COUNT_MAX` pieces are in flight.  So at most one request
  (`PAYLOAD_MAX`) lies above the limit, plus what the driver hands to one `receive`.  Room for a payload is
  made as its bytes arrive.
- A write is offered only when its whole payload is here: a client that dies before has written nothing.
- A payload is copied once, out of the driver's receive buffer, which may be reused when `receive` returns.
- A refused request takes no token; a refused WRITE is answered after its payload has been skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum

from replicator.nbd import constants as c
from replicator.nbd.constants import Chunk, Command, protocol_errno
from replicator.nbd.negotiation import Export, Negotiation
from replicator.nbd.requests import KINDS, Abilities, Buffer, Fault, Kind, Request, judge, pieces

_READ, _WRITE, _DISC, _BLOCK_STATUS = 0, 1, 2, 7  # plain numbers: an enum attribute costs more
assert (_READ, _WRITE) == (Command.READ, Command.WRITE)
assert (_DISC, _BLOCK_STATUS) == (Command.DISC, Command.BLOCK_STATUS)


class State(Enum):
    """Where a session stands; it only moves downwards."""

    FLAGS = "flags"  #: waiting for the client's flags
    OPTIONS = "options"  #: haggling
    TRANSMISSION = "transmission"  #: serving requests
    CLOSING = "closing"  #: nothing more is read; `finished` says when the connection may be closed


class _Joined:
    """A request cut into several pieces: what is known about its one reply."""

    __slots__ = ("error", "left", "offset", "parts", "size")

    def __init__(self, offset: int, size: int, count: int) -> None:
        self.offset = offset
        self.size = size
        self.left = count
        self.error = 0
        self.parts: list[Buffer] = [b""] * count


class _Incoming:
    """A WRITE whose payload is still arriving; with a fault it is thrown away."""

    __slots__ = ("cookie", "fault", "filled", "flags", "missing", "offset", "parts", "size")

    def __init__(self, cookie: int, flags: int, offset: int, size: int, fault: Fault | None) -> None:
        self.cookie = cookie
        self.flags = flags
        self.offset = offset
        self.size = size
        self.fault = fault
        self.missing = size
        self.parts: list[bytearray] = []
        self.filled = 0  # bytes of the last part

    def fill(self, view: memoryview, position: int) -> int:
        """Take what belongs to this payload; returns the position behind it."""
        stop = min(len(view), position + self.missing)
        if self.fault is not None:
            self.missing -= stop - position
            return stop
        while position < stop:
            if not self.parts or self.filled == len(self.parts[-1]):
                self.parts.append(bytearray(min(c.IO_MAX, self.missing)))
                self.filled = 0
            part = self.parts[-1]
            count = min(len(part) - self.filled, stop - position)
            part[self.filled : self.filled + count] = view[position : position + count]
            self.filled += count
            self.missing -= count
            position += count
        return position


class NbdSession:
    """The server's side of one connection.

    `exports` maps every accepted name to its export and may change while the session lives (`negotiation`);
    the export a client has chosen stays as it was chosen.  `tokens` yields ints that are unique per process.
    """

    def __init__(self, exports: Mapping[str, Export], tokens: Iterator[int]) -> None:
        self.state = State.FLAGS
        self.export: Export | None = None  #: what the client has chosen
        self.fault = ""  #: why we ended the session; empty if the client did
        self.in_flight_bytes = 0  #: payload of READs and WRITEs begun and not answered
        self.unsent_bytes = 0  #: produced and not yet reported by `sent`
        self._tokens = tokens
        self._negotiation = Negotiation(exports)
        self._able: Abilities | None = None
        self._structured = False
        self._rest: bytes = b""
        self._incoming: _Incoming | None = None
        self._paused = False
        #: token -> cookie, command, offset and size of the piece, and the whole it belongs to
        self._waiting: dict[int, tuple[int, int, int, int, _Joined | None]] = {}
        self._requests: list[Request] = []
        self._output: list[Buffer] = []
        self._tail = bytearray()  # small answers, gathered so that they leave as one buffer
        self._put(self._negotiation.greeting())

    # -- the driver's side --------------------------------

    @property
    def in_flight_count(self) -> int:
        """Pieces offered and not answered."""
        return len(self._waiting)

    @property
    def closing(self) -> bool:
        """Nothing more is read from this client."""
        return self.state is State.CLOSING

    @property
    def finished(self) -> bool:
        """Close the connection now: all that is owed has left (after a fault: all that was said)."""
        return self.closing and not self.unsent_bytes and (bool(self.fault) or not self._waiting)

    @property
    def wants_data(self) -> bool:
        """Whether the driver should read from the socket."""
        if self.closing or self._paused:
            return False
        return self._incoming is not None or not self._full()

    def take_requests(self) -> list[Request]:
        """The pieces of work accepted since the last call, in the client's order."""
        requests, self._requests = self._requests, []
        return requests

    def take_output(self) -> list[Buffer]:
        """The buffers to send, in order; report them with `sent`.  They must not be changed."""
        if self._tail:
            self._output.append(self._tail)
            self._tail = bytearray()
        output, self._output = self._output, []
        return output

    def sent(self, size: int) -> None:
        """`size` bytes of the output have left (this may let waiting requests go on: ask `take_requests`)."""
        assert 0 <= size <= self.unsent_bytes, f"sent {size} of {self.unsent_bytes} bytes"
        self.unsent_bytes -= size
        if self._paused:
            self._resume()

    def receive(self, data: Buffer) -> None:
        """Take bytes from the client; any split, any content.  Ignored when closing."""
        if self.state is State.CLOSING:
            return
        if self._rest:
            data = b"".join((self._rest, data))
            self._rest = b""
        if self.state is State.TRANSMISSION:
            self._transmit(memoryview(data), 0)
        else:
            self._negotiate(memoryview(data))

    def reply(self, token: int, error: int, data: Buffer = b"") -> None:
        """Answer one piece; `error` is an errno or 0, `data` belongs to a successful READ.

        May let waiting requests go on: ask `take_requests`.
        """
        waiting = self._waiting.pop(token, None)
        assert waiting is not None, f"no request has token {token}"
        cookie, command, offset, size, joined = waiting
        if command == _READ:
            assert error or len(data) == size, f"a read of {size} bytes was answered with {len(data)}"
        if joined is None:
            self._answer(cookie, command, offset, size, error, [data])
        else:
            joined.left -= 1
            joined.error = joined.error or error
            joined.parts[(offset - joined.offset) // c.IO_MAX if command == _READ else 0] = data
            if not joined.left:
                self._answer(cookie, command, joined.offset, joined.size, joined.error, joined.parts)
        if self._paused:
            self._resume()

    # -- negotiation --------------------------------

    def _negotiate(self, view: memoryview) -> None:
        talk = self._negotiation
        position = 0
        if self.state is State.FLAGS and len(view) >= c.CLIENT_FLAGS.size:
            talk.client_flags(c.CLIENT_FLAGS.unpack_from(view)[0])
            position = c.CLIENT_FLAGS.size
            self.state = State.OPTIONS
        while self.state is State.OPTIONS:
            if talk.ended:
                self._close(talk.fault)
            elif talk.chosen is not None:
                self._begin(talk.chosen, view, position)
                return
            elif self.unsent_bytes > c.IN_FLIGHT_BYTES_MAX:
                self._close("the answers to its options are not read")
            else:
                behind = self._take_option(view, position)
                if behind == position:
                    break
                position = behind
        if not self.closing:
            self._rest = bytes(view[position:])

    def _take_option(self, view: memoryview, position: int) -> int:
        """Answer the option at `position`, if all of it is here; returns the position behind it."""
        body = position + c.OPTION.size
        if len(view) < body:
            return position
        magic, code, length = c.OPTION.unpack_from(view, position)
        if magic != c.IHAVEOPT:
            self._close(f"an option begins with {magic:#x}")
        elif length > c.OPTION_LENGTH_MAX:
            self._close(f"option {code} of {length} bytes is longer than {c.OPTION_LENGTH_MAX}")
        elif len(view) >= body + length:
            self._put(self._negotiation.option(code, bytes(view[body : body + length])))
            return body + int(length)
        return position

    def _begin(self, export: Export, view: memoryview, position: int) -> None:
        talk = self._negotiation
        self.state = State.TRANSMISSION
        self.export = export
        self._structured = talk.structured
        self._able = Abilities(export, talk.structured, talk.allocation)
        self._transmit(view, position)

    # -- transmission --------------------------------

    def _full(self) -> bool:
        held = self.in_flight_bytes + self.unsent_bytes
        return held >= c.IN_FLIGHT_BYTES_MAX or len(self._waiting) >= c.IN_FLIGHT_COUNT_MAX

    def _resume(self) -> None:
        """Go on with bytes that waited for room (a session that closes keeps none)."""
        if not self._full():
            self._paused = False
            rest, self._rest = self._rest, b""
            self._transmit(memoryview(rest), 0)

    def _transmit(self, view: memoryview, position: int) -> None:
        able, unpack, header_size = self._able, c.REQUEST.unpack_from, c.REQUEST.size
        assert able is not None, "transmission without an export"
        end = len(view)
        while True:
            if self._incoming is not None:
                position = self._fill(self._incoming, view, position)
            if end - position < header_size:
                break
            if self._full():
                self._paused = True
                break
            magic, flags, command, cookie, offset, size = unpack(view, position)
            if magic != c.REQUEST_MAGIC:
                self._close(f"a request begins with {magic:#x}")
                return
            position += header_size
            if command == _DISC:
                self._close("")
                return
            fault = judge(able, command, flags, offset, size)
            if command == _WRITE:
                if fault is None and 0 < size <= c.IO_MAX and size <= end - position:
                    self.in_flight_bytes += size
                    payload = bytes(view[position : position + size])
                    self._offer(cookie, command, flags, offset, size, (payload,))
                    position += size
                elif size > c.SKIP_MAX:
                    self._close(f"a write of {size} bytes is longer than {c.SKIP_MAX}, too long to skip")
                    return
                else:
                    self.in_flight_bytes += size if fault is None else 0
                    self._incoming = _Incoming(cookie, flags, offset, size, fault)
            elif fault is not None:
                self._refuse(cookie, command, fault)
            else:
                self._dispatch(cookie, command, flags, offset, size)
        # Less than a header is left, or what waits for room; a payload that is arriving took its bytes.
        self._rest = bytes(view[position:])

    def _fill(self, incoming: _Incoming, view: memoryview, position: int) -> int:
        position = incoming.fill(view, position)
        if incoming.missing:
            return position
        self._incoming = None
        if incoming.fault is not None:
            self._refuse(incoming.cookie, _WRITE, incoming.fault)
        elif incoming.size == 0:
            self._answer(incoming.cookie, _WRITE, incoming.offset, 0, 0, [])
        else:
            flags, parts = incoming.flags, tuple(incoming.parts)
            self._offer(incoming.cookie, _WRITE, flags, incoming.offset, incoming.size, parts)
        return position

    def _dispatch(self, cookie: int, command: int, flags: int, offset: int, size: int) -> None:
        """Carry out a good request other than WRITE."""
        if command == _BLOCK_STATUS:
            # Where holes are is not known, so one extent says "allocated": always true enough, and legal.
            self._put(c.CHUNK.pack(c.STRUCTURED_MAGIC, c.CHUNK_FLAG_DONE, Chunk.BLOCK_STATUS, cookie, 12))
            self._put(c.CHUNK_STATUS.pack(c.META_ALLOCATION_ID, size, 0))
        elif size == 0 and KINDS[command] is not Kind.FLUSH:
            # The protocol leaves it open; nothing is asked, so nothing is done.
            self._answer(cookie, command, offset, 0, 0, [])
        else:
            if command == _READ:
                self.in_flight_bytes += size
            self._offer(cookie, command, flags, offset, size, ())

    def _offer(self, cookie: int, command: int, flags: int, offset: int, size: int, parts: tuple[Buffer, ...]) -> None:
        """Offer a request in pieces; `parts` are a WRITE's payload, one per piece."""
        kind = KINDS[command]
        fua = bool(flags & c.CMD_FLAG_FUA) and command != _READ
        keep = bool(flags & c.CMD_FLAG_NO_HOLE)
        if size <= c.IO_MAX:  # most requests: one piece whatever the kind
            token = next(self._tokens)
            self._waiting[token] = (cookie, command, offset, size, None)
            self._requests.append(Request(token, kind, offset, size, parts[0] if parts else b"", fua, keep))
            return
        cut = list(pieces(kind, offset, size))
        assert not parts or len(parts) == len(cut), f"{len(parts)} parts for {len(cut)} pieces"
        joined = _Joined(offset, size, len(cut))
        for index, (start, length) in enumerate(cut):
            token = next(self._tokens)
            self._waiting[token] = (cookie, command, start, length, joined)
            data = parts[index] if parts else b""
            self._requests.append(Request(token, kind, start, length, data, fua, keep))

    # -- replies --------------------------------

    def _put(self, data: bytes) -> None:
        self._tail += data
        self.unsent_bytes += len(data)

    def _put_payload(self, parts: list[Buffer]) -> None:
        self._output.append(self._tail)
        self._tail = bytearray()
        self._output.extend(parts)
        self.unsent_bytes += sum(map(len, parts))

    def _answer(self, cookie: int, command: int, offset: int, size: int, error: int, parts: list[Buffer]) -> None:
        """Answer a whole request.  Only READ needs a structured reply when those were negotiated."""
        if command <= _WRITE:
            self.in_flight_bytes -= size  # only now: the parts of a split READ are held until it is complete
        if error:
            message = f"{Command(command).name} of {size} bytes at offset {offset} failed with errno {error}"
            self._refuse(cookie, command, Fault(protocol_errno(error), message))
        elif command != _READ or not self._structured:
            self._put(c.SIMPLE.pack(c.SIMPLE_MAGIC, 0, cookie))
            if command == _READ and size:
                self._put_payload(parts)
        elif size == 0:
            self._put(c.CHUNK.pack(c.STRUCTURED_MAGIC, c.CHUNK_FLAG_DONE, Chunk.NONE, cookie, 0))
        else:  # one chunk, so "do not fragment" holds by construction
            head = (c.STRUCTURED_MAGIC, c.CHUNK_FLAG_DONE, Chunk.OFFSET_DATA, cookie, size + 8, offset)
            self._put(c.CHUNK_DATA.pack(*head))
            self._put_payload(parts)

    def _refuse(self, cookie: int, command: int, fault: Fault) -> None:
        """Answer a request with an error, with its reason where the client can read one."""
        if not self._structured:
            self._put(c.SIMPLE.pack(c.SIMPLE_MAGIC, fault.error, cookie))
            return
        text = fault.message.encode()[: c.MESSAGE_LENGTH_MAX]
        length = c.CHUNK_ERROR.size + len(text)
        self._put(c.CHUNK.pack(c.STRUCTURED_MAGIC, c.CHUNK_FLAG_DONE, Chunk.ERROR, cookie, length))
        self._put(c.CHUNK_ERROR.pack(fault.error, len(text)) + text)

    def _close(self, fault: str) -> None:
        """Read no more.  Requests already offered are still answered, unless there is a fault."""
        self.state = State.CLOSING
        self.fault = fault
        self._rest = b""
        self._incoming = None
        self._paused = False
