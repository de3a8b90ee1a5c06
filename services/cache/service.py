"""CacheService: between the protos and the store, the index and the statistics."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from itertools import pairwise
from typing import Any

from services.cache.config import CacheConfig
from services.cache.index import BlockIndex, Location
from services.cache.intake import Arrival, Staging, arrivals, namespace_of
from services.cache.metrics import CacheMetrics
from services.cache.stats import Row, StatsBook
from services.cache.store import BlockStore, StoredBlock, namespace_digest
from tidemill.api.cache.v1 import cache_service_pb2 as pb
from tidemill.api.cache.v1.cache_service_pb2_grpc import CacheServiceServicer
from tidemill.api.common.v1.kv_pb2 import BlockPiece
from tidemill.kv.cache_client import INLINE_HASH_BYTES, digest
from tidemill.kv.pieces import split
from tidemill.rpc.validation import validate

SERVICE = "tidemill.api.cache.v1.CacheService"
WORKERS = frozenset({"prefill", "decode", "worker"})
ALLOWED_ROLES = {
    f"/{SERVICE}/LookupBlocks": WORKERS,
    f"/{SERVICE}/FetchBlocks": WORKERS,
    f"/{SERVICE}/StoreBlocks": WORKERS,
    f"/{SERVICE}/GetCacheStats": WORKERS | {"router"},
}
MAX_STATS_ROWS = 10_000

logger = logging.getLogger(__name__)

Context = Any  # grpc.aio.ServicerContext; unused here, errors are raised


class CacheServicer(CacheServiceServicer):
    """The context cache of one node. `index` is None where no Redis is configured."""

    def __init__(
        self,
        config: CacheConfig,
        store: BlockStore,
        index: BlockIndex | None,
        stats: StatsBook,
        metrics: CacheMetrics,
    ) -> None:
        self._max_block_bytes = config.max_block_bytes
        self.staging = Staging(config.staging_bytes)
        self._store = store
        self._index = index
        self._stats = stats
        self._metrics = metrics

    async def LookupBlocks(
        self, request: pb.LookupBlocksRequest, context: Context
    ) -> pb.LookupBlocksResponse:
        """The chain's held start: here, or at nodes that the index names."""
        validate(request)
        hashes = request.block_hashes
        located = await self._locate(_digest(request.namespace), hashes)
        row = _row(request.namespace)
        self._stats.count(row, "queried", len(hashes))
        self._stats.count(row, "found", len(located))
        self._metrics.hits.inc(len(located))
        self._metrics.misses.inc(len(hashes) - len(located))
        return pb.LookupBlocksResponse(
            tiers=[pb.CacheTier.ValueType(each.tier) for each in located],
            total_bytes=sum(each.num_bytes for each in located),
            holders=_runs(located),
        )

    async def FetchBlocks(
        self, request: pb.FetchBlocksRequest, context: Context
    ) -> AsyncGenerator[pb.FetchBlocksResponse, None]:
        """Payloads from this node's memory, each verified before its first piece leaves."""
        validate(request)
        namespace, row = _digest(request.namespace), _row(request.namespace)
        self._store.touch_chain(namespace, request.block_hashes)
        ahead: asyncio.Task[StoredBlock | None] | None = None
        try:
            for block_hash, following in pairwise([*request.block_hashes, b""]):
                block = await (ahead or self._sound(namespace, block_hash, row))
                if block is None:
                    return
                # While a large block is sent, the next one is verified.
                ahead = None
                if following and len(block.payload) >= INLINE_HASH_BYTES:
                    ahead = asyncio.create_task(self._sound(namespace, following, row))
                for piece in split(block_hash, block.payload, block.payload_sha256):
                    yield pb.FetchBlocksResponse(piece=piece, tier=pb.CACHE_TIER_RAM)
                self._delivered(row, block)
        finally:
            if ahead is not None:
                ahead.cancel()

    async def StoreBlocks(
        self, request_iterator: AsyncIterator[pb.StoreBlocksRequest], context: Context
    ) -> pb.StoreBlocksResponse:
        """Whole, verified blocks go into memory; those held already are skipped."""
        named = await namespace_of(request_iterator)
        namespace, row = _digest(named), _row(named)
        chain: dict[bytes, None] = {}
        stored = 0
        blocks = arrivals(
            request_iterator,
            self.staging,
            wanted=self._wants,
            max_block_bytes=self._max_block_bytes,
        )
        try:
            async for arrival in blocks:
                stored += self._keep(namespace, arrival, chain)
                chain[arrival.block_hash] = None
        finally:
            await blocks.aclose()
            self._store.touch_chain(namespace, list(chain))
            self._stats.count(row, "stored", stored)
            self._metrics.stored.inc(stored)
            self._metrics.skipped.inc(len(chain) - stored)
        return pb.StoreBlocksResponse(stored_blocks=stored, skipped_blocks=len(chain) - stored)

    async def GetCacheStats(
        self, request: pb.GetCacheStatsRequest, context: Context
    ) -> pb.GetCacheStatsResponse:
        """Counters of all nodes, and how full this one is."""
        validate(request)
        tenant_id = request.tenant_id if request.HasField("tenant_id") else None
        rows = await self._stats.rows(tenant_id)
        answer = pb.GetCacheStatsResponse(
            ram_bytes=self._store.num_bytes,
            ram_capacity_bytes=self._store.capacity_bytes,
            ram_blocks=len(self._store),
        )
        for (tenant, model), counts in list(rows.items())[:MAX_STATS_ROWS]:
            fields = {f"{counter}_blocks": number for counter, number in counts.items()}
            answer.stats.add(tenant_id=tenant, model=model, **fields)
        return answer

    async def _locate(self, namespace: bytes, hashes: Sequence[bytes]) -> list[Location]:
        """Locations from the chain's start on, up to the first block that nobody holds."""
        here = [self._location_here(namespace, each) for each in hashes]
        start = here.index(None) if None in here else len(here)
        if self._index is not None and start < len(here):
            elsewhere = await self._index.find(namespace, hashes[start:])
            here[start:] = [
                mine or other for mine, other in zip(here[start:], elsewhere, strict=True)
            ]
        located = []
        for each in here:
            if each is None:
                break
            located.append(each)
        return located

    def _location_here(self, namespace: bytes, block_hash: bytes) -> Location | None:
        block = self._store.peek(namespace, block_hash)
        return None if block is None else Location("", pb.CACHE_TIER_RAM, len(block.payload))

    async def _sound(self, namespace: bytes, block_hash: bytes, row: Row) -> StoredBlock | None:
        """The block if it is here and as it was stored; a corrupt one is dropped."""
        block = self._store.peek(namespace, block_hash)
        cause = "missing"
        if block is not None:
            if await digest(block.payload) == block.payload_sha256:
                return block
            cause = "corrupt"
            logger.warning("dropped a corrupt block", extra={"block": block_hash.hex()})
            if self._store.drop(block_hash, block):
                self._note_gone(block_hash)
        self._stats.count(row, "failed")
        self._metrics.failed.labels(cause).inc()
        return None

    def _delivered(self, row: Row, block: StoredBlock) -> None:
        self._stats.count(row, "delivered")
        self._metrics.delivered.inc()
        self._metrics.delivered_bytes.inc(len(block.payload))

    def _wants(self, first: BlockPiece) -> bool:
        return first.block_hash not in self._store and self._store.fits(first.total_bytes)

    def _keep(self, namespace: bytes, arrival: Arrival, chain: dict[bytes, None]) -> bool:
        """Whether the block was stored. Earlier blocks of its chain do not go for it."""
        if arrival.payload is None:
            return False
        block = StoredBlock(namespace, arrival.payload, arrival.payload_sha256)
        put = self._store.put(arrival.block_hash, block, spare=chain)
        self._metrics.evictions.inc(len(put.evicted))
        for each in put.evicted:
            self._note_gone(each)
        if put.taken:
            self._metrics.stored_bytes.inc(len(arrival.payload))
            if self._index is not None:
                self._index.stored(arrival.block_hash, namespace, len(arrival.payload))
        return put.taken

    def _note_gone(self, block_hash: bytes) -> None:
        if self._index is not None:
            self._index.gone(block_hash)


def _digest(namespace: pb.BlockNamespace) -> bytes:
    return namespace_digest(namespace.cache_scope, namespace.layout_fingerprint)


def _row(namespace: pb.BlockNamespace) -> Row:
    return namespace.tenant_id, namespace.model


def _runs(located: Sequence[Location]) -> list[pb.BlockHolder]:
    """Holders as runs; none at all where this node holds every block."""
    runs: list[pb.BlockHolder] = []
    for each in located:
        if not runs or runs[-1].address != each.address:
            runs.append(pb.BlockHolder(address=each.address))
        runs[-1].num_blocks += 1
    return [] if all(run.address == "" for run in runs) else runs
