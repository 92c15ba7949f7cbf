# SPDX-License-Identifier: Apache-2.0
"""Two nodes' links over real sockets: who gets in, what gets through, and how it ends."""

from __future__ import annotations

import itertools
import random
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from replicator.core.actions import CloseLink, Dial, Send
from replicator.core.events import DialFailed, Event, LinkDown, LinkFrames, LinkUp
from replicator.core.wire import HELLO_MIN, Frame, Kind, encode
from replicator.drivers import keys
from replicator.drivers.admission import PENALTY_NS
from replicator.drivers.attempt import HANDSHAKE_NS
from replicator.drivers.link import TURN_BYTES
from replicator.drivers.loop import Loop
from replicator.drivers.peer import ACCEPTED_LINKS_MAX, Clear, PeerAddress, PeerLinks, Tls
from replicator.errors import ConfigError

HELLO = Frame(Kind.HELLO, payload=bytes(HELLO_MIN))
AGREE = Frame(Kind.AGREE, payload=bytes(32))
NAMES = {1: "alpha", 2: "beta"}
GIVE_UP_S = 20


def free_port(host: str) -> int:
    """Below the ephemeral range, where the product's ports are."""
    for port in random.sample(range(20000, 30000), 200):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
            try:
                sock.bind((host, port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


class World:
    """A loop, the links of some nodes in it, and everything they posted."""

    def __init__(self) -> None:
        self.skew_ns = 0
        self.loop = Loop(lambda: time.monotonic_ns() + self.skew_ns)
        self.events: list[Event] = []
        self.nodes: dict[int, PeerLinks] = {}
        self.refused: list[str] = []
        self.numbers = itertools.count(1)  # both nodes' events arrive in one list

    def add(self, node: int, links: PeerLinks) -> PeerLinks:
        self.nodes[node] = links
        return links

    def until(self, done: Callable[[], object]) -> None:
        """Turn the loop until `done()`; the deadline only keeps a broken test from hanging."""
        give_up = time.monotonic_ns() + GIVE_UP_S * 10**9

        def turn(events: list[Event], _now_ns: int) -> None:
            self.events += events
            assert time.monotonic_ns() < give_up, f"nothing more happens; so far {self.events} {self.refused}"
            if done():
                self.loop.stop()

        self.loop.run(turn, lambda: self.loop.now_ns() + 5_000_000)

    def ups(self) -> list[LinkUp]:
        return [event for event in self.events if isinstance(event, LinkUp)]

    def downs(self) -> list[LinkDown]:
        return [event for event in self.events if isinstance(event, LinkDown)]

    def failures(self) -> list[DialFailed]:
        return [event for event in self.events if isinstance(event, DialFailed)]

    def frames(self, link: int, kind: Kind) -> list[Frame]:
        return [
            frame
            for event in self.events
            if isinstance(event, LinkFrames) and event.link == link
            for frame in event.frames
            if frame.kind is kind
        ]


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for links in world.nodes.values():
        links.close()
    world.loop.close()


class Pair:
    """Alpha (1) listens, beta (2) dials."""

    def __init__(self, world: World, tmp_path: Path, *, host: str = "127.0.0.1", tls: bool = True) -> None:
        self.world = world
        self.host = host
        self.ports = {1: free_port(host), 2: free_port(host)}
        self.directories = {node: tmp_path / name for node, name in NAMES.items()}
        self.tls = tls
        if tls:
            for node, name in NAMES.items():
                keys.generate(name, self.directories[node])
            self.pin(1, 2)
            self.pin(2, 1)

    def pin(self, at: int, peer: int, *more: Path) -> None:
        path = self.directories[at] / "peers" / f"{NAMES[peer]}.crt"
        sources = [self.directories[peer] / "node.crt", *more]
        path.write_bytes(b"".join(source.read_bytes() for source in sources))
        path.chmod(0o644)

    def links(self, node: int) -> PeerLinks:
        other = 3 - node
        links = PeerLinks(
            self.world.loop,
            listen=(self.host, self.ports[node]),
            peers={other: PeerAddress(NAMES[other], self.host, self.ports[other])},
            security=Tls(self.directories[node]) if self.tls else Clear(),
            node_id=node,
            on_refused=self.world.refused.append,
            numbers=self.world.numbers,
        )
        return self.world.add(node, links)

    def start(self) -> tuple[PeerLinks, PeerLinks]:
        alpha, beta = self.links(1), self.links(2)
        alpha.listen()
        return alpha, beta

    def up(self) -> tuple[PeerLinks, int, PeerLinks, int]:
        """Both, with a link that is open for all frames."""
        alpha, beta = self.start()
        a, b = self.connect(alpha, beta)
        return alpha, a, beta, b

    def connect(self, alpha: PeerLinks, beta: PeerLinks) -> tuple[int, int]:
        before = len(self.world.ups())
        beta.dial(Dial(1))
        self.world.until(lambda: len(self.world.ups()) == before + 2)
        a = next(up.link for up in self.world.ups()[before:] if not up.dialed)
        b = next(up.link for up in self.world.ups()[before:] if up.dialed)
        for frame in (HELLO, AGREE):
            alpha.send(Send(a, frame))
            beta.send(Send(b, frame))
        self.world.until(lambda: self.world.frames(a, Kind.AGREE) and self.world.frames(b, Kind.AGREE))
        return a, b

    def stranger(self, source: str = "") -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        if source:
            sock.bind((source, 0))
        sock.connect((self.host, self.ports[1]))
        sock.setblocking(False)
        return sock


def ended(sock: socket.socket) -> bool:
    """The other side has closed."""
    try:
        return not sock.recv(65536)
    except BlockingIOError:
        return False
    except OSError:
        return True


def write(sequence: int, size: int = 4096) -> Frame:
    return Frame(Kind.WRITE, sequence=sequence, offset=0, size=size, payload=sequence.to_bytes(8, "big") * (size // 8))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("tls", [True, False])
def test_a_link_carries_frames_both_ways(world: World, tmp_path: Path, host: str, tls: bool) -> None:
    alpha, a, beta, b = Pair(world, tmp_path, host=host, tls=tls).up()
    alpha.send(Send(a, write(1)))
    beta.send(Send(b, write(2)))
    world.until(lambda: world.frames(a, Kind.WRITE) and world.frames(b, Kind.WRITE))
    assert world.frames(b, Kind.WRITE) == [write(1)]
    assert world.frames(a, Kind.WRITE) == [write(2)]
    up = {event.link: event for event in world.ups()}
    assert (up[a].peer, up[a].dialed, up[b].peer, up[b].dialed) == (
        (2, False, 1, True) if tls else (None, False, None, True)
    )
    assert len(up[a].nonce) == 32 and up[a].nonce != up[b].nonce


def test_what_follows_agree_waits_until_this_side_agreed_too(world: World, tmp_path: Path) -> None:
    pair = Pair(world, tmp_path)
    alpha, beta = pair.start()
    beta.dial(Dial(1))
    world.until(lambda: len(world.ups()) == 2)
    a = next(up.link for up in world.ups() if not up.dialed)
    b = next(up.link for up in world.ups() if up.dialed)
    for frame in (HELLO, AGREE, write(7)):
        beta.send(Send(b, frame))
    world.until(lambda: world.frames(a, Kind.AGREE))
    assert not world.frames(a, Kind.WRITE)
    alpha.send(Send(a, AGREE))
    world.until(lambda: world.frames(a, Kind.WRITE))
    assert not world.downs()


def test_close_lets_what_is_queued_arrive_and_ends_both_sides_once(world: World, tmp_path: Path) -> None:
    alpha, a, _beta, b = Pair(world, tmp_path).up()
    for sequence in range(1, 33):
        alpha.send(Send(a, write(sequence, 1 << 20)))
    alpha.close_link(CloseLink(a, "enough"))
    alpha.send(Send(a, write(99)))
    alpha.close_link(CloseLink(a, "twice"))
    world.until(lambda: len(world.downs()) == 2)
    assert [frame.sequence for frame in world.frames(b, Kind.WRITE)] == list(range(1, 33))
    assert {down.link: down.reason for down in world.downs()} == {
        a: "enough",
        b: "the peer closed the connection",
    }
    alpha.send(Send(a, write(100)))
    assert alpha.queued_bytes(a) == 0


def test_an_unknown_certificate_is_refused_on_both_sides(world: World, tmp_path: Path) -> None:
    pair = Pair(world, tmp_path)
    _alpha, beta = pair.start()
    keys.generate("beta", pair.directories[2], force=True)
    beta.dial(Dial(1))  # alpha does not know the new key; beta learns it from the alert
    world.until(lambda: world.refused and world.downs())
    assert "not pinned" in world.refused[0]
    assert "refused this node's certificate" in world.downs()[0].reason
    assert [up.dialed for up in world.ups()] == [True]
    keys.generate("alpha", pair.directories[1], force=True)
    heard_again = time.monotonic_ns() + PENALTY_NS
    world.until(lambda: time.monotonic_ns() > heard_again)
    beta.dial(Dial(1))
    world.until(lambda: world.failures())
    assert "not pinned" in world.failures()[0].reason


def test_a_configured_node_that_answers_for_another_is_refused(world: World, tmp_path: Path) -> None:
    pair = Pair(world, tmp_path)
    keys.generate("gamma", tmp_path / "gamma")
    for name, source in (("alpha", tmp_path / "gamma"), ("gamma", pair.directories[1])):
        path = pair.directories[2] / "peers" / f"{name}.crt"
        path.write_bytes((source / "node.crt").read_bytes())
        path.chmod(0o644)
    pair.links(1).listen()
    address = PeerAddress("alpha", pair.host, pair.ports[1])
    beta = world.add(2, PeerLinks(
        world.loop, listen=(pair.host, pair.ports[2]), security=Tls(pair.directories[2]), node_id=2,
        peers={1: address, 3: PeerAddress("gamma", pair.host, pair.ports[1])},
        on_refused=world.refused.append,
    ))  # fmt: skip
    beta.dial(Dial(1))  # the node there is pinned here, but as gamma
    world.until(lambda: world.failures())
    assert "not pinned" in world.failures()[0].reason
    assert not world.ups()


def test_a_node_that_meets_itself_is_refused(world: World, tmp_path: Path) -> None:
    pair = Pair(world, tmp_path)
    pair.ports[1] = pair.ports[2]
    beta = pair.links(2)
    beta.listen()
    beta.dial(Dial(1))
    world.until(lambda: world.failures())
    assert not world.ups()


def test_a_peer_that_answers_in_clear_is_refused_and_not_retried_in_clear(world: World, tmp_path: Path) -> None:
    pair = Pair(world, tmp_path)
    beta = pair.links(2)
    with socket.create_server((pair.host, pair.ports[1])) as server:
        beta.dial(Dial(1))
        taken: list[socket.socket] = []

        def strip() -> bool:
            if not taken and _readable(server):
                taken.append(server.accept()[0])
                taken[0].sendall(b"".join(map(bytes, encode(HELLO))))
            return bool(world.failures())

        world.until(strip)
        with taken[0] as sock:
            said = sock.recv(65536)
            assert said[0] == 0x16  # a TLS handshake record, nothing else
    assert "not TLS" in world.failures()[0].reason
    assert not world.ups()


def _readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


@pytest.mark.parametrize("said", [b"".join(map(bytes, encode(HELLO))), b"GET / HTTP/1.0\r\n\r\n", b"\0" * 4096])
def test_a_stranger_that_speaks_no_tls_is_refused_and_told_nothing(world: World, tmp_path: Path, said: bytes) -> None:
    pair = Pair(world, tmp_path)
    pair.start()
    with pair.stranger() as sock:
        sock.sendall(said)
        world.until(lambda: world.refused)
        sock.setblocking(True)
        answer = b""
        try:
            answer = sock.recv(65536)
        except ConnectionResetError:
            pass
    assert answer == b"" or answer[0] == 0x15  # nothing but a TLS alert
    assert len(answer) <= 7
    assert not world.ups()


def _tls_client(directory: Path, version: ssl.TLSVersion, *, show: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    if show:
        context.load_cert_chain(directory / "node.crt", directory / "node.key")
    return context


@pytest.mark.parametrize(
    ("version", "show", "sentence"),
    [
        (ssl.TLSVersion.TLSv1_2, True, "does not speak TLS 1.3"),
        (ssl.TLSVersion.TLSv1_3, False, "the peer showed no certificate"),
    ],
)
def test_old_tls_and_no_certificate_are_refused(
    world: World, tmp_path: Path, version: ssl.TLSVersion, show: bool, sentence: str
) -> None:
    pair = Pair(world, tmp_path)
    pair.start()
    context = _tls_client(pair.directories[2], version, show=show)
    with context.wrap_socket(pair.stranger(), do_handshake_on_connect=False) as client:

        def shake() -> bool:
            try:
                client.do_handshake()
            except (ssl.SSLWantReadError, OSError):
                pass
            return bool(world.refused)

        world.until(shake)
    assert sentence in world.refused[0]
    assert not world.ups()


def test_without_keys_nothing_starts(world: World, tmp_path: Path) -> None:
    pair = Pair(world, tmp_path)
    (pair.directories[2] / "peers" / "alpha.crt").unlink()
    with pytest.raises(ConfigError, match=r"copy node\.crt of alpha"):
        pair.links(2)
    (pair.directories[1] / "node.key").unlink()
    with pytest.raises(ConfigError, match="run replicator keygen"):
        pair.links(1)


@pytest.mark.parametrize("listen", ["192.0.2.1", "0.0.0.0", "2001:db8::1"])
def test_clear_off_loopback_needs_a_second_word(world: World, listen: str) -> None:
    def make(security: Clear) -> PeerLinks:
        return PeerLinks(
            world.loop, listen=(listen, 20000), peers={}, security=security, node_id=1, on_refused=print
        )  # fmt: skip

    with pytest.raises(ConfigError, match="refused off loopback"):
        make(Clear())
    make(Clear(clear_off_loopback=True))


def test_names_instead_of_addresses_are_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="not a numeric address"):
        PeerLinks(
            world.loop, listen=("localhost", 20000), peers={}, security=Clear(), node_id=1, on_refused=print
        )  # fmt: skip


@pytest.mark.parametrize("tls", [True, False])
def test_a_flood_of_silent_strangers_does_not_disturb_a_link(world: World, tmp_path: Path, tls: bool) -> None:
    pair = Pair(world, tmp_path, tls=tls)
    alpha, a, beta, b = pair.up()
    strangers = [pair.stranger(f"127.0.1.{n // 2 + 1}") for n in range(40)]
    for sequence in range(1, 201):
        beta.send(Send(b, write(sequence, 65536)))
    world.until(lambda: len(world.frames(a, Kind.WRITE)) == 200 and sum(map(ended, strangers)) >= 32)
    waiting = [sock for sock in strangers if not ended(sock)]
    assert len(waiting) <= 8
    if tls:
        pair.connect(alpha, beta)  # and the peer still finds a place among them
    assert not [down for down in world.downs() if down.link in (a, b)]
    assert 0 < len(world.refused) <= 8
    for sock in strangers:
        sock.close()


@pytest.mark.parametrize("tls", [True, False])
def test_a_stranger_that_says_nothing_is_cut_at_the_deadline(world: World, tmp_path: Path, tls: bool) -> None:
    pair = Pair(world, tmp_path, tls=tls)
    _alpha, a, _beta, b = pair.up()
    with pair.stranger("127.0.1.1") as slow:
        if tls:
            slow.sendall(bytes.fromhex("16030102000100"))  # the first bytes of a handshake
        turns = iter(range(10))
        world.until(lambda: next(turns, None) is None)
        assert not ended(slow)
        world.skew_ns = HANDSHAKE_NS
        world.until(lambda: ended(slow))
    assert not [down for down in world.downs() if down.link in (a, b)]


def test_a_peer_that_accepts_and_says_nothing_fails_the_dial_at_the_deadline(world: World, tmp_path: Path) -> None:
    pair = Pair(world, tmp_path)
    beta = pair.links(2)
    with socket.create_server((pair.host, pair.ports[1])):
        beta.dial(Dial(1))
        turns = iter(range(10))
        world.until(lambda: next(turns, None) is None)
        assert not world.failures()
        world.skew_ns = HANDSHAKE_NS
        world.until(lambda: world.failures())
    assert [failed.reason for failed in world.failures()] == ["the peer has not authenticated within 10 s"]


def test_one_authenticated_peer_holds_few_connections(world: World, tmp_path: Path) -> None:
    pair = Pair(world, tmp_path)
    alpha, beta = pair.start()
    for _ in range(ACCEPTED_LINKS_MAX):
        pair.connect(alpha, beta)
    beta.dial(Dial(1))
    world.until(lambda: world.refused and world.downs())
    assert "from this peer are up" in world.refused[0]
    assert len([up for up in world.ups() if not up.dialed]) == ACCEPTED_LINKS_MAX
    assert len(world.downs()) == 1


def _arrived(world: World, link: int) -> bool:
    return any(frame.sequence == 2 for frame in world.frames(link, Kind.WRITE))


def test_a_rotation_under_load_keeps_the_old_link_and_new_links_use_the_new_key(world: World, tmp_path: Path) -> None:
    pair = Pair(world, tmp_path)
    alpha, a, beta, b = pair.up()
    new = keys.rotate("beta", pair.directories[2])
    pair.pin(1, 2, pair.directories[2] / "node.crt.next")
    beta.send(Send(b, write(1)))
    assert keys.activate_next(pair.directories[2]) == new
    a2, b2 = pair.connect(alpha, beta)
    pair.pin(1, 2)  # the old certificate is gone: who holds the old key comes no more
    a3, b3 = pair.connect(alpha, beta)
    for link, other in ((b, a), (b2, a2), (b3, a3)):
        beta.send(Send(link, write(2)))
        world.until(partial(_arrived, world, other))
    assert not world.downs() and not world.refused


@pytest.mark.parametrize("tls", [True, False])
def test_garbage_instead_of_frames_ends_the_link_with_the_reason(world: World, tmp_path: Path, tls: bool) -> None:
    pair = Pair(world, tmp_path, tls=tls)
    pair.start()
    raw = pair.stranger()
    raw.setblocking(True)
    raw.settimeout(0.001)
    context = _tls_client(pair.directories[2], ssl.TLSVersion.TLSv1_3, show=True) if tls else None
    sock = context.wrap_socket(raw, do_handshake_on_connect=False) if context else raw
    sent: list[bool] = []

    def talk() -> bool:
        if isinstance(sock, ssl.SSLSocket) and not sent:
            try:
                sock.do_handshake()
            except TimeoutError:
                return False
        if not sent:
            sock.sendall(b"".join(map(bytes, encode(HELLO))))
            sent.append(True)
        elif len(sent) == 1 and any(isinstance(event, LinkFrames) for event in world.events):
            sock.sendall(b"garbage " * 8)
            sent.append(True)
        return bool(world.downs())

    world.until(talk)
    sock.close()
    assert len(world.frames(world.ups()[0].link, Kind.HELLO)) == 1
    assert "does not speak this protocol" in world.downs()[0].reason


def test_data_before_both_agreed_ends_the_link(world: World, tmp_path: Path) -> None:
    pair = Pair(world, tmp_path)
    _alpha, beta = pair.start()
    beta.dial(Dial(1))
    world.until(lambda: len(world.ups()) == 2)
    b = next(up.link for up in world.ups() if up.dialed)
    beta.send(Send(b, HELLO))
    beta.send(Send(b, write(1)))
    world.until(lambda: len(world.downs()) == 2)
    assert any("before the handshake was complete" in down.reason for down in world.downs())


@pytest.mark.parametrize("tls", [True, False])
def test_large_writes_keep_their_order_under_backpressure(world: World, tmp_path: Path, tls: bool) -> None:
    _alpha, a, beta, b = Pair(world, tmp_path, tls=tls).up()
    sizes = random.Random(7).choices([512, 4096, 65536, 1 << 20], k=120)
    beta_total = 0
    for sequence, size in enumerate(sizes, 1):
        beta.send(Send(b, write(sequence, size)))
        beta_total += size + 44
    assert beta.queued_bytes(b) == beta_total
    world.until(lambda: len(world.frames(a, Kind.WRITE)) == len(sizes))
    assert [frame.sequence for frame in world.frames(a, Kind.WRITE)] == list(range(1, len(sizes) + 1))
    assert beta.queued_bytes(b) == 0
    batches = [e.frames for e in world.events if isinstance(e, LinkFrames) and e.link == a]
    assert len(batches) > 1
    assert max(sum(len(f.payload) for f in batch) for batch in batches) <= TURN_BYTES + (2 << 20)


def test_a_receiver_that_does_not_read_stops_the_sender_and_costs_one_second_at_close(
    world: World, tmp_path: Path
) -> None:
    pair = Pair(world, tmp_path, tls=False)
    alpha, _beta = pair.start()
    with pair.stranger() as sock:
        world.until(lambda: world.ups())
        link = world.ups()[0].link
        for sequence in range(1, 41):
            alpha.send(Send(link, write(sequence, 1 << 20)))
        turns = iter(range(20))
        world.until(lambda: next(turns, None) is None)
        assert alpha.queued_bytes(link) > 1 << 20
        alpha.close_link(CloseLink(link, "no patience"))
        world.until(lambda: world.downs())
        assert [down.reason for down in world.downs()] == ["no patience"]
        assert alpha.queued_bytes(link) == 0
        assert sock.fileno() >= 0


def test_a_cut_in_the_middle_of_a_frame_is_one_link_down(world: World, tmp_path: Path) -> None:
    pair = Pair(world, tmp_path, tls=False)
    pair.start()
    sock = pair.stranger()
    sock.sendall(b"".join(map(bytes, encode(HELLO)))[:-5])
    world.until(lambda: world.ups())
    sock.close()
    world.until(lambda: world.downs())
    turns = iter(range(5))
    world.until(lambda: next(turns, None) is None)
    assert [down.reason for down in world.downs()] == [
        "the peer closed the connection in the middle of a frame, 105 bytes of it had come"
    ]


def test_a_node_that_dies_is_one_link_down_on_tls_too(world: World, tmp_path: Path) -> None:
    _alpha, a, beta, b = Pair(world, tmp_path).up()
    beta.send(Send(b, write(1)))
    beta.close()
    world.until(lambda: len(world.downs()) == 2)
    assert sorted(down.link for down in world.downs()) == sorted((a, b))


def test_a_dial_that_nobody_answers_fails_once(world: World, tmp_path: Path) -> None:
    beta = Pair(world, tmp_path).links(2)
    beta.dial(Dial(1))
    world.until(lambda: world.failures())
    assert [failed.peer for failed in world.failures()] == [1]
    assert "refused" in world.failures()[0].reason
