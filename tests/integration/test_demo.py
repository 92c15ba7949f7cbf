# SPDX-License-Identifier: Apache-2.0
"""`replicator demo` shows what it says, sees what is wrong, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from replicator.cli.demo_nodes import DemoFailed, Node, free_ports, scene
from replicator.cli.demo_writes import BLOCK, MIB, Ledger, content, difference

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 110


def reader(blocks: dict[int, bytes]) -> Callable[[int, int], bytes]:
    return lambda offset, size: blocks.get(offset // BLOCK, bytes(size))


def processes_of(directory: Path) -> list[int]:
    """Processes that were told to use a directory below this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environ = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"REPLICATOR_RUN_DIR={directory}/replicator-demo-".encode() in environ:
                found.append(int(entry.name))
    return found


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], subprocess.Popen[str]]:
    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "replicator", "demo"],
            env=os.environ | {"TMPDIR": str(short(tmp_path_factory)), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def short(factory: pytest.TempPathFactory) -> Path:
    """The base directory: a test's own is too deep for UNIX sockets."""
    return factory.getbasetemp()


def test_the_demonstration_shows_what_it_says(
    start: Callable[[], subprocess.Popen[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with start() as process:
        out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, err) == (0, "")
    assert "acknowledged writes lost" in out
    assert "0 of " in out.partition("acknowledged writes lost")[2].splitlines()[0]
    base = short(tmp_path_factory)
    assert list(base.glob("replicator-demo-*")) == []
    assert processes_of(base) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: str(number.name))
def test_interrupted_it_leaves_nothing_behind(
    number: signal.Signals,
    start: Callable[[], subprocess.Popen[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    base = short(tmp_path_factory)
    with start() as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "primary on alpha" in line:
                break
        assert len(processes_of(base)) == 2
        process.send_signal(number)
        process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert list(base.glob("replicator-demo-*")) == []
    assert processes_of(base) == []


def test_a_process_that_cannot_start_is_said_with_its_last_words(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(short(tmp_path_factory)))
    with pytest.raises(DemoFailed, match="alpha ended with exit code 10"), scene(keep=False) as (alpha, _):
        alpha.start()  # there is no configuration
    assert "alpha: " in capfd.readouterr().err


def test_a_block_with_the_acknowledged_write_is_right() -> None:
    ledger = Ledger()
    ledger.acknowledge(3, 7)
    assert ledger.wrong(reader({3: content(3, 7)})) == []


@pytest.mark.parametrize(
    "found", [bytes(BLOCK), content(3, 6), content(2, 7), content(3, 7)[:-1] + b"\0"], ids=range(4)
)
def test_a_block_with_anything_else_is_wrong(found: bytes) -> None:
    ledger = Ledger()
    ledger.acknowledge(3, 6)
    ledger.acknowledge(3, 7)
    assert ledger.wrong(reader({3: found})) == [3]


def test_a_write_in_doubt_may_be_there_or_not_but_nothing_else() -> None:
    ledger = Ledger(acknowledged={3: 7}, doubtful={3: 9, 4: 10})
    assert ledger.wrong(reader({3: content(3, 7)})) == []
    assert ledger.wrong(reader({3: content(3, 9), 4: content(4, 10)})) == []
    assert ledger.wrong(reader({3: content(3, 8), 4: content(4, 9)})) == [3, 4]


def test_a_block_written_again_is_in_doubt_no_longer() -> None:
    ledger = Ledger(doubtful={3: 9})
    ledger.acknowledge(3, 11)
    assert ledger.wrong(reader({3: content(3, 9)})) == [3]


@pytest.mark.parametrize("at", [0, MIB - 1, MIB, 2 * MIB + 5])
def test_a_difference_of_one_byte_is_found(tmp_path: Path, at: int) -> None:
    size = 2 * MIB + 6
    (tmp_path / "a").write_bytes(bytes(size))
    other = bytearray(size)
    other[at] = 1
    (tmp_path / "b").write_bytes(other)
    assert difference(tmp_path / "a", tmp_path / "b", size) == at
    assert difference(tmp_path / "a", tmp_path / "a", size) is None


def test_files_that_end_too_early_are_not_equal(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(10))
    assert difference(tmp_path / "a", tmp_path / "a", 20) == 10


def test_ports_are_free_and_below_the_ephemeral_range() -> None:
    ports = free_ports(2)
    assert len(set(ports)) == 2
    assert all(20000 <= port < 32768 for port in ports)


def test_a_node_describes_itself_in_the_configuration(tmp_path: Path) -> None:
    node = Node(tmp_path, "alpha", 0, 20001)
    assert 'address = "127.0.0.1:20001"' in node.section()
    assert node.uri.startswith("nbd+unix:///demo%2F0?socket=/")
