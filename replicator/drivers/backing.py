# SPDX-License-Identifier: Apache-2.0
"""A backing store: a block device or a regular file, opened so that nobody else uses it by accident.

Invariants:
- One process has a store: O_EXCL on a block device (mounts heed it, too) and flock on both.
- With io="direct" nothing of ours waits in the page cache, so a completed write was accepted by the device.
- A range zeroed or punched reads back as zeroes, on every kind of store: copies stay equal after a TRIM.
- A `sync` that failed once fails for ever: the kernel reports a lost page once and forgets it, we do not.

Methods raise plain `OSError`; opening raises `DiskError` with a hint for the operator.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import threading
import time
from pathlib import Path

from replicator.errors import DiskError

# linux/fs.h, linux/falloc.h
BLKSSZGET = 0x1268
BLKGETSIZE64 = 0x80081272
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

#: Largest logical block size accepted: the bitmap's block and the metadata's unit.
BLOCK_SIZE_MAX = 4096
#: One transfer through an aligned buffer; larger requests take several.
BUFFER_SIZE = 1 << 20
#: udev holds a shared lock on a block device while it probes it; it is done in well under this time.
LOCK_TRIES = 40
LOCK_PAUSE_S = 0.05

_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.ENOTTY, errno.EINVAL})
_CHECK_PATH = "check the configured path, and that the device is there"

_libc = ctypes.CDLL(None, use_errno=True)
_prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, use_errno=True)
_fallocate = _prototype(("fallocate64" if hasattr(_libc, "fallocate64") else "fallocate", _libc))


def aligned_buffer(size: int = BUFFER_SIZE) -> memoryview:
    """Page-aligned memory, as O_DIRECT asks for."""
    return memoryview(mmap.mmap(-1, size))


_ZEROES = aligned_buffer().toreadonly()


class Backing:
    """An open store.  Offsets and sizes in bytes; any thread may call any method but `close`."""

    def __init__(self, path: str, fd: int, *, direct: bool, block_size: int, size: int, device: bool) -> None:
        self.path = path
        self.fd = fd
        self.direct = direct  #: offset, size and memory of every transfer must be aligned
        self.block_size = block_size
        self.size = size  #: rounded down to whole blocks
        self.device = device
        self._sync_lock = threading.Lock()
        self._sync_errno = 0
        self._dsync = direct
        self._refused: set[int] = set()  # fallocate modes this store does not know

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`; the end of the file is an error (EIO), never silence."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self.fd, [buffer[done:]], offset + done)
            if count == 0:
                raise OSError(errno.EIO, f"read past the end of {self.path}")
            done += count

    def read(self, offset: int, size: int) -> bytes:
        """Read exactly `size` bytes; aligned when the store is direct.  For metadata, not the hot path."""
        result = bytearray(size)
        bounce = aligned_buffer(min(BUFFER_SIZE, round_up(max(size, 1), mmap.PAGESIZE)))
        for start in range(0, size, BUFFER_SIZE):
            part = bounce[: min(BUFFER_SIZE, size - start)]
            self.read_into(part, offset + start)
            result[start : start + len(part)] = part
        return bytes(result)

    def write(self, buffers: list[memoryview], offset: int) -> None:
        """Write all of `buffers`, one behind the other."""
        self._write(buffers, offset, 0)

    def write_stable(self, buffers: list[memoryview], offset: int) -> None:
        """Write and return when it is stable (FUA)."""
        if self._dsync:
            try:
                self._write(buffers, offset, os.RWF_DSYNC)
                return
            except OSError as error:
                # Refused before anything was written: this is no retry of a failed write.
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                self._dsync = False
        # Through the page cache RWF_DSYNC would take the one report of an older lost page away from `sync`.
        self._write(buffers, offset, 0)
        self.sync()

    def _write(self, buffers: list[memoryview], offset: int, flags: int) -> None:
        while buffers:
            count = os.pwritev(self.fd, buffers, offset, flags)
            if count == 0:
                raise OSError(errno.EIO, f"nothing could be written to {self.path}")
            offset += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers[0])
                buffers = buffers[1:]
            if count:
                buffers = [buffers[0][count:], *buffers[1:]]

    def zero(self, offset: int, size: int, *, punch: bool) -> None:
        """Make an aligned range read as zeroes; `punch` gives the space back where the store can."""
        zero_range = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
        punch_hole = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        # On a block device PUNCH_HOLE is a zeroing unmap and, unlike BLKDISCARD, promises zeroes.
        for mode in (punch_hole, zero_range) if punch else (zero_range,):
            if self._allocate(mode, offset, size):
                return
        for start in range(0, size, len(_ZEROES)):
            self.write([_ZEROES[: min(len(_ZEROES), size - start)]], offset + start)

    def _allocate(self, mode: int, offset: int, size: int) -> bool:
        """False: the store does not know this mode (and nothing was changed)."""
        if mode in self._refused:
            return False
        while _fallocate(self.fd, mode, offset, size) != 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            if number in _UNSUPPORTED:
                self._refused.add(mode)
                return False
            raise OSError(number, os.strerror(number), self.path)
        return True

    def sync(self) -> None:
        """Make completed writes stable.  After one failure it fails with the same errno for ever."""
        with self._sync_lock:
            if self._sync_errno:
                raise OSError(self._sync_errno, os.strerror(self._sync_errno), self.path)
            try:
                os.fdatasync(self.fd)
            except OSError as error:
                self._sync_errno = error.errno or errno.EIO
                raise

    def close(self) -> None:
        """Give the store back; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def absent(path: str) -> bool:
    """Nothing is there, or an empty regular file: what a crash leaves between making a file and giving it a size."""
    try:
        found = os.lstat(path)
    except OSError:
        return True  # whoever makes it learns why it cannot be
    return stat.S_ISREG(found.st_mode) and found.st_size == 0


def open_backing(path: str, *, io: str = "direct", read_only: bool = False) -> Backing:
    """Open `path` for ourselves alone; `io` is "direct" (O_DIRECT) or "buffered".

    Raises `DiskError`: missing, not a block device or regular file, busy (and who has it), no O_DIRECT.
    """
    assert io in ("direct", "buffered"), io
    try:
        device = stat.S_ISBLK(os.stat(path).st_mode)
    except OSError as error:
        raise DiskError(f"{path} cannot be opened: {_reason(error)}", hint=_CHECK_PATH) from error
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    # A device is usually named by a link of udev or LVM; a file is named by itself.
    flags |= os.O_EXCL if device else os.O_NOFOLLOW
    fd = _open(path, flags | (os.O_DIRECT if io == "direct" else 0), direct=io == "direct")
    try:
        _lock(fd, path, device)
        block_size, size = _measure(fd, path, device, direct=io == "direct")
    except BaseException:
        os.close(fd)
        raise
    return Backing(path, fd, direct=io == "direct", block_size=block_size, size=size, device=device)


def put(
    backing: Backing,
    offset: int,
    buffers: list[memoryview],
    bounce: memoryview,
    edge_lock: threading.Lock,
    stable: bool,
) -> None:
    """Write `buffers` one behind the other, through the aligned memory `bounce` when the store needs it."""
    write = backing.write_stable if stable else backing.write
    if not backing.direct:
        write(buffers, offset)
        return
    size = sum(map(len, buffers))
    if (offset | size) % backing.block_size:
        with edge_lock:
            _put_unaligned(backing, offset, b"".join(buffers), bounce, stable)
        return
    filled = 0
    for data in buffers:
        taken = 0
        while taken < len(data):
            part = data[taken : taken + len(bounce) - filled]
            bounce[filled : filled + len(part)] = part
            filled += len(part)
            taken += len(part)
            if filled == len(bounce):
                write([bounce], offset)
                offset += filled
                filled = 0
    if filled:
        write([bounce[:filled]], offset)


def _put_unaligned(backing: Backing, offset: int, data: bytes, bounce: memoryview, stable: bool) -> None:
    """Read, change and write the blocks around an unaligned range."""
    block = backing.block_size
    end = offset + len(data)
    for start in range(round_down(offset, block), end, len(bounce)):
        stop = min(start + len(bounce), round_up(end, block))
        window = bounce[: stop - start]
        inner_start, inner_stop = max(start, offset), min(stop, end)
        if start < inner_start:
            backing.read_into(window[:block], start)
        if inner_stop < stop and (stop - start > block or start >= inner_start):
            backing.read_into(window[-block:], stop - block)
        window[inner_start - start : inner_stop - start] = data[inner_start - offset : inner_stop - offset]
        backing.write([window], start)
    if stable:
        backing.sync()


def _open(path: str, flags: int, *, direct: bool) -> int:
    try:
        return os.open(path, flags)
    except OSError as error:
        hint = _CHECK_PATH
        if error.errno == errno.EBUSY:
            hint = "unmount it or stop what uses it"
            raise DiskError(f"{path} is in use{_holders(path)}", hint=hint) from error
        if error.errno == errno.ELOOP:
            hint = "name the file itself, not a symbolic link to it"
        if error.errno == errno.EINVAL and direct:
            raise _no_direct(path) from error
        raise DiskError(f"{path} cannot be opened: {_reason(error)}", hint=hint) from error


def _no_direct(path: str) -> DiskError:
    hint = 'set io = "buffered"; data is then stable after a flush only'
    return DiskError(f"the file system of {path} does not support O_DIRECT", hint=hint)


def _lock(fd: int, path: str, device: bool) -> None:
    for _ in range(LOCK_TRIES if device else 1):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if device:
                time.sleep(LOCK_PAUSE_S)
        except OSError as error:
            raise DiskError(f"{path} cannot be locked: {_reason(error)}") from error
    raise DiskError(f"{path} is in use{_holders(path)}", hint="only one process may have it open")


def _measure(fd: int, path: str, device: bool, *, direct: bool) -> tuple[int, int]:
    """Block size and size in bytes."""
    mode = os.fstat(fd)
    if device:
        block_size = int(struct.unpack("i", fcntl.ioctl(fd, BLKSSZGET, bytes(4)))[0])
        size = int(struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0])
    elif stat.S_ISREG(mode.st_mode):
        block_size, size = _probe_alignment(fd, path) if direct else 512, mode.st_size
    else:
        raise DiskError(f"{path} is neither a block device nor a regular file")
    if block_size > BLOCK_SIZE_MAX:
        raise DiskError(f"{path} has logical blocks of {block_size} bytes, supported are {BLOCK_SIZE_MAX}")
    return block_size, round_down(size, block_size)


def _probe_alignment(fd: int, path: str) -> int:
    """The smallest transfer a file system takes with O_DIRECT."""
    for size in (512, 4096):
        try:
            os.preadv(fd, [aligned_buffer(size)], 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise DiskError(f"{path} cannot be read: {_reason(error)}") from error
            continue
        # An empty file may answer before anything is checked; the largest unit is safe then.
        return size if os.fstat(fd).st_size else BLOCK_SIZE_MAX
    raise _no_direct(path)


def _holders(path: str) -> str:
    """Who has it, as far as /proc and /sys tell: mount points, stacked devices, processes with a lock."""
    status = os.stat(path)
    device = stat.S_ISBLK(status.st_mode)
    number = status.st_rdev if device else status.st_dev
    major, minor = os.major(number), os.minor(number)
    names: list[str] = []
    if device:
        mounts = (line.split() for line in _lines("/proc/self/mountinfo"))
        names += [f"mounted on {words[4]}" for words in mounts if words[2] == f"{major}:{minor}"]
        holders = Path(f"/sys/dev/block/{major}:{minor}/holders")
        names += [f"device {entry.name}" for entry in holders.iterdir()] if holders.is_dir() else []
    node = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in _lines("/proc/locks"):
        words = line.split()
        if node in words and words[1] == "FLOCK":
            pid = words[words.index(node) - 1]
            command = " ".join(_lines(f"/proc/{pid}/comm")) or "gone"
            names.append(f"process {pid} ({command})")
    return " by " + ", ".join(dict.fromkeys(names)) if names else ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []  # only a help for the operator's eyes; the refusal stands without it


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def round_down(offset: int, unit: int) -> int:
    """The last multiple of `unit` at or before `offset`."""
    return offset // unit * unit


def round_up(offset: int, unit: int) -> int:
    """The first multiple of `unit` at or behind `offset`."""
    return -(-offset // unit) * unit
