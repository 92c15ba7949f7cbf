# SPDX-License-Identifier: Apache-2.0
"""What a user types, and what is said back, without any process of a resource."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from replicator import __version__
from replicator.cli import main, watch
from replicator.cli.local import gi_lines, gi_of_dump
from replicator.cli.parser import VERBS, function_of
from replicator.cli.say import error_text, outcome
from replicator.cli.target import Target, parse
from replicator.errors import ConfigError, NotRunning, Refused, UsageError

CONFIG = """
[net]
security = "clear"
[volume.0]
[volume.1]
[node.alpha]
id = 0
address = "127.0.0.1:7788"
[node.alpha.volume.0]
disk = "{base}/a0"
[node.alpha.volume.1]
disk = "{base}/a1"
metadata = "{base}/m1"
[node.beta]
id = 1
address = "127.0.0.1:7789"
[node.beta.volume.0]
disk = "{base}/b0"
[node.beta.volume.1]
disk = "{base}/b1"
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configured resource r0 with two volumes; this is alpha."""
    for variable, name in (("CONFIG", "etc"), ("RUN", "run"), ("KEY", "keys")):
        monkeypatch.setenv(f"REPLICATOR_{variable}_DIR", str(tmp_path / name))
    monkeypatch.setenv("REPLICATOR_NODE", "alpha")
    (tmp_path / "etc").mkdir()
    path = tmp_path / "etc" / "r0.toml"
    path.write_text(CONFIG.format(base=tmp_path))
    path.chmod(0o644)
    return tmp_path


# -- the command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_its_function(verb: str) -> None:
    assert callable(function_of(verb))


@pytest.mark.parametrize(
    "argv",
    [[], ["dance"], ["up"], ["up", "r0/1"], ["attach", "r0/x"], ["attach", "r0/"],
     ["wait-sync", "r0", "--timeout", "-1"],
     ["wait-sync", "r0", "--timeout", "soon"], ["create-md", "r0", "--size", "tiny"], ["create-md", "r0/7"]],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.usefixtures("home")
def test_wrong_usage_is_exit_code_20_with_a_hint(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 20
    said = capsys.readouterr()
    assert said.out == "" and "hint: " in said.err


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"replicator {__version__}\n"


def test_directories_and_node_on_the_command_line_overrule_the_environment(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = home / "other"
    other.mkdir()
    (other / "r7.toml").write_text(CONFIG.format(base=home))
    (other / "r7.toml").chmod(0o644)
    assert main(["--config-dir", str(other), "--node", "beta", "check"]) == 0
    assert capsys.readouterr().out == "r7: OK\n"


def test_the_parser_imports_nothing_heavy() -> None:
    heavy = (
        "structlog",
        "cryptography",
        "lxml",
        "jinja2",
        "paramiko",
        "ssl",
        "replicator.core",
        "replicator.drivers",
    )
    code = f"""
import sys
from replicator.cli.parser import make_parser, function_of
make_parser().parse_args(["status"])
function_of("status"); function_of("primary"); function_of("up")
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- targets and errors ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("home")
def test_targets_are_resources_volumes_or_all() -> None:
    assert parse("r0", volumes=False) == [Target("r0")]
    assert parse("r0/1", volumes=True) == [Target("r0", 1)]
    assert parse("all", volumes=True) == [Target("r0")]
    with pytest.raises(ConfigError):
        parse("../etc", volumes=True)


def test_all_without_a_resource_is_refused(home: Path) -> None:
    (home / "etc" / "r0.toml").unlink()
    with pytest.raises(UsageError, match="no resource is configured"):
        parse("all", volumes=False)


def test_a_refusal_has_drbds_shape() -> None:
    refused = Refused("no-data", "Need access to UpToDate data", number=-2, hint="connect beta")
    assert error_text("r0", refused) == (
        "r0: State change failed: (-2) Need access to UpToDate data\nhint: connect beta\n"
    )
    assert outcome("r0", refused)["exit-code"] == 17


def test_a_message_that_names_the_resource_does_not_name_it_twice() -> None:
    assert error_text("r0", NotRunning("r0 is not running here")) == "r0 is not running here\n"
    assert error_text("r0", NotRunning("no answer")) == "r0: no answer\n"


def test_every_fault_of_a_configuration_has_its_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "etc" / "r0.toml").write_text("protocol = 7\n[net]\nfoo = 1\n")
    assert main(["check"]) == 10
    said = capsys.readouterr()
    assert "protocol" in said.err and "net.foo" in said.err and "OK" not in said.out


def test_check_finds_missing_keys_when_the_link_is_encrypted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / "etc" / "r0.toml"
    path.write_text(path.read_text().replace('"clear"', '"tls"'))
    assert main(["check", "r0"]) == 10
    assert "replicator keygen" in capsys.readouterr().err


# -- without a process ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("home")
def test_a_resource_that_does_not_run_is_exit_code_10(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["primary", "r0"]) == 10
    assert "hint: replicator up r0" in capsys.readouterr().err
    assert main(["status", "r0"]) == 10
    assert main(["status", "nonsense"]) == 10
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.usefixtures("home")
def test_status_of_everything_names_what_does_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "r0 not running\n    do: replicator up r0\n\n"
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_status_without_any_resource_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "etc" / "r0.toml").unlink()
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "# No currently configured resource found.\n"


@pytest.mark.usefixtures("home")
def test_down_of_what_does_not_run_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["down", "all"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("home")
def test_with_json_the_outcome_of_each_target_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["connect", "r0", "--json"]) == 10
    said = capsys.readouterr()
    assert said.err == ""
    assert [(one["name"], one["ok"], one["exit-code"]) for one in json.loads(said.out)] == [("r0", False, 10)]


# -- metadata ---------------------------------------------------------------------------------------


@pytest.fixture
def disks(home: Path) -> Path:
    """Metadata for both volumes, on files the command made."""
    path = home / "etc" / "r0.toml"
    path.write_text('[disk]\nio = "buffered"\n' + path.read_text())
    assert main(["create-md", "r0", "--size", "8MiB"]) == 0
    return home


def test_create_md_makes_files_and_gives_all_volumes_one_resource_id(
    disks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert os.path.getsize(disks / "a0") == 8 << 20
    capsys.readouterr()
    assert main(["dump-md", "r0"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["resource_id"] == second["resource_id"] != "00" * 16
    assert (first["place"], second["place"]) == ("internal", "external")
    assert main(["create-md", "r0/1", "--force"]) == 0
    capsys.readouterr()
    assert main(["dump-md", "r0/1"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["resource_id"] == first["resource_id"]


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["plain", "forced"])
def test_create_md_completes_the_empty_files_that_a_crash_in_it_leaves(home: Path, force: list[str]) -> None:
    path = home / "etc" / "r0.toml"
    path.write_text('[disk]\nio = "buffered"\n' + path.read_text())
    for name in ("a0", "a1", "m1"):
        (home / name).touch()
    assert main(["create-md", "r0", "--size", "8MiB", *force]) == 0
    assert os.path.getsize(home / "a0") == os.path.getsize(home / "a1") == 8 << 20
    assert os.stat(home / "m1").st_blocks * 512 >= os.path.getsize(home / "m1") > 0, "its space is allocated"
    assert main(["dump-md", "r0"]) == 0


@pytest.mark.parametrize("linked", [False, True], ids=["something", "link"])
def test_create_md_gives_no_size_to_what_holds_something_or_is_no_file(home: Path, *, linked: bool) -> None:
    (home / "a1").write_bytes(bytes(8 << 20))
    (home / "elsewhere").touch()
    if linked:
        (home / "m1").symlink_to(home / "elsewhere")
    else:
        (home / "m1").write_bytes(b"x")
    assert main(["create-md", "r0/1", "--size", "8MiB", "--force"]) == 10
    assert (home / "elsewhere").read_bytes() == b"" and (linked or (home / "m1").read_bytes() == b"x")


@pytest.mark.usefixtures("disks")
def test_create_md_refuses_to_overwrite(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["create-md", "r0"]) == 11
    assert "--force" in capsys.readouterr().err


@pytest.mark.usefixtures("disks")
def test_show_gi_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["show-gi", "r0/0"]) == 0
    shown = capsys.readouterr().out
    assert "current: 0000000000000004" in shown and "peer beta (node id 1)" in shown
    assert "0 Consistent      the data is of one moment" in shown


def test_show_gi_looks_alike_from_disk_and_from_the_process() -> None:
    dumped = {
        "volume": 0, "resource_id": "ab" * 16, "current": "00000000000000aa",
        "history": ["00000000000000bb", "0" * 16],
        "size_bytes": 4096,
        "flags": {"consistent": True, "was_up_to_date": False, "primary_indicator": True,
                  "crashed_primary": False},
        "peers": [{"node_id": 1, "bitmap_id": "00000000000000cc", "full_sync": True, "outdated": False,
                   "survivor": False, "dirty_blocks": 3}],
    }  # fmt: skip
    lines = gi_lines("r0/0", gi_of_dump(dumped), {1: "beta"})
    assert lines[0] == f"r0/0 size:4 KiB resource-id:{'ab' * 16}"
    assert "  history: 00000000000000bb   generations before it" in lines
    assert not any("0" * 16 in line for line in lines)
    assert "    bitmap:  00000000000000cc   the peer lacks writes since" in lines
    assert "    1 FullSync        every block has to be copied" in lines


# -- waits ---------------------------------------------------------------------------------------


def seen(state: str = "Connected", replication: str = "Established", **peer: Any) -> dict[str, Any]:
    disk = peer.pop("disk", "UpToDate")
    return {
        "devices": [{"volume": 0, "disk-state": disk}],
        "connections": [
            {
                "name": "beta",
                "connection-state": state,
                "reason": "split brain",
                "peer_devices": [
                    {"volume": 0, "replication-state": replication, "peer-disk-state": "UpToDate", **peer}
                ],
            }
        ],
    }


def test_a_wait_for_the_connection_ends_when_every_peer_is_there() -> None:
    assert watch.connected(seen()) == ""
    assert watch.connected(seen("Connecting")) is None
    assert watch.connected(seen("StandAlone")) == "the connection to beta is StandAlone: split brain"


def test_a_wait_for_the_sync_goes_on_while_there_is_a_resync() -> None:
    assert watch.synced(seen()) == ""
    assert watch.synced(seen("Connecting")) is None
    assert watch.synced(seen(replication="SyncTarget", disk="Inconsistent")) is None
    assert watch.synced(seen(replication="Off")) is None


def test_a_wait_for_the_sync_of_two_worthless_copies_is_in_vain() -> None:
    verdict = watch.synced(seen(replication="Off", disk="Inconsistent", **{"peer-disk-state": "Inconsistent"}))
    assert verdict is not None and "nothing to sync" in verdict


def test_the_amount_of_a_resync_is_what_was_and_is_out_of_sync() -> None:
    details: dict[str, Any] = {"has-sync-details": True, "rs-total": 100, "out-of-sync": 25}
    syncing = seen(replication="SyncSource", **details)
    assert watch.amount(syncing) == (75 * 1024, 100 * 1024)
    assert watch.amount(seen()) == (0, 0)
