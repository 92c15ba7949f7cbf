# SPDX-License-Identifier: Apache-2.0
"""Hardening says what it could not do; notifications reach systemd's socket and never disturb us."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from replicator.drivers import process
from replicator.drivers.process import Notifier, watchdog_interval_ns
from replicator.errors import UsageError

HARDEN = """
import json, re
from pathlib import Path
from replicator.drivers import process
complaints = process.harden()
locked = re.search(r"VmLck:\\s+(\\d+)", Path("/proc/self/status").read_text())
print(json.dumps({
    "complaints": complaints,
    "locked_kib": int(locked[1]),
    "oom": int(Path("/proc/self/oom_score_adj").read_text()),
    "dumpable": process._call("prctl", 3, 0, 0, 0, 0) == 0,
}))
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=60)


def test_harden_does_what_it_does_not_complain_about() -> None:
    done = run_python("-c", HARDEN)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    complaints = " / ".join(seen["complaints"])
    assert ("memory is not locked" in complaints) == (seen["locked_kib"] == 0)
    assert ("oom_score_adj" in complaints) == (seen["oom"] != process.OOM_SCORE_ADJ_NEVER)
    assert seen["dumpable"]  # PR_GET_DUMPABLE returned 0
    assert all(c == c.strip() and not c.endswith(".") for c in seen["complaints"])


def test_without_asserts_it_refuses_to_run() -> None:
    done = run_python("-O", "-c", HARDEN)
    assert done.returncode != 0
    assert "assertions are switched off" in done.stderr
    with pytest.raises(UsageError):
        process.require_asserts(enabled=False)
    process.require_asserts(enabled=True)


def test_the_oom_score_is_set_and_a_refusal_is_told(tmp_path: Path) -> None:
    score = tmp_path / "oom_score_adj"
    score.write_text("0\n")
    assert process.hide_from_oom_killer(score) == ""
    assert score.read_text() == "-1000\n"
    assert "unknown" in process.hide_from_oom_killer(tmp_path / "absent")


def test_a_system_call_that_fails_gives_its_errno() -> None:
    assert process._call("prctl", -1, 0, 0, 0, 0) == 22


def test_stray_descriptors_are_closed_and_kept_ones_stay() -> None:
    code = (
        "import os\n"
        "from replicator.drivers import process\n"
        "keep, stray = os.open('/dev/null', 0), os.open('/dev/null', 0)\n"
        "print(stray in process.close_stray_fds([keep]), os.fstat(keep) is not None)\n"
        "try: os.fstat(stray)\n"
        "except OSError: print('closed')\n"
    )
    done = run_python("-c", code)
    assert done.stdout.split() == ["True", "True", "closed"], done.stderr


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[socket.socket, str]:
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    request.addfinalizer(receiver.close)
    receiver.setblocking(False)
    if request.param == "path":
        address = str(tmp_path / "notify")
        receiver.bind(address)
        return receiver, address
    name = f"replicator-test-{secrets.token_hex(8)}"
    receiver.bind(b"\0" + name.encode())
    return receiver, f"@{name}"


def test_notifications_arrive(manager: tuple[socket.socket, str]) -> None:
    receiver, address = manager
    notifier = Notifier(address)
    assert notifier.ready("r0: Primary\nUpToDate")
    assert receiver.recv(999).decode() == f"READY=1\nSTATUS=r0: Primary UpToDate\nMAINPID={os.getpid()}"
    for send, expected in (
        (notifier.watchdog, b"WATCHDOG=1"),
        (notifier.stopping, b"STOPPING=1"),
        (lambda: notifier.status("resync 40 %"), b"STATUS=resync 40 %"),
        (lambda: notifier.extend_timeout(5_000_000), b"EXTEND_TIMEOUT_USEC=5000000"),
    ):
        assert send()
        assert receiver.recv(999) == expected
    notifier.close()
    assert not notifier.watchdog()


@pytest.mark.parametrize("address", [None, "", "vsock:2:1", "/nowhere/notify"])
def test_nobody_listening_is_no_error(address: str | None) -> None:
    notifier = Notifier(address)
    assert not notifier.ready("served")
    notifier.close()


def test_the_address_is_taken_from_the_environment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify")
    Notifier.from_environment().close()
    assert "NOTIFY_SOCKET" not in os.environ


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 1_500_000_000),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_interval_is_half_of_what_is_allowed(environ: dict[str, str], expected: int | None) -> None:
    assert watchdog_interval_ns(environ) == expected
