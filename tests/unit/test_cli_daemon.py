# SPDX-License-Identifier: Apache-2.0
"""The composition root with a core that does as the test says: who gets which action, who is told what."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from replicator.config import ResourceConfig, parse
from replicator.control.messages import Reply, Request
from replicator.core import actions, events
from replicator.core.actions import Action, CommandDone, Notice
from replicator.core.events import Command, Event
from replicator.daemon import logs
from replicator.daemon.compose import Daemon, Setting, core_options
from replicator.daemon.watchers import INTERVAL_NS, Watchers, Wish
from replicator.drivers.device import Choice
from replicator.drivers.loop import Loop
from replicator.errors import ConfigError
from tests.unit.test_cli import CONFIG

MIB = 1 << 20


class Lines:
    """A log that is looked at."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str, dict[str, object]]] = []

    def debug(self, event: str, **values: object) -> None:
        self.said.append(("debug", event, values))

    def info(self, event: str, **values: object) -> None:
        self.said.append(("info", event, values))

    def warning(self, event: str, **values: object) -> None:
        self.said.append(("warning", event, values))

    def critical(self, event: str, **values: object) -> None:
        self.said.append(("critical", event, values))


class ScriptedCore:
    """Answers commands as `script` says (default: ok) and otherwise only remembers."""

    def __init__(self) -> None:
        self.seen: list[Event] = []
        self.out: list[Action] = []
        self.role = "Secondary"
        self.disk = "Diskless"
        self.size = 0
        self.refuse: dict[str, tuple[str, int]] = {}
        self.hold: set[str] = set()
        self.deadline: int | None = None

    def step(self, event: Event, _now: int) -> None:
        self.seen.append(event)
        if not isinstance(event, Command) or event.verb in self.hold:
            return
        if event.verb in self.refuse:
            code, number = self.refuse[event.verb]
            self.out.append(CommandDone(event.token, False, code, number, "no", "do so"))
            return
        roles = {"primary": "Primary", "secondary": "Secondary", "down": "Secondary"}
        self.role = roles.get(event.verb, self.role)
        self.out.append(CommandDone(event.token, True))

    def drain(self) -> list[Action]:
        out, self.out = self.out, []
        return out

    def status(self) -> Mapping[str, object]:
        device = {"volume": 0, "disk-state": self.disk, "size": self.size // 1024, "openers": []}
        return {"name": "r0", "role": self.role, "devices": [device], "connections": []}

    def gi(self) -> Mapping[str, object]:
        return {"volumes": []}

    @property
    def verbs(self) -> list[str]:
        return [event.verb for event in self.seen if isinstance(event, Command)]


class World:
    """A daemon on a real loop, stepped until something is so."""

    def __init__(self, config: ResourceConfig, run_dir: Path) -> None:
        self.loop = Loop()
        self.core = ScriptedCore()
        self.log = Lines()
        self.stopped = 0
        choice = Choice("none", "not in a test")
        node = config.node("beta")  # the higher id dials: no port is needed
        self.setting = Setting(
            config=config, node=node, run_dir=run_dir, key_dir=run_dir, choice=choice, complaints=("so so",)
        )
        self.daemon = Daemon(self.loop, self.setting, self.core, self.log, self._stop)

    def _stop(self) -> None:
        self.stopped += 1

    def until(self, done: Callable[[], object]) -> None:
        turns = 0

        def turn(happened: list[Event], now_ns: int) -> None:
            nonlocal turns
            self.daemon.turn(happened, now_ns)
            turns += 1
            assert turns < 2000, f"nothing more happens: {self.core.seen}"
            if done():
                self.loop.stop()

        self.loop.run(turn, lambda: self.loop.now_ns() + 1_000_000)

    def ask(self, verb: str, **args: object) -> Reply:
        """What the control socket would be answered."""
        answers: list[Reply] = []
        self.daemon.commands.request(1, Request(verb, args), answers.append)
        self.until(lambda: answers)
        return answers[0]


@pytest.fixture
def run_dir() -> Iterator[Path]:
    # A socket's path is short; pytest's directories are not.
    directory = Path(tempfile.mkdtemp(prefix="rep-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def config(tmp_path: Path) -> ResourceConfig:
    return parse(CONFIG.format(base=tmp_path).encode(), Path("/etc/r0.toml"))


@pytest.fixture
def world(config: ResourceConfig, run_dir: Path) -> Iterator[World]:
    world = World(config, run_dir)
    yield world
    world.daemon.close()
    world.loop.close()


def test_the_core_is_told_the_whole_configuration(config: ResourceConfig) -> None:
    alpha, beta = (core_options(config, config.node(name)) for name in ("alpha", "beta"))
    assert (alpha.node_id, alpha.peers, alpha.volumes) == (0, {1: "beta"}, (0, 1))
    assert (alpha.listens_for, beta.listens_for) == (frozenset({1}), frozenset())
    assert alpha.matching == config.options_to_match() == beta.matching
    assert alpha.timeout_ns == config.net.timeout_ns and alpha.ko_count == config.net.ko_count
    assert alpha.activity_extents == config.disk.al_extents


def test_at_the_start_it_attaches_and_connects(world: World) -> None:
    answers: list[Reply] = []
    world.daemon.start(answers.append)
    world.until(lambda: answers)
    assert world.core.verbs == ["attach", "connect"]
    assert answers[0].ok


def test_it_answers_for_itself(world: World) -> None:
    assert world.ask("ping").data["pid"] == os.getpid()
    status = world.ask("status").data
    assert status["pid"] == os.getpid() and status["complaints"] == ["so so"]
    assert world.ask("gi").data == {"volumes": []}


@pytest.mark.parametrize(
    ("verb", "args", "code"),
    [
        ("dance", {}, "unknown-verb"),
        ("attach", {"volume": 9}, "no-such-volume"),
        ("attach", {"volume": "0"}, "no-such-volume"),
        ("invalidate", {}, "bad-argument"),
        ("connect", {"peer": "beta"}, "no-such-peer"),
        ("primary", {"force": 1}, "bad-argument"),
        ("down", {"kindly": True}, "bad-argument"),
    ],
)
def test_what_makes_no_sense_never_reaches_the_core(
    world: World, verb: str, args: dict[str, object], code: str
) -> None:
    assert world.ask(verb, **args).code == code
    assert world.core.verbs == []


def test_arguments_reach_the_core_complete(world: World) -> None:
    assert world.ask("new-current-uuid", volume=1).ok
    assert world.ask("connect", peer="alpha").ok
    found = [dict(event.args) for event in world.core.seen if isinstance(event, Command)]
    assert found == [{"volume": 1, "clear_bitmap": False}, {"peer": "alpha"}]


def test_a_refusal_of_the_core_reaches_the_operator(world: World) -> None:
    world.core.refuse["primary"] = ("no-data", -2)
    reply = world.ask("primary")
    assert (reply.ok, reply.code, reply.number, reply.message, reply.hint) == (
        False,
        "no-data",
        -2,
        "no",
        "do so",
    )


def test_an_export_is_served_by_a_primary_with_a_size_only(world: World) -> None:
    world.daemon.start(lambda _reply: None)
    export = world.daemon.exports.frontends[0]._exports["r0/0"]
    assert export.refused == "r0/0 is Secondary on beta, only a Primary serves it"
    assert world.ask("primary").ok
    export = world.daemon.exports.frontends[0]._exports["r0/0"]
    assert export.refused is not None and "no size yet" in export.refused
    world.core.size = 8 * MIB
    assert world.ask("primary").ok
    export = world.daemon.exports.frontends[0]._exports["r0/0"]
    assert export.refused is None and export.size_bytes == 8 * MIB
    assert world.ask("secondary").ok
    assert world.daemon.exports.frontends[0]._exports["r0/0"].refused is not None


def test_a_refused_demotion_keeps_the_export(world: World) -> None:
    world.daemon.start(lambda _reply: None)
    world.core.size = 8 * MIB
    assert world.ask("primary").ok
    world.core.refuse["secondary"] = ("held-open", -12)
    assert world.ask("secondary").number == -12
    assert world.daemon.exports.frontends[0]._exports["r0/0"].refused is None


def test_a_second_demotion_waits_for_the_first(world: World) -> None:
    world.core.hold = {"secondary"}
    answers: list[Reply] = []
    world.daemon.commands.request(1, Request("secondary", {}), answers.append)
    world.daemon.commands.request(2, Request("down", {}), answers.append)
    world.until(lambda: world.core.verbs)
    assert world.core.verbs == ["secondary"] and not answers
    first = next(event for event in world.core.seen if isinstance(event, Command))
    world.core.out.append(CommandDone(first.token, True))
    world.until(lambda: world.stopped)
    assert world.core.verbs == ["secondary", "down"]


def test_down_is_answered_when_everything_is_closed(world: World) -> None:
    world.daemon.start(lambda _reply: None)
    socket_path = Path(world.daemon.exports.frontends[0].path)
    existed: list[bool] = []
    world.daemon.commands.request(1, Request("down", {}), lambda _reply: existed.append(socket_path.exists()))
    world.until(lambda: world.stopped)
    assert existed == []
    world.daemon.close()
    assert existed == [False]
    world.daemon = Daemon(world.loop, world.setting, world.core, world.log, world._stop)  # for the fixture to close


def test_a_disk_that_cannot_be_opened_is_reported_and_can_be_closed(world: World) -> None:
    world.core.out = [actions.OpenDisk(0)]
    world.until(lambda: any(isinstance(event, events.DiskOpenFailed) for event in world.core.seen))
    world.core.out = [actions.CloseDisk(0)]
    world.until(lambda: events.DiskClosed(0) in world.core.seen)


def test_closing_overtakes_opening(world: World) -> None:
    world.core.out = [actions.OpenDisk(0), actions.CloseDisk(0)]
    world.until(lambda: events.DiskClosed(0) in world.core.seen)
    assert not any(isinstance(event, events.DiskOpened | events.DiskOpenFailed) for event in world.core.seen)


def test_a_reply_to_nobody_is_a_broken_invariant(world: World) -> None:
    world.core.out = [actions.Reply(12345, 0)]
    with pytest.raises(AssertionError, match="12345"):
        world.daemon.turn([], world.loop.now_ns())


def test_a_completion_nobody_asked_for_is_a_broken_invariant(world: World) -> None:
    world.core.out = [CommandDone(999, True)]
    with pytest.raises(KeyError):
        world.daemon.turn([], world.loop.now_ns())


# -- watchers ---------------------------------------------------------------------------------------


class Watched:
    """Watchers on a loop whose clock the test moves."""

    def __init__(self) -> None:
        self.now_ns = 10**12
        self.loop = Loop(lambda: self.now_ns)
        self.role = "Secondary"
        self.looks = 0
        self.got: list[tuple[int, Reply]] = []
        self.watchers = Watchers(self.loop, self.status, self.reply)

    def status(self) -> Mapping[str, object]:
        self.looks += 1
        return {"name": "r0", "role": self.role, "devices": [], "connections": []}

    def reply(self, token: int, reply: Reply) -> bool:
        self.got.append((token, reply))
        return True

    def turn(self) -> None:
        self.watchers.turned()
        self.loop._run_timers()


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched()
    yield watched
    watched.loop.close()


def test_nobody_watching_costs_nothing(watched: Watched) -> None:
    for _ in range(3):
        watched.turn()
    assert watched.looks == 0


def test_a_watcher_gets_the_present_state_and_then_changes_at_most_every_interval(watched: Watched) -> None:
    watched.watchers.add(5, Wish(status=True))
    assert watched.got[0][1].data["lines"][-1] == "exists -"  # type: ignore[index]
    watched.now_ns += INTERVAL_NS
    watched.role = "Primary"
    watched.turn()
    token, reply = watched.got[-1]
    assert token == 5 and not reply.final
    assert reply.data["lines"] == ["change resource name:r0 role:Primary"]
    status = reply.data["status"]
    assert isinstance(status, dict) and status["role"] == "Primary"
    watched.role = "Secondary"
    watched.turn()
    assert len(watched.got) == 2, "too early"
    watched.now_ns += INTERVAL_NS
    watched.turn()
    assert len(watched.got) == 3


def test_without_a_change_nothing_is_said(watched: Watched) -> None:
    watched.watchers.add(5, Wish())
    watched.now_ns += INTERVAL_NS
    watched.turn()
    assert len(watched.got) == 1


def test_a_late_watcher_does_not_swallow_the_change_for_an_early_one(watched: Watched) -> None:
    watched.watchers.add(5, Wish())
    watched.role = "Primary"
    watched.watchers.add(6, Wish())
    assert [token for token, _ in watched.got] == [5, 5, 6]


def test_the_end_is_told_once_and_for_all(watched: Watched) -> None:
    watched.watchers.add(5, Wish())
    watched.watchers.add(6, Wish())
    watched.watchers.remove(6)
    watched.watchers.finish()
    token, reply = watched.got[-1]
    assert token == 5 and reply.final and reply.data["lines"] == ["destroy resource name:r0"]


# -- the log ---------------------------------------------------------------------------------------


def test_a_notice_is_one_line_at_the_right_level() -> None:
    log = Lines()
    logs.tell(log, Notice("role", {"role": "Primary", "event": "odd"}))
    logs.tell(log, Notice("disk-failed", {"volume": 0}))
    assert log.said == [
        ("info", "role", {"role": "Primary", "event_": "odd"}),
        ("warning", "disk-failed", {"volume": 0}),
    ]


def test_the_log_is_json_and_has_no_local_variables(capsys: pytest.CaptureFixture[str]) -> None:
    log = logs.configure({"REPLICATOR_LOG_FORMAT": "json"}, "r0", "alpha")
    try:
        payload = bytes([65]) * 40  # spelled so that no line of source contains it
        raise AssertionError(f"{len(payload)} bytes too many")
    except AssertionError as error:
        log.critical("broken-invariant", exc_info=error)
    log.debug("unheard")
    (line,) = capsys.readouterr().err.splitlines()
    said: dict[str, Any] = json.loads(line)
    assert (said["resource"], said["node"], said["level"]) == ("r0", "alpha", "critical")
    assert "40 bytes too many" in said["exception"] and "A" * 40 not in line


@pytest.mark.parametrize("variable", ["REPLICATOR_LOG_LEVEL", "REPLICATOR_LOG_FORMAT"])
def test_an_unknown_word_for_the_log_is_refused(variable: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        logs.configure({variable: "loud"}, "r0", "alpha")
