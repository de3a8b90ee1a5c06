"""CacheService over a worker's own pool: what other workers may reuse of it."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

import grpc.aio

from tidemill.api.cache.v1 import cache_service_pb2 as pb
from tidemill.api.cache.v1.cache_service_pb2_grpc import (
    CacheServiceServicer,
    add_CacheServiceServicer_to_server,
)
from tidemill.blocks import root_hash
from tidemill.errors import PermissionDenied
from tidemill.kv.cache_client import digest
from tidemill.kv.segments import to_bytes
from tidemill.kv.threads import in_thread, one_ahead
from tidemill.kv.wire import Wire, fetch_responses, serve_fetches
from tidemill.rpc.interceptors import Context
from tidemill.rpc.validation import validate
from tidemill.worker.worker import Worker

MOST_FETCHES = 4  # at once; whoever comes then gets no block, and computes


class PeerService(CacheServiceServicer):
    """Serves LookupBlocks and FetchBlocks from the device and host tiers.

    A block is found only under its chain hash, and only if the chain hangs on the root that the
    stated scope and this worker's model and layout give (C1). Nothing is stored here.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._pool = worker.engine.pool
        self._layout = worker.engine.layout

    async def LookupBlocks(
        self, request: pb.LookupBlocksRequest, context: Context
    ) -> pb.LookupBlocksResponse:
        """How much of the chain lies here."""
        validate(request)
        root = self._root(request.namespace)
        num_held = 0
        if root is not None and not self._worker.draining:
            num_held = len(self._pool.locate(request.block_hashes, root=root))
        return pb.LookupBlocksResponse(
            tiers=[pb.CACHE_TIER_PEER] * num_held, total_bytes=num_held * self._layout.block_bytes
        )

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Serve; FetchBlocks' messages as they are."""
        add_CacheServiceServicer_to_server(self, server)
        serve_fetches(server, self.FetchBlocks)

    async def FetchBlocks(  # type: ignore[override]  # serialized already: add_to_server
        self, request: pb.FetchBlocksRequest, context: Context
    ) -> AsyncIterator[Wire]:
        """Blocks in the order asked, up to the first that is no longer here."""
        validate(request)
        root = self._root(request.namespace)
        worker = self._worker
        if root is None or worker.draining or worker.num_serving >= MOST_FETCHES:
            return
        worker.num_serving += 1
        try:
            async with aclosing(self._stream(request.block_hashes, root)) as responses:
                async for response in responses:
                    yield response
        finally:
            worker.num_serving -= 1

    async def StoreBlocks(
        self, request_iterator: AsyncIterator[pb.StoreBlocksRequest], context: Context
    ) -> pb.StoreBlocksResponse:
        """Nobody's to call."""
        raise PermissionDenied("a worker stores no blocks for others")

    async def GetCacheStats(
        self, request: pb.GetCacheStatsRequest, context: Context
    ) -> pb.GetCacheStatsResponse:
        """Nobody's to call."""
        raise PermissionDenied("a worker keeps no statistics of tenants")

    async def _stream(self, hashes: Sequence[bytes], root: bytes) -> AsyncGenerator[Wire, None]:
        async with aclosing(one_ahead(self._payloads(hashes, root))) as payloads:
            async for block_hash, payload, payload_sha256 in payloads:
                tier = pb.CACHE_TIER_PEER
                for response in fetch_responses(block_hash, payload, payload_sha256, tier):
                    yield response
                self._worker.metrics.peer_served_blocks.inc()

    async def _payloads(
        self, hashes: Sequence[bytes], root: bytes
    ) -> AsyncGenerator[tuple[bytes, bytes, bytes], None]:
        """(hash, payload, its SHA-256) of the blocks, up to the first that is not here."""
        for block_hash in hashes:
            payload = await in_thread(self._read, block_hash, root)
            if payload is None:
                return
            yield block_hash, payload, await digest(payload)

    def _read(self, block_hash: bytes, root: bytes) -> bytes | None:
        values = self._pool.read_committed(block_hash, root)
        return None if values is None else to_bytes(values)

    def _root(self, namespace: pb.BlockNamespace) -> bytes | None:
        """What the scope's chains hang on here; None for blocks of another layout or model."""
        layout = self._layout
        if namespace.layout_fingerprint != layout.fingerprint():
            return None
        return root_hash(layout.model_digest, layout.kv_format, namespace.cache_scope)
