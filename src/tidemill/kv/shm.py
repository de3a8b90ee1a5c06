"""Hand-overs through memory that two workers of one host share: files in a folder of it.

    <folder>/id           16 random bytes: equal ids mean that both sides see the same folder
    <folder>/<32 hex>     an arena: made, sized and locked by the puller, written by the source

The puller lends an arena to one pull at a time and keeps it for the next, since a page's first use
costs more than the copy. An arena goes to another pull only if its last source has said that it
is done. The lock dies with the puller's process, and whoever sweeps removes files without one.
"""

import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tidemill.errors import ConfigError, FailedPrecondition

Bytes = NDArray[np.uint8]

ID_BYTES = 16
STEP_BYTES = 16 << 20  # an arena's size is a multiple of this
KEEP_BYTES = 1 << 30  # idle arenas that a puller keeps, and windows that a source keeps open
YOUNG_S = 10.0  # a file may be this old without a lock: its maker has not come to it yet

_NAME = re.compile(r"[0-9a-f]{32}")
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class ShmFolder:
    """A folder that only this user can enter. Raises ConfigError where it cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check(path.lstat())
            self.id = self._find_id()
        except OSError as error:
            raise ConfigError(f"shm_dir {path}: cannot be used: {error.strerror}") from error
        self.sweep()

    def sweep(self) -> int:
        """Remove arenas whose process has ended; returns how many."""
        with suppress(FileNotFoundError):  # someone removed the folder: nothing is left over
            return sum(self._sweep(each) for each in self.path.iterdir())
        return 0

    def _check(self, status: os.stat_result) -> None:
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise ConfigError(f"shm_dir {self.path}: must be a folder of this user's own")
        if status.st_mode & 0o077:
            raise ConfigError(f"shm_dir {self.path}: must be closed to others (mode 0700)")

    def _find_id(self) -> bytes:
        """The folder's id, made by whoever comes first: it appears whole or not at all."""
        path = self.path / "id"
        if not path.exists():
            made = self.path / f"id-{secrets.token_hex(8)}"
            descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(ID_BYTES))
            with suppress(FileExistsError):
                os.link(made, path)
            made.unlink()
        found = path.read_bytes()
        if len(found) != ID_BYTES:
            raise ConfigError(f"shm_dir {self.path}: the file id is not {ID_BYTES} bytes long")
        return found

    def _sweep(self, path: Path) -> bool:
        if _NAME.fullmatch(path.name) is None:
            return False
        try:
            descriptor = os.open(path, _OPEN)
        except OSError:
            return False
        try:
            if time.time() - os.fstat(descriptor).st_ctime < YOUNG_S:
                return False
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True


class ShmArena:
    """The puller's end of one file: `memory` is all of it. For a thread: its pages are made here.

    Raises OSError where there is no room: every page is there before anyone writes, so that a
    full file system is an error and not a signal.
    """

    def __init__(self, folder: ShmFolder, num_bytes: int) -> None:
        self.name = secrets.token_hex(16)
        self.num_bytes = num_bytes
        self._path = folder.path / self.name
        self._descriptor = os.open(self._path, _OPEN | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            os.posix_fallocate(self._descriptor, 0, num_bytes)
            self.memory = _map(self._descriptor, num_bytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the file; its memory goes when nobody looks at it any more."""
        with suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._descriptor)


class ShmArenas:
    """A puller's arenas, lent and idle. Thread-safe."""

    def __init__(self, folder: ShmFolder, *, keep_bytes: int = KEEP_BYTES) -> None:
        self.folder = folder
        self._keep_bytes = keep_bytes
        self._lock = threading.Lock()
        self._idle: list[ShmArena] = []
        self._closed = False

    def lend(self, num_bytes: int) -> ShmArena:
        """An arena of at least `num_bytes`, idle or new. For a thread. Raises OSError."""
        with self._lock:
            fitting = [each for each in self._idle if each.num_bytes >= num_bytes]
            if fitting:
                arena = min(fitting, key=lambda each: each.num_bytes)
                self._idle.remove(arena)
                return arena
        return ShmArena(self.folder, -(-num_bytes // STEP_BYTES) * STEP_BYTES)

    def give_back(self, arena: ShmArena, *, reusable: bool) -> None:
        """Take an arena back; `reusable` if no source can still write into it."""
        going = []
        with self._lock:
            if reusable and not self._closed:
                self._idle.append(arena)
            else:
                going.append(arena)
            while sum(each.num_bytes for each in self._idle) > self._keep_bytes:
                going.append(self._idle.pop(0))
        for each in going:
            each.close()

    def close(self) -> None:
        """Remove what is idle now, and what is lent when it comes back."""
        with self._lock:
            self._closed = True
            going, self._idle = self._idle, []
        for each in going:
            each.close()


@dataclass(frozen=True)
class _Window:
    descriptor: int
    memory: Bytes


class ShmWindows:
    """A source's view of pullers' arenas, kept open as long as their files exist. Thread-safe."""

    def __init__(self, folder: ShmFolder, *, keep_bytes: int = KEEP_BYTES) -> None:
        self.folder = folder
        self._keep_bytes = keep_bytes
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Window] = OrderedDict()

    def look(self, name: str, num_bytes: int, *, need: int) -> Bytes:
        """The memory of an arena of `num_bytes`. For a thread.

        Raises FailedPrecondition (SHM_UNAVAILABLE) for what is not a file of this user's of that
        size in this folder, or too small for the `need` bytes to be written.
        """
        with self._lock:
            window = self._open.pop(name, None)
            try:
                if window is None:
                    window = self._look(name, num_bytes)
                if need > num_bytes or len(window.memory) != num_bytes:
                    raise OSError(errno.EINVAL, "not of the size announced")
            except OSError as error:
                if window is not None:
                    os.close(window.descriptor)
                raise FailedPrecondition(
                    f"the shared file cannot be used: {error.strerror}", reason="SHM_UNAVAILABLE"
                ) from error
            self._open[name] = window
            self._trim()
            return window.memory

    def sweep(self) -> None:
        """Let go of memory whose file is gone."""
        with self._lock:
            gone = [
                name
                for name, window in self._open.items()
                if os.fstat(window.descriptor).st_nlink == 0
            ]
            for name in gone:
                os.close(self._open.pop(name).descriptor)

    def close(self) -> None:
        """Let go of all."""
        with self._lock:
            for window in self._open.values():
                os.close(window.descriptor)
            self._open.clear()

    def _look(self, name: str, num_bytes: int) -> _Window:
        if _NAME.fullmatch(name) is None:
            raise OSError(errno.EINVAL, "not the name of a shared file")
        descriptor = os.open(self.folder.path / name, _OPEN)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
                raise OSError(errno.EPERM, "not a file of this user's")
            if status.st_size != num_bytes:
                raise OSError(errno.EINVAL, "not of the size announced")
            return _Window(descriptor, _map(descriptor, num_bytes))
        except BaseException:
            os.close(descriptor)
            raise

    def _trim(self) -> None:
        while sum(len(each.memory) for each in self._open.values()) > self._keep_bytes:
            if len(self._open) == 1:
                break
            _, window = self._open.popitem(last=False)
            os.close(window.descriptor)


class SharedMemory:
    """What one worker does with the folder, as a puller and as a source. Raises ConfigError."""

    def __init__(self, path: Path) -> None:
        self.folder = ShmFolder(path)
        self.arenas = ShmArenas(self.folder)
        self.windows = ShmWindows(self.folder)

    def sweep(self) -> None:
        """Let go of what dead processes left. For a thread."""
        self.windows.sweep()
        self.folder.sweep()

    def close(self) -> None:
        """Leave nothing behind but the id."""
        self.arenas.close()
        self.windows.close()


def _map(descriptor: int, num_bytes: int) -> Bytes:
    """The file's memory, its pages at hand; unmapped when the last view of it goes."""
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    return np.frombuffer(mmap.mmap(descriptor, num_bytes, flags=flags), dtype=np.uint8)
