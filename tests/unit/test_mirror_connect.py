# SPDX-License-Identifier: Apache-2.0
"""How two nodes find each other, refuse each other and notice that the other is gone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from replicator.core.actions import Action, CloseLink, Send
from replicator.core.events import Io, LinkDown, LinkFrames, LinkUp
from replicator.core.handshake_wire import Hello
from replicator.core.wire import Frame, Kind
from tests.sim.disk import Disk
from tests.sim.node import Node
from tests.sim.world import MS, SECOND
from tests.unit.mirror import MIB, Mirror

HOUR = 3600 * SECOND


def off(**options: Any) -> Mirror:
    return Mirror(start="off", **options)


def tamper(m: Mirror, node: Node, **changes: object) -> None:
    """What this node says in HELLO."""
    perform = m.world.perform

    def other(who: Node, action: Action) -> None:
        if who is node and isinstance(action, Send) and action.frame.kind is Kind.HELLO:
            said = replace(Hello.unpack(action.frame.payload), **changes)  # type: ignore[arg-type]
            action = Send(action.link, Frame(Kind.HELLO, payload=said.pack()))
        perform(who, action)

    m.world.perform = other  # type: ignore[method-assign]


def vanish(m: Mirror, node: Node) -> None:
    """The machine is gone without a word: the other one's link stays, as it believes."""
    for link in m.world.network.links:
        link.alive = False
    node.die(power=False)


# --- refusals


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"matching": (("protocol", "A"),)}, "protocol is"),
        ({"node_name": "gamma"}, "gamma"),
    ],
)
def test_settings_that_differ_end_in_standalone_on_both_and_say_which(changes: dict[str, object], word: str) -> None:
    m = off()
    m.change_options(m.beta, **changes)
    m.restart(m.alpha, m.beta)
    m.run(lambda: m.state(m.alpha) == "StandAlone" and bool(m.connection(m.alpha).reason))
    m.pause(5 * SECOND)
    assert word in m.reasons(m.alpha)["standalone"]
    assert m.reasons(m.beta), "the other side knows that something is wrong, too"


def test_protocol_versions_without_a_common_one_end_in_standalone() -> None:
    m = off()
    tamper(m, m.beta, version_min=7, version_max=9)
    m.restart(m.alpha, m.beta)
    m.run(lambda: m.state(m.alpha) == "StandAlone" and bool(m.connection(m.alpha).reason))
    assert "protocol versions 7 to 9" in m.reasons(m.alpha)["standalone"]


def test_different_volumes_end_in_standalone() -> None:
    m = off(volumes=(0, 1))
    m.change_options(m.beta, volumes=(0,))
    m.restart(m.alpha, m.beta)
    m.run(lambda: m.state(m.alpha) == m.state(m.beta) == "StandAlone" and bool(m.connection(m.beta).reason))
    assert "volumes [0]" in m.reasons(m.alpha)["standalone"] and "volumes [0, 1]" in m.reasons(m.beta)["standalone"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"resource": "r9"}, "serves resource r9"),
        ({"peer_node_id": 7}, "wants to talk to node 7"),
        ({"node_id": 5}, "is node 5"),
    ],
)
def test_somebody_else_is_refused_and_the_right_peer_still_waited_for(changes: dict[str, object], word: str) -> None:
    m = off()
    tamper(m, m.beta, **changes)
    m.restart(m.alpha, m.beta)
    m.run(lambda: bool(m.notices(m.alpha, "link-refused")))
    assert word in m.notices(m.alpha, "link-refused")[0].fields["reason"]
    assert word in m.reasons(m.alpha)["not-connected"]
    m.run(lambda: word in m.reasons(m.beta).get("not-connected", ""), limit=5 * SECOND)
    assert m.state(m.alpha) != "StandAlone"


def test_unrelated_resources_end_in_standalone_as_unrelated_data() -> None:
    m = Mirror(primary=0)
    m.kill(m.beta)
    m.alpha.die(power=False)
    stranger = Mirror(seed=77)
    stranger.kill(stranger.alpha)
    stranger.kill(stranger.beta)
    changed = stranger.superblock(stranger.beta)
    assert changed.current != m.superblock(m.alpha).current
    m.beta.disks[0] = stranger.beta.disks[0]
    m.rename_resource(m.beta, b"\x77" * 16)
    states = m.sent(Kind.VOLUME_STATE)
    m.restart(m.alpha, m.beta)
    m.run(lambda: m.state(m.alpha) == m.state(m.beta) == "StandAlone" and bool(m.connection(m.beta).reason))
    assert "unrelated data" in m.reasons(m.alpha)["split-brain"]
    assert m.sent(Kind.VOLUME_STATE) == states, "refused before anything was compared"


def test_unrelated_generations_of_one_resource_end_in_standalone() -> None:
    m = Mirror(seed=1)
    stranger = Mirror(seed=77)
    for node in (m.alpha, m.beta, stranger.alpha, stranger.beta):
        node.die(power=False)
    m.beta.disks[0] = stranger.beta.disks[0]
    requests = m.sent(Kind.RESYNC_REQUEST)
    m.restart(m.alpha, m.beta)
    m.run(lambda: m.state(m.alpha) == m.state(m.beta) == "StandAlone" and bool(m.connection(m.beta).reason))
    assert (
        "unrelated data" in m.reasons(m.alpha)["split-brain"] and "unrelated data" in m.reasons(m.beta)["split-brain"]
    )
    assert m.sent(Kind.RESYNC_REQUEST) == requests


def replace_disk(m: Mirror, node: Node, size: int) -> None:
    node.disks[0] = Disk(size, node_id=node.id, volume=0, peers=[1 - node.id], resource_id=bytes([9]) * 16)


def test_a_fresh_disk_that_is_too_small_is_refused() -> None:
    m = Mirror()
    m.kill(m.beta)
    replace_disk(m, m.beta, MIB // 2)
    m.restart(m.beta)
    m.run(lambda: m.state(m.alpha) == m.state(m.beta) == "StandAlone" and bool(m.connection(m.beta).reason))
    assert "disk-too-small" in m.connection(m.alpha).reason + m.connection(m.beta).reason


def test_a_fresh_disk_that_is_larger_is_filled() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.kill(m.beta)
    replace_disk(m, m.beta, 2 * MIB)
    m.restart(m.beta)
    m.establish()
    assert m.beta.disks[0].data.seen[:MIB] == m.alpha.disks[0].data.seen
    assert m.volume(m.beta).size == MIB


@pytest.mark.parametrize("smaller", [0, 1])
def test_two_fresh_disks_agree_on_the_smaller_size(smaller: int) -> None:
    m = off()
    replace_disk(m, m.node(1 - smaller), 2 * MIB)
    m.restart(m.alpha, m.beta)
    m.run(lambda: m.connection(m.alpha).connected and m.connection(m.beta).connected)
    m.pause()
    m.done(m.alpha, "primary", force=True)
    m.establish()
    assert m.volume(m.alpha).size == m.volume(m.beta).size == MIB
    assert m.superblock(m.alpha).size_bytes == m.superblock(m.beta).size_bytes == MIB


def test_a_node_that_meets_itself_refuses() -> None:
    m = off()
    m.world.network.partitioned = True
    m.restart(m.alpha)
    m.run(lambda: m.disk(m.alpha) == "Inconsistent")
    m.pause()
    sent: list[Frame] = []
    m.watch(lambda _, action: sent.append(action.frame) if isinstance(action, Send) and action.link == 999 else None)
    m.alpha.step(LinkUp(999, None, True, bytes(32)))
    m.pause(MS)
    m.alpha.step(LinkFrames(999, [sent[0]]))
    m.pause(MS)
    assert "which is this node" in m.notices(m.alpha, "link-refused")[0].fields["reason"]
    assert m.state(m.alpha) != "StandAlone"


def test_a_reason_the_peer_gives_for_its_refusal_is_shown() -> None:
    m = Mirror()
    m.done(m.alpha, "disconnect")
    m.run(lambda: "alpha is StandAlone" in m.reasons(m.beta).get("not-connected", ""), limit=5 * SECOND)


# --- staying apart, coming back


def test_standalone_stays_standalone_until_somebody_says_connect() -> None:
    m = Mirror()
    m.done(m.alpha, "disconnect")
    m.done(m.beta, "disconnect")
    m.pause(HOUR // 10)
    assert m.state(m.alpha) == m.state(m.beta) == "StandAlone"
    m.done(m.beta, "connect")
    m.pause(5 * SECOND)
    assert m.state(m.alpha) == "StandAlone"
    m.done(m.alpha, "connect")
    m.establish()


def test_attempts_keep_their_distance() -> None:
    m = Mirror()
    m.partition()
    dials = m.actions("Dial")
    m.pause(10 * SECOND)
    assert 15 <= len(dials) <= 21, "one per half second"
    assert {node for node, _ in dials} == {1}, "one side dials, the other listens"


@pytest.mark.parametrize("when", [Kind.HELLO, Kind.AGREE])
@pytest.mark.parametrize("node_id", [0, 1])
@pytest.mark.parametrize("sender", [0, 1])
def test_a_disconnect_before_both_agreed_ends_in_standalone(when: Kind, node_id: int, sender: int) -> None:
    disconnect_in_a_handshake(when, node_id, sender)


@pytest.mark.parametrize("when", [Kind.ROLE, Kind.VOLUME_STATE])
@pytest.mark.parametrize("node_id", [0, 1])
def test_a_disconnect_right_after_both_agreed_ends_in_standalone(when: Kind, node_id: int) -> None:
    disconnect_in_a_handshake(when, node_id, node_id)


def disconnect_in_a_handshake(when: Kind, node_id: int, sender: int) -> None:
    """A node is told to disconnect right after this frame of the handshake was sent."""
    m = Mirror()
    m.cut()
    node = m.node(node_id)
    hit = m.on_frame(when, lambda: m.world.after(0, lambda: node.command("disconnect")), m.node(sender))
    m.run(lambda: bool(hit))
    m.pause(5 * SECOND)
    assert m.state(node) == "StandAlone"
    m.done(node, "connect")
    m.establish()


def test_a_disconnect_while_dialing_does_not_end_dialing_for_good() -> None:
    m = Mirror()
    m.partition()
    dials = m.actions("Dial")
    m.run(lambda: bool(dials))
    m.done(m.beta, "disconnect")
    m.done(m.beta, "connect")
    m.heal()
    m.establish()


# --- a peer that is silently gone


def test_a_silent_peer_is_noticed_by_pings() -> None:
    m = Mirror()
    m.stall(m.alpha)
    m.stall(m.beta)
    m.world.network.partitioned = True
    m.pause(11 * SECOND)
    assert m.state(m.alpha) == "Connected"
    m.pause(2 * SECOND)
    assert m.state(m.alpha) != "Connected" and m.state(m.beta) != "Connected"
    assert any("pings" in str(notice.fields["reason"]) for notice in m.notices(m.alpha, "connection-state"))


def test_writes_that_are_not_acknowledged_end_the_link_although_pings_are_answered() -> None:
    m = Mirror(primary=0, ping_interval_ns=SECOND, timeout_ns=SECOND, ko_count=3)
    m.write(m.alpha, 3, 6)
    m.on_frame(Kind.WRITE, lambda: m.world.after(0, lambda: m.slow_disks(30_000_000)))
    asked = m.ask(m.alpha, Io.WRITE, 3, value=7)
    m.pause(10 * MS)
    m.fast_disks()
    m.pause(2 * SECOND)
    assert m.state(m.alpha) == "Connected" and asked.reply is None
    assert m.wait(asked).error == 0
    assert m.state(m.alpha) == "StandAlone" and "ko-count" in m.reasons(m.alpha)["standalone"]
    m.done(m.alpha, "connect")
    m.world.run(lambda: m.replication(m.beta) == "Established", 120 * SECOND)
    m.establish()
    assert m.identical()


def test_with_ko_count_0_a_peer_that_answers_pings_is_never_given_up() -> None:
    m = Mirror(primary=0, ping_interval_ns=SECOND, timeout_ns=SECOND, ko_count=0)
    m.write(m.alpha, 3, 6)
    assert m.state(m.alpha) == "Connected" and not m.notices(m.alpha, "new-generation")
    m.on_frame(Kind.WRITE, lambda: m.world.after(0, lambda: m.slow_disks(30_000_000)))
    asked = m.ask(m.alpha, Io.WRITE, 3, value=7)
    m.pause(10 * MS)
    m.fast_disks()
    assert m.wait(asked).error == 0
    assert m.state(m.alpha) == "Connected" and m.state(m.beta) == "Connected"
    assert not any("acknowledge" in str(notice.fields["reason"]) for notice in m.notices(m.alpha, "connection-state"))


def test_a_handshake_that_hangs_is_given_up_and_tried_again() -> None:
    m = Mirror()
    m.cut()
    m.stall_at(Kind.AGREE, m.alpha)
    m.pause(15 * SECOND)
    assert m.state(m.beta) != "Connected"
    assert any("too long" in str(notice.fields["reason"]) for notice in m.notices(m.beta, "link-refused"))
    m.hooks.clear()
    m.stall(m.alpha, stalled=False)
    m.establish()


def test_a_round_that_hangs_ends_the_link() -> None:
    m = Mirror(ping_interval_ns=100 * SECOND)
    m.cut()
    m.stall_at(Kind.VOLUME_STATE, m.beta)
    m.run(lambda: m.state(m.alpha) == "Connected")
    m.pause(11 * SECOND)
    assert any("handshake" in str(notice.fields["reason"]) for notice in m.notices(m.alpha, "connection-state"))
    m.hooks.clear()
    m.stall(m.beta, stalled=False)
    m.establish()


def test_a_peer_that_came_back_takes_over_from_its_old_link_and_nothing_is_lost() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    vanish(m, m.beta)
    under_way = [m.ask(m.alpha, Io.WRITE, block, value=8) for block in range(10, 14)]
    m.pause(MS)
    assert m.state(m.alpha) == "Connected", "it believes in the old link"
    m.restart(m.beta)
    m.establish()
    assert all(m.wait(each).error == 0 for each in under_way)
    assert m.identical() and m.block(m.beta, 13) == 8
    assert m.world.now < 5 * SECOND, "without waiting for pings"


def test_an_old_link_that_ends_late_does_not_touch_the_new_one() -> None:
    m = Mirror(primary=0)
    old = m.connection(m.alpha).link
    assert old is not None
    vanish(m, m.beta)
    m.restart(m.beta)
    m.establish()
    m.alpha.step(LinkDown(old, "reset, late"))
    m.pause()
    assert m.state(m.alpha) == "Connected"
    m.write(m.alpha, 3, 7)
    assert m.block(m.beta, 3) == 7


def test_a_stranger_cannot_take_over_the_link_of_a_peer() -> None:
    m = Mirror(primary=0)
    link = m.connection(m.alpha).link
    m.alpha.step(LinkUp(999, 1, False, bytes(32)))
    m.pause(MS)
    m.alpha.step(LinkFrames(999, [Frame(Kind.AGREE, payload=bytes(32))]))
    m.pause()
    assert m.connection(m.alpha).link == link and m.state(m.alpha) == "Connected"


def test_links_that_never_agree_are_bounded() -> None:
    m = Mirror()
    closed = m.actions(CloseLink.__name__)
    for number in range(20):
        m.alpha.step(LinkUp(1000 + number, 1, False, bytes(32)))
    m.pause(MS)
    assert len(closed) == 12
    m.pause(11 * SECOND)
    assert len(closed) == 20 and m.state(m.alpha) == "Connected"


@pytest.mark.parametrize("times", [1, 5])
def test_a_link_that_flaps_under_load_loses_nothing(times: int) -> None:
    m = Mirror(primary=0)
    asked = []
    for number in range(1, 40 * times):
        asked.append(m.ask(m.alpha, Io.WRITE, number % 50, value=number % 250 + 1))
        if number % 13 == 0:
            m.world.network.cut_all()
        m.pause(50 * MS)
    assert all(m.wait(each).error == 0 for each in asked)
    m.establish()
    m.pause(2 * SECOND)
    assert m.identical()


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.AGREE, Kind.ROLE, Kind.VOLUME_STATE])
@pytest.mark.parametrize("sender", [0, 1])
def test_a_link_cut_in_the_middle_of_a_handshake_is_made_again(kind: Kind, sender: int) -> None:
    m = Mirror(primary=0)
    m.cut()
    cut = m.cut_at(kind, m.node(sender))
    m.establish()
    assert cut


@pytest.mark.parametrize("node_id", [0, 1])
@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.AGREE, Kind.ROLE, Kind.VOLUME_STATE])
def test_a_node_killed_in_the_middle_of_a_handshake_is_met_again(kind: Kind, node_id: int) -> None:
    m = Mirror()
    m.cut()
    node = m.node(node_id)
    hit = m.on_frame(kind, lambda: m.world.after(0, lambda: m.kill(node)))
    m.run(lambda: bool(hit) and not node.up)
    m.restart(node)
    m.establish()


@pytest.mark.parametrize("verb", ["disconnect", "down"])
def test_the_peer_of_a_node_that_left_keeps_trying(verb: str) -> None:
    m = Mirror()
    m.done(m.beta, verb)
    m.pause(5 * SECOND)
    assert m.state(m.alpha) == "Connecting"
    assert "beta disconnected" in m.reasons(m.alpha)["not-connected"]
