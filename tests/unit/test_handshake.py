# SPDX-License-Identifier: Apache-2.0
"""HELLO and AGREE: two candidates joined by hand, and everything that forbids them to talk."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicator.core.handshake import PROVISIONAL_ID, Candidate, Fault, check, hello, option_faults
from replicator.core.handshake_wire import Hello, agree_hash
from replicator.core.wire import VERSION, Frame, Kind, encode
from replicator.errors import ProtocolError

PEERS_OF_ALPHA, PEERS_OF_BRAVO = {1: "bravo"}, {0: "alpha"}
OPTIONS = (("protocol", "C"), ("shared-key", "none"))


def alpha(*, provisional: bool = False, resource_id: bytes = b"R" * 16) -> Hello:
    return hello(
        resource="r0", resource_id=resource_id, provisional=provisional, node_id=0, node="alpha", peer=1,
        nonce=b"a" * 32, options=OPTIONS, volumes=(0, 7),
    )  # fmt: skip


def bravo(*, provisional: bool = False, resource_id: bytes = b"R" * 16) -> Hello:
    return hello(
        resource="r0", resource_id=resource_id, provisional=provisional, node_id=1, node="bravo", peer=0,
        nonce=b"b" * 32, options=tuple(reversed(OPTIONS)), volumes=(7, 0),
    )  # fmt: skip


def pair(ours: Hello, theirs: Hello, *, known: bool = True) -> tuple[Candidate, Candidate]:
    """Alpha, who dialed, and Bravo; `known`: TLS said before who is there."""
    return (
        Candidate(5, 1 if known else None, ours, 0, dialed=True),
        Candidate(6, 0 if known else None, theirs, 0, dialed=False),
    )


def join(ours: Candidate, theirs: Candidate) -> None:
    """Carry the four frames across, as the link would."""
    agree_from_bravo = theirs.on_frame(ours.first(), PEERS_OF_BRAVO)
    agree_from_alpha = ours.on_frame(theirs.first(), PEERS_OF_ALPHA)
    assert isinstance(agree_from_bravo, Frame) and isinstance(agree_from_alpha, Frame)
    assert not ours.agreed and not theirs.agreed, "a HELLO alone proves nothing"
    for frame in (agree_from_bravo, agree_from_alpha):
        encode(frame)  # it may travel
    assert ours.on_frame(agree_from_bravo, PEERS_OF_ALPHA) is None
    assert theirs.on_frame(agree_from_alpha, PEERS_OF_BRAVO) is None


@pytest.mark.parametrize("known", [True, False], ids=["TLS", "clear"])
def test_two_candidates_agree_and_know_each_other(known: bool) -> None:
    ours, theirs = pair(alpha(), bravo(), known=known)
    encode(ours.first())
    join(ours, theirs)
    assert ours.agreed and theirs.agreed
    assert (ours.peer, theirs.peer) == (1, 0)
    assert ours.theirs == bravo() and theirs.theirs == alpha()


FAULTS: dict[str, tuple[Hello, str, bool]] = {
    "reflected": (alpha(), "calls itself 0, which is this node", False),
    "a node nobody configured": (replace(bravo(), node_id=9), "is node 9 (bravo), not node 1", False),
    "meant for another node": (
        replace(bravo(), peer_node_id=4),
        "wants to talk to node 4, this is node 0",
        False,
    ),
    "another resource": (replace(bravo(), resource="r1"), "serves resource r1 here, not r0", False),
    "only older versions": (
        replace(bravo(), version_min=VERSION - 1, version_max=VERSION - 1),
        "upgrade one",
        True,
    ),
    "only newer versions": (
        replace(bravo(), version_min=VERSION + 1, version_max=VERSION + 2),
        "upgrade one",
        True,
    ),
    "another name": (replace(bravo(), node="mike"), "calls itself mike, the configuration here bravo", True),
    "another protocol": (
        replace(bravo(), options=(("protocol", "A"), ("shared-key", "none"))),
        "incompatible settings with bravo: protocol is C here and A there",
        True,
    ),
    "other volumes": (replace(bravo(), volumes=(0,)), "bravo has volumes [0], this node [0, 7]", True),
    "other data": (bravo(resource_id=b"S" * 16), "unrelated data", True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_forbids_two_nodes_to_talk(fault: str) -> None:
    theirs, text, fatal = FAULTS[fault]
    found = check(alpha(), theirs, 1, PEERS_OF_ALPHA)
    assert found is not None and text in found.text and found.fatal == fatal
    candidate = Candidate(5, 1, alpha(), 0, dialed=True)
    assert candidate.on_frame(Frame(Kind.HELLO, payload=theirs.pack()), PEERS_OF_ALPHA) == found
    assert not candidate.agreed and candidate.theirs is None


def test_a_stranger_cannot_send_a_node_to_standalone() -> None:
    """Only the configured peer may cause a fatal fault: else whoever reaches the port stops the mirror."""
    for fault in ("reflected", "a node nobody configured", "meant for another node", "another resource"):
        theirs = replace(FAULTS[fault][0], options=(), volumes=(), version_min=9, version_max=9)
        found = check(alpha(), theirs, None, PEERS_OF_ALPHA)
        assert found is not None and not found.fatal


def test_another_configured_node_than_the_certificate_says_is_refused() -> None:
    peers = {1: "bravo", 2: "charlie"}
    found = check(alpha(), replace(bravo(), node_id=2, node="charlie"), 1, peers)
    assert found == Fault("the other side is node 2 (charlie), not node 1")
    assert check(alpha(), replace(bravo(), node_id=2, node="charlie"), None, peers) is None


def test_a_range_of_versions_that_overlaps_is_enough() -> None:
    newer = replace(bravo(), version_min=VERSION, version_max=VERSION + 5)
    assert check(alpha(), newer, 1, PEERS_OF_ALPHA) is None


def test_each_setting_that_differs_is_named_with_both_values() -> None:
    assert option_faults({"a": "1", "b": "2"}, {"b": "3", "c": "4"}) == [
        "a is 1 here and not set there",
        "b is 2 here and 3 there",
        "c is not set here and 4 there",
    ]
    assert option_faults({"a": "1"}, {"a": "1"}) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"),
    [
        (alpha(), bravo(), b"R" * 16),
        (alpha(provisional=True, resource_id=b"X" * 16), bravo(), b"R" * 16),
        (alpha(), bravo(provisional=True, resource_id=b"X" * 16), b"R" * 16),
        # Nobody holds data: both take the id of the lower node id.
        (alpha(provisional=True), bravo(provisional=True, resource_id=b"X" * 16), b"R" * 16),
    ],
    ids=["both hold data", "only the peer does", "only this node does", "nobody does"],
)
def test_both_sides_take_the_same_resource_id(ours: Hello, theirs: Hello, agreed: bytes) -> None:
    here, there = pair(ours, theirs)
    join(here, there)
    assert here.resource_id == there.resource_id == agreed


def test_whether_an_id_is_provisional_travels_with_the_features() -> None:
    assert Hello.unpack(alpha(provisional=True).pack()).features & PROVISIONAL_ID
    assert not alpha().features & PROVISIONAL_ID


@pytest.mark.parametrize("at", [0, 5, 11])
def test_a_hello_changed_on_the_way_is_found_by_agree(at: int) -> None:
    """The nonce is no setting that `check` compares: only the digest over both HELLOs sees it."""
    ours, theirs = pair(alpha(), bravo())
    nonce = bytearray(alpha().nonce)
    nonce[at] ^= 1
    tampered = replace(alpha(), nonce=bytes(nonce)).pack()
    agree_from_bravo = theirs.on_frame(Frame(Kind.HELLO, payload=tampered), PEERS_OF_BRAVO)
    agree_from_alpha = ours.on_frame(theirs.first(), PEERS_OF_ALPHA)
    assert isinstance(agree_from_bravo, Frame) and isinstance(agree_from_alpha, Frame)
    for side, agree, peers in (
        (ours, agree_from_bravo, PEERS_OF_ALPHA),
        (theirs, agree_from_alpha, PEERS_OF_BRAVO),
    ):
        fault = side.on_frame(agree, peers)
        assert isinstance(fault, Fault) and "somebody is between us" in fault.text
        assert not side.agreed


def test_agree_depends_on_who_dialed() -> None:
    first, second = alpha().pack(), bravo().pack()
    assert agree_hash(first, second) != agree_hash(second, first)


def test_frames_in_the_wrong_order_end_the_link() -> None:
    agree = Frame(Kind.AGREE, payload=bytes(32))
    ours, theirs = pair(alpha(), bravo())
    early = ours.on_frame(agree, PEERS_OF_ALPHA)
    assert early == Fault("AGREE in the middle of the handshake") and not ours.agreed
    join(ours, theirs)
    for frame in (theirs.first(), agree, Frame(Kind.PING)):
        assert ours.on_frame(frame, PEERS_OF_ALPHA) == Fault(f"{frame.kind.name} in the middle of the handshake")


def test_a_second_hello_does_not_replace_the_first() -> None:
    ours, _ = pair(alpha(), bravo())
    first = ours.on_frame(Frame(Kind.HELLO, payload=bravo().pack()), PEERS_OF_ALPHA)
    other = replace(bravo(), nonce=b"z" * 32)
    assert isinstance(first, Frame)
    assert isinstance(ours.on_frame(Frame(Kind.HELLO, payload=other.pack()), PEERS_OF_ALPHA), Fault)
    assert ours.theirs == bravo()


def test_a_malformed_hello_is_a_broken_protocol() -> None:
    ours, _ = pair(alpha(), bravo())
    with pytest.raises(ProtocolError, match="HELLO"):
        ours.on_frame(Frame(Kind.HELLO, payload=bravo().pack() + b"x"), PEERS_OF_ALPHA)
    assert ours.theirs is None and not ours.agreed
