"""CacheService: between the protos and the store, the index and the statistics."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import grpc.aio

from services.cache.config import CacheConfig
from services.cache.index import Location
from services.cache.intake import Arrival, Staging, arrivals, namespace_of
from services.cache.metrics import CacheMetrics
from services.cache.stats import Row, StatsBook
from services.cache.store import StoredBlock, namespace_digest
from services.cache.tiers import CacheTiers
from tidemill.api.cache.v1 import cache_service_pb2 as pb
from tidemill.api.cache.v1.cache_service_pb2_grpc import (
    CacheServiceServicer,
    add_CacheServiceServicer_to_server,
)
from tidemill.api.common.v1.kv_pb2 import BlockPiece
from tidemill.kv.cache_client import INLINE_HASH_BYTES
from tidemill.kv.wire import Wire, fetch_responses, serve_fetches
from tidemill.rpc.validation import validate

SERVICE = "tidemill.api.cache.v1.CacheService"
WORKERS = frozenset({"prefill", "decode"})
ALLOWED_ROLES = {
    f"/{SERVICE}/LookupBlocks": WORKERS,
    f"/{SERVICE}/FetchBlocks": WORKERS,
    f"/{SERVICE}/StoreBlocks": WORKERS,
    f"/{SERVICE}/GetCacheStats": WORKERS | {"router"},
}
MAX_STATS_ROWS = 10_000

Context = Any  # grpc.aio.ServicerContext; unused here, errors are raised
_Sound = tuple[StoredBlock, pb.CacheTier.ValueType]


class CacheServicer(CacheServiceServicer):
    """The context cache of one node."""

    def __init__(
        self,
        config: CacheConfig,
        tiers: CacheTiers,
        stats: StatsBook,
        metrics: CacheMetrics,
    ) -> None:
        self._max_block_bytes = config.max_block_bytes
        self.staging = Staging(config.staging_bytes)
        self._tiers = tiers
        self._stats = stats
        self._metrics = metrics

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Serve; FetchBlocks' messages as they are."""
        add_CacheServiceServicer_to_server(self, server)
        serve_fetches(server, self.FetchBlocks)

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

    async def FetchBlocks(  # type: ignore[override]  # serialized already: add_to_server
        self, request: pb.FetchBlocksRequest, context: Context
    ) -> AsyncGenerator[Wire, None]:
        """Payloads from this node's tiers, each verified before its first piece leaves."""
        validate(request)
        hashes = request.block_hashes
        self._tiers.touch_chain(_digest(request.namespace), hashes)
        chain, row = frozenset(hashes), _row(request.namespace)
        read = partial(self._sound, request.namespace, chain)
        ahead: asyncio.Task[_Sound | None] | None = None
        try:
            for block_hash, following in pairwise([*hashes, b""]):
                found = await (ahead or read(block_hash))
                if found is None:
                    return
                block, tier = found
                # While a large block is sent, the next one is read and verified.
                ahead = None
                slow = tier == pb.CACHE_TIER_DISK or len(block.payload) >= INLINE_HASH_BYTES
                if following and slow:
                    ahead = asyncio.create_task(read(following))
                sealed = block_hash, block.payload, block.payload_sha256
                for response in fetch_responses(*sealed, tier):
                    yield response
                self._delivered(row, block)
        finally:
            if ahead is not None:
                ahead.cancel()

    async def StoreBlocks(
        self, request_iterator: AsyncIterator[pb.StoreBlocksRequest], context: Context
    ) -> pb.StoreBlocksResponse:
        """Whole, verified blocks are kept; those held already are skipped."""
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
            self._tiers.touch_chain(namespace, list(chain))
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
        store, disk = self._tiers.store, self._tiers.disk
        answer = pb.GetCacheStatsResponse(
            ram_bytes=store.num_bytes,
            ram_capacity_bytes=store.capacity_bytes,
            ram_blocks=len(store),
        )
        if disk is not None:
            answer.disk_bytes = disk.num_bytes
            answer.disk_capacity_bytes = disk.capacity_bytes
            answer.disk_blocks = len(disk)
        for (tenant, model), counts in list(rows.items())[:MAX_STATS_ROWS]:
            fields = {f"{counter}_blocks": number for counter, number in counts.items()}
            answer.stats.add(tenant_id=tenant, model=model, **fields)
        return answer

    async def _locate(self, namespace: bytes, hashes: Sequence[bytes]) -> list[Location]:
        """Locations from the chain's start on, up to the first block that nobody holds."""
        index = self._tiers.index
        here = [self._tiers.locate(namespace, each) for each in hashes]
        start = here.index(None) if None in here else len(here)
        if index is not None and start < len(here):
            elsewhere = await index.find(namespace, hashes[start:])
            here[start:] = [
                mine or other for mine, other in zip(here[start:], elsewhere, strict=True)
            ]
        located = []
        for each in here:
            if each is None:
                break
            located.append(each)
        return located

    async def _sound(
        self, named: pb.BlockNamespace, chain: Collection[bytes], block_hash: bytes
    ) -> _Sound | None:
        """The block if it is here and as it was stored, and its tier; failures are counted."""
        found = await self._tiers.read(_digest(named), block_hash, spare=chain)
        if not isinstance(found, str):
            return found
        self._stats.count(_row(named), "failed")
        self._metrics.failed.labels(found).inc()
        return None

    def _delivered(self, row: Row, block: StoredBlock) -> None:
        self._stats.count(row, "delivered")
        self._metrics.delivered.inc()
        self._metrics.delivered_bytes.inc(len(block.payload))

    def _wants(self, first: BlockPiece) -> bool:
        tiers = self._tiers
        return not tiers.holds(first.block_hash) and tiers.fits(first.total_bytes)

    def _keep(self, namespace: bytes, arrival: Arrival, chain: dict[bytes, None]) -> bool:
        """Whether the block was stored. Earlier blocks of its chain do not go for it."""
        if arrival.payload is None:
            return False
        block = StoredBlock(namespace, arrival.payload, arrival.payload_sha256)
        taken = self._tiers.put(arrival.block_hash, block, spare=chain)
        if taken:
            self._metrics.stored_bytes.inc(len(arrival.payload))
        return taken


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
