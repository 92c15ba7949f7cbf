# SPDX-License-Identifier: Apache-2.0
"""One volume and one peer: the round that compares the copies, and the resync that follows.

A round (decision 0001, "Connect") is the only way to decide who is source.  Each side sends VOLUME_STATE when nothing
of the volume is in motion; both compute the same decision; it is carried out only when every volume of the link has one
(two volumes that contradict each other are a split brain no single volume can see).

Everything that arrives for this volume from this peer comes through `on_frame`, which returns a sentence when
the peer broke the protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from replicator.core.actions import FlushData
from replicator.core.events import DiskDone
from replicator.core.generations import (
    EXPOSED_RULE,
    JUST_CREATED,
    UNSET,
    Decision,
    Outcome,
    Side,
    decide,
    hold_to_exposed,
    same,
)
from replicator.core.geometry import BLOCK_SHIFT
from replicator.core.handshake_wire import (
    VolumeState,
    pack_current_generation,
    pack_disk_state,
    unpack_current_generation,
)
from replicator.core.ledger import slot_index, with_slot
from replicator.core.resync import SyncSource, SyncTarget
from replicator.core.resync_steps import ResyncSteps, clear_slot
from replicator.core.states import REPLICATION_MOVES, Disk, DiskMove, Replication, ReplicationMove, move
from replicator.core.superblock import Superblock
from replicator.core.wire import Frame, Kind

if TYPE_CHECKING:
    from replicator.core.connection import Connection
    from replicator.core.volume import Volume
    from replicator.core.write import Write

#: A peer may begin rounds of its own, but not so many that our counter could leave its 64 bits.
ROUNDS_AHEAD_MAX: Final = 1 << 32
_GOOD: Final = (Outcome.NONE, Outcome.SOURCE, Outcome.TARGET, Outcome.NO_GOOD_COPY)


class Replica:
    """The relation of one volume to one peer."""

    def __init__(self, volume: Volume, peer: int) -> None:
        self.volume = volume
        self.peer = peer
        self.link: Connection | None = None
        self.replication = Replication.OFF
        self.disk = Disk.DUNKNOWN  # the peer's
        self.generation = UNSET  # the peer's copy is at, as last told
        self.decision: Decision | None = None
        self._round = 0
        self._sent: VolumeState | None = None
        self._received: tuple[int, VolumeState] | None = None
        self._starting = False  # waits to send VOLUME_STATE
        self._waits = 0  # which of those that waited is the latest
        self._surviving = False
        self.carried_out = False
        self.steps = ResyncSteps(self)
        self.sent_bytes = 0
        self.received_bytes = 0

    # --- what others want to know

    @property
    def replicating(self) -> bool:
        """Every write made now reaches the peer's disk, or comes from there."""
        return self.replication is not Replication.OFF and self.disk >= Disk.INCONSISTENT and self.link is not None

    @property
    def has_good_data(self) -> bool:
        """The peer can serve reads, and a write acknowledged by it is safe."""
        return self.replicating and self.disk is Disk.UP_TO_DATE

    @property
    def state_sent(self) -> bool:
        """The peer knows our state on this link: it may have decided, and write."""
        return self._round > 0

    @property
    def spoken(self) -> bool:
        """We know the peer's state on this link."""
        return self._received is not None

    @property
    def syncing(self) -> bool:
        """A resync is under way."""
        return self.steps.sync is not None

    @property
    def leaves_mixture(self) -> bool:
        """If the link ends now, the peer's copy is durably Inconsistent and cannot get better without us."""
        return isinstance(self.steps.sync, SyncSource) and self.steps.sync.unfinishable

    @property
    def deciding(self) -> bool:
        """A round has begun and is not carried out."""
        return self._starting or (
            self.link is not None and self.replication is Replication.OFF and self.decision is None
        )

    @property
    def deadline(self) -> int | None:
        """When the resync wants to be asked again."""
        return self.steps.sync.deadline if isinstance(self.steps.sync, SyncTarget) else None

    def covered(self, offset: int, size: int) -> bool:
        """No dirty bit towards the peer in this range: the local copy of a target may be read there."""
        attached = self.volume.attached
        if attached is None or not isinstance(self.steps.sync, SyncTarget):
            return False  # before the resync has begun the source's bits are not known here
        first = offset >> BLOCK_SHIFT
        last = (offset + size - 1) >> BLOCK_SHIFT
        return not attached.bitmaps[self.peer].any_dirty(first, last - first + 1)

    # --- the link comes and goes

    def link_up(self, link: Connection) -> None:
        """Both nodes agreed who they are; `begin_round` follows, now or when the peer has spoken."""
        self.link = link
        self._received = None
        self._round = 0
        self.steps.link_up()

    def leave_round(self) -> None:
        """The link is about to go: nobody who waits for a quiet moment may begin a round on it."""
        self._starting = False

    def link_down(self, *, lost_primary: bool) -> None:
        """The link is gone.  `lost_primary`: the peer was Primary and said no goodbye."""
        survived = (
            lost_primary
            and self.volume.context.options.protocol != "A"  # the lost Primary may have acknowledged more
            and self.replication is Replication.ESTABLISHED
            and self.volume.disk is Disk.UP_TO_DATE
            and not self.volume.group.primary
        )
        self.link = None
        self.steps.stop()
        self.disk = Disk.DUNKNOWN
        self.replication = move(REPLICATION_MOVES, self.replication, ReplicationMove.LOST)
        self.decision = None
        self._starting = False
        self._sent = self._received = None
        self.steps.paused_there = False
        path = self.volume.path
        path.held = path.held_peer = False
        self.volume.refresh()
        if survived:
            self._survive()

    def _survive(self) -> None:
        """We hold all that the lost Primary had acknowledged: say so, durably, once it is stable.

        If that Primary crashed it may have lost what its cache held; this flag makes us the source (rule "survivor").
        It may not be lost in a restart of our own, or an acknowledged write would be overwritten.
        """
        volume = self.volume
        self._surviving = True

        def flush() -> None:
            token = volume.context.ask(flushed, None)
            volume.context.out.append(FlushData(volume.number, token))

        def flushed(_: None, event: DiskDone) -> None:
            if event.error:
                volume.disk_error("flush", event.error)
            if volume.attached is None:
                done()
            else:
                volume.ledger.save(lambda found: with_slot(found, self.peer, survivor=True), done)

        def done() -> None:
            self._surviving = False
            if self._starting:
                self._when_still(self._send_state)

        volume.path.when_peers_quiet(lambda: flush() if volume.attached is not None else done())

    def move(self, happened: ReplicationMove) -> None:
        self.replication = move(REPLICATION_MOVES, self.replication, happened)
        self.volume.refresh()
        self.volume.context.notice(
            "replication-state", volume=self.volume.number, peer=self.peer, replication=self.replication.value
        )

    # --- rounds

    def begin_round(self) -> None:
        """Compare the copies (again)."""
        if self.link is None or self._starting:
            return
        self._starting = True
        self.link.round_begins()
        self.volume.path.held = True
        self._when_still(self._send_state)

    def _when_still(self, then: Callable[[], None]) -> None:
        """Call `then` when no replicated write is under way and no superblock change is pending.

        The latest call counts: two that wait for each other's superblock writes would never end.
        """
        self._waits = waits = self._waits + 1

        def go_on() -> None:
            if self._waits != waits or not self._starting or self._surviving:
                return  # (`_survive` comes back here)
            volume = self.volume
            if volume.attached is not None and volume.ledger.busy:
                volume.ledger.settled(lambda: volume.path.when_peers_quiet(go_on))
            elif volume.disk not in (Disk.ATTACHING, Disk.DETACHING, Disk.FAILED):
                then()
            # else: `Volume.disk_changed` begins again

        self.volume.path.when_peers_quiet(go_on)

    def disk_settled(self) -> None:
        """The local disk is attached or gone: a round that waited for it goes on, or a new one begins."""
        self._starting = False
        self.begin_round()

    def _send_state(self) -> None:
        assert self.link is not None
        self._starting = False
        self.steps.stop()
        self.move(ReplicationMove.ROUND)
        self.decision = None
        self.carried_out = False
        received = self._received
        self._round = max(self._round + 1, received[0] if received else 0)
        self._sent = self.state()
        # What the peer sends from now on may belong to the outcome: nothing is written before that is carried out.
        self.volume.path.held_peer = True
        self.link.send(Frame(Kind.VOLUME_STATE, self.volume.number, sequence=self._round, payload=self._sent.pack()))
        self._decide()

    def state(self) -> VolumeState:
        """What we say about our copy."""
        volume = self.volume
        if volume.attached is None:
            return VolumeState(disk=Disk.DISKLESS, primary=volume.group.primary, exposed=volume.exposed)
        found = volume.ledger.durable
        slot = found.peers[slot_index(found, self.peer)]
        return VolumeState(
            disk=volume.disk,
            crashed_primary=found.crashed_primary,
            survived=slot.survivor,
            full_sync=slot.full_sync,
            primary=volume.group.primary and volume.serving,
            paused=self.steps.paused_here,
            size_bytes=volume.size,
            current=found.current,
            bitmap_id=slot.bitmap_id,
            dirty_count=volume.dirty_count(self.peer),
            exposed=volume.exposed,
            history=found.history,
        )

    def _on_state(self, frame: Frame) -> str | None:
        state = VolumeState.unpack(frame.payload)
        if frame.sequence <= 0 or (self._received and frame.sequence <= self._received[0]):
            # Also the same round twice: what is carried out already must not be decided again.
            return f"round {frame.sequence} after round {self._received and self._received[0]}"
        if frame.sequence > self._round + ROUNDS_AHEAD_MAX:
            return f"round {frame.sequence} when ours is {self._round}"
        if state.disk != Disk.DISKLESS and same(state.current, UNSET):
            return "VOLUME_STATE without a current generation"
        self._received = (frame.sequence, state)
        self.steps.paused_there = state.paused
        if frame.sequence > self._round:
            self.volume.farewell_refused(self.peer)  # if our disk has just gone: the peer did not take over
            assert self.link is not None
            self.link.round_wanted(self)
        else:
            self._decide()
        return None

    def _decide(self) -> None:
        if self._sent is None or self._received is None or self._received[0] != self._round or self._starting:
            return
        ours, theirs = self._sent, self._received[1]
        self.disk = Disk(theirs.disk)
        self.generation = theirs.current
        here = self._side(ours, self.volume.context.options.node_id)
        there = self._side(theirs, self.peer)
        if Disk.DISKLESS in (ours.disk, theirs.disk):
            decision = Decision(Outcome.NONE, "diskless")
        else:
            decision = self._size_fault(ours, theirs) or decide(here, there)
        self.decision = hold_to_exposed(here, there, decision)
        self._tell(ours, theirs)
        assert self.link is not None
        self.link.decided()

    def _side(self, state: VolumeState, node_id: int) -> Side:
        return Side(
            node_id=node_id,
            disk=Disk(state.disk),
            current=state.current,
            bitmap_id=state.bitmap_id,
            history=state.history,
            dirty=state.dirty_count > 0 or state.full_sync,
            full_sync=state.full_sync,
            crashed_primary=state.crashed_primary,
            survived=state.survived,
            primary=state.primary,
            exposed=state.exposed,
        )

    def _size_fault(self, ours: VolumeState, theirs: VolumeState) -> Decision | None:
        fresh_here, fresh_there = same(ours.current, JUST_CREATED), same(theirs.current, JUST_CREATED)
        if fresh_here and fresh_there:
            return None
        if fresh_here or fresh_there:
            fresh, settled = (ours, theirs) if fresh_here else (theirs, ours)
            return Decision(Outcome.CONFLICT, "disk-too-small") if fresh.size_bytes < settled.size_bytes else None
        return Decision(Outcome.CONFLICT, "size-differs") if ours.size_bytes != theirs.size_bytes else None

    def _tell(self, ours: VolumeState, theirs: VolumeState) -> None:
        assert self.decision is not None
        self.volume.context.notice(
            "sync-decision",
            volume=self.volume.number,
            peer=self.peer,
            rule=self.decision.rule,
            outcome=self.decision.outcome.value,
            ours=lineage_text(ours),
            theirs=lineage_text(theirs),
        )

    @property
    def acceptable(self) -> bool:
        """The decision lets the two nodes stay together."""
        return self.decision is not None and self.decision.outcome in _GOOD

    @property
    def refusal(self) -> str:
        """Why the decision forbids the two nodes to stay together, for both operators."""
        assert self.decision is not None and self._sent is not None and self._received is not None
        if self.decision.rule != EXPOSED_RULE:
            return f"volume {self.volume.number}: {self.decision.outcome.value} ({self.decision.rule})"
        options = self.volume.context.options
        ours, theirs, peer = self._sent, self._received[1], options.peers[self.peer]
        here = not same(ours.exposed, UNSET)
        seen, primary = (ours.exposed, options.node_name) if here else (theirs.exposed, peer)
        current, name = (theirs.current, peer) if here else (ours.current, options.node_name)
        return (
            f"volume {self.volume.number}: clients of {primary} have seen generation {seen:016x}, "
            f"which the data of {name} (generation {current:016x}) does not contain ({EXPOSED_RULE})"
        )

    def carry_out(self) -> None:
        """Every volume of the link has a decision, and none forbids: act on ours."""
        assert self.decision is not None and self._received is not None and self._sent is not None
        decision, theirs = self.decision, self._received[1]
        self.carried_out = True
        if decision.outcome is Outcome.SOURCE:
            self.steps.be_source(full=decision.full)
        elif decision.outcome is Outcome.TARGET:
            self.steps.be_target(theirs, full=decision.full)
        elif decision.rule == "diskless":
            self._establish()
        elif decision.outcome is Outcome.NO_GOOD_COPY or decision.rule == "just-created-both":
            self.volume.agree_size(min(self._sent.size_bytes, theirs.size_bytes))  # (they differ only if one is fresh)
            self.release()
        else:
            self._no_sync(theirs)
        self.volume.serve_from_peer()

    def _establish(self) -> None:
        self.move(ReplicationMove.NO_SYNC)
        self.release()

    def release(self) -> None:
        """The round is carried out: writes of both sides go on."""
        path = self.volume.path
        path.held = path.held_peer = False
        if self.volume.writable():
            path.doomed = False
        path.wake_all()

    def _no_sync(self, theirs: VolumeState) -> None:
        """Equal copies: no fork point may remain (V3), and whoever was in doubt no longer is."""
        volume, link = self.volume, self.link
        # Equal, nothing dirty, nobody crashed: with two nodes there is no third copy that could be newer, so doubt
        # is lifted even if both were outdated (each let its disk go while it believed in the other's).
        alone = len(volume.replicas) == 1
        lifted = alone or max(volume.disk, Disk(theirs.disk)) >= Disk.CONSISTENT

        def change(found: Superblock) -> Superblock:
            found = clear_slot(found, self.peer)
            indicator = found.primary_indicator or (volume.group.primary and lifted)  # V6: it may be served from now on
            good = found.was_up_to_date or lifted
            return replace(found, was_up_to_date=good, crashed_primary=False, primary_indicator=indicator)

        def done() -> None:
            if self.link is not link or self.decision is None:
                return
            if lifted:
                volume.become(DiskMove.PEER_NOT_NEWER)
                self.disk = Disk.UP_TO_DATE
                volume.start_serving()
            self._establish()

        if change(volume.ledger.wanted) == volume.ledger.wanted:
            done()
        else:
            volume.ledger.save(change, done)

    # --- frames

    def on_frame(self, frame: Frame) -> str | None:
        """Something about this volume from this peer.  Returns what is wrong with it, or None."""
        if frame.kind is Kind.VOLUME_STATE:
            return self._on_state(frame)
        if frame.kind is Kind.CURRENT_GENERATION:
            return self._on_current_generation(frame)
        return self.steps.on_frame(frame)

    def tell_generation(self, current: int) -> None:
        """The peer has no disk and may live on our copy: which generation that is, before what is written in it."""
        if self.link is not None and self.carried_out and self.disk is Disk.DISKLESS:
            payload = pack_current_generation(current)
            self.link.send(Frame(Kind.CURRENT_GENERATION, self.volume.number, payload=payload))

    def _on_current_generation(self, frame: Frame) -> str | None:
        generation = unpack_current_generation(frame.payload)
        if self.replicating:  # else a round is coming, which says it again
            self.generation = generation
            self.volume.serve_from_peer()
        return None

    # --- disks, writes, turns

    def disk_gone(self, ranges: list[tuple[int, int]]) -> bool:
        """Our disk is gone: stop any resync, tell the peer.  True if its confirmation must be waited for."""
        self._starting = self._surviving = False
        self._sent = None  # the state we sent is not true any more: the round is over without a decision
        if self.link is None:
            self.steps.stop()
            return False
        confirm = self.has_good_data
        if self.replication is not Replication.OFF:
            self.move(ReplicationMove.ROUND)
        self.link.send(
            Frame(
                Kind.DISK_STATE,
                self.volume.number,
                sequence=1,
                payload=pack_disk_state(Disk.DISKLESS, ranges),
            )
        )
        if confirm:
            self.move(ReplicationMove.NO_SYNC)  # the peer goes on with our writes
            self.decision, self.carried_out = Decision(Outcome.NONE, "diskless"), True
            # Only now may what waited for the resync's locks go on: behind DISK_STATE, as a diskless node's writes.
            self.steps.stop()
            self.release()
        else:
            self.steps.stop()
            self.decision = None  # when the device is closed, a new round tells what is left
        return confirm

    def peer_disk_gone(self) -> None:
        """The peer's disk is gone: nothing reaches it any more."""
        self.steps.stop()
        self.disk = Disk.DISKLESS
        self.move(ReplicationMove.ROUND)
        self.move(ReplicationMove.NO_SYNC)
        self._starting = False
        self.decision, self.carried_out = Decision(Outcome.NONE, "diskless"), True

    def send_write(self, write: Write) -> None:
        """Mirror a client's write."""
        assert self.link is not None
        self.sent_bytes += write.size
        self.link.send_write(self.volume, write)

    def settle(self) -> None:
        """Once per turn."""
        if isinstance(self.steps.sync, SyncTarget):
            self.steps.sync.pull()


def lineage_text(state: VolumeState) -> str:
    """Both ids and the history as `show-gi` prints them."""
    ids = ":".join(f"{generation:016x}" for generation in (state.current, state.bitmap_id, *state.history[:4]))
    flags = ",".join(name for name in ("crashed_primary", "survived", "full_sync", "primary") if getattr(state, name))
    return f"{ids} disk={Disk(state.disk).word} dirty={state.dirty_count}{' ' + flags if flags else ''}"
