"""Blocks as files: their format, and the folder that holds them. Everything here blocks: threads.

    <root>/lock                    held by the one process that uses the folder
    <root>/partial/<random>        a file being written; leftovers are removed at start
    <root>/v1/<2 hex>/<64 hex>     one block, named by its chain hash

A file is a header and the payload. The header repeats the name and says whose block it is, how
long, and what it must hash to, so a file that was cut, changed or put in another's place is found
out by whoever reads it. Nothing is synced: after a crash of the machine a file may hold anything.
"""

import errno
import fcntl
import os
import re
import secrets
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from tidemill.errors import ConfigError
from tidemill.kv.pieces import sha256

NUM_FOLDERS = 256
PAGE_BYTES = 4096  # what a file takes is a multiple of this

_MAGIC = b"TIDEMILL"
_VERSION = 1
_FIELDS = struct.Struct("<8sIQ32s32s32s")  # magic, version, bytes, namespace, hash, payload's hash
_SUM_BYTES = 32
HEADER_BYTES = _FIELDS.size + _SUM_BYTES
_NAME = re.compile(r"[0-9a-f]{64}")
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Cause(StrEnum):
    """Why a block could not be kept or read back; the values are a metric's labels."""

    MISSING = "missing"
    TRUNCATED = "truncated"
    SWAPPED = "swapped"
    CORRUPT = "corrupt"
    FULL = "full"
    DENIED = "denied"
    IO = "io"
    FOLDER = "folder"  # the whole folder was removed or replaced
    SLOW = "slow"
    QUEUE = "queue"
    PAUSED = "paused"

    @property
    def is_block(self) -> bool:
        """Whether one file is at fault, and not the disk."""
        return self in (Cause.MISSING, Cause.TRUNCATED, Cause.SWAPPED, Cause.CORRUPT)


_CAUSES = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), Cause.MISSING),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), Cause.FULL),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), Cause.DENIED),
    **dict.fromkeys((errno.ELOOP, errno.EISDIR), Cause.SWAPPED),
}


def file_bytes(num_bytes: int) -> int:
    """What the file of a payload takes of the disk."""
    return -(-(HEADER_BYTES + num_bytes) // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True)
class Header:
    """What a file says of its block."""

    block_hash: bytes
    namespace: bytes
    num_bytes: int
    payload_sha256: bytes

    @property
    def file_bytes(self) -> int:
        """What the file takes of the disk."""
        return file_bytes(self.num_bytes)

    def pack(self) -> bytes:
        """The file's first HEADER_BYTES: the fields and their SHA-256."""
        fields = _FIELDS.pack(
            _MAGIC, _VERSION, self.num_bytes, self.namespace, self.block_hash, self.payload_sha256
        )
        return fields + sha256(fields)

    @classmethod
    def unpack(cls, packed: bytes) -> Self | None:
        """The header, None if it is cut, changed, or of another version."""
        fields, checksum = packed[: _FIELDS.size], packed[_FIELDS.size :]
        if len(packed) != HEADER_BYTES or sha256(fields) != checksum:
            return None
        magic, version, num_bytes, namespace, block_hash, payload_sha256 = _FIELDS.unpack(fields)
        if (magic, version) != (_MAGIC, _VERSION):
            return None
        return cls(block_hash, namespace, num_bytes, payload_sha256)


class BlockFolder:
    """The files of one cache node. Faults are returned as a Cause, never raised."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._partials = root / "partial"
        self._blocks = root / "v1"
        self._lock_fd = -1

    def open(self) -> None:
        """Take the folder for this process and clear what an earlier one left half written.

        Raises ConfigError where it cannot be used, or another process uses it.
        """
        try:
            self._take()
        except BlockingIOError as error:
            raise ConfigError(f"{self.root}: another process uses this folder") from error
        except OSError as error:
            raise ConfigError(f"{self.root}: cannot be used: {error.strerror}") from error

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def write(self, header: Header, payload: bytes, used_at_ns: int) -> Cause | None:
        """Keep a block; None if it is there now, whole."""
        partial = self._partials / secrets.token_hex(8)
        path = self._path(header.block_hash)
        try:
            if not self.intact():
                self._take_again()
            with os.fdopen(os.open(partial, _CREATE, 0o600), "wb") as file:
                file.write(header.pack())
                file.write(payload)
                file.flush()
                os.utime(file.fileno(), ns=(used_at_ns, used_at_ns))
            path.parent.mkdir(mode=0o700, exist_ok=True)
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            return self._cause(error)
        return None

    def read(self, header: Header, used_at_ns: int) -> bytes | Cause:
        """The payload, verified; the file's time becomes `used_at_ns`."""
        try:
            with os.fdopen(os.open(self._path(header.block_hash), _READ), "rb") as file:
                packed = file.read(HEADER_BYTES)
                if packed != header.pack():
                    return _wrong_header(packed)
                payload = file.read(header.num_bytes + 1)
                with suppress(OSError):  # a folder that cannot be written can still be read
                    os.utime(file.fileno(), ns=(used_at_ns, used_at_ns))
        except OSError as error:
            return self._cause(error)
        if len(payload) < header.num_bytes:
            return Cause.TRUNCATED
        return payload if sha256(payload) == header.payload_sha256 else Cause.CORRUPT

    def remove(self, block_hash: bytes) -> None:
        """Forget a block, whatever stands under its name."""
        with suppress(OSError):
            self._path(block_hash).unlink(missing_ok=True)

    def touch(self, block_hash: bytes, used_at_ns: int) -> None:
        """Let a block's file remember its last use."""
        with suppress(OSError):
            os.utime(self._path(block_hash), ns=(used_at_ns, used_at_ns), follow_symlinks=False)

    def scan(self, numbers: Iterable[int]) -> tuple[list[tuple[Header, int]], list[Cause]]:
        """Headers and times of use in some of the NUM_FOLDERS folders; what is no block is removed.

        Only headers are read, payloads are verified when they are wanted.
        """
        found: list[tuple[Header, int]] = []
        faults: list[Cause] = []
        for number in numbers:
            place = self._blocks / f"{number:02x}"
            try:
                names = [each.name for each in os.scandir(place)]
            except FileNotFoundError:
                continue
            except OSError as error:
                faults.append(self._cause(error))
                continue
            for name in names:
                if _NAME.fullmatch(name) is None or not name.startswith(place.name):
                    continue  # not ours
                outcome = self._scan_file(bytes.fromhex(name))
                if isinstance(outcome, Cause):
                    faults.append(outcome)
                    self.remove(bytes.fromhex(name))
                else:
                    found.append(outcome)
        return found, faults

    def intact(self) -> bool:
        """Whether the folder is still the one that was opened."""
        try:
            ours, there = os.fstat(self._lock_fd), (self.root / "lock").stat()
        except OSError:
            return False
        return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)

    def _take(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_fd = os.open(self.root / "lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in (self._partials, self._blocks):
                folder.mkdir(mode=0o700, exist_ok=True)
            for leftover in self._partials.iterdir():
                leftover.unlink()
        except BaseException:
            os.close(lock_fd)
            raise
        self.close()
        self._lock_fd = lock_fd

    def _take_again(self) -> None:
        """Begin anew where the folder was removed; never below a mount point that came off."""
        if os.fstat(self._lock_fd).st_dev != _nearest(self.root).stat().st_dev:
            raise FileNotFoundError(errno.ENOENT, "not the disk that it was", str(self.root))
        self._take()

    def _scan_file(self, block_hash: bytes) -> tuple[Header, int] | Cause:
        try:
            with os.fdopen(os.open(self._path(block_hash), _READ), "rb", buffering=0) as file:
                packed = file.read(HEADER_BYTES) or b""
                status = os.fstat(file.fileno())
        except OSError as error:
            return self._cause(error)
        header = Header.unpack(packed)
        if header is None or header.block_hash != block_hash:
            return _wrong_header(packed)
        if status.st_size != HEADER_BYTES + header.num_bytes:
            return Cause.TRUNCATED
        return header, status.st_mtime_ns

    def _path(self, block_hash: bytes) -> Path:
        name = block_hash.hex()
        return self._blocks / name[:2] / name

    def _cause(self, error: OSError) -> Cause:
        cause = _CAUSES.get(error.errno or 0, Cause.IO)
        return Cause.FOLDER if cause is Cause.MISSING and not self.intact() else cause


def _wrong_header(packed: bytes) -> Cause:
    """What is wrong with the header of a file that is not the one expected."""
    if len(packed) < HEADER_BYTES:
        return Cause.TRUNCATED
    return Cause.CORRUPT if Header.unpack(packed) is None else Cause.SWAPPED


def _nearest(path: Path) -> Path:
    """The path itself, or the first folder above it that exists."""
    return next(each for each in (path, *path.parents) if each.exists())
