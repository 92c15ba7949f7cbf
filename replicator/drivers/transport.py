# SPDX-License-Identifier: Apache-2.0
"""Byte streams to a peer: TLS contexts, and one face for clear and encrypted connections.

Invariants: TLS is 1.3 or nothing, both sides show a certificate, and nothing is a trust anchor but what is
pinned. Contexts are built anew for every connection, so a changed key directory counts from the next
connection on and never touches one that is up.  No session is ever resumed: a resumed session would outlive a
removed certificate. There is no way from TLS to clear text: a `TlsStream` that is not encrypted refuses to
finish its handshake.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Final

from replicator.core.wire import Buffer
from replicator.drivers.keys import Fingerprint, Trust, fingerprint, load_trust
from replicator.drivers.loop import READ, WRITE
from replicator.errors import ConfigError, ProtocolError

IOV_MAX: Final = os.sysconf("SC_IOV_MAX")
TLS_CHUNK_BYTES: Final = 128 * 1024  #: handed to OpenSSL at once: few calls, and full records of 16 KiB
_NO_CERTIFICATE_REASONS: Final = ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "TLSV13_ALERT_CERTIFICATE_REQUIRED")
_BAD_VERSION_REASONS: Final = ("UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION")
_CLEAR_TEXT_REASONS: Final = (
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "BAD_RECORD_TYPE",
    "RECORD_LAYER_FAILURE",
)
_REFUSED_REASONS: Final = ("UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_UNKNOWN", "ACCESS_DENIED")


class SendQueue:
    """Buffers that wait to be sent, in order.  `size_bytes` is what no system call has taken yet."""

    __slots__ = ("_buffers", "size_bytes")

    def __init__(self) -> None:
        self._buffers: deque[Buffer] = deque()
        self.size_bytes = 0

    def push(self, buffers: Iterable[Buffer]) -> None:
        """Append; the buffers must not change until they are sent."""
        for buffer in buffers:
            self._buffers.append(buffer)
            self.size_bytes += len(buffer)

    def front(self) -> list[Buffer]:
        """The first buffers, as many as one sendmsg takes."""
        return list(islice(self._buffers, IOV_MAX))

    def sent(self, count: int) -> None:
        """Remove `count` bytes from the front."""
        self.size_bytes -= count
        buffers = self._buffers
        while count:
            head = buffers.popleft()
            if len(head) > count:
                buffers.appendleft(memoryview(head)[count:])
                return
            count -= len(head)

    def take(self, most: int) -> memoryview:
        """Move up to `most` bytes out, small buffers joined; the caller counts them in `size_bytes` as it
        sends.
        """
        buffers = self._buffers
        head = memoryview(buffers.popleft())
        if len(head) >= most or not buffers:
            if len(head) > most:
                buffers.appendleft(head[most:])
            return head[:most]
        parts: list[Buffer] = [head]
        room = most - len(head)
        while buffers and room:
            part = memoryview(buffers.popleft())
            if len(part) > room:
                buffers.appendleft(part[room:])
                part = part[:room]
            parts.append(part)
            room -= len(part)
        return memoryview(b"".join(parts))


class ClearStream:
    """Plain TCP.  `input_ended` and `output_failed` are sentences once that direction is over."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.input_ended = ""
        self.output_failed = ""

    def fileno(self) -> int:
        """The descriptor to watch."""
        return self._sock.fileno()

    def handshake(self) -> int:
        """Nothing to do: 0, done."""
        return 0

    def receive(self, into: memoryview) -> int:
        """Fill `into`; a smaller count means that no more is there now (or `input_ended`)."""
        try:
            count = self._sock.recv_into(into)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.input_ended = _sentence(error)
            return 0
        if not count:
            self.input_ended = "the peer closed the connection"
        return count

    def undelivered(self) -> bool:
        """Whether bytes wait here that the selector does not know of."""
        return False

    def send(self, queue: SendQueue) -> int:
        """Send what the kernel takes; returns the readiness to wait for, 0 when all is sent (or
        `output_failed`).
        """
        while queue.size_bytes:
            try:
                queue.sent(self._sock.sendmsg(queue.front()))
            except BlockingIOError:
                return WRITE
            except OSError as error:
                self.output_failed = _sentence(error)
                return 0
        return 0

    def end_output(self) -> None:
        """Tell the peer that nothing follows; what it still sends can only be discarded."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.output_failed = _sentence(error)

    def discard(self, into: memoryview) -> bool:
        """Throw away what arrives after `end_output`; True when the peer has ended too."""
        try:
            return not self._sock.recv_into(into)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Release the descriptor."""
        self._sock.close()


class TlsStream:
    """TLS 1.3 over TCP; the same face as `ClearStream`."""

    def __init__(self, sock: socket.socket, *, context: ssl.SSLContext, server_side: bool) -> None:
        """Takes the socket over (closes it on failure).  Raises ProtocolError when it is not connected any
        more.
        """
        try:
            self._sock = context.wrap_socket(
                sock, server_side=server_side, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
        except OSError as error:
            sock.close()
            raise ProtocolError(_sentence(error)) from None
        self._chunk = memoryview(b"")
        self.input_ended = ""
        self.output_failed = ""

    def fileno(self) -> int:
        """The descriptor to watch."""
        return self._sock.fileno()

    def handshake(self) -> int:
        """Go on with the handshake; returns the readiness to wait for, 0 when it is complete.

        Raises ProtocolError with a sentence for the operator.
        """
        try:
            self._sock.do_handshake()
        except ssl.SSLWantReadError:
            return READ
        except ssl.SSLWantWriteError:
            return WRITE
        except OSError as error:  # ssl.SSLError is one
            raise tls_fault(error) from None
        # An SSLSocket wrapped around a socket that was not connected speaks clear text without a word.
        if self._sock.version() != "TLSv1.3":
            raise ProtocolError(f"the connection speaks {self._sock.version() or 'clear text'} instead of TLSv1.3")
        return 0

    def fingerprint(self) -> Fingerprint:
        """Of the certificate the peer has shown and proved.  Raises ProtocolError when there is none."""
        certificate = self._sock.getpeercert(binary_form=True)
        if not certificate:
            raise ProtocolError("the handshake ended without a verified certificate")
        return fingerprint(certificate)

    def receive(self, into: memoryview) -> int:
        """As `ClearStream.receive`; one call of OpenSSL gives one record at most, so this asks until it has
        no more.
        """
        count = 0
        size = len(into)
        try:
            while count < size:
                got = self._sock.recv_into(into[count:])
                if not got:
                    self.input_ended = "the peer closed the connection"
                    break
                count += got
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except ssl.SSLZeroReturnError:
            self.input_ended = "the peer closed the connection"
        except OSError as error:
            self.input_ended = str(tls_fault(error))
        return count

    def undelivered(self) -> bool:
        """Whether OpenSSL holds decrypted bytes, for which the selector will never fire."""
        return self._sock.pending() > 0

    def send(self, queue: SendQueue) -> int:
        """As `ClearStream.send`.  A chunk OpenSSL has begun to encrypt is offered again as it is, as it
        demands.
        """
        try:
            while queue.size_bytes:
                if not self._chunk:
                    self._chunk = queue.take(TLS_CHUNK_BYTES)
                count = self._sock.send(self._chunk)
                self._chunk = self._chunk[count:]
                queue.size_bytes -= count
        except ssl.SSLWantWriteError:
            return WRITE
        except ssl.SSLWantReadError:
            return READ
        except OSError as error:
            self.output_failed = str(tls_fault(error))
        return 0

    def end_output(self) -> None:
        """As `ClearStream.end_output`, with TLS's own end mark before TCP's."""
        try:
            self._sock.unwrap()
        except (OSError, ValueError):
            pass  # the mark is sent or cannot be; its echo is not waited for
        try:
            self._sock.shutdown(socket.SHUT_WR)  # from here on the object reads raw bytes, to be discarded
        except OSError as error:
            self.output_failed = _sentence(error)

    def discard(self, into: memoryview) -> bool:
        """As `ClearStream.discard`."""
        try:
            return not self._sock.recv_into(into)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Release the descriptor."""
        self._sock.close()


Stream = ClearStream | TlsStream


def server_context(directory: Path, names: Mapping[int, str]) -> tuple[ssl.SSLContext, Trust]:
    """For one accepted connection: any pinned certificate will do, who it is follows from which.

    Raises ConfigError when this node's own key cannot be used.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    return context, _anchor(context, directory, names)


def client_context(directory: Path, peer: int, name: str) -> tuple[ssl.SSLContext, Trust]:
    """For one dialed connection: the certificates of that peer alone.

    Raises ConfigError when this node's key or what is pinned for the peer cannot be used.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    trust = _anchor(context, directory, {peer: name})
    if trust.faults:
        raise ConfigError(list(trust.faults))
    return context, trust


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False  # the certificate itself is pinned; names in it mean nothing
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # a pinned certificate is an anchor, whoever signed it
    return context


def _anchor(context: ssl.SSLContext, directory: Path, names: Mapping[int, str]) -> Trust:
    trust = load_trust(context, directory, names)
    for certificates in trust.certificates.values():
        context.load_verify_locations(cadata=b"".join(certificates))
    return trust


def tls_fault(error: OSError) -> ProtocolError:
    """What went wrong in TLS, for the operator: in this project's words where the cause is known."""
    reason = (error.reason or "") if isinstance(error, ssl.SSLError) else ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return ProtocolError(
            f"the certificate the peer shows is not pinned: {error.verify_message}",
            hint="compare its node.crt with the file in peers/",
        )
    if any(word in reason for word in _REFUSED_REASONS):
        return ProtocolError(
            f"the peer refused this node's certificate: {_words(reason)}",
            hint="copy this node's node.crt to the peers/ directory there",
        )
    if any(word in reason for word in _NO_CERTIFICATE_REASONS):
        return ProtocolError("the peer showed no certificate")
    if any(word in reason for word in _BAD_VERSION_REASONS):
        return ProtocolError("the peer does not speak TLS 1.3")
    if any(word in reason for word in _CLEAR_TEXT_REASONS):
        return ProtocolError("what the peer sends is not TLS", hint="is it configured for clear connections?")
    if reason:
        return ProtocolError(f"TLS failed: {_words(reason)}")
    return ProtocolError(_sentence(error))


def _words(reason: str) -> str:
    return reason.lower().replace("_", " ")


def _sentence(error: OSError) -> str:
    if isinstance(error, ssl.SSLEOFError):
        return "the peer cut the connection"
    return f"the connection is lost: {error.strerror or error}"
