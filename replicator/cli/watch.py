# SPDX-License-Identifier: Apache-2.0
"""What a resource does: status, events, and waits.

Waits follow the event stream: nothing is polled, and the end is seen within a tenth of a second.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from replicator import config
from replicator.cli import target as targets
from replicator.cli.say import complain
from replicator.cli.target import Target
from replicator.control import client, render
from replicator.errors import NotRunning, ReplicatorError

Status = Mapping[str, Any]
#: None: go on waiting; "": it is so; a sentence: it will never be so.
Verdict = str | None


class TimedOut(ReplicatorError):
    """A wait was not over in time (exit code 5)."""

    exit_code = 5


def status(args: Namespace) -> int:
    """The state of one resource or of all."""
    found: list[render.Status] = []
    absent: list[str] = []
    code = 0
    chosen = targets.parse(args.target, volumes=False) if args.target and args.target != "all" else None
    for one in chosen if chosen is not None else [Target(name) for name in config.resource_names()]:
        try:
            found.append(client.call(one.socket, "status"))
        except NotRunning as error:
            if chosen is not None:
                targets.load(one)  # a resource that is not configured is another error
                complain(one.resource, error)
            code = 10 if chosen is not None else code
            absent.append(one.resource)
        except ReplicatorError as error:
            complain(one.resource, error)
            code = code or error.exit_code
    if args.json:
        sys.stdout.write(render.status_json(found))
    elif found or not absent:
        colour = sys.stdout.isatty()
        sys.stdout.write(render.status_text(found, verbose=args.verbose, statistics=args.statistics, colour=colour))
    if not args.json and chosen is None:
        for name in absent:
            print(f"{name} not running\n    do: replicator up {name}\n")
    return code


def events(args: Namespace) -> int:
    """The present state, then changes as they happen, of one resource or of all that run."""
    named = bool(args.target) and args.target != "all"
    found = targets.parse(args.target, volumes=False) if named else [Target(n) for n in config.resource_names()]
    failed: list[ReplicatorError] = []
    lock = threading.Lock()

    def follow(one: Target) -> None:
        try:
            _follow(one, args, lock)
        except NotRunning as error:
            if named:
                failed.append(error)
        except ReplicatorError as error:
            failed.append(error)

    threads = [threading.Thread(target=follow, args=(one,), daemon=True) for one in found[1:]]
    for thread in threads:
        thread.start()
    if found:
        follow(found[0])
    for thread in threads:
        thread.join()
    for error in failed:
        complain("replicator", error)
    return failed[0].exit_code if failed else 0


def _follow(one: Target, args: Namespace, lock: threading.Lock) -> None:
    wish = {"statistics": args.statistics, "diff": args.diff, "status": args.json}
    for message in client.stream(one.socket, "events", wish):
        with lock:
            if args.json:
                print(json.dumps(message.get("status")), flush=True)
            else:
                for line in _lines(message):
                    print(line, flush=True)
        if args.now:
            return


def _lines(message: Mapping[str, object]) -> list[str]:
    lines = message.get("lines")
    return [str(line) for line in lines] if isinstance(lines, list) else []


# -- waits ----------------------------------------------------------------------------------------------


def wait_connect(args: Namespace) -> int:
    """Until every peer is connected."""
    return _wait(args, connected, show=False)


def wait_sync(args: Namespace) -> int:
    """Until every peer is connected and no resync is left."""
    return _wait(args, synced, show=not args.json)


def connected(status: Status) -> Verdict:
    """Whether every peer is connected."""
    for connection in status["connections"]:
        state = connection["connection-state"]
        if state == "StandAlone":
            why = f": {connection['reason']}" if connection.get("reason") else ""
            return f"the connection to {connection['name']} is StandAlone{why}"
        if state != "Connected":
            return None
    return ""


def synced(status: Status) -> Verdict:
    """Whether every peer is connected and holds what we hold."""
    verdict = connected(status)
    if verdict != "":
        return verdict
    disks = {device["volume"]: device["disk-state"] for device in status["devices"]}
    done = True
    for connection in status["connections"]:
        for peer in connection["peer_devices"]:
            copies = {disks.get(peer["volume"]), peer["peer-disk-state"]}
            if peer["replication-state"] == "Off" and copies == {"Inconsistent"}:
                number = peer["volume"]
                return f"neither copy of volume {number} holds good data, so there is nothing to sync"
            done = done and peer["replication-state"] == "Established"
    return "" if done else None


def statuses(one: Target, timeout_s: float | None) -> Iterator[Status]:
    """The status as it changes; raises TimedOut, and NotRunning when the process ends."""
    try:
        for message in client.stream(one.socket, "events", {"status": True}, timeout_s):
            found = message.get("status")
            if isinstance(found, dict):
                yield found
    except NotRunning as error:
        if isinstance(error.__cause__, TimeoutError | BlockingIOError):
            raise TimedOut(f"not so within {timeout_s:g} s", hint=f"replicator status {one}") from error
        raise
    raise NotRunning(f"{one} went down", hint=f"replicator up {one}")


def wait(one: Target, verdict: Callable[[Status], Verdict], timeout_s: float | None, show: bool) -> None:
    """Follow one resource until `verdict` is there; raises TimedOut, also for what will never be."""
    columns = shutil.get_terminal_size().columns if sys.stderr.isatty() else 0
    progress: Any = None
    total = 0
    try:
        # A look that takes no time at all is still a look.
        for found in statuses(one, None if timeout_s is None else max(timeout_s, 1.0)):
            answer = verdict(found)
            if answer == "":
                if progress is not None:
                    progress.update(total, total)
                return
            if answer is not None:
                raise TimedOut(answer, hint=f"replicator status {one}")
            if timeout_s == 0:
                raise TimedOut("not so at the moment", hint=f"replicator status {one}")
            done, now_total = amount(found)
            total = now_total or total
            if show and now_total:
                if progress is None:
                    from replicator.control.progress import ProgressPrinter

                    progress = ProgressPrinter(str(one), _write_stderr, time.monotonic, columns)
                progress.update(done, total)
    finally:
        if progress is not None:
            progress.finish()


def amount(status: Status) -> tuple[int, int]:
    """Bytes of all running resyncs: done, and in all."""
    done = total = 0
    for connection in status["connections"]:
        for peer in connection["peer_devices"]:
            if peer.get("has-sync-details"):
                total += peer["rs-total"] * 1024
                done += max(0, peer["rs-total"] - peer["out-of-sync"]) * 1024
    return done, total


def _wait(args: Namespace, verdict: Callable[[Status], Verdict], *, show: bool) -> int:
    def do(one: Target) -> None:
        try:
            wait(one, verdict, args.timeout, show)
        except NotRunning:
            targets.load(one)
            raise

    return targets.each(args, targets.parse(args.target, volumes=False), do)


def _write_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
