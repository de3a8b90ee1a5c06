"""The disk tier: blocks that memory let go, bounded in bytes, least recently used first to go.

Which blocks are there is known in memory, so a lookup never waits for the disk. Files are read by
a few threads and written and removed by one, in the order in which that was decided. A disk that
fails is left alone for a while: its blocks count as not held, and nobody waits for it.
"""

import asyncio
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from services.cache.disk_files import NUM_FOLDERS, BlockFolder, Cause, Header, file_bytes
from services.cache.store import StoredBlock
from tidemill.kv.breaker import Breaker
from tidemill.rpc import tasks

logger = logging.getLogger(__name__)

NUM_READERS = 4
QUEUE_BYTES = 64 << 20  # payloads that wait to be written; one block always may
SCAN_FOLDERS = 16  # at a time
PAUSE_S = 1.0
MOST_PAUSE_S = 30.0
STUCK_S = 10.0  # a write that takes longer: the disk hangs
FLUSH_S = 5.0  # for writing down what memory holds, at the end


class DiskEvents(Protocol):
    """Whom the tier tells what has become of blocks; called on the event loop."""

    def kept(self, header: Header) -> None:
        """The block is on disk now."""

    def lost(self, header: Header) -> None:
        """The tier no longer has the block, or never came to write it."""

    def fault(self, cause: Cause, number: int = 1) -> None:
        """So many blocks could not be read, written or queued."""


@dataclass
class _Kept:
    header: Header
    used_at_ns: int


class DiskTier:
    """Blocks on disk, by hash. For one event loop, from start() to close()."""

    def __init__(
        self,
        folder: BlockFolder,
        capacity_bytes: int,
        events: DiskEvents,
        *,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self.num_evicted = 0
        self.scanned = False
        self._folder = folder
        self._events = events
        self._timeout_s = timeout_s
        self._clock = clock
        self._reads = Breaker(PAUSE_S, MOST_PAUSE_S, clock=clock)
        self._writes = Breaker(PAUSE_S, MOST_PAUSE_S, clock=clock)
        self._readers = ThreadPoolExecutor(NUM_READERS, "disk-read")
        self._writer = ThreadPoolExecutor(1, "disk-write")
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._taken_bytes = 0
        self._waiting: dict[bytes, StoredBlock] = {}
        self._waiting_bytes = 0
        self._filled = asyncio.Event()
        self._writing_since: float | None = None
        self._last_ns = 0
        self._work: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_waiting(self) -> int:
        """Blocks that are queued or being written."""
        return len(self._waiting)

    @property
    def up(self) -> bool:
        """Whether the disk did what was last asked of it."""
        return self._reads.closed and self._writes.closed and not self._stuck

    @property
    def failure(self) -> str | None:
        """Why the tier works no more; None while it does, whatever the disk does."""
        return "the disk tier has failed" if self._work is not None and self._work.done() else None

    async def start(self) -> None:
        """Take the folder and begin to learn what lies there. Raises ConfigError.

        All readers are there from now on: one that first came under some later load would look like
        a leak, with the memory that its thread keeps.
        """
        await asyncio.to_thread(self._folder.open)
        loop, all_there = asyncio.get_running_loop(), threading.Barrier(NUM_READERS)
        readers = (loop.run_in_executor(self._readers, all_there.wait) for _ in range(NUM_READERS))
        await asyncio.gather(*readers)
        self._work = asyncio.create_task(self._run(), name="disk tier")

    async def close(self, remaining: Iterable[tuple[bytes, StoredBlock]] = ()) -> None:
        """Write down `remaining`, the most recently used last, as far as there is time; let go."""
        sound = self.failure is None
        if self._work is not None:
            await tasks.end(self._work)
            await asyncio.gather(self._work, return_exceptions=True)  # it was logged
        if self.scanned and sound and not self._stuck:
            await self._flush([*self._waiting.items(), *remaining])
        for executor in (self._readers, self._writer):
            executor.shutdown(wait=not self._stuck, cancel_futures=self._stuck)
        self._folder.close()

    def peek(self, namespace: bytes, block_hash: bytes) -> StoredBlock | Header | None:
        """What `read` would find: a block that still waits to be written, or a file's header."""
        waiting = self._waiting.get(block_hash)
        if waiting is not None:
            return waiting if waiting.namespace == namespace else None
        kept = self._kept.get(block_hash)
        if kept is None or kept.header.namespace != namespace or self._reads.retry_after_s() > 0:
            return None
        return kept.header

    def holds(self, block_hash: bytes) -> bool:
        """Whether the block needs no writing, whoever stored it."""
        return block_hash in self._waiting or block_hash in self._kept

    def serves(self, block_hash: bytes) -> bool:
        """Whether `read` would find the block, whoever stored it, the disk being well."""
        on_disk = block_hash in self._kept and self._reads.retry_after_s() == 0
        return on_disk or block_hash in self._waiting

    def header(self, block_hash: bytes) -> Header | None:
        """What is known of a block that is here or soon will be."""
        kept, waiting = self._kept.get(block_hash), self._waiting.get(block_hash)
        if kept is not None:
            return kept.header
        return None if waiting is None else _header(block_hash, waiting)

    def headers(self) -> list[Header]:
        """All blocks on disk, the one used longest ago first."""
        return [each.header for each in self._kept.values()]

    def touch_chain(self, namespace: bytes, block_hashes: Sequence[bytes]) -> None:
        """Count a chain's blocks as used now, its end first to go."""
        for block_hash in reversed(block_hashes):
            kept = self._kept.get(block_hash)
            if kept is not None and kept.header.namespace == namespace:
                kept.used_at_ns = self._now_ns()
                self._kept.move_to_end(block_hash)

    def fits(self, num_bytes: int) -> bool:
        """Whether a payload of that size can ever be held."""
        return file_bytes(num_bytes) <= self.capacity_bytes

    def offer(self, block_hash: bytes, block: StoredBlock) -> bool:
        """Queue a block to be written, unless it is here; False, and counted, if it will not be."""
        if self.holds(block_hash):
            self._use(block.namespace, block_hash)
            return True
        header = _header(block_hash, block)
        if not self.fits(header.num_bytes):
            return False
        if self._writes.retry_after_s() > 0:
            self._events.fault(Cause.PAUSED)
            return False
        if self._waiting and self._waiting_bytes + header.num_bytes > QUEUE_BYTES:
            self._events.fault(Cause.QUEUE)
            return False
        self._waiting[block_hash] = block
        self._waiting_bytes += header.num_bytes
        self._filled.set()
        return True

    async def read(self, namespace: bytes, block_hash: bytes) -> StoredBlock | Cause | None:
        """A block from its file, verified; None if it is not held or the disk is being paused.

        A block that cannot be read is forgotten, and its Cause returned.
        """
        kept = self._kept.get(block_hash)
        if kept is None or kept.header.namespace != namespace or not self._reads.admits():
            return None
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._readers, self._folder.read, kept.header, kept.used_at_ns)
        done, _ = await asyncio.wait([work], timeout=self._timeout_s)
        outcome = work.result() if done else Cause.SLOW
        if isinstance(outcome, bytes):
            self._reads.succeeded()
            return StoredBlock(namespace, outcome, kept.header.payload_sha256)
        if outcome.is_block:
            self._reads.succeeded()
        else:
            self._failed(self._reads, "read", outcome)
        if self._kept.get(block_hash) is not kept:  # it had to go meanwhile
            return None
        self._events.fault(outcome)
        if outcome is Cause.FOLDER:
            self._forget_all()
        elif outcome is not Cause.SLOW:
            self._forget(block_hash)
            self._writer.submit(self._folder.remove, block_hash)
        return outcome

    def check_integrity(self) -> None:
        """Raises AssertionError unless the sizes add up and the bound holds."""
        headers = self.headers()
        assert self.num_bytes == sum(each.num_bytes for each in headers)
        assert self._taken_bytes == sum(each.file_bytes for each in headers)
        assert self._waiting_bytes == sum(len(each.payload) for each in self._waiting.values())
        assert not self.scanned or self._taken_bytes <= self.capacity_bytes

    async def _run(self) -> None:
        """Learn what is there, then write what comes. Its failure is logged and fails readiness."""
        try:
            await self._scan()
            while True:
                await self._filled.wait()
                self._filled.clear()
                while self._waiting:
                    block_hash, block = next(iter(self._waiting.items()))
                    await self._keep(_header(block_hash, block), block.payload, self._now_ns())
                    del self._waiting[block_hash]
                    self._waiting_bytes -= len(block.payload)
                    if block_hash not in self._kept:
                        self._events.lost(_header(block_hash, block))
        except Exception:
            logger.exception("the disk tier has failed: it is no longer written")
            raise

    async def _scan(self) -> None:
        """Find the blocks of earlier lives, and let those go that no longer fit."""
        loop = asyncio.get_running_loop()
        begun = self._clock()
        faults: Counter[Cause] = Counter()
        for start in range(0, NUM_FOLDERS, SCAN_FOLDERS):
            numbers = range(start, start + SCAN_FOLDERS)
            found, causes = await loop.run_in_executor(self._writer, self._folder.scan, numbers)
            faults.update(causes)
            for header, used_at_ns in found:
                self._remember(header, used_at_ns)
        self._kept = OrderedDict(sorted(self._kept.items(), key=lambda each: each[1].used_at_ns))
        for victim in self._make_room(0):
            await loop.run_in_executor(self._writer, self._folder.remove, victim)
        self.scanned = True
        for cause, number in faults.items():
            self._events.fault(cause, number)
        seconds = round(self._clock() - begun, 3)
        details = {"blocks": len(self), "unusable": faults.total(), "seconds": seconds}
        logger.info("disk scanned", extra=details)

    async def _keep(self, header: Header, payload: bytes, used_at_ns: int) -> Cause | None:
        """Write one block; None if it is on disk now."""
        if not self._writes.admits():
            self._events.fault(Cause.PAUSED)
            return Cause.PAUSED
        victims = self._make_room(header.file_bytes)
        self._writing_since = self._clock()
        loop = asyncio.get_running_loop()
        cause = await loop.run_in_executor(
            self._writer, self._replace, victims, header, payload, used_at_ns
        )
        self._writing_since = None
        if cause is None:
            self._writes.succeeded()
            self._remember(header, used_at_ns)
            return None
        self._events.fault(cause)
        self._failed(self._writes, "write", cause)
        if cause is Cause.FOLDER:
            self._forget_all()
        if cause is Cause.FULL:  # others fill this disk too: give way
            spare = self.capacity_bytes - self._taken_bytes + 2 * header.file_bytes
            for victim in self._make_room(spare):
                await loop.run_in_executor(self._writer, self._folder.remove, victim)
        return cause

    @property
    def _stuck(self) -> bool:
        """Whether a write has been hanging for long."""
        since = self._writing_since
        return since is not None and self._clock() - since > STUCK_S

    def _use(self, namespace: bytes, block_hash: bytes) -> None:
        """Count a block as used now, beyond this life too."""
        self.touch_chain(namespace, [block_hash])
        kept = self._kept.get(block_hash)
        if kept is not None and self.up:
            self._writer.submit(self._folder.touch, block_hash, kept.used_at_ns)

    def _replace(
        self, victims: list[bytes], header: Header, payload: bytes, used_at_ns: int
    ) -> Cause | None:
        for victim in victims:
            self._folder.remove(victim)
        return self._folder.write(header, payload, used_at_ns)

    async def _flush(self, blocks: list[tuple[bytes, StoredBlock]]) -> None:
        """The last blocks first, so that what there is no time for is what was used longest ago."""
        end = self._clock() + FLUSH_S
        newest_ns = self._now_ns()
        room = self.capacity_bytes
        for block_hash, _ in blocks:
            if block_hash in self._kept:
                self._kept.move_to_end(block_hash)
        for age, (block_hash, block) in enumerate(reversed(blocks)):
            header = _header(block_hash, block)
            room -= header.file_bytes
            if room < 0 or self._clock() > end:
                break
            if block_hash in self._kept:
                continue
            if await self._keep(header, block.payload, newest_ns - age) is not None:
                break

    def _make_room(self, num_bytes: int) -> list[bytes]:
        """Hashes of the oldest blocks, forgotten here so that `num_bytes` more will fit."""
        victims = []
        while self._kept and self._taken_bytes + num_bytes > self.capacity_bytes:
            victims.append(next(iter(self._kept)))
            self._forget(victims[-1])
        self.num_evicted += len(victims)
        return victims

    def _remember(self, header: Header, used_at_ns: int) -> None:
        self._kept[header.block_hash] = _Kept(header, used_at_ns)
        self.num_bytes += header.num_bytes
        self._taken_bytes += header.file_bytes
        self._events.kept(header)

    def _forget(self, block_hash: bytes) -> None:
        header = self._kept.pop(block_hash).header
        self.num_bytes -= header.num_bytes
        self._taken_bytes -= header.file_bytes
        self._events.lost(header)

    def _forget_all(self) -> None:
        for block_hash in list(self._kept):
            self._forget(block_hash)

    def _failed(self, breaker: Breaker, what: str, cause: Cause) -> None:
        if breaker.closed:
            details = {"failed": what, "cause": cause, "folder": str(self._folder.root)}
            logger.warning("the disk tier pauses", extra=details)
        breaker.failed()

    def _now_ns(self) -> int:
        """The time, later with every call."""
        self._last_ns = max(time.time_ns(), self._last_ns + 1)
        return self._last_ns


def _header(block_hash: bytes, block: StoredBlock) -> Header:
    return Header(block_hash, block.namespace, len(block.payload), block.payload_sha256)
