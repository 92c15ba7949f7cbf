# SPDX-License-Identifier: Apache-2.0
"""May this node be Primary, may it stop being one, and how willing is it.

Pure questions over plain facts; the answers are DRBD's refusals with DRBD's numbers (its state-change
errors: -1, -2, -7, -12, -18), each with a stable code and what to type next.
"""

from __future__ import annotations

from dataclasses import dataclass

from replicator.core.states import Disk


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not.  `number` is DRBD's, `code` ours."""

    code: str
    number: int
    message: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeFacts:
    """One volume, as promotion sees it."""

    number: int
    disk: Disk
    peer_has_good_data: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFacts:
    """One peer, as promotion sees it."""

    name: str
    connected: bool
    primary: bool
    known_outdated: bool  # it confirmed that it is, or was fenced


def promotion_refusal(
    volumes: list[VolumeFacts], peers: list[PeerFacts], *, fencing: str, force: bool
) -> Refusal | None:
    """Why this node may not become Primary now; None if it may."""
    for peer in peers:
        if peer.connected and peer.primary:
            return Refusal(
                "peer-is-primary",
                -1,
                "Multiple primaries not allowed by config",
                f"{peer.name} is Primary; make it Secondary first: replicator secondary on {peer.name}",
            )
    for volume in volumes:
        if volume.disk is Disk.UP_TO_DATE or volume.peer_has_good_data:
            continue
        if force and volume.disk >= Disk.INCONSISTENT:
            continue
        return Refusal(
            "no-up-to-date-data",
            -2,
            "Need access to UpToDate data",
            _data_hint(volume, peers),
        )
    if fencing != "dont-care" and not force:
        for peer in peers:
            if not peer.connected and not peer.known_outdated:
                return Refusal(
                    "peer-not-outdated",
                    -7,
                    "Refusing to be Primary while peer is not outdated",
                    f"{peer.name} is not connected and may be newer; connect it, fence it, "
                    "or overrule with primary --force if it is certainly down",
                )
    return None


def _data_hint(volume: VolumeFacts, peers: list[PeerFacts]) -> str:
    what = f"volume {volume.number} is {volume.disk.word} here"
    absent = [peer.name for peer in peers if not peer.connected]
    if volume.disk < Disk.INCONSISTENT:
        return f"{what}; attach its disk, or connect {', '.join(absent) or 'a peer'} with UpToDate data"
    if absent:
        return (
            f"{what}; connect {', '.join(absent)}, or if this copy is to be believed anyway: "
            "replicator primary --force (this may lose what the peer has)"
        )
    return (
        f"{what} and no peer has better data; for new disks start the first sync with replicator primary --force, "
        "or skip it with replicator new-current-uuid --clear-bitmap"
    )


def openers_refusal(openers: list[str]) -> Refusal | None:
    """Why this node may not be demoted now; None if it may."""
    if not openers:
        return None
    return Refusal(
        "held-open",
        -12,
        f"Device is held open by someone: {', '.join(openers)}",
        "stop what uses it (umount, stop the guest), or cut it off with secondary --force",
    )


def in_transition() -> Refusal:
    """Something else is going on that decides who has good data."""
    return Refusal(
        "in-transient-state",
        -18,
        "In transient state, retry after next state change",
        "try again in a moment",
    )


def promotion_score(disks: list[Disk], *, peers_known: bool, peer_has_good_data: bool) -> int:
    """DRBD's ladder for Pacemaker: 0 no, 10 only through a peer, 1000 good but the peer is unknown, 10000 good."""
    if not disks:
        return 0
    if all(disk is Disk.UP_TO_DATE for disk in disks):
        return 10000 if peers_known else 1000
    return 10 if peer_has_good_data else 0
