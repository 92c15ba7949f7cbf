# SPDX-License-Identifier: Apache-2.0
"""A file system on the mirror, through the real processes and a real /dev node (nbdfuse and a loop device).

The node carries the resource's name in /dev/replicated, which belongs to the whole machine: so the resource of
this test has a name of its own.  Whatever happens, mounts and loop devices are given back.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from replicator.control.client import call
from replicator.drivers.fuse_loop import TOOLS, find_tool
from replicator.drivers.node import DEV_DIR
from tests.integration.cluster import GIVE_UP_S, MIB, NODES, TwoNodes, synced

pytestmark = pytest.mark.root

LINK = DEV_DIR / "r0" / "0"
TOOL_S = 60


def require_machine() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if not Path("/dev/fuse").is_char_device():
        pytest.skip("no /dev/fuse")
    if not Path("/dev/loop-control").is_char_device():
        pytest.skip("no loop devices")
    for tool in (*TOOLS, "mkfs.ext4", "mount"):
        if find_tool(tool) is None:
            pytest.skip(f"needs {tool}")
    if os.path.lexists(LINK):
        pytest.skip(f"needs {LINK}, which is in use on this machine")


def run(*command: str | Path, check: bool = True) -> str:
    tool = find_tool(str(command[0]))
    assert tool is not None, command[0]
    done = subprocess.run([tool, *command[1:]], capture_output=True, text=True, timeout=TOOL_S, check=False)
    assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def mounts_below(directory: Path) -> list[str]:
    """Mount points in a directory, the innermost first."""
    points = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted((point for point in points if point.startswith(f"{directory}/")), reverse=True)


def loops_below(directory: Path) -> list[str]:
    files = Path("/sys/block").glob("loop*/loop/backing_file")
    return [f"/dev/{file.parts[3]}" for file in files if file.read_text().startswith(f"{directory}/")]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[TwoNodes]:
    require_machine()
    with TwoNodes(tmp_path, size_bytes=48 * MIB, net='ping-interval = "60s"\nko-count = 255') as pair:
        for node in NODES:
            path = pair.config_dir(node) / "r0.toml"
            text = path.read_text()
            assert 'kind = "none"' in text
            path.write_text(text.replace('kind = "none"', 'kind = "fuse"'))
        runs = pair.run_dir(NODES[0]).parent.resolve()
        try:
            pair.create_md()
            pair.start_both()
            pair.cli("alpha", "new-current-uuid", "--clear-bitmap", "r0", check=True)
            for node in NODES:
                pair.wait(node, synced)
            yield pair
        finally:
            for point in mounts_below(tmp_path):
                run("umount", point, check=False)
            for node in list(pair.processes):
                with suppress(subprocess.TimeoutExpired):
                    pair.cli(node, "down", "r0", "--force")
            for node in list(pair.processes):
                pair.kill(node)
            for loop in loops_below(runs):
                run("losetup", "--detach", loop, check=False)
            for point in mounts_below(runs):
                run("umount", "--lazy", point, check=False)
        assert loops_below(runs) == [] and mounts_below(runs) == []
        assert not os.path.lexists(LINK)


def test_a_file_system_moves_from_node_to_node(nodes: TwoNodes, tmp_path: Path) -> None:
    where = tmp_path / "mnt"
    where.mkdir()
    content = os.urandom(3 * MIB)

    nodes.cli("alpha", "primary", "r0", check=True)
    # `primary` is answered when the node is there: the next line of a script may use it.
    assert LINK.is_symlink() and LINK.is_block_device()
    device = nodes.status("alpha")["devices"][0]
    assert device["device-kind"] == "fuse" and device["device"] == str(LINK.resolve())
    run("mkfs.ext4", "-q", "-E", "nodiscard", LINK)
    run("mount", LINK, where)
    (where / "directory").mkdir()
    with (where / "directory" / "file").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())

    refused = nodes.cli("alpha", "secondary", "r0")
    assert refused.returncode == 11
    assert "(-12) Device is held open by someone" in refused.stderr
    assert str(where) in refused.stderr and "umount" in refused.stderr
    assert nodes.status("alpha")["role"] == "Primary"
    (where / "after").write_text("a refused demotion takes nothing away")
    run("umount", where)
    nodes.cli("alpha", "secondary", "r0", check=True)
    assert not os.path.lexists(LINK)

    nodes.cli("beta", "primary", "r0", check=True)
    run("mount", LINK, where)
    assert (where / "directory" / "file").read_bytes() == content
    assert (where / "after").read_text() == "a refused demotion takes nothing away"
    run("umount", where)
    assert "clean" in run("fsck.ext4", "-n", LINK)
    nodes.cli("beta", "secondary", "r0", check=True)
    for node in ("beta", "alpha"):
        call(nodes.control(node), "down", timeout_s=GIVE_UP_S)
        assert nodes.ended(node) == 0
    size = 40 * MIB
    assert nodes.data("alpha", size) == nodes.data("beta", size)


def test_a_process_that_holds_the_node_open_is_named(nodes: TwoNodes) -> None:
    nodes.cli("alpha", "primary", "r0", check=True)
    with LINK.open("rb"):
        refused = nodes.cli("alpha", "secondary", "r0")
    assert refused.returncode == 11 and f"{os.getpid()}" in refused.stderr, refused.stderr
    nodes.cli("alpha", "secondary", "r0", check=True)


def test_the_file_system_of_a_killed_primary_is_mounted_by_the_survivor(nodes: TwoNodes, tmp_path: Path) -> None:
    where = tmp_path / "mnt"
    where.mkdir()
    nodes.cli("alpha", "primary", "r0", check=True)
    run("mkfs.ext4", "-q", "-E", "nodiscard", LINK)
    run("mount", LINK, where)
    with (where / "file").open("wb") as file:
        file.write(b"promised" * 100_000)
        file.flush()
        os.fsync(file.fileno())
    nodes.kill("alpha")
    run("umount", "--lazy", where)
    nodes.wait("beta", lambda status: status["connections"][0]["connection-state"] != "Connected")
    nodes.cli("beta", "primary", "r0", check=True)
    run("mount", LINK, where)  # the journal is replayed
    assert (where / "file").read_bytes() == b"promised" * 100_000
    run("umount", where)
    nodes.cli("beta", "secondary", "r0", check=True)
