# SPDX-License-Identifier: Apache-2.0
"""The process of a resource: start it, end it, be it.

`up` starts `replicator run RES` detached from the terminal, and waits on an inherited pipe for the line that
says that the control socket is served and what came of the attach.  On a resource that runs it attaches and
connects what is not.  `down` returns when the process is gone, so that its ports and disks are free for the
next command.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from replicator import config
from replicator.cli import target as targets
from replicator.cli.remote import ask
from replicator.cli.target import Target
from replicator.errors import ConfigError, NotRunning, Refused, ReplicatorError

DOWN_S = 60.0
LOG_TAIL_BYTES = 4096


class _NotStarted(ReplicatorError):
    """The process could not start; it said why."""

    def __init__(self, message: str, hint: str, exit_code: int) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def run(args: Namespace) -> int:
    """Be the process of a resource; returns when it is down."""
    from replicator.drivers.process import close_stray_fds

    found = targets.parse(args.target, volumes=False)
    if args.target == "all":
        from replicator.errors import UsageError

        raise UsageError("one process serves one resource", hint="replicator up all starts them all")
    keep = () if args.ready_fd is None else (args.ready_fd,)
    close_stray_fds(keep)
    from replicator import daemon

    path = config.resource_path(found[0].resource)
    return daemon.run(path, config.local_node_name(), ready_fd=args.ready_fd)


def up(args: Namespace) -> int:
    """Start what does not run; attach and connect what is not."""
    return targets.each(args, targets.parse(args.target, volumes=False), _up)


def down(args: Namespace) -> int:
    """End it in order; a resource that does not run is down already."""
    return targets.each(args, targets.parse(args.target, volumes=False), lambda one: _down(one, force=args.force))


def _up(one: Target) -> None:
    loaded = targets.load(one)
    loaded.node(config.local_node_name())  # a node that is not in the file cannot run it
    from replicator.control.client import call

    try:
        status = call(one.socket, "status")
    except NotRunning as error:
        if isinstance(error.__cause__, TimeoutError):
            raise  # it is there, but does not answer: a second one would not help
        try:
            _start(one)
        except Refused as refused:
            if refused.code != "already-running":
                raise
            status = call(one.socket, "status")  # somebody was faster
        else:
            return
    _complete(one, status)


def _complete(one: Target, status: Mapping[str, object]) -> None:
    """Attach and connect what is not."""
    devices, connections = status.get("devices"), status.get("connections")
    assert isinstance(devices, list) and isinstance(connections, list)
    if any(device["disk-state"] == "Diskless" for device in devices):
        ask(one, "attach", {"volume": None})
    if any(connection["connection-state"] == "StandAlone" for connection in connections):
        ask(one, "connect", {"peer": None})


def _start(one: Target) -> None:
    """Start the process and wait until it is ready; raises what it says it failed of."""
    directory = config.run_dir()
    log_path = directory / f"{one.resource}.log"
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        log = open(log_path, "ab", buffering=0)  # noqa: SIM115 - closed below, in the with
    except OSError as error:
        raise ConfigError([f"{log_path} cannot be written: {error.strerror}"], hint="run as root") from error
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with log, open(reader, "rb", buffering=0) as ready:
        size_before = log.seek(0, os.SEEK_END)
        command = [sys.executable, "-m", "replicator", "run", one.resource, "--ready-fd", str(writer)]
        try:
            # Not waited for: it outlives this command, and init inherits it.
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(writer,),
                start_new_session=True,
            )
        finally:
            os.close(writer)
        line = ready.readall()
        if not line:
            code = child.wait()
    if not line:
        hint = _tail(str(log_path), size_before) or f"see {log_path}"
        raise _NotStarted(f"its process ended with exit code {code} before it was ready", hint, 10)
    child.returncode = 0  # it is not ours to reap: the interpreter must not warn about a running child
    _judge(json.loads(line))


def _judge(said: Mapping[str, object]) -> None:
    """Raise what the new process said went wrong."""
    if not said.get("ready"):
        code, message, hint = str(said.get("code")), str(said.get("message")), str(said.get("hint"))
        if code == "already-running":
            raise Refused(code, message, hint=hint)
        exit_code = said.get("exit_code")
        raise _NotStarted(message, hint, exit_code if isinstance(exit_code, int) else 10)
    attach = said.get("attach")
    if isinstance(attach, dict) and not attach.get("ok"):
        raise Refused(
            str(attach.get("code")),
            str(attach.get("message")),
            number=int(attach.get("number", 0)),
            hint=str(attach.get("hint") or "it runs without its disk: mend that, then replicator attach"),
        )


def _tail(path: str, start: int) -> str:
    """The last line that the child left in its log."""
    with suppress(OSError), open(path, "rb") as log:
        log.seek(start)
        lines = log.read()[-LOG_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""
    return ""


def _down(one: Target, *, force: bool) -> None:
    try:
        pid = ask(one, "ping", {}, 5.0).get("pid")
    except NotRunning as error:
        if isinstance(error.__cause__, TimeoutError):
            raise
        return
    assert isinstance(pid, int)
    with _process(pid) as handle:
        ask(one, "down", {"force": force})
        if handle is not None and not select.select([handle], [], [], DOWN_S)[0]:
            raise NotRunning(f"it is down, but process {pid} does not end", hint=f"see its log, then kill {pid}")


@contextmanager
def _process(pid: int) -> Iterator[int | None]:
    """A descriptor that becomes readable when the process is gone; None when it is gone already."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)
