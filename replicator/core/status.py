# SPDX-License-Identifier: Apache-2.0
"""What operators see: the state of a resource as plain data, and for every abnormal state why it is so and what to do.

Keys are DRBD's JSON names (`drbdsetup status --json`) so that existing tools work; sizes are KiB.  `reasons` is ours:
one entry per thing that is not as it should be, with a stable code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from replicator.core.connection import BY_OPERATOR
from replicator.core.generations import EXPOSED_RULE, Outcome
from replicator.core.promotion import promotion_refusal, promotion_score
from replicator.core.resync import SyncTarget
from replicator.core.states import Connection as State
from replicator.core.states import Disk, Replication

if TYPE_CHECKING:
    from replicator.core.connection import Connection
    from replicator.core.replica import Replica
    from replicator.core.resource import Resource
    from replicator.core.volume import Volume

_BLOCK_KIB = 4
_SPLIT = ("split brain", "unrelated data")
_OLDER = f"{Outcome.CONFLICT.value} ("  # a would-be target that is Primary (`generations._checked`) ...
_SIZES = ("disk-too-small", "size-differs")  # ... and not a matter of sizes (`Replica._size_fault`)


def status(resource: Resource) -> dict[str, object]:
    """The whole state of a resource."""
    options = resource.options
    volumes = list(resource.volumes.values())
    volume_facts, peer_facts = resource.roles.facts()
    refusal = promotion_refusal(volume_facts, peer_facts, fencing=options.fencing, force=False)
    return {
        "name": options.resource,
        "node-id": options.node_id,
        "node-name": options.node_name,
        "role": resource.roles.role.value,
        "suspended": any(volume.path.frozen for volume in volumes),
        "write-ordering": "flush",
        "protocol": options.protocol,
        "promotion-score": promotion_score(
            [volume.disk for volume in volumes],
            peers_known=all(
                c.connected or resource.roles.known_outdated(c.peer) for c in resource.connections.values()
            ),
            peer_has_good_data=all(facts.peer_has_good_data for facts in volume_facts),
        ),
        "may-promote": refusal is None and resource.settled and not resource.roles.busy,
        "devices": [_device(resource, volume) for volume in volumes],
        "connections": [_connection(resource, connection) for connection in resource.connections.values()],
        "reasons": reasons(resource),
    }


def _device(resource: Resource, volume: Volume) -> dict[str, object]:
    openers = resource.openers(volume.number)
    return {
        "volume": volume.number,
        "minor": None,
        "disk-state": volume.disk.word,
        "open": bool(openers),
        "openers": openers,
        "size": volume.size // 1024,
        "read": volume.read_bytes // 1024,
        "written": volume.written_bytes // 1024,
        "al-writes": volume.log_writes,
        "bm-writes": volume.bitmap_writes,
        "upper-pending": volume.path.in_flight,
        "lower-pending": 0,
    }


def _connection(resource: Resource, connection: Connection) -> dict[str, object]:
    return {
        "peer-node-id": connection.peer,
        "name": connection.name,
        "connection-state": connection.state.value,
        "peer-role": connection.role.value if connection.role is not None else "Unknown",
        "congested": False,
        "ap-in-flight": connection.unwritten_bytes // 1024,
        "rs-in-flight": 0,
        "reason": connection.reason,
        "peer_devices": [
            _peer_device(resource, volume, volume.replicas[connection.peer]) for volume in resource.volumes.values()
        ],
    }


def _peer_device(resource: Resource, volume: Volume, replica: Replica) -> dict[str, object]:
    dirty = volume.dirty_count(replica.peer)
    blocks = max(1, volume.blocks)
    paused = [
        word for word, flag in (("user", replica.steps.paused_here), ("peer", replica.steps.paused_there)) if flag
    ]
    entry: dict[str, object] = {
        "volume": volume.number,
        "replication-state": replica.replication.value,
        "peer-disk-state": replica.disk.word,
        "resync-suspended": ",".join(paused) or "no",
        "received": replica.received_bytes // 1024,
        "sent": replica.sent_bytes // 1024,
        "out-of-sync": dirty * _BLOCK_KIB,
        "pending": 0,
        "unacked": 0,
        "percent-in-sync": round(100 * (1 - dirty / blocks), 2),
        "has-sync-details": replica.steps.sync is not None,
    }
    if replica.steps.sync is not None:
        entry |= _progress(resource, replica, dirty)
    return entry


def _progress(resource: Resource, replica: Replica, dirty: int) -> dict[str, object]:
    sync = replica.steps.sync
    assert sync is not None
    total = max(sync.total, dirty, 1)
    done = total - dirty
    elapsed_ns = max(1, resource.context.now - sync.since)
    rate = done * 4096 * 1_000_000_000 / elapsed_ns  # bytes per second
    same = sync.same_blocks if isinstance(sync, SyncTarget) else 0
    full = isinstance(sync, SyncTarget) and sync.full
    return {
        "sync-kind": "checksum" if same else "full" if full else "bitmap",
        "rs-total": total * _BLOCK_KIB,
        "rs-same-csum": same * _BLOCK_KIB,
        "percent-resync-done": round(100 * done / total, 2),
        "db/dt [MiB/s]": round(rate / (1 << 20), 2),
        "estimated-seconds-to-finish": round(dirty * 4096 / rate) if done and elapsed_ns > 500_000_000 else None,
    }


def reasons(resource: Resource) -> list[dict[str, str]]:
    """Everything that is not as it should be: code, sentence, what to do, where."""
    found: list[dict[str, str]] = []
    for volume in resource.volumes.values():
        found += _disk_reasons(resource, volume)
    for connection in resource.connections.values():
        found += _connection_reasons(resource, connection)
    return found


def _entry(scope: str, code: str, text: str, do: str) -> dict[str, str]:
    return {"scope": scope, "code": code, "text": text, "do": do}


def _disk_reasons(resource: Resource, volume: Volume) -> list[dict[str, str]]:
    name, scope = resource.options.resource, f"volume {volume.number}"
    synced = any(replica.steps.sync is not None or replica.deciding for replica in volume.replicas.values())
    if volume.disk in (Disk.DISKLESS, Disk.FAILED):
        why = volume.error or "it was detached or never attached"
        return [
            _entry(
                scope,
                "diskless",
                f"the local disk is not in use: {why}",
                f"replicator attach {name}/{volume.number}",
            )
        ]
    if volume.disk is Disk.INCONSISTENT and not synced:
        if resource.provisional() and not any(r.link is not None for r in volume.replicas.values()):
            text = "this copy is new and holds no data yet"
            do = f"connect the peer: replicator up {name} there; then say which data counts (status tells how)"
        elif all(r.decision is not None and r.decision.rule == "just-created-both" for r in volume.replicas.values()):
            text = "both copies are new and nobody said which data counts"
            do = (
                f"on the node with the data: replicator primary --force {name}; "
                f"if both disks are blank: replicator new-current-uuid --clear-bitmap {name}/{volume.number}"
            )
        else:
            text = "the copy into this disk is unfinished and the peer with the good copy is not connected"
            do = f"bring the peer back; a last resort is replicator primary --force {name}"
        return [_entry(scope, "inconsistent", text, do)]
    if volume.disk is Disk.OUTDATED and not synced:
        return [
            _entry(
                scope,
                "outdated",
                "the peer went on without this copy",
                f"replicator connect {name}, and wait for the resync",
            )
        ]
    if volume.disk is Disk.CONSISTENT and not synced:
        return [
            _entry(
                scope,
                "peer-unknown",
                "this copy is of one moment, but whether the peer is newer is not known",
                f"replicator connect {name}; or fence the peer",
            )
        ]
    return []


def _standalone_reason(resource: Resource, connection: Connection) -> dict[str, str]:
    name, scope = resource.options.resource, f"connection {connection.name}"
    why = connection.reason or "nobody asked for a connection"
    text = f"no connection is tried: {why}"
    if any(word in why for word in _SPLIT):
        do = (
            f"decide whose data counts; on the OTHER node: replicator down {name}, "
            f"replicator create-md --force {name}, replicator up {name}; "
            f"then on both: replicator connect {name}"
        )
        return _entry(scope, "split-brain", f"the two copies went different ways: {why}", do)
    if EXPOSED_RULE in why:
        do = (
            f"on the node that is Primary: replicator attach {name} if its own disk is whole; if not, stop its "
            f"clients and make it Secondary: replicator secondary {name}; then on both: replicator connect {name}"
        )
        return _entry(scope, EXPOSED_RULE, text, do)
    if _OLDER in why and not any(word in why for word in _SIZES):
        do = (
            f"the Primary has the older copy, and would be overwritten under its clients: stop them, make it Secondary "
            f"(replicator secondary {name}), then on both: replicator connect {name}; it copies what it lacks"
        )
        return _entry(scope, "older-copy-is-primary", text, do)
    if why in (BY_OPERATOR, "nobody asked for a connection"):
        return _entry(scope, "standalone", text, f"replicator connect {name}")
    return _entry(scope, "standalone", text, f"mend that, then replicator connect {name}")


def _connection_reasons(resource: Resource, connection: Connection) -> list[dict[str, str]]:
    name, scope = resource.options.resource, f"connection {connection.name}"
    if connection.state is State.STANDALONE:
        return [_standalone_reason(resource, connection)]
    if connection.state is not State.CONNECTED:
        why = connection.reason or "the peer has not answered yet"
        return [
            _entry(
                scope,
                "not-connected",
                f"{connection.name} is not connected: {why}",
                f"see that {name} is up on {connection.name} and that the network between the nodes works",
            )
        ]
    found = []
    for volume in resource.volumes.values():
        replica = volume.replicas[connection.peer]
        where = f"{scope} volume {volume.number}"
        if replica.disk in (Disk.DISKLESS, Disk.FAILED):
            found.append(
                _entry(
                    where,
                    "peer-diskless",
                    f"{connection.name} has no disk",
                    f"on {connection.name}: replicator attach {name}",
                )
            )
        elif replica.replication in (Replication.PAUSED_SYNC_S, Replication.PAUSED_SYNC_T):
            on = resource.options.node_name if replica.steps.paused_here else connection.name
            found.append(
                _entry(
                    where,
                    "paused",
                    f"the resync is paused on {on}",
                    f"on {on}: replicator resume-sync {name}",
                )
            )
    return found


def gi(resource: Resource) -> dict[str, object]:
    """Generation ids and flags of every volume with a disk (show-gi)."""
    result: dict[str, object] = {"name": resource.options.resource, "volumes": []}
    volumes: list[dict[str, object]] = []
    for volume in resource.volumes.values():
        if volume.attached is None:
            continue
        found = volume.ledger.durable
        volumes.append(
            {
                "volume": volume.number,
                "resource-id": found.resource_id.hex(),
                "current": f"{found.current:016x}",
                "history": [f"{old:016x}" for old in found.history],
                "consistent": found.consistent,
                "was-up-to-date": found.was_up_to_date,
                "primary-indicator": found.primary_indicator,
                "crashed-primary": found.crashed_primary,
                "size": found.size_bytes // 1024,
                "peers": [
                    {
                        "node-id": slot.node_id,
                        "bitmap": f"{slot.bitmap_id:016x}",
                        "full-sync": slot.full_sync,
                        "outdated": slot.outdated,
                        "survivor": slot.survivor,
                        "dirty-blocks": volume.dirty_count(slot.node_id),
                    }
                    for slot in found.peers
                    if slot.node_id in resource.options.peers
                ],
            }
        )
    result["volumes"] = volumes
    return result
