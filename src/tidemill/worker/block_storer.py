"""Stores computed blocks in the context cache, in the background and never in anyone's way."""

import asyncio
from collections import deque
from collections.abc import Sequence

from tidemill.engine import BlockPool
from tidemill.errors import CacheUnavailable, InvalidRequest
from tidemill.kv.cache_client import CacheClient, CacheNamespace
from tidemill.kv.segments import to_bytes
from tidemill.kv.threads import in_thread
from tidemill.worker.metrics import WorkerMetrics

BATCH_BLOCKS = 16


class BlockStorer:
    """A bounded queue of block hashes and the task that empties it.

    Queued blocks are not held: one that was evicted before its turn is dropped, as is what does
    not fit in the queue or finds the cache away. Drops are counted.
    """

    def __init__(
        self, pool: BlockPool, cache: CacheClient, *, max_blocks: int, metrics: WorkerMetrics
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._max_blocks = max_blocks
        self._metrics = metrics
        self._queue: deque[tuple[CacheNamespace, bytes]] = deque()
        self._filled = asyncio.Event()
        self.busy = False

    def __len__(self) -> int:
        return len(self._queue)

    def offer(self, namespace: CacheNamespace, hashes: Sequence[bytes]) -> None:
        """Queue committed blocks, as far as there is room."""
        room = self._max_blocks - len(self._queue)
        self._queue.extend((namespace, block_hash) for block_hash in hashes[:room])
        self._metrics.cache_dropped_blocks.inc(max(len(hashes) - room, 0))
        self._filled.set()

    async def run(self) -> None:
        """Store until cancelled."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            while self._queue:
                self.busy = True
                try:
                    await self._store(*self._next_batch())
                finally:
                    self.busy = False

    def _next_batch(self) -> tuple[CacheNamespace, list[bytes]]:
        namespace, block_hash = self._queue.popleft()
        hashes = [block_hash]
        while self._queue and len(hashes) < BATCH_BLOCKS and self._queue[0][0] == namespace:
            hashes.append(self._queue.popleft()[1])
        return namespace, hashes

    async def _store(self, namespace: CacheNamespace, hashes: list[bytes]) -> None:
        payloads = await in_thread(self._read, hashes)
        self._metrics.cache_dropped_blocks.inc(len(hashes) - len(payloads))
        try:
            await self._cache.store(namespace, payloads)
        except (CacheUnavailable, InvalidRequest):
            self._metrics.cache_errors.labels("store").inc()
            self._metrics.cache_dropped_blocks.inc(len(payloads))
        else:
            self._metrics.cache_stored_blocks.inc(len(payloads))

    def _read(self, hashes: list[bytes]) -> list[tuple[bytes, bytes]]:
        """Payloads of those blocks that the pool still holds, by hash."""
        found = [(block_hash, self._pool.read_committed(block_hash)) for block_hash in hashes]
        return [
            (block_hash, to_bytes(values)) for block_hash, values in found if values is not None
        ]
