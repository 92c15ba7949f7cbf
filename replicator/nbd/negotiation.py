# SPDX-License-Identifier: Apache-2.0
"""What a client may ask before it has an export (fixed newstyle negotiation).

`Negotiation` answers one whole option at a time; finding option boundaries in the byte stream is the
session's work.  Every option but EXPORT_NAME gets a reply, and a client may go on after a refusal.
EXPORT_NAME has no way to say no, so there the connection ends.

`exports` maps every accepted name (canonical or alias) to its `Export`; it is read at each option, so an
export that is published or refused during a negotiation is seen at once.  Names match exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from replicator.nbd import constants as c
from replicator.nbd.constants import Info, Option, Rep, Transmission


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """One volume as clients see it.  Sizes are bytes."""

    name: str
    size_bytes: int
    read_only: bool = False
    refused: str | None = None  #: why it is not served now, for the client's user; None: it is served
    description: str = ""
    block_min: int = 512  #: offsets and lengths are multiples of it
    block_preferred: int = 4096
    payload_max: int = c.PAYLOAD_MAX

    def __post_init__(self) -> None:
        for size in (self.block_min, self.block_preferred):
            assert size > 0 and size & (size - 1) == 0, f"block size {size} is not a power of two"
        assert self.block_min <= 64 * c.KIB, f"the protocol allows no minimum block of {self.block_min}"
        assert self.block_min <= self.block_preferred <= self.payload_max <= c.PAYLOAD_MAX
        assert self.payload_max % self.block_min == 0
        assert self.size_bytes >= 0 and self.size_bytes % self.block_min == 0, f"odd size {self.size_bytes}"

    def transmission_flags(self, *, structured: bool) -> int:
        """What this export can do, for a client that has (not) negotiated structured replies.

        CAN_MULTI_CONN is true because a flush covers every write answered before it, whoever sent that write.
        """
        flags = Transmission.HAS_FLAGS | Transmission.SEND_FLUSH | Transmission.SEND_FUA
        flags |= Transmission.SEND_TRIM | Transmission.SEND_WRITE_ZEROES | Transmission.CAN_MULTI_CONN
        if self.read_only:
            flags |= Transmission.READ_ONLY
        if structured:
            flags |= Transmission.SEND_DF
        return int(flags)


class Malformed(ValueError):
    """The body of an option does not have the form the protocol gives it; never leaves this module."""


class Negotiation:
    """The server's side of one negotiation.

    `chosen` is set when the client has its export; `ended` when the connection must close after the answer,
    with `fault` as the reason, empty if the client asked for it.
    """

    def __init__(self, exports: Mapping[str, Export]) -> None:
        self.exports = exports
        self.structured = False
        self.chosen: Export | None = None
        self.ended = False
        self.fault = ""
        self._fixed = False
        self._zeroes = True
        self._meta_name: str | None = None
        self._count = 0

    @staticmethod
    def greeting() -> bytes:
        """The first bytes of the connection."""
        return c.GREETING.pack(c.NBDMAGIC, c.IHAVEOPT, c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)

    @property
    def allocation(self) -> bool:
        """Whether BLOCK_STATUS was negotiated for the chosen export (decided at GO, by name)."""
        return self._meta_name is not None

    def client_flags(self, flags: int) -> None:
        """Take the client's answer to the greeting."""
        if flags & ~(c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES):
            self._end(f"unknown client flags {flags:#x}")
        self._fixed = bool(flags & c.FLAG_FIXED_NEWSTYLE)
        self._zeroes = not flags & c.FLAG_NO_ZEROES

    def option(self, code: int, body: bytes) -> bytes:
        """Answer one option."""
        self._count += 1
        if self._count > c.OPTION_COUNT_MAX:
            self._end(f"more than {c.OPTION_COUNT_MAX} options")
            return b""
        if code == Option.EXPORT_NAME:
            return self._export_name(body)
        if not self._fixed:
            self._end(f"option {code} from a client that cannot read its answer")
            return b""
        try:
            return self._answer(code, body)
        except Malformed as malformed:
            return _reply(code, Rep.ERR_INVALID, str(malformed).encode())

    def _answer(self, code: int, body: bytes) -> bytes:
        if code in (Option.INFO, Option.GO):
            return self._info(code, body)
        if code in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            return self._meta(code, body)
        if code == Option.STARTTLS:
            return _reply(code, Rep.ERR_POLICY, b"TLS is not offered on a local socket")
        if code == Option.ABORT:
            self.ended = True
            return _reply(code, Rep.ACK)
        if code == Option.LIST:
            _expect_empty(body)
            return self._list()
        if code == Option.STRUCTURED_REPLY:
            _expect_empty(body)
            self.structured = True
            return _reply(code, Rep.ACK)
        return _reply(code, Rep.ERR_UNSUP, b"option %d is not supported" % code)

    def _end(self, fault: str) -> None:
        self.ended = True
        self.fault = fault

    def _find(self, name: str) -> tuple[Export | None, Rep, str]:
        """The export to serve under a name, or the refusal and its reason."""
        export = self.exports.get(name)
        if export is None:
            return None, Rep.ERR_UNKNOWN, f"no export is named '{name[:200]}'"
        if export.refused is not None:
            return None, Rep.ERR_POLICY, export.refused
        return export, Rep.ACK, ""

    def _export_name(self, body: bytes) -> bytes:
        try:
            export, _, reason = self._find(_text(body))
        except Malformed as malformed:
            export, reason = None, str(malformed)
        if export is None:
            self._end(reason)
            return b""
        self.chosen = export
        if self._meta_name != _text(body):
            self._meta_name = None
        flags = export.transmission_flags(structured=self.structured)
        padding = bytes(c.EXPORT_NAME_PADDING) if self._zeroes else b""
        return c.EXPORT_NAME_REPLY.pack(export.size_bytes, flags) + padding

    def _list(self) -> bytes:
        names = sorted({export.name for export in self.exports.values()})
        answers = [_reply(Option.LIST, Rep.SERVER, _counted(name)) for name in names]
        return b"".join((*answers, _reply(Option.LIST, Rep.ACK)))

    def _info(self, code: int, body: bytes) -> bytes:
        name, position = _take_text(body, 0)
        if len(body) < position + 2:
            raise Malformed("the list of information requests is missing")
        (count,) = c.U16.unpack_from(body, position)
        position += 2
        if len(body) != position + 2 * count:
            raise Malformed(f"{count} information requests do not fill {len(body) - position} bytes")
        wanted = {c.U16.unpack_from(body, position + 2 * index)[0] for index in range(count)}
        export, refusal, reason = self._find(name)
        if export is None:
            return _reply(code, refusal, reason.encode())
        flags = export.transmission_flags(structured=self.structured)
        answers = [_reply(code, Rep.INFO, c.INFO_EXPORT.pack(Info.EXPORT, export.size_bytes, flags))]
        if Info.NAME in wanted:
            answers.append(_reply(code, Rep.INFO, c.U16.pack(Info.NAME) + export.name.encode()))
        if Info.DESCRIPTION in wanted and export.description:
            answers.append(_reply(code, Rep.INFO, c.U16.pack(Info.DESCRIPTION) + export.description.encode()))
        # Sent without being asked for too: a client that did not ask may still honour it.
        sizes = (export.block_min, export.block_preferred, export.payload_max)
        answers.append(_reply(code, Rep.INFO, c.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes)))
        answers.append(_reply(code, Rep.ACK))
        if code == Option.GO:
            self.chosen = export
            if self._meta_name != name:
                self._meta_name = None
        return b"".join(answers)

    def _meta(self, code: int, body: bytes) -> bytes:
        if code == Option.SET_META_CONTEXT:
            self._meta_name = None  # each SET replaces what an earlier one selected, even if it fails
        if not self.structured:
            raise Malformed("metadata contexts need structured replies")
        name, position = _take_text(body, 0)
        (count, position) = _take_u32(body, position)
        queries = []
        for _ in range(count):  # ends early: every query takes four bytes of a bounded body
            query, position = _take_text(body, position)
            queries.append(query)
        if position != len(body):
            raise Malformed(f"{len(body) - position} bytes follow the last query")
        export, refusal, reason = self._find(name)
        if export is None:
            return _reply(code, refusal, reason.encode())
        listing = code == Option.LIST_META_CONTEXT
        selected = c.META_ALLOCATION in queries or (listing and (not queries or "base:" in queries))
        if not selected:
            return _reply(code, Rep.ACK)
        if not listing:
            self._meta_name = name
        context = c.U32.pack(0 if listing else c.META_ALLOCATION_ID) + c.META_ALLOCATION.encode()
        return _reply(code, Rep.META_CONTEXT, context) + _reply(code, Rep.ACK)


def _reply(code: int, kind: Rep, body: bytes = b"") -> bytes:
    if kind & c.REP_ERROR:
        body = body[: c.MESSAGE_LENGTH_MAX]
    return c.OPTION_REPLY.pack(c.OPTION_REPLY_MAGIC, code, kind, len(body)) + body


def _counted(text: str) -> bytes:
    encoded = text.encode()
    return c.U32.pack(len(encoded)) + encoded


def _expect_empty(body: bytes) -> None:
    if body:
        raise Malformed(f"this option has no body, but {len(body)} bytes came")


def _text(raw: bytes) -> str:
    if len(raw) > c.NAME_LENGTH_MAX:
        raise Malformed(f"a string of {len(raw)} bytes is longer than {c.NAME_LENGTH_MAX}")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Malformed("a string is not UTF-8") from None


def _take_u32(body: bytes, position: int) -> tuple[int, int]:
    if len(body) < position + 4:
        raise Malformed("the option ends inside a number")
    return c.U32.unpack_from(body, position)[0], position + 4


def _take_text(body: bytes, position: int) -> tuple[str, int]:
    length, position = _take_u32(body, position)
    if len(body) < position + length:
        raise Malformed(f"the option ends inside a string of {length} bytes")
    return _text(body[position : position + length]), position + length
