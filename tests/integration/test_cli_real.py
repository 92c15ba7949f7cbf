# SPDX-License-Identifier: Apache-2.0
"""The command and the daemon as an operator meets them: two nodes, real processes, real files, kill -9."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator.control.client import call, stream
from replicator.errors import Refused
from tests.integration.cluster import MIB, NODES, TwoNodes, alone, connected, synced


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[TwoNodes]:
    with TwoNodes(tmp_path) as nodes:
        yield nodes


@pytest.fixture
def running(pair: TwoNodes) -> TwoNodes:
    """Both up, connected and UpToDate."""
    pair.create_md()
    pair.start_both()
    pair.cli("alpha", "new-current-uuid", "--clear-bitmap", "r0", check=True)
    for node in NODES:
        pair.wait(node, synced)
    return pair


@pytest.mark.parametrize(
    ("metadata", "security"),
    [("internal", "clear"), ("external", "tls")],
    ids=["internal-clear", "external-tls"],
)
def test_a_primary_that_is_killed_is_replaced_and_catches_up(tmp_path: Path, metadata: str, security: str) -> None:
    with TwoNodes(tmp_path, metadata=metadata, security=security) as nodes:
        if security == "tls":
            nodes.exchange_keys()
        for node in NODES:
            assert nodes.cli(node, "check").stdout == "r0: OK\n"
        nodes.create_md()
        nodes.start_both()
        nodes.cli("alpha", "new-current-uuid", "--clear-bitmap", "r0", check=True)
        nodes.wait("beta", synced)
        nodes.cli("alpha", "primary", "r0", check=True)
        drawn = random.Random(7)
        expected: dict[int, bytes] = {}
        with nodes.nbd("alpha") as client:
            size = client.size_bytes
            for offset in (0, 5 * MIB, size - 65536):
                expected[offset] = drawn.randbytes(65536)
                client.write(offset, expected[offset])
            client.flush()
            refused = nodes.cli("alpha", "secondary", "r0")
            assert refused.returncode == 11
            assert "State change failed: (-12) Device is held open by someone" in refused.stderr
            assert f"pid {os.getpid()}" in refused.stderr
            nodes.kill("alpha")
        nodes.wait("beta", alone)
        nodes.cli("beta", "primary", "r0", check=True)
        with nodes.nbd("beta") as client:
            for offset, data in expected.items():
                assert client.read(offset, len(data)) == data
            client.write(9 * MIB, drawn.randbytes(MIB))
            client.flush()
        assert nodes.start("alpha")["attach"]["ok"]
        waited = nodes.cli("beta", "wait-sync", "r0", "--timeout", "25")
        assert waited.returncode == 0, waited.stderr + nodes.logs()
        nodes.wait("alpha", synced)
        for node in ("beta", "alpha"):
            nodes.cli(node, "down", "r0", check=True)
            assert nodes.ended(node) == 0
        assert nodes.data("alpha", size) == nodes.data("beta", size)
        shown = nodes.cli("alpha", "show-gi", "r0", check=True).stdout
        assert "1 Consistent" in shown and "0 Primary" in shown and "peer beta (node id 1)" in shown


def test_up_detaches_and_is_idempotent_and_so_is_down(pair: TwoNodes) -> None:
    pair.create_md()
    assert "r0 not running\n    do: replicator up r0\n" in pair.cli("alpha", "status").stdout
    for node in NODES:
        pair.cli(node, "up", "r0", check=True)
    pair.cli("alpha", "wait-connect", "r0", "--timeout", "25", check=True)
    pid = pair.status("alpha")["pid"]
    pair.cli("alpha", "detach", "r0", check=True)
    pair.cli("alpha", "disconnect", "r0", check=True)
    pair.cli("alpha", "up", "all", check=True)
    status = pair.wait("alpha", connected)
    assert status["pid"] == pid and status["devices"][0]["disk-state"] == "Inconsistent"
    for node in NODES:
        pair.cli(node, "down", "r0", check=True)
        pair.cli(node, "down", "r0", check=True)
    # Nothing of the process is left when `down` returns: its disk can be had at once.
    pair.cli("alpha", "create-md", "r0", "--force", check=True)
    gone = pair.cli("alpha", "status", "r0")
    assert gone.returncode == 10 and "hint: replicator up r0" in gone.stderr


def test_up_says_why_the_disk_could_not_be_attached_and_attaches_it_later(pair: TwoNodes) -> None:
    failed = pair.cli("alpha", "up", "r0")
    assert failed.returncode == 11 and "create-md" in failed.stderr, failed.stderr
    assert pair.status("alpha")["devices"][0]["disk-state"] == "Diskless"
    pair.cli("alpha", "create-md", "r0", check=True)
    pair.cli("alpha", "up", "r0", check=True)
    assert pair.status("alpha")["devices"][0]["disk-state"] == "Inconsistent"


def test_up_says_why_the_process_could_not_start(pair: TwoNodes) -> None:
    text = (pair.config_dir("alpha") / "r0.toml").read_text()
    port = int(text.partition('address = "127.0.0.1:')[2].partition('"')[0])
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        failed = pair.cli("alpha", "up", "r0")
    assert failed.returncode == 10 and str(port) in failed.stderr
    assert not Path(pair.control("alpha")).exists(), "a process that could not start left its socket"


def test_create_md_refuses_to_destroy_what_it_knows(pair: TwoNodes) -> None:
    pair.create_md()
    refused = pair.cli("alpha", "create-md", "r0", "--json")
    assert refused.returncode == 11
    assert json.loads(refused.stdout)[0]["code"] == "metadata-exists"
    pair.cli("alpha", "create-md", "r0", "--force", check=True)


def test_a_wait_that_is_in_vain_ends_with_exit_code_5(pair: TwoNodes) -> None:
    pair.create_md()
    pair.start("alpha")
    waited = pair.cli("alpha", "wait-connect", "r0", "--timeout", "0")
    assert waited.returncode == 5 and "replicator status r0" in waited.stderr
    pair.cli("alpha", "disconnect", "r0", check=True)
    assert "StandAlone" in pair.cli("alpha", "wait-connect", "r0").stderr


def test_a_secondary_refuses_clients_in_words(running: TwoNodes) -> None:
    with pytest.raises(PermissionError, match="r0/0 is Secondary on beta"):
        running.nbd("beta")


def test_a_forced_demotion_cuts_the_clients_off(running: TwoNodes) -> None:
    running.cli("alpha", "primary", "r0", check=True)
    with running.nbd("alpha") as client:
        client.write(0, b"x" * 4096)
        running.cli("alpha", "secondary", "r0", "--force", check=True)
        with pytest.raises(OSError):
            client.write(0, b"y" * 4096)
    assert running.status("alpha")["role"] == "Secondary"


def test_terminated_in_use_it_ends_and_says_that_it_was_not_down(running: TwoNodes) -> None:
    running.cli("alpha", "primary", "r0", check=True)
    with running.nbd("alpha") as client:
        client.write(0, b"x" * 4096)
        assert running.terminate("alpha") == 1
    assert running.terminate("beta") == 0
    assert '"not-down"' in running.logs()


def test_events_come_as_they_happen_and_end_with_the_resource(running: TwoNodes) -> None:
    lines: list[str] = []
    messages = stream(running.control("alpha"), "events", {"diff": True}, 30.0)
    first = next(messages)["lines"]
    assert isinstance(first, list) and first[-1] == "exists -"
    running.cli("alpha", "primary", "r0", check=True)
    running.cli("alpha", "down", "r0", check=True)
    for message in messages:
        found = message["lines"]
        assert isinstance(found, list)
        lines += found
    assert any("role:Secondary->Primary" in line for line in lines)
    assert lines[-1] == "destroy resource name:r0"
    assert running.ended("alpha") == 0


def test_an_interrupted_command_says_nothing_ugly(running: TwoNodes) -> None:
    command = [sys.executable, "-m", "replicator", "events", "r0"]
    with subprocess.Popen(
        command,
        env=running.environment("alpha"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as following:
        assert following.stdout is not None and following.stderr is not None
        while following.stdout.readline() != "exists -\n":
            pass
        following.send_signal(signal.SIGINT)
        assert (following.wait(30), following.stderr.read()) == (130, "")


def test_the_process_answers_for_itself_and_refuses_what_it_does_not_know(running: TwoNodes) -> None:
    control = running.control("alpha")
    assert call(control, "ping")["node"] == "alpha"
    for verb, args, code in (
        ("dance", {}, "unknown-verb"),
        ("attach", {"volume": 7}, "no-such-volume"),
        ("attach", {"volume": True}, "no-such-volume"),
        ("connect", {"peer": "gamma"}, "no-such-peer"),
        ("primary", {"force": "yes"}, "bad-argument"),
        ("primary", {"why": 1}, "bad-argument"),
        ("status", {"volume": 0}, "bad-argument"),
    ):
        with pytest.raises(Refused) as refused:
            call(control, verb, args)
        assert refused.value.code == code, verb
    assert running.status("alpha")["role"] == "Secondary"


def test_a_second_process_for_the_same_resource_is_refused(running: TwoNodes) -> None:
    second = running.cli("alpha", "run", "r0")
    assert second.returncode != 0 and "r0" in second.stderr
    assert running.status("alpha")["devices"][0]["disk-state"] == "UpToDate"


BROKEN = """
import sys
from replicator.cli import main
import replicator.daemon.run
def broken(self): raise AssertionError("two and two are five")
sys.modules["replicator.daemon.run"].Resource.drain = broken
main(["run", "r0"])
"""


def test_a_broken_invariant_ends_the_process_with_a_traceback(pair: TwoNodes) -> None:
    pair.create_md()
    done = subprocess.run(
        [sys.executable, "-c", BROKEN],
        env=pair.environment("alpha"),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 70, done.stderr
    last = json.loads(done.stderr.splitlines()[-1])
    assert last["level"] == "critical" and "two and two are five" in last["exception"]


def test_it_does_not_run_without_assertions(pair: TwoNodes) -> None:
    done = subprocess.run(
        [sys.executable, "-O", "-m", "replicator", "run", "r0"],
        env=pair.environment("alpha"),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 20 and "assertions are switched off" in done.stderr
