# SPDX-License-Identifier: Apache-2.0
"""The links to the peers: listen, dial, authenticate, and tell the core.

A connection is an `Attempt` until it has proved who it is (TLS: the certificate pinned for a peer), then a
`Link`. An attempt has `HANDSHAKE_NS`; accepted ones wait in the few places of `Admission`.  Before
authentication nothing is sent or parsed but TLS, and whatever a stranger does touches no established link: it
has its own descriptor and state, and shares nothing with a link but the loop.

A `clear` link is for tests and for links that are protected otherwise.  It authenticates nobody:
`LinkUp.peer` is None, HELLO says who it is, and an accepted one keeps its place in `Admission` until its
first whole frame.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Final

from replicator.core.actions import CloseLink, Dial, Send
from replicator.core.events import DialFailed, LinkUp
from replicator.drivers import tcp
from replicator.drivers.admission import Admission, Notices
from replicator.drivers.attempt import Attempt, Probation, Secure
from replicator.drivers.keys import Trust
from replicator.drivers.link import BUFFER_BYTES, Link
from replicator.drivers.loop import READ, Loop, Timer
from replicator.drivers.transport import ClearStream, Stream, TlsStream, client_context, server_context
from replicator.errors import ConfigError, ProtocolError

ACCEPTS_PER_TURN: Final = 16
ACCEPTED_LINKS_MAX: Final = 4  #: at once, of one peer (clear: of all): what a hostile peer may hold
ACCEPT_PAUSE_NS: Final = 1_000_000_000  #: when the process has no descriptor left
NONCE_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where a peer listens; `name` is its node name and names its certificate in `peers/`."""

    name: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Clear:
    """No encryption and no authentication; off loopback only with the second word."""

    clear_off_loopback: bool = False


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS 1.3 with the keys of this directory (see `keys`)."""

    directory: Path


class PeerLinks:
    """All connections of one resource on this node.  Everything is called in the loop's thread."""

    def __init__(
        self,
        loop: Loop,
        *,
        listen: tuple[str, int],
        peers: Mapping[int, PeerAddress],
        security: Clear | Tls,
        node_id: int,
        on_refused: Callable[[str], None],
        random: Callable[[int], bytes] = os.urandom,
        numbers: Iterator[int] | None = None,
    ) -> None:
        """`on_refused` gets a sentence for the log, rate limited, when a connection is refused.
        `numbers` gives links their numbers: one source for all resources of a process.

        Raises ConfigError: an address is not numeric, a key or certificate is missing or unsafe (all faults
        at once), or `clear` is asked for off loopback without its second word.
        """
        assert node_id not in peers, "a node is not its own peer"
        self._loop = loop
        self._listen = listen
        self._peers = dict(peers)
        self._security = security
        self._random = random
        self._names = {peer: where.name for peer, where in peers.items()}
        self._check()
        self._admission = Admission({_canonical(where.host) for where in peers.values()})
        self._notices = Notices(on_refused)
        self._listener: socket.socket | None = None
        self._paused: Timer | None = None  # while nothing is accepted for want of descriptors
        self._attempts: dict[Attempt, str] = {}  # and the address at the other end
        self._links: dict[int, Link] = {}
        self._numbers = numbers if numbers is not None else count(1)
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def listen(self) -> None:
        """Begin to accept connections.  Raises ConfigError when the address cannot be had."""
        assert self._listener is None
        self._listener = tcp.listening_socket(*self._listen)
        self._loop.register(self._listener, READ, self._on_acceptable)

    def close(self) -> None:
        """Cut everything (the process ends).  `LinkDown` is posted for links that were up."""
        if self._listener is not None:
            if self._paused is None:
                self._loop.unregister(self._listener)
            else:
                self._loop.cancel(self._paused)
            self._listener.close()
            self._listener = None
        for attempt in list(self._attempts):
            attempt.abandon("this node is shutting down")
        for link in list(self._links.values()):
            link.cut("this node is shutting down")

    # -- actions of the core -------------------------------------------------------------------------------

    def dial(self, action: Dial) -> None:
        """Try once to connect: `LinkUp` or `DialFailed` follows."""
        peer = self._peers[action.peer]
        try:
            secure, trust = self._client_side(action.peer, peer.name)
            sock = tcp.dialing_socket(self._listen[0], peer.host, peer.port)
        except (ConfigError, ProtocolError) as error:
            self._loop.post(DialFailed(action.peer, str(error)))
            return
        attempt = Attempt(self._loop, sock, secure, trust, self._on_attempt_end, peer=action.peer)
        self._attempts[attempt] = peer.host

    def send(self, action: Send) -> None:
        """Queue a frame; frames to a link that is gone go nowhere (its `LinkDown` is on the way)."""
        link = self._links.get(action.link)
        if link is not None:
            link.send(action.frame)

    def close_link(self, action: CloseLink) -> None:
        """Send what is queued, for a second at most, then close: `LinkDown` follows."""
        link = self._links.get(action.link)
        if link is not None:
            link.close(action.reason)

    def queued_bytes(self, link: int) -> int:
        """Bytes handed over for a link that the kernel has not taken; 0 for one that is gone."""
        found = self._links.get(link)
        return found.queued_bytes if found is not None else 0

    # -- who comes in --------------------------------------------------------------------------------------

    def _on_acceptable(self, _mask: int) -> None:
        assert self._listener is not None
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, where = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause_accepting(error)
                    return
                continue  # that connection is gone already (accept(2) lists the reasons)
            self._on_accepted(sock, _canonical(where[0]))

    def _pause_accepting(self, error: OSError) -> None:
        """Out of descriptors or memory: the connection stays ready, so look away for a while instead of
        spinning.
        """
        assert self._listener is not None
        self._notices.refused("anybody", error.strerror or str(error), self._loop.now_ns())
        self._loop.unregister(self._listener)
        self._paused = self._loop.call_at(self._loop.now_ns() + ACCEPT_PAUSE_NS, self._accept_again)

    def _accept_again(self) -> None:
        assert self._listener is not None
        self._paused = None
        self._loop.register(self._listener, READ, self._on_acceptable)

    def _on_accepted(self, sock: socket.socket, source: str) -> None:
        refusal = self._admission.refusal(source, self._loop.now_ns())
        if refusal:
            sock.close()
            self._refused(source, refusal)
            return
        try:
            sock.setblocking(False)
            tcp.tune(sock)
            if isinstance(self._security, Clear):
                self._accept_clear(sock, source)
                return
            secure, trust = self._server_side(self._security)
        except (ConfigError, OSError) as error:
            sock.close()
            self._refused(source, str(error))
            return
        attempt = Attempt(self._loop, sock, secure, trust, self._on_attempt_end, peer=None)
        self._attempts[attempt] = source
        self._admission.enter(source, partial(attempt.abandon, "its place was needed for a peer"))

    def _accept_clear(self, sock: socket.socket, source: str) -> None:
        if self._crowded(None):
            sock.close()
            self._refused(source, f"{ACCEPTED_LINKS_MAX} clear connections are up")
            return
        proof = Probation(self._loop, partial(self._admission.leave, source))
        link = self._open(ClearStream(sock), None, dialed=False, probation=proof)
        proof.begin(link)
        self._admission.enter(source, partial(link.cut, "its place was needed for a peer"))

    def _server_side(self, security: Tls) -> tuple[Secure, Trust]:
        context, trust = server_context(security.directory, self._names)
        if not trust.owners:
            raise ConfigError(list(trust.faults) or ["no peer has a certificate"])
        return partial(TlsStream, context=context, server_side=True), trust

    def _client_side(self, peer: int, name: str) -> tuple[Secure, Trust | None]:
        if isinstance(self._security, Clear):
            return ClearStream, None
        context, trust = client_context(self._security.directory, peer, name)
        return partial(TlsStream, context=context, server_side=False), trust

    # -- how it ends ---------------------------------------------------------------------------------------

    def _on_attempt_end(self, attempt: Attempt, proved: int | None, fault: str) -> None:
        """An attempt is over: a link to `proved` (clear: None), or `fault` says why not."""
        source = self._attempts.pop(attempt)
        if not attempt.dialed:
            assert fault or proved is not None, "an accepted TLS connection proves a peer or fails"
            self._admission.leave(source, self._loop.now_ns(), failed=bool(fault))
            if not fault and self._crowded(proved):
                fault = f"{ACCEPTED_LINKS_MAX} connections accepted from this peer are up"
        if fault:
            attempt.release()
            if attempt.peer is not None:
                self._loop.post(DialFailed(attempt.peer, fault))
            else:
                self._refused(source, fault)
            return
        self._open(attempt.stream(), proved, dialed=attempt.dialed, probation=None)

    def _open(self, stream: Stream, peer: int | None, *, dialed: bool, probation: Probation | None) -> Link:
        number = next(self._numbers)
        link = Link(
            self._loop, number, stream, self._buffer, peer=peer, dialed=dialed,
            on_first=probation.passed if probation else _nothing,
            on_end=partial(self._on_link_end, probation),
        )  # fmt: skip
        self._links[number] = link
        self._loop.post(LinkUp(number, peer, dialed, self._random(NONCE_BYTES)))
        return link

    def _on_link_end(self, probation: Probation | None, link: Link) -> None:
        del self._links[link.number]
        if probation is not None:
            probation.failed()

    def _crowded(self, peer: int | None) -> bool:
        accepted = sum(1 for link in self._links.values() if link.peer == peer and not link.dialed)
        return accepted >= ACCEPTED_LINKS_MAX

    def _refused(self, source: str, reason: str) -> None:
        self._notices.refused(source, reason, self._loop.now_ns())

    # -- the configuration ---------------------------------------------------------------------------------

    def _check(self) -> None:
        hosts = [self._listen, *((where.host, where.port) for where in self._peers.values())]
        for host, port in hosts:
            tcp.address(host, port)
        if isinstance(self._security, Tls):
            _, trust = server_context(self._security.directory, self._names)
            if trust.faults:
                raise ConfigError(list(trust.faults))
            return
        outside = [host for host, _ in hosts if not tcp.is_loopback(host)]
        if outside and not self._security.clear_off_loopback:
            raise ConfigError(
                [f"clear connections are refused off loopback: {', '.join(outside)}"],
                hint="use TLS (replicator keygen), or set clear_off_loopback if the network is protected",
            )


def _canonical(host: str) -> str:
    """One spelling per address, without a zone."""
    return str(ipaddress.ip_address(host.partition("%")[0]))


def _nothing() -> None:
    """An authenticated link has nothing left to prove."""
