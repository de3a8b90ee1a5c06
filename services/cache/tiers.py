"""The tiers of one node: memory, the disk under it, and what the index is told of both."""

import logging
from collections.abc import Collection, Iterator, Sequence

from services.cache.disk import DiskTier
from services.cache.disk_files import Cause, Header
from services.cache.index import BlockIndex, Holding, Location
from services.cache.metrics import CacheMetrics
from services.cache.store import BlockStore, StoredBlock
from tidemill.api.cache.v1.cache_service_pb2 import (
    CACHE_TIER_DISK,
    CACHE_TIER_RAM,
    CacheTier,
)
from tidemill.kv.cache_client import digest

logger = logging.getLogger(__name__)


class CacheTiers:
    """Blocks of one node wherever they lie. Memory's evictions go to disk, disk's hits to memory.

    A block that was read from disk stays there, so that it costs nothing when memory lets it go
    again. `disk` and `index` are set once, before anything is served; None where there is none.
    """

    def __init__(self, store: BlockStore, metrics: CacheMetrics) -> None:
        self.store = store
        self.disk: DiskTier | None = None
        self.index: BlockIndex | None = None
        self._metrics = metrics

    def locate(self, namespace: bytes, block_hash: bytes) -> Location | None:
        """Where on this node a block lies."""
        block = self._in_memory(namespace, block_hash)
        if block is not None:
            return Location("", CACHE_TIER_RAM, len(block.payload))
        header = None if self.disk is None else self.disk.peek(namespace, block_hash)
        if not isinstance(header, Header):
            return None
        return Location("", CACHE_TIER_DISK, header.num_bytes)

    def holds(self, block_hash: bytes) -> bool:
        """Whether there is no need to store a block, whoever did it before."""
        return block_hash in self.store or (self.disk is not None and self.disk.serves(block_hash))

    def holdings(self) -> Iterator[Holding]:
        """All blocks of this node, for the index."""
        for block_hash, block in self.store:
            yield _in_ram(block_hash, block)
        for header in [] if self.disk is None else self.disk.headers():
            if header.block_hash not in self.store:
                yield _on_disk(header)

    def touch_chain(self, namespace: bytes, block_hashes: Sequence[bytes]) -> None:
        """Count a chain's blocks as used now, its end first to go."""
        self.store.touch_chain(namespace, block_hashes)
        if self.disk is not None:
            self.disk.touch_chain(namespace, block_hashes)

    def fits(self, num_bytes: int) -> bool:
        """Whether a payload of that size can ever be held."""
        disk = self.disk
        return self.store.fits(num_bytes) or (disk is not None and disk.fits(num_bytes))

    def put(self, block_hash: bytes, block: StoredBlock, *, spare: Collection[bytes]) -> bool:
        """Hold a block: in memory, or on disk where memory has no room but that of `spare`."""
        if self._take(block_hash, block, spare):
            return True
        return not self.holds(block_hash) and self._offer(block_hash, block)

    async def read(
        self, namespace: bytes, block_hash: bytes, *, spare: Collection[bytes]
    ) -> tuple[StoredBlock, CacheTier.ValueType] | str:
        """The block as it was stored and the tier it lay in, or why it cannot be delivered.

        What is not as it was stored is dropped. A block from disk is then held in memory too, if
        no block of `spare` has to go for it.
        """
        cause = "missing"
        block = self._in_memory(namespace, block_hash)
        if block is not None:
            if await digest(block.payload) == block.payload_sha256:
                return block, CACHE_TIER_RAM
            cause = "corrupt"
            logger.warning("dropped a corrupt block", extra={"block": block_hash.hex()})
            if self.store.drop(block_hash, block):
                self._left_memory(block_hash)
        if self.disk is None:
            return cause
        found = await self.disk.read(namespace, block_hash)
        if not isinstance(found, StoredBlock):
            return cause if found is None else found.value
        if self._take(block_hash, found, spare):
            self._metrics.promoted.inc()
        return found, CACHE_TIER_DISK

    def kept(self, header: Header) -> None:
        """The disk now has a block."""
        if self.index is not None and header.block_hash not in self.store:
            self.index.stored(_on_disk(header))

    def lost(self, header: Header) -> None:
        """The disk no longer has a block."""
        if self.index is not None and header.block_hash not in self.store:
            self.index.gone(header.block_hash)

    def fault(self, cause: Cause, number: int = 1) -> None:
        """The disk failed a block."""
        self._metrics.disk_faults.labels(cause.value).inc(number)

    def _in_memory(self, namespace: bytes, block_hash: bytes) -> StoredBlock | None:
        block = self.store.peek(namespace, block_hash)
        if block is None and self.disk is not None:
            waiting = self.disk.peek(namespace, block_hash)
            block = waiting if isinstance(waiting, StoredBlock) else None
        return block

    def _take(self, block_hash: bytes, block: StoredBlock, spare: Collection[bytes]) -> bool:
        """Hold a block in memory; what has to go for it goes to disk."""
        put = self.store.put(block_hash, block, spare=spare)
        self._metrics.evictions.inc(len(put.evicted))
        for evicted_hash, evicted in put.evicted:
            self._offer(evicted_hash, evicted)
            self._left_memory(evicted_hash)
        if put.taken and self.index is not None:
            self.index.stored(_in_ram(block_hash, block))
        return put.taken

    def _offer(self, block_hash: bytes, block: StoredBlock) -> bool:
        return self.disk is not None and self.disk.offer(block_hash, block)

    def _left_memory(self, block_hash: bytes) -> None:
        """Tell the index where the block lies now, if anywhere."""
        if self.index is None:
            return
        header = None if self.disk is None else self.disk.header(block_hash)
        if header is None:
            self.index.gone(block_hash)
        else:
            self.index.stored(_on_disk(header))


def _in_ram(block_hash: bytes, block: StoredBlock) -> Holding:
    return Holding(block_hash, block.namespace, len(block.payload), CACHE_TIER_RAM)


def _on_disk(header: Header) -> Holding:
    return Holding(header.block_hash, header.namespace, header.num_bytes, CACHE_TIER_DISK)
