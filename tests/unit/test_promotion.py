# SPDX-License-Identifier: Apache-2.0
"""Promotion and demotion: each refusal with DRBD's number and text and what to type next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicator.core.promotion import (
    PeerFacts,
    VolumeFacts,
    in_transition,
    openers_refusal,
    promotion_refusal,
    promotion_score,
)
from replicator.core.states import Disk

GOOD = VolumeFacts(number=0, disk=Disk.UP_TO_DATE, peer_has_good_data=False)
PEER = PeerFacts(name="bravo", connected=True, primary=False, known_outdated=False)
ABSENT = replace(PEER, connected=False)
NO_DISK = replace(GOOD, disk=Disk.DISKLESS)
MIXTURE = replace(GOOD, disk=Disk.INCONSISTENT)

REFUSED = {
    "a connected peer is Primary": (
        [GOOD], replace(PEER, primary=True), "dont-care", False,
        "peer-is-primary", -1, "Multiple primaries not allowed by config", "replicator secondary on bravo",
    ),
    "force does not make two Primaries": (
        [GOOD], replace(PEER, primary=True), "dont-care", True,
        "peer-is-primary", -1, "Multiple primaries not allowed by config", "make it Secondary first",
    ),
    "a mixture, peer absent": (
        [MIXTURE], ABSENT, "dont-care", False,
        "no-up-to-date-data", -2, "Need access to UpToDate data", "connect bravo, or",
    ),
    "a mixture, peer no better": (
        [MIXTURE], PEER, "dont-care", False,
        "no-up-to-date-data", -2, "Need access to UpToDate data", "new-current-uuid --clear-bitmap",
    ),
    "old data": (
        [replace(GOOD, disk=Disk.OUTDATED)], ABSENT, "dont-care", False,
        "no-up-to-date-data", -2, "Need access to UpToDate data", "volume 0 is Outdated here",
    ),
    "perhaps old data": (
        [replace(GOOD, disk=Disk.CONSISTENT)], ABSENT, "resource-only", False,
        "no-up-to-date-data", -2, "Need access to UpToDate data", "volume 0 is Consistent here",
    ),
    "no disk": (
        [NO_DISK], ABSENT, "dont-care", False,
        "no-up-to-date-data", -2, "Need access to UpToDate data", "attach its disk, or connect bravo",
    ),
    "no disk and no peer with data": (
        [NO_DISK], PEER, "dont-care", False,
        "no-up-to-date-data", -2, "Need access to UpToDate data", "or connect a peer",
    ),
    "force makes no disk appear": (
        [NO_DISK], ABSENT, "dont-care", True,
        "no-up-to-date-data", -2, "Need access to UpToDate data", "attach its disk",
    ),
    "one bad volume of two": (
        [GOOD, replace(MIXTURE, number=1)], PEER, "dont-care", False,
        "no-up-to-date-data", -2, "Need access to UpToDate data", "volume 1 is Inconsistent here",
    ),
    "fencing asked for, peer not fenced": (
        [GOOD], ABSENT, "resource-and-stonith", False,
        "peer-not-outdated", -7, "Refusing to be Primary while peer is not outdated", "primary --force",
    ),
}  # fmt: skip

ALLOWED = {
    "good data, no fencing": ([GOOD], ABSENT, "dont-care", False),
    "good data, peer connected": ([GOOD], PEER, "resource-only", False),
    "peer known to be old": ([GOOD], replace(ABSENT, known_outdated=True), "resource-only", False),
    "force instead of fencing": ([GOOD], ABSENT, "resource-only", True),
    "force on a mixture": ([MIXTURE], ABSENT, "dont-care", True),
    "force on old data": ([replace(GOOD, disk=Disk.OUTDATED)], ABSENT, "resource-and-stonith", True),
    "diskless, but the peer has it": ([replace(NO_DISK, peer_has_good_data=True)], PEER, "dont-care", False),
    "a mixture, but the peer has it": ([replace(MIXTURE, peer_has_good_data=True)], PEER, "dont-care", False),
    # What a peer was when its link broke says nothing about now; fencing and the generation ids do.
    "it was Primary when it was lost": ([GOOD], replace(ABSENT, primary=True), "dont-care", False),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_has_the_number_the_words_and_a_way_out(case: str) -> None:
    volumes, peer, fencing, force, code, number, message, hint = REFUSED[case]
    refusal = promotion_refusal(volumes, [peer], fencing=fencing, force=force)
    assert refusal is not None
    assert (refusal.code, refusal.number, refusal.message) == (code, number, message)
    assert hint in refusal.hint


@pytest.mark.parametrize("case", ALLOWED)
def test_promotion_is_allowed_when(case: str) -> None:
    volumes, peer, fencing, force = ALLOWED[case]
    assert promotion_refusal(volumes, [peer], fencing=fencing, force=force) is None


def test_one_unfenced_peer_of_two_is_enough_to_refuse() -> None:
    peers = [replace(ABSENT, known_outdated=True), replace(ABSENT, name="charlie")]
    refusal = promotion_refusal([GOOD], peers, fencing="resource-only", force=False)
    assert refusal is not None and refusal.number == -7 and "charlie" in refusal.hint


def test_a_second_primary_is_refused_before_the_state_of_the_data_is_looked_at() -> None:
    refusal = promotion_refusal([NO_DISK], [replace(PEER, primary=True)], fencing="dont-care", force=True)
    assert refusal is not None and refusal.number == -1


def test_demotion_is_refused_while_somebody_has_the_device_open_and_says_who() -> None:
    assert openers_refusal([]) is None
    refusal = openers_refusal(["pid 1 /sbin/a", "pid 2 /sbin/b"])
    assert refusal is not None and (refusal.code, refusal.number) == ("held-open", -12)
    assert refusal.message == "Device is held open by someone: pid 1 /sbin/a, pid 2 /sbin/b"
    assert "secondary --force" in refusal.hint


def test_a_state_that_will_pass_is_a_refusal_of_its_own() -> None:
    refusal = in_transition()
    assert (refusal.code, refusal.number) == ("in-transient-state", -18)
    assert refusal.message == "In transient state, retry after next state change"


@pytest.mark.parametrize(
    ("disks", "peers_known", "peer_good", "score"),
    [
        ([], True, True, 0),
        ([Disk.UP_TO_DATE], True, True, 10000),
        ([Disk.UP_TO_DATE], True, False, 10000),
        ([Disk.UP_TO_DATE, Disk.UP_TO_DATE], False, False, 1000),
        ([Disk.UP_TO_DATE, Disk.INCONSISTENT], True, True, 10),
        ([Disk.DISKLESS], True, True, 10),
        ([Disk.CONSISTENT], False, False, 0),
        ([Disk.UP_TO_DATE, Disk.OUTDATED], True, False, 0),
        ([Disk.DISKLESS], True, False, 0),
    ],
)
def test_the_ladder_of_promotion_scores(disks: list[Disk], peers_known: bool, peer_good: bool, score: int) -> None:
    assert promotion_score(disks, peers_known=peers_known, peer_has_good_data=peer_good) == score
