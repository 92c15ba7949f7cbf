# SPDX-License-Identifier: Apache-2.0
"""The life of a resource's process: `replicator run RES`, from hardening to exit code.

Exit codes: 0 after `down` (or SIGTERM, which asks for it), the error's own code when it cannot start, 1 when
SIGTERM had to end a resource that could not go down, 70 for a broken invariant.  The last is never survived:
an assertion or any unexpected exception, in any thread, is logged with its traceback and the process is gone
at once; what was acknowledged is safe on disk, and the cluster manager acts.

Readiness: whoever started us may pass a descriptor.  One JSON line is written to it when the control socket
is served and the attach has ended, well or not, or when the process cannot start.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

from replicator.config import ResourceConfig, key_dir, load, run_dir
from replicator.control.messages import Reply
from replicator.core.resource import Resource
from replicator.daemon import logs
from replicator.daemon.compose import Daemon, Setting, core_options, new_id
from replicator.daemon.logs import Log
from replicator.drivers import device, process
from replicator.drivers.loop import Loop
from replicator.errors import ReplicatorError

EXIT_BROKEN = 70
EXIT_NOT_DOWN = 1
TERM_NS = 10_000_000_000
#: Threads here keep little on their stack, and every page of it is locked in memory.
THREAD_STACK_BYTES = 1 << 20


class Readiness:
    """The descriptor that whoever started us waits on; one line at most is ever written."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def tell(self, **said: object) -> None:
        """Write the line and close the descriptor; a reader that is gone is not our trouble."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            os.write(fd, json.dumps(said).encode("ascii") + b"\n")
        except BrokenPipeError:
            pass
        os.close(fd)

    def failed(self, error: ReplicatorError) -> None:
        """The process cannot start."""
        code = getattr(error, "code", "cannot-start")
        self.tell(ready=False, code=code, message=error.message, hint=error.hint, exit_code=error.exit_code)


def run(config_path: Path, node_name: str, *, ready_fd: int | None = None) -> int:
    """Serve one resource until it is taken down; returns the exit code.

    Raises ReplicatorError when it cannot start (told to `ready_fd` as well).  Does not return from a broken
    invariant.
    """
    readiness = Readiness(ready_fd)
    try:
        process.require_asserts(enabled=__debug__)
        config = load(config_path)
        node = config.node(node_name)
        log = logs.configure(os.environ, config.name, node.name)
        _fall_when_broken(log)
        os.chdir("/")  # whatever file system we were started from can be unmounted
        choice = device.choose(_wish(config), _abilities(config))
        threading.stack_size(THREAD_STACK_BYTES)
        complaints = process.harden()
        for complaint in complaints:
            log.warning("hardening", text=complaint)
        setting = Setting(
            config=config,
            node=node,
            run_dir=run_dir(),
            key_dir=key_dir(),
            choice=choice,
            complaints=tuple(complaints),
        )
        life = _Life(Loop(), setting, log, readiness)
        life.start()
    except ReplicatorError as error:
        readiness.failed(error)
        raise
    try:
        return life.serve()
    except BaseException as error:  # whatever it is, nothing may go on behind it
        _fall(log, error)


class _Life:
    """From the first event to the last."""

    def __init__(self, loop: Loop, setting: Setting, log: Log, readiness: Readiness) -> None:
        self._loop = loop
        self._log = log
        self._setting = setting
        self._readiness = readiness
        self._notifier = process.Notifier.from_environment()
        self._watchdog_ns = process.watchdog_interval_ns()
        self._exit_code = 0
        self._terminating = False
        core = Resource(core_options(setting.config, setting.node), new_id)
        self._daemon = Daemon(loop, setting, core, log, loop.stop)

    def start(self) -> None:
        """Open what the process serves; raises ReplicatorError and gives everything back."""
        try:
            self._daemon.start(self._on_attached)
        except ReplicatorError:
            self._daemon.close()
            raise

    def serve(self) -> int:
        """Turn until the resource is down; the exit code."""
        self._loop.on_signal(signal.SIGTERM, self._on_term)
        self._loop.on_signal(signal.SIGINT, self._on_term)
        self._loop.on_signal(signal.SIGHUP, lambda: self._log.info("sighup", text="nothing to do"))
        if self._watchdog_ns is not None:
            self._on_watchdog()
        self._log.info("started", pid=os.getpid(), device=self._setting.choice.kind)
        self._loop.run(self._daemon.turn, lambda: self._daemon.deadline)
        self._daemon.close()
        self._log.info("ended", exit_code=self._exit_code)
        return self._exit_code

    def _on_attached(self, answer: Reply) -> None:
        if not answer.ok:
            self._log.warning("attach-refused", text=answer.message, hint=answer.hint)
        name = self._setting.config.name
        self._notifier.ready(f"{name} is served" if answer.ok else f"{name}: {answer.message}")
        said = answer._asdict()
        self._readiness.tell(ready=True, attach={key: said[key] for key in ("ok", "code", "number", "message", "hint")})

    def _on_watchdog(self) -> None:
        assert self._watchdog_ns is not None
        self._notifier.watchdog()
        self._loop.call_at(self._loop.now_ns() + self._watchdog_ns, self._on_watchdog)

    def _on_term(self) -> None:
        if self._terminating:
            return
        self._terminating = True
        self._notifier.stopping()
        self._log.info("terminating", text="asked to end: going down")
        self._exit_code = EXIT_NOT_DOWN  # until the answer says otherwise
        self._loop.call_at(self._loop.now_ns() + TERM_NS, self._give_up)
        self._daemon.commands.ask("down", {"force": False}, self._on_term_answer)

    def _on_term_answer(self, answer: Reply) -> None:
        """For a `down` that succeeded this comes when everything is closed."""
        if answer.ok:
            self._exit_code = 0
            return
        self._log.warning(
            "not-down", text=answer.message, hint="it ends as after a crash; nothing acknowledged is lost"
        )
        self._loop.stop()

    def _give_up(self) -> None:
        self._log.warning("not-down", text=f"still not down after {TERM_NS // 10**9} s; it ends as after a crash")
        # Disks and peers do not answer: waiting for them again would be the same wait.
        _flush()
        os._exit(EXIT_NOT_DOWN)


def _wish(config: ResourceConfig) -> device.Wish:
    match config.device.kind:
        case "nbd":
            return "nbd"
        case "fuse":
            return "fuse"
        case "none":
            return "none"
        case _:
            return "auto"


def _abilities(config: ResourceConfig) -> device.Abilities:
    """What this host can do; not looked at when no node is wanted (it loads a kernel module)."""
    if config.device.kind == "none":
        return device.Abilities(no_nbd="", no_fuse="")
    return device.probe()


def _fall_when_broken(log: Log) -> None:
    """A thread that dies takes the process with it."""

    def on_thread(broken: threading.ExceptHookArgs) -> None:
        _fall(log, broken.exc_value or SystemError(f"a thread ended with {broken.exc_type}"))

    threading.excepthook = on_thread


def _fall(log: Log, error: BaseException) -> NoReturn:
    """Say why, and be gone: no destructor, no handler, no last write."""
    try:
        log.critical("broken-invariant", exc_info=error)
        _flush()
    finally:
        os._exit(EXIT_BROKEN)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
