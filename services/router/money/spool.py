"""What could not be settled while the ledger was away: append-only files that outlive the router.

<spool_dir>/<router id>/lock             locked by the router whose folder it is, while it lives
<spool_dir>/<router id>/<number>.intents a segment: one line for each record,
                                         "<SHA-256 of the content in hex> <content>\\n"

A record counts once `append` has returned: then file and folder are on the disk. The last line of
a segment may be torn by a crash; nobody was told of it. All calls block.
"""

import fcntl
import hashlib
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from services.router.crash_points import crash_point
from tidemill.errors import ConfigError

_LOCK = "lock"
_SUFFIX = ".intents"
_DAMAGED = ".damaged"
_DIGEST_CHARS = 64
_TAKE_AGAIN_S = 0.05

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Segment:
    """What one file holds. `torn`: its last line is no record; `damaged`: others that are none."""

    records: tuple[bytes, ...]
    torn: bool
    damaged: int


def line_of(record: bytes) -> bytes:
    """A record as it stands in a segment; ValueError if it holds a line's end."""
    if b"\n" in record:
        raise ValueError("a record must be one line")
    return hashlib.sha256(record).hexdigest().encode() + b" " + record + b"\n"


def parse(content: bytes) -> Segment:
    """The records of a segment in order."""
    *lines, rest = content.split(b"\n")
    records = [_record(line) for line in lines]
    torn = bool(rest)
    if records and records[-1] is None:
        torn = True
        records.pop()
    whole = tuple(record for record in records if record is not None)
    return Segment(whole, torn, len(records) - len(whole))


def _record(line: bytes) -> bytes | None:
    digest, record = line[:_DIGEST_CHARS], line[_DIGEST_CHARS + 1 :]
    whole = line == digest + b" " + record
    return record if whole and hashlib.sha256(record).hexdigest().encode() == digest else None


class Folder:
    """One router's folder, locked for this process."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def take(cls, path: Path) -> "Folder | None":
        """Lock the folder, making it if need be; None while another process has it. OSError."""
        path.mkdir(parents=True, exist_ok=True)
        name = path / _LOCK
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_ino == name.stat().st_ino:
                return cls(path, lock)
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(lock)  # another has it, or has just taken the folder away
        return None

    def segments(self) -> list[Path]:
        """Its segments, oldest first."""
        return sorted(self.path.glob(f"*{_SUFFIX}"))

    def give_back(self) -> None:
        """Unlock the folder, and remove it if it is empty."""
        if not any(each.name != _LOCK for each in self.path.iterdir()):
            (self.path / _LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # somebody may be taking it this moment
                self.path.rmdir()
        os.close(self._lock)


class Spool:
    """This router's folder, and those of routers that died.

    ConfigError if the folder cannot be written, or if another living router has this id: a
    neighbour that has adopted what this router's last life left gives it back within `wait_s`.
    """

    def __init__(self, directory: Path, router_id: str, *, wait_s: float = 5.0) -> None:
        self._directory = directory
        given_up = time.monotonic() + wait_s
        try:
            while (folder := Folder.take(directory / router_id)) is None:
                if time.monotonic() >= given_up:
                    raise ConfigError(f"another router with the id {router_id} is running")
                time.sleep(_TAKE_AGAIN_S)
        except OSError as error:
            raise ConfigError(f"router.money.spool_dir: {directory} {error}") from error
        self._own = folder
        _sync_folder(directory)
        self._adopted: list[Folder] = []
        self._open: tuple[Path, int] | None = None

    def append(self, record: bytes) -> None:
        """Write a record that nothing can lose once this has returned. OSError if it cannot be."""
        line = line_of(record)
        segment, file = self._open or self._new_segment()
        try:
            written = os.write(file, line)
            if written != len(line):
                raise OSError(f"{segment}: only {written} of {len(line)} bytes were written")
            crash_point("spool.before_fsync")
            os.fsync(file)
        except OSError:
            # What is in this segment's last line is unknown: what comes next gets a new one.
            self._close_segment()
            raise
        crash_point("spool.after_fsync")

    def adopt(self) -> None:
        """Take over the folders of routers that are no more."""
        taken = {folder.path for folder in (self._own, *self._adopted)}
        for path in sorted(self._directory.iterdir()):
            if path in taken or not (path / _LOCK).exists():
                continue
            if (folder := Folder.take(path)) is not None:
                logger.warning("adopting the spool of %s", path.name)
                self._adopted.append(folder)

    def closed_segments(self) -> list[Path]:
        """Every segment that is to be replayed, oldest first; new records go to new ones."""
        self._close_segment()
        return [path for folder in (*self._adopted, self._own) for path in folder.segments()]

    def read(self, segment: Path) -> list[bytes]:
        """The records of a segment; what is torn or damaged is reported, and damage kept."""
        content = segment.read_bytes()
        found = parse(content)
        if found.torn:
            logger.warning("spool %s ends in a torn record, which nobody was told of", segment)
        if found.damaged:
            logger.error("spool %s has %d damaged records", segment, found.damaged)
            segment.with_suffix(_DAMAGED).write_bytes(content)
        return list(found.records)

    def remove(self, segment: Path) -> None:
        """All of the segment has been settled."""
        segment.unlink()
        _sync_folder(segment.parent)

    def release_adopted(self) -> None:
        """Give back the folders whose segments are all settled."""
        for folder in list(self._adopted):
            if not folder.segments():
                self._adopted.remove(folder)
                folder.give_back()

    def close(self) -> None:
        """Give every folder back; what is left in them is another router's to settle."""
        self._close_segment()
        for folder in (self._own, *self._adopted):
            folder.give_back()
        self._adopted.clear()

    def _new_segment(self) -> tuple[Path, int]:
        last = max((int(path.stem) for path in self._own.segments()), default=0)
        path = self._own.path / f"{last + 1:012d}{_SUFFIX}"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._open = (path, file)
        _sync_folder(self._own.path)
        return self._open

    def _close_segment(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None


def _sync_folder(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
