# SPDX-License-Identifier: Apache-2.0
"""From a fresh link to two nodes that agree who they are: HELLO, then AGREE over both HELLOs.

A candidate does not touch the established link of its peer: only when its AGREE was verified does the resource let it
take over.  A peer that is not the one configured is refused and forgotten; a peer that is, but whose settings or data
do not fit, is *fatal*: dialing again cannot help, an administrator must act, so the connection goes StandAlone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from replicator.core.handshake_wire import FEATURE_DIGESTS, Hello, agree_hash, unpack_goodbye
from replicator.core.wire import VERSION, Frame, Kind

#: Feature bits from 32 up state something about the sender and are not negotiated.
PROVISIONAL_ID: Final = 1 << 32  # no volume of the sender holds data yet: it takes the other's resource id
FEATURES: Final = FEATURE_DIGESTS


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a link is not accepted."""

    text: str
    fatal: bool = False


class Candidate:
    """One link that has not agreed yet."""

    def __init__(self, link: int, peer: int | None, ours: Hello, now: int, *, dialed: bool) -> None:
        self.link = link
        self.peer = peer  # None on a clear link until HELLO says it
        self.since = now
        self.dialed = dialed
        self.agreed = False
        self.theirs: Hello | None = None
        self._ours = ours
        self._packed = ours.pack()
        self._expected = b""

    def first(self) -> Frame:
        """The HELLO to send."""
        return Frame(Kind.HELLO, payload=self._packed)

    def on_frame(self, frame: Frame, peers: dict[int, str]) -> Frame | Fault | None:
        """HELLO is answered with AGREE; a verified AGREE sets `agreed`.  ProtocolError if it is malformed."""
        if frame.kind is Kind.HELLO and self.theirs is None:
            return self._on_hello(frame, peers)
        if frame.kind is Kind.AGREE and self.theirs is not None and not self.agreed:
            if bytes(frame.payload) != self._expected:
                return Fault("the peer saw another handshake than we did: somebody is between us")
            self.agreed = True
            return None
        if frame.kind is Kind.GOODBYE:
            return Fault(f"the peer refused: {unpack_goodbye(frame.payload)[1]}")
        return Fault(f"{frame.kind.name} in the middle of the handshake")

    def _on_hello(self, frame: Frame, peers: dict[int, str]) -> Frame | Fault:
        theirs = Hello.unpack(frame.payload)
        fault = check(self._ours, theirs, self.peer, peers)
        if fault is not None:
            return fault
        self.theirs = theirs
        self.peer = theirs.node_id
        packed = bytes(frame.payload)
        first, second = (self._packed, packed) if self.dialed else (packed, self._packed)
        self._expected = agree_hash(first, second)
        return Frame(Kind.AGREE, payload=self._expected)

    @property
    def resource_id(self) -> bytes:
        """The id of the resource on this link: of the side that holds data, or of the lower node id."""
        ours, theirs = self._ours, self.theirs
        assert theirs is not None
        provisional_here, provisional_there = (bool(hello.features & PROVISIONAL_ID) for hello in (ours, theirs))
        if provisional_here == provisional_there:
            return min(ours, theirs, key=lambda hello: hello.node_id).resource_id
        return theirs.resource_id if provisional_here else ours.resource_id


def check(ours: Hello, theirs: Hello, peer: int | None, peers: dict[int, str]) -> Fault | None:
    """What forbids these two to talk; None if nothing does."""
    if theirs.node_id == ours.node_id:
        return Fault(
            f"connected to a node that calls itself {ours.node_id}, which is this node: reflected or misconfigured"
        )
    if theirs.node_id not in peers or (peer is not None and theirs.node_id != peer):
        expected = f"node {peer}" if peer is not None else "a configured node"
        return Fault(f"the other side is node {theirs.node_id} ({theirs.node}), not {expected}")
    if theirs.peer_node_id != ours.node_id:
        return Fault(f"node {theirs.node} wants to talk to node {theirs.peer_node_id}, this is node {ours.node_id}")
    if theirs.resource != ours.resource:
        return Fault(f"node {theirs.node} serves resource {theirs.resource} here, not {ours.resource}")
    name = peers[theirs.node_id]
    if theirs.version_min > ours.version_max or theirs.version_max < ours.version_min:
        return Fault(
            f"{name} speaks protocol versions {theirs.version_min} to {theirs.version_max}, "
            f"this node {ours.version_min} to {ours.version_max}: upgrade one of them",
            fatal=True,
        )
    if theirs.node != name:
        return Fault(f"node {theirs.node_id} calls itself {theirs.node}, the configuration here {name}", fatal=True)
    differing = option_faults(dict(ours.options), dict(theirs.options))
    if differing:
        return Fault(f"incompatible settings with {name}: {'; '.join(differing)}", fatal=True)
    if set(theirs.volumes) != set(ours.volumes):
        return Fault(f"{name} has volumes {sorted(theirs.volumes)}, this node {sorted(ours.volumes)}", fatal=True)
    settled = not (theirs.features | ours.features) & PROVISIONAL_ID
    if settled and theirs.resource_id != ours.resource_id:
        return Fault(
            f"resource {ours.resource} of {name} is another one (id {theirs.resource_id.hex()}, "
            f"here {ours.resource_id.hex()}): unrelated data",
            fatal=True,
        )
    return None


def option_faults(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """One phrase per setting that differs."""
    return [
        f"{key} is {ours.get(key, 'not set')} here and {theirs.get(key, 'not set')} there"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def hello(
    *,
    resource: str,
    resource_id: bytes,
    provisional: bool,
    node_id: int,
    node: str,
    peer: int,
    nonce: bytes,
    options: tuple[tuple[str, str], ...],
    volumes: tuple[int, ...],
) -> Hello:
    """Our HELLO to one peer."""
    return Hello(
        version_min=VERSION,
        version_max=VERSION,
        features=FEATURES | (PROVISIONAL_ID if provisional else 0),
        resource_id=resource_id,
        nonce=nonce,
        node_id=node_id,
        peer_node_id=peer,
        resource=resource,
        node=node,
        options=options,
        volumes=volumes,
    )
