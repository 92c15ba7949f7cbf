# SPDX-License-Identifier: Apache-2.0
"""A peer that lies, against a real process: it stays Primary, serves its client, and forgets no dirty bit.

The real node is alpha, Primary, with a peer that was killed and blocks that this peer lacks.  The evil one
takes the killed peer's address and, where it is let that far, its identity and its generation ids.
"""

from __future__ import annotations

import re
import select
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import pytest

from replicator.core import handshake_wire as hw
from replicator.core.handshake_wire import Hello, VolumeState, agree_hash
from replicator.core.wire import FRAME_MAX, HEADER, HEADER_SIZE, MAGIC, Flag, Frame, Kind, encode
from tests.integration.cluster import GIVE_UP_S, MIB, NODES, TwoNodes, alone, synced
from tests.integration.evil import BLOCK, DIRTY, RSS_GROWTH_MAX, Evil, Victim, state_of_beta


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    with TwoNodes(
        tmp_path_factory.mktemp("hostile"), size_bytes=16 * MIB, net='handshake-timeout = "1s"\nko-count = 2'
    ) as pair:
        pair.create_md()
        pair.start_both()
        pair.cli("alpha", "new-current-uuid", "--clear-bitmap", "r0", check=True)
        for node in NODES:
            pair.wait(node, synced)
        pair.cli("alpha", "primary", "r0", check=True)
        pair.kill("beta")
        pair.wait("alpha", alone)
        yield pair


@pytest.fixture(scope="module")
def running(nodes: TwoNodes) -> Iterator[Victim]:
    found = Victim(nodes)
    yield found
    found.client.close()


@pytest.fixture
def victim(running: Victim) -> Iterator[Victim]:
    running.serves()
    running.new_log()
    yield running
    status = running.status()
    if status["connections"][0]["connection-state"] == "StandAlone":
        running.connect()


def header(kind: int, length: int, *, magic: int = MAGIC, version: int = 1) -> bytes:
    """A header with a right checksum, whatever it says."""
    head = HEADER.pack(magic, version, kind, 0, 0, 0, 0, 0, 0, length, 0, 0)[:-4]
    return head + struct.pack("!I", zlib.crc32(head))


# ------------------------------------------------------------------------------------- before the handshake


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: alpha\r\n\r\n".ljust(HEADER_SIZE, b"\0"), "not speak", id="http"),
        pytest.param(bytes(range(256)) * 64, "does not speak this protocol", id="garbage"),
        pytest.param(header(Kind.HELLO, (1 << 32) - 1), "payload of 4294967295 bytes", id="absurd-length"),
        pytest.param(header(Kind.HELLO, 100)[:-1] + b"\0", "checksum", id="damaged-header"),
        pytest.param(header(Kind.HELLO, 100, version=2), "version 2", id="other-frame-version"),
        pytest.param(header(200, 0), "unknown kind 200", id="unknown-kind"),
        pytest.param(header(Kind.WRITE, 512), "before the handshake", id="write-first"),
        pytest.param(header(Kind.HELLO, 66) + bytes(66), "checksum", id="damaged-payload"),
    ],
)
def test_bytes_that_are_no_handshake_end_the_link_with_a_reason(victim: Victim, sent: bytes, reason: str) -> None:
    with victim.evil() as evil:
        evil.raw(sent)
        assert evil.ended() == []
    victim.says(reason)
    victim.serves()


@pytest.mark.parametrize("cut", [1, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 50])
def test_half_a_frame_and_silence_for_ever_is_told_as_such(victim: Victim, cut: int) -> None:
    with victim.evil() as evil:
        whole = b"".join(bytes(part) for part in encode(Frame(Kind.HELLO, payload=evil.hello().pack())))
        evil.raw(whole[:cut])
    victim.says(f"in the middle of a frame, {cut} bytes")
    victim.serves()


# (what is changed in beta's HELLO, the reason, is alpha StandAlone afterwards)
HELLOS: Final[dict[str, tuple[Callable[[Hello], Hello], str, bool]]] = {
    "other-resource": (lambda h: replace(h, resource="r1"), "serves resource r1 here, not r0", False),
    "other-node-id": (lambda h: replace(h, node_id=5), "is node 5", False),
    "meant-for-another": (lambda h: replace(h, peer_node_id=7), "wants to talk to node 7", False),
    "reflected": (lambda h: replace(h, node_id=0, node="alpha", peer_node_id=1), "reflected", False),
    "newer-versions": (lambda h: replace(h, version_min=2, version_max=3), "versions 2 to 3", True),
    "other-name": (lambda h: replace(h, node="gamma"), "calls itself gamma", True),
    "protocol-a": (
        lambda h: replace(h, options=tuple({**dict(h.options), "protocol": "A"}.items())),
        "protocol is C here and A there",
        True,
    ),
    "two-primaries": (
        lambda h: replace(h, options=tuple({**dict(h.options), "allow-two-primaries": "yes"}.items())),
        "allow-two-primaries is no here and yes there",
        True,
    ),
    "more-volumes": (lambda h: replace(h, volumes=(0, 1)), r"has volumes \[0, 1\], this node \[0\]", True),
    "unrelated": (lambda h: replace(h, resource_id=bytes(range(16))), "unrelated data", True),
}


@pytest.mark.parametrize("name", HELLOS)
def test_a_hello_that_does_not_fit_is_refused_with_the_reason(victim: Victim, name: str) -> None:
    change, reason, fatal = HELLOS[name]
    with victim.evil() as evil:
        evil.send(Frame(Kind.HELLO, payload=change(evil.hello()).pack()))
        frames = evil.ended()
    (goodbye,) = frames
    assert goodbye.kind is Kind.GOODBYE
    assert re.search(reason, hw.unpack_goodbye(goodbye.payload)[1])
    status = victim.says(reason)
    assert (status["connections"][0]["connection-state"] == "StandAlone") == fatal
    assert victim.new_log().count('"event": "link-refused"') == 1
    if fatal:
        (entry,) = [entry for entry in status["reasons"] if entry["scope"] == "connection beta"]
        assert re.search(reason, entry["text"]) and "replicator connect r0" in entry["do"]
    victim.serves()


def test_a_wrong_agree_is_refused(victim: Victim) -> None:
    with victim.evil() as evil:
        evil.send(Frame(Kind.HELLO, payload=evil.hello().pack()))
        evil.expect(Kind.AGREE)
        evil.send(Frame(Kind.AGREE, payload=bytes(32)))
        assert [frame.kind for frame in evil.ended()] == [Kind.GOODBYE]
    victim.says("somebody is between us")
    victim.serves()


def test_a_mirror_of_our_own_bytes_gets_nowhere(victim: Victim) -> None:
    with victim.evil() as evil:
        evil.send(Frame(Kind.HELLO, payload=evil.theirs.pack()))
        assert [frame.kind for frame in evil.ended()] == [Kind.GOODBYE]
    victim.says("reflected or misconfigured")
    victim.serves()


# -------------------------------------------------------------------------------------- after the handshake

WRITE: Final = Frame(Kind.WRITE, sequence=1, size=512, payload=b"\xee" * 512)
SEVEN: Final = hw.pack_sequences([7])

#: What is said right after AGREE, before the copies are compared; what alpha says to that.
EARLY: Final[dict[str, tuple[list[Frame], str]]] = {
    "write": ([WRITE], "WRITE from a peer that may not write"),
    "write-as-primary": (
        [Frame(Kind.ROLE, payload=hw.pack_role(True)), WRITE],
        "WRITE from a peer that may not write",
    ),
    "trim": ([Frame(Kind.TRIM, sequence=1, size=MIB)], "TRIM from a peer that may not write"),
    "zero": ([Frame(Kind.ZERO, sequence=1, size=MIB)], "ZERO from a peer that may not write"),
    "written": ([Frame(Kind.WRITTEN, payload=SEVEN)], "WRITTEN for write 7, which is not under way"),
    "received": ([Frame(Kind.RECEIVED, payload=SEVEN)], "RECEIVED, which belongs to protocol B"),
    "failed": ([Frame(Kind.FAILED, payload=SEVEN)], "FAILED for write 7"),
    "barrier-ack": ([Frame(Kind.BARRIER_ACK, sequence=1 << 40)], "BARRIER_ACK 1099511627776 for no barrier"),
    "confirm": (
        [Frame(Kind.RESYNC_CONFIRM, payload=hw.pack_ranges([(0, MIB)]))],
        "RESYNC_CONFIRM while Off",
    ),
    "done": ([Frame(Kind.RESYNC_DONE)], "RESYNC_DONE while Off"),
    "ready": ([Frame(Kind.SYNC_READY)], "SYNC_READY while Off"),
    "start": ([Frame(Kind.SYNC_START)], "SYNC_START while Off"),
    "request": ([Frame(Kind.RESYNC_REQUEST, sequence=1, size=MIB)], "RESYNC_REQUEST while Off"),
    "resync-data": (
        [Frame(Kind.RESYNC_DATA, sequence=1, size=BLOCK, payload=bytes(BLOCK))],
        "RESYNC_DATA while Off",
    ),
    "bitmap": ([Frame(Kind.BITMAP, size=MIB, payload=b"\1")], "BITMAP while Off"),
    "generation": (
        [Frame(Kind.NEW_GENERATION, sequence=1, payload=hw.pack_generation(99, clear_bitmap=False))],
        "NEW_GENERATION for copies that are not equal",
    ),
    "generation-clears": (
        [Frame(Kind.NEW_GENERATION, sequence=1, payload=hw.pack_generation(99, clear_bitmap=True))],
        "NEW_GENERATION that clears the bitmap",
    ),
    "generation-none": (
        [Frame(Kind.NEW_GENERATION, sequence=1, payload=hw.pack_generation(0, clear_bitmap=True))],
        "NEW_GENERATION that cannot be",
    ),
    "generation-ack": ([Frame(Kind.NEW_GENERATION_ACK, sequence=1)], "NEW_GENERATION_ACK without"),
    "read-data": (
        [Frame(Kind.READ_DATA, sequence=1, size=512, payload=bytes(512))],
        "READ_DATA 1 for no read of ours",
    ),
    "read-failed": ([Frame(Kind.READ_FAILED, sequence=1, payload=hw.pack_errno(5))], "for no read of ours"),
    "read-beyond": ([Frame(Kind.READ, sequence=1, offset=1 << 40, size=512)], "READ beyond the end"),
    "no-such-volume": ([Frame(Kind.BITMAP_END, 9)], "BITMAP_END for volume 9, which does not exist"),
    "hello-again": ([Frame(Kind.HELLO, payload=bytes(66))], "HELLO"),
    "disk-state-beyond": (
        [Frame(Kind.DISK_STATE, sequence=1, payload=hw.pack_disk_state(0, [(1 << 40, 512)]))],
        "DISK_STATE with a range beyond the end",
    ),
    "disk-state-good": (
        [Frame(Kind.DISK_STATE, sequence=1, payload=hw.pack_disk_state(9))],
        "only the loss of a disk is told this way",
    ),
    "state-nonsense": ([Frame(Kind.VOLUME_STATE, sequence=1, payload=b"\xff" * 43)], "VOLUME_STATE with the value 255"),
    "state-round-0": (
        [Frame(Kind.VOLUME_STATE, payload=VolumeState(disk=9, size_bytes=MIB, current=2).pack())],
        "round 0",
    ),
    "state-no-id": (
        [Frame(Kind.VOLUME_STATE, sequence=1, payload=VolumeState(disk=9, size_bytes=MIB).pack())],
        "VOLUME_STATE without a current generation",
    ),
    "state-back": (
        [
            Frame(Kind.VOLUME_STATE, sequence=9, payload=VolumeState(disk=9, size_bytes=512, current=2).pack()),
            Frame(Kind.VOLUME_STATE, sequence=8, payload=VolumeState(disk=9, size_bytes=512, current=2).pack()),
        ],
        "round 8 after round 9|size-differs",
    ),
}


@pytest.mark.parametrize("name", EARLY)
def test_a_lie_before_the_copies_are_compared_ends_the_link(victim: Victim, name: str) -> None:
    frames, reason = EARLY[name]
    with victim.evil() as evil:
        evil.agree()
        evil.expect(Kind.ROLE)
        evil.send(*frames)
        evil.ended()
    victim.says(reason)
    assert len(re.findall('"event": "(protocol-error|refused-data)"', victim.new_log())) == 1
    victim.serves()


#: The same while the peer may pull its resync.
LATE: Final[dict[str, tuple[list[Frame], str]]] = {
    "done-too-early": ([Frame(Kind.RESYNC_DONE)], f"RESYNC_DONE with {DIRTY} blocks not confirmed"),
    "confirm-unasked": (
        [Frame(Kind.RESYNC_CONFIRM, payload=hw.pack_ranges([(0, DIRTY * BLOCK)]))],
        "which was never copied",
    ),
    "confirm-beyond": (
        [Frame(Kind.RESYNC_CONFIRM, payload=hw.pack_ranges([(1 << 40, BLOCK)]))],
        "RESYNC_CONFIRM beyond the end",
    ),
    "request-beyond": (
        [Frame(Kind.RESYNC_REQUEST, sequence=1, offset=1 << 40, size=BLOCK)],
        "resync request beyond the end",
    ),
    "ready-again": ([Frame(Kind.SYNC_READY)], "SYNC_READY while SyncSource"),
    "bitmap-again": ([Frame(Kind.BITMAP, size=MIB, payload=b"\1")], "BITMAP while SyncSource"),
    "bitmap-end-again": ([Frame(Kind.BITMAP_END)], "BITMAP_END while SyncSource"),
    "start": ([Frame(Kind.SYNC_START)], "SYNC_START while SyncSource"),
    "resync-data": (
        [Frame(Kind.RESYNC_DATA, sequence=1, size=BLOCK, payload=bytes(BLOCK))],
        "RESYNC_DATA while SyncSource",
    ),
    "write": ([WRITE], "WRITE from a peer that may not write"),
    "generation": (
        [Frame(Kind.NEW_GENERATION, sequence=1, payload=hw.pack_generation(99, clear_bitmap=False))],
        "NEW_GENERATION for copies that are not equal",
    ),
    "flood-of-requests": (
        [Frame(Kind.RESYNC_REQUEST, sequence=n, size=MIB) for n in range(1, 400)],
        "bytes of resync requests at once",
    ),
}


@pytest.mark.parametrize("name", LATE)
def test_a_lie_in_the_middle_of_a_resync_ends_the_link(victim: Victim, name: str) -> None:
    frames, reason = LATE[name]
    with victim.evil() as evil:
        evil.sync()
        evil.send(*frames)
        evil.ended()
    victim.says(reason)
    assert victim.new_log().count('"event": "protocol-error"') == 1
    victim.serves()


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (Frame(Kind.BITMAP, offset=1 << 40, size=BLOCK, payload=b"\1"), "BITMAP beyond the end"),
        (Frame(Kind.BITMAP, size=BLOCK, payload=b"\xff" * 65536), "bitmap chunk|BITMAP"),
        (Frame(Kind.BITMAP, offset=BLOCK, size=BLOCK, payload=b"\1"), "bitmap chunk"),
    ],
    ids=["beyond", "too-long", "crooked"],
)
def test_a_bitmap_that_cannot_be_ends_the_link(victim: Victim, frame: Frame, reason: str) -> None:
    with victim.evil() as evil:
        evil.agree()
        evil.compare()
        evil.expect(Kind.BITMAP_END)
        evil.send(frame)
        evil.ended()
    victim.says(reason)
    victim.serves()


def test_a_write_acknowledged_twice_ends_the_link_and_stays_dirty(victim: Victim) -> None:
    with victim.evil() as evil:
        evil.sync()
        cookie = victim.client.submit_write(0, b"\xaa" * BLOCK)
        sequence = evil.expect(Kind.WRITE).sequence
        evil.send(*[Frame(Kind.WRITTEN, payload=hw.pack_sequences([sequence]))] * 2)
        evil.ended()
    assert victim.client.poll(GIVE_UP_S) == [(cookie, 0)]
    victim.says(f"WRITTEN for write {sequence}, which is not under way")
    assert victim.client.read(0, BLOCK) == b"\xaa" * BLOCK
    victim.serves()


def test_a_peer_that_takes_a_write_and_never_answers_is_given_up(victim: Victim) -> None:
    with victim.evil() as evil:
        evil.sync()
        cookie = victim.client.submit_write(0, b"\xbb" * BLOCK)
        evil.expect(Kind.WRITE)
        for _ in range(3):  # it is alive, and that must not count
            evil.send(Frame(Kind.PING, sequence=1))
            evil.expect(Kind.PONG)
        assert victim.client.poll(GIVE_UP_S) == [(cookie, 0)]
        evil.ended()
    victim.says("does not acknowledge writes")
    victim.serves()
    victim.connect()  # it was expelled


@pytest.mark.parametrize("disk", range(1, 10))
def test_no_disk_state_a_peer_may_claim_breaks_anything(victim: Victim, disk: int) -> None:
    with victim.evil() as evil:
        evil.agree()
        frame = evil.state_of_alpha()
        lie = replace(state_of_beta(VolumeState.unpack(frame.payload)), disk=disk)
        evil.send(Frame(Kind.VOLUME_STATE, sequence=frame.sequence, payload=lie.pack()))
        evil.send(Frame(Kind.PING, sequence=5))
        try:
            evil.expect(Kind.PONG)
        except (EOFError, ConnectionResetError):
            pass
    victim.nodes.wait("alpha", alone)
    victim.serves()


@pytest.mark.parametrize(
    "change",
    [{"size_bytes": 512}, {"size_bytes": 1 << 62}, {"current": 77}],
    ids=["small", "huge", "unrelated"],
)
def test_a_copy_that_does_not_fit_is_refused(victim: Victim, change: dict[str, Any]) -> None:
    with victim.evil() as evil:
        evil.agree()
        frame = evil.state_of_alpha()
        lie = replace(state_of_beta(VolumeState.unpack(frame.payload)), **change)
        evil.send(Frame(Kind.VOLUME_STATE, sequence=frame.sequence, payload=lie.pack()))
        assert evil.ended()[-1].kind is Kind.GOODBYE
    victim.nodes.wait("alpha", alone)
    victim.serves()


def test_a_peer_that_says_it_is_ahead_of_a_primary_is_refused(victim: Victim) -> None:
    with victim.evil() as evil:
        evil.agree()
        frame = evil.state_of_alpha()
        alpha = VolumeState.unpack(frame.payload)
        lie = VolumeState(disk=9, size_bytes=alpha.size_bytes, current=1234, bitmap_id=alpha.current, dirty_count=9)
        evil.send(Frame(Kind.VOLUME_STATE, sequence=frame.sequence, payload=lie.pack()))
        assert evil.ended()[-1].kind is Kind.GOODBYE
    status = victim.says(".")
    assert status["connections"][0]["connection-state"] == "StandAlone"
    victim.serves()


def test_a_disk_that_is_lost_again_and_again_breaks_nothing(victim: Victim) -> None:
    lost = Frame(Kind.DISK_STATE, sequence=1, payload=hw.pack_disk_state(0, [(0, BLOCK)]))
    for prepare in (Evil.agree, Evil.sync):
        with victim.evil() as evil:
            prepare(evil)
            for _ in range(3):
                evil.send(lost)
                evil.expect(Kind.DISK_STATE_ACK)
        victim.nodes.wait("alpha", alone)
        victim.serves()


def test_the_highest_round_number_is_survived_also_by_the_next_round(victim: Victim) -> None:
    with victim.evil() as evil:
        evil.agree()
        frame = evil.state_of_alpha()
        state = state_of_beta(VolumeState.unpack(frame.payload))
        evil.send(Frame(Kind.VOLUME_STATE, sequence=(1 << 64) - 1, payload=state.pack()))
        evil.ended()  # a round that far ahead is a broken peer: our own counter could never follow
    victim.nodes.wait("alpha", alone)
    victim.serves()


# ----------------------------------------------------------------------------------------------------- floods


def test_a_flood_of_pings_whose_answers_nobody_reads_costs_no_memory(victim: Victim) -> None:
    with victim.evil() as evil:
        evil.agree()
        pings = b"".join(bytes(encode(Frame(Kind.PING, sequence=n))[0]) for n in range(1, 1001))
        evil.sock.settimeout(0.5)  # alpha may stop reading
        try:
            for _ in range(300):
                evil.sock.sendall(pings)
        except OSError:
            pass
        victim.client.read(0, BLOCK)
    victim.nodes.wait("alpha", alone)
    victim.serves()


def test_strangers_that_say_nothing_keep_nobody_out(victim: Victim) -> None:
    strangers = [socket.create_connection(("127.0.0.1", victim.port), GIVE_UP_S) for _ in range(200)]
    try:
        victim.serves()
    finally:
        for stranger in strangers:
            stranger.close()
    with victim.evil() as evil:
        evil.sync()
    victim.nodes.wait("alpha", alone)
    victim.serves()


def test_a_handshake_one_byte_at_a_time_ends_at_its_deadline(victim: Victim) -> None:
    with victim.evil() as evil:
        whole = b"".join(bytes(part) for part in encode(Frame(Kind.HELLO, payload=evil.hello().pack())))
        try:
            for at in range(len(whole)):
                evil.sock.sendall(whole[at : at + 1])
                if select.select([evil.sock], [], [], 0.05)[0]:
                    break
        except (BrokenPipeError, ConnectionResetError):
            pass
        goodbye = evil.ended()
    assert [hw.unpack_goodbye(frame.payload)[1] for frame in goodbye] == ["the handshake took too long"]
    victim.serves()


def test_a_peer_that_agrees_and_then_keeps_its_state_to_itself_is_given_up(victim: Victim) -> None:
    with victim.evil() as evil:
        evil.agree()
        evil.ended()
    victim.says("the peer does not finish the handshake")
    victim.serves()


def test_what_is_sent_behind_agree_is_not_stored_without_bound(victim: Victim) -> None:
    with victim.evil() as evil:
        ours = evil.hello().pack()
        agreed = Frame(Kind.AGREE, payload=agree_hash(ours, evil.theirs.pack()))
        hello = b"".join(bytes(part) for part in encode(Frame(Kind.HELLO, payload=ours)))
        evil.raw(hello + b"".join(bytes(part) for part in encode(agreed)) + bytes(4 * FRAME_MAX))
        evil.ended()
    victim.says("does not speak this protocol|behind AGREE")
    victim.serves()


def test_a_goodbye_in_ill_temper_is_shown_to_the_operator(victim: Victim) -> None:
    with victim.evil() as evil:
        evil.agree()
        evil.send(Frame(Kind.GOODBYE, flags=Flag.GRACEFUL, payload=hw.pack_goodbye(2, "I do not like you")))
        evil.ended()
    status = victim.says("beta refused: I do not like you")
    assert status["connections"][0]["connection-state"] == "StandAlone"
    victim.serves()


def test_a_flood_of_reads_whose_answers_nobody_reads_costs_no_memory(victim: Victim) -> None:
    with victim.evil() as evil:
        evil.agree()
        evil.compare()
        evil.expect(Kind.BITMAP_END)
        evil.send(*[Frame(Kind.READ, sequence=n, size=MIB) for n in range(1, 601)])
        evil.send(Frame(Kind.PING, sequence=1))
        victim.client.read(0, BLOCK)
        select.select([], [], [], 0.5)  # time to read all that from the disk
        grown = victim.resident_bytes() - victim.rss
        assert grown < RSS_GROWTH_MAX, f"{grown / MIB:.0f} MiB more"
    victim.nodes.wait("alpha", alone)
    victim.serves()
