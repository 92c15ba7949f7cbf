# SPDX-License-Identifier: Apache-2.0
"""Status and events keep drbdsetup's shape, because scripts and eyes are trained on it."""

from __future__ import annotations

import copy
import json
from typing import Any

from replicator.control.render import event_lines, initial_events, status_json, status_text


def healthy() -> dict[str, Any]:
    return {
        "name": "r0",
        "node-id": 0,
        "node-name": "alpha",
        "role": "Primary",
        "suspended": False,
        "write-ordering": "flush",
        "promotion-score": 10102,
        "may-promote": False,
        "reasons": [],
        "devices": [
            {
                "volume": 0,
                "minor": None,
                "disk-state": "UpToDate",
                "open": False,
                "openers": [],
                "size": 65496,
                "read": 18956,
                "written": 0,
                "al-writes": 8,
                "bm-writes": 0,
                "upper-pending": 0,
                "lower-pending": 0,
            }
        ],
        "connections": [
            {
                "peer-node-id": 1,
                "name": "beta",
                "connection-state": "Connected",
                "peer-role": "Secondary",
                "tls": True,
                "congested": False,
                "ap-in-flight": 0,
                "rs-in-flight": 0,
                "peer_devices": [
                    {
                        "volume": 0,
                        "replication-state": "Established",
                        "peer-disk-state": "UpToDate",
                        "resync-suspended": "no",
                        "out-of-sync": 0,
                        "percent-in-sync": 100.0,
                        "received": 0,
                        "sent": 7,
                        "pending": 0,
                        "unacked": 0,
                        "has-sync-details": False,
                    }
                ],
            }
        ],
    }


def syncing() -> dict[str, Any]:
    status = healthy()
    status["connections"][0]["peer_devices"][0] |= {
        "replication-state": "SyncSource",
        "peer-disk-state": "Inconsistent",
        "out-of-sync": 46540,
        "has-sync-details": True,
        "percent-resync-done": 28.94,
        "db/dt [MiB/s]": 110.5,
        "sync-kind": "bitmap",
        "estimated-seconds-to-finish": 12,
    }
    return status


def cut_off() -> dict[str, Any]:
    status = healthy()
    status["connections"][0] |= {"connection-state": "StandAlone", "peer-role": "Unknown"}
    status["reasons"] = [
        {
            "code": "split-brain",
            "text": "both nodes wrote alone",
            "do": "replicator connect",
            "scope": "connection beta",
        },
        {"code": "fenced", "text": "odd \x1b[31m text", "do": "", "scope": "volume 0"},
        {"code": "other", "text": "of no known place", "do": "look", "scope": "path 9"},
    ]
    return status


def test_a_healthy_resource_takes_four_lines() -> None:
    assert status_text([healthy()]) == (
        "r0 role:Primary\n  disk:UpToDate open:no\n  beta role:Secondary\n    peer-disk:UpToDate\n\n"
    )


def test_a_resync_shows_its_state_and_progress() -> None:
    assert "    replication:SyncSource peer-disk:Inconsistent done:28.94\n" in status_text([syncing()])


def test_unfinished_never_reads_one_hundred() -> None:
    status = syncing()
    status["connections"][0]["peer_devices"][0]["percent-resync-done"] = 99.9999
    assert "done:99.99\n" in status_text([status])


def test_every_abnormal_state_says_why_and_what_to_do_at_its_place() -> None:
    assert status_text([cut_off()]).splitlines() == [
        "r0 role:Primary",
        "    why: of no known place",
        "    do: look",
        "  disk:UpToDate open:no",
        "      why: odd \\x1b[31m text",
        "  beta connection:StandAlone",
        "      why: both nodes wrote alone",
        "      do: replicator connect",
        "",
    ]


def test_verbose_with_statistics_is_wrapped_like_drbdsetup() -> None:
    assert status_text([syncing()], verbose=True, statistics=True).splitlines() == [
        "r0 node-id:0 role:Primary suspended:no",
        "    write-ordering:flush",
        "  volume:0 disk:UpToDate open:no",
        "      size:65496 read:18956 written:0 al-writes:8 bm-writes:0 upper-pending:0",
        "      lower-pending:0",
        "  beta node-id:1 connection:Connected role:Secondary congested:no tls:yes",
        "      ap-in-flight:0 rs-in-flight:0",
        "    volume:0 replication:SyncSource peer-disk:Inconsistent done:28.94",
        "        resync-suspended:no",
        "        received:0 sent:7 out-of-sync:46540 pending:0 unacked:0",
        "        sync:bitmap dbdt:110.5 eta:12",
        "",
    ]


def test_several_volumes_are_numbered_and_openers_are_named() -> None:
    status = healthy()
    status["devices"].append(status["devices"][0] | {"volume": 1, "open": True, "openers": ["pid 7 qemu"]})
    assert "  volume:0 disk:UpToDate open:no\n  volume:1 disk:UpToDate open:yes\n" in status_text([status])
    assert "      open-by:pid 7 qemu\n" in status_text([status], verbose=True)


def test_colours_appear_only_when_asked_for() -> None:
    assert "\x1b" not in status_text([cut_off()], verbose=True, statistics=True)
    coloured = status_text([healthy()], colour=True)
    assert "role:\x1b[1;36mPrimary\x1b[0m" in coloured
    assert "disk:\x1b[1;32mUpToDate\x1b[0m" in coloured


def test_colours_do_not_move_the_line_breaks() -> None:
    coloured = status_text([syncing()], verbose=True, statistics=True, colour=True)
    plain = status_text([syncing()], verbose=True, statistics=True)
    assert len(coloured.splitlines()) == len(plain.splitlines())


def test_nothing_configured_is_said() -> None:
    assert status_text([]) == "# No currently configured resource found.\n"


def test_a_status_from_another_version_is_still_shown() -> None:
    assert status_text([{"name": "r0"}]) == "r0 role:unknown\n\n"
    assert status_text([{"name": "r0", "devices": [{}], "connections": [{}, 3]}], verbose=True, statistics=True)


def test_json_is_the_array_as_it_is() -> None:
    assert json.loads(status_json([healthy()])) == [healthy()]


def test_events_begin_with_everything_that_exists() -> None:
    assert initial_events([syncing()]) == [
        "exists resource name:r0 role:Primary suspended:no may_promote:no promotion_score:10102",
        "exists connection name:r0 peer-node-id:1 conn-name:beta connection:Connected role:Secondary",
        "exists device name:r0 volume:0 disk:UpToDate open:no",
        "exists peer-device name:r0 peer-node-id:1 conn-name:beta volume:0 replication:SyncSource"
        " peer-disk:Inconsistent resync-suspended:no done:28.94",
        "exists -",
    ]


def test_a_change_names_only_what_changed() -> None:
    assert event_lines(healthy(), healthy()) == []
    assert event_lines(syncing(), healthy()) == [
        "change peer-device name:r0 peer-node-id:1 conn-name:beta volume:0 replication:Established peer-disk:UpToDate"
    ]
    after = copy.deepcopy(healthy())
    after["role"] = "Secondary"
    assert event_lines(healthy(), after, diff=True) == ["change resource name:r0 role:Primary->Secondary"]


def test_statistics_are_events_only_when_asked_for() -> None:
    after = copy.deepcopy(healthy())
    after["devices"][0]["written"] = 4
    assert event_lines(healthy(), after) == []
    assert event_lines(healthy(), after, statistics=True) == ["change device name:r0 volume:0 written:4"]


def test_objects_come_outside_in_and_go_inside_out() -> None:
    kinds = ["resource", "connection", "device", "peer-device"]
    assert [line.split()[:2] for line in event_lines(None, healthy())] == [["create", kind] for kind in kinds]
    gone = event_lines(healthy(), None)
    assert [line.split()[:2] for line in gone] == [["destroy", kind] for kind in reversed(kinds)]
    assert gone[0] == "destroy peer-device name:r0 peer-node-id:1 conn-name:beta volume:0"


def test_a_minor_number_is_shown_to_those_who_want_all() -> None:
    status = healthy()
    status["devices"][0]["minor"] = 7
    assert "minor:7" not in status_text([status])
    assert "  volume:0 minor:7 disk:UpToDate open:no\n" in status_text([status], verbose=True)


def test_progress_is_an_event_while_it_lasts() -> None:
    after = copy.deepcopy(syncing())
    after["connections"][0]["peer_devices"][0]["percent-resync-done"] = 50.0
    assert event_lines(syncing(), after, diff=True) == [
        "change peer-device name:r0 peer-node-id:1 conn-name:beta volume:0 done:28.94->50.00"
    ]


def test_progress_that_is_no_number_is_unknown() -> None:
    status = syncing()
    for odd in (None, True, "most"):
        status["connections"][0]["peer_devices"][0]["percent-resync-done"] = odd
        assert " done:unknown\n" in status_text([status])
