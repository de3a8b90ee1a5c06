"""Client of the context cache service: what workers use to reuse and to share KV blocks.

    client = CacheClient(channel)
    async for block in client.fetch(namespace, hashes):
        ...                                   # block.index counts from 0 without gaps
    await client.store(namespace, [(block_hash, payload), ...])

A cache that is slow or gone must never cost more than it saves: every call has a short deadline,
and after a failure a breaker skips that node of the cache for a while.
"""

import asyncio
import enum
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import grpc
import grpc.aio

from tidemill.api.cache.v1 import cache_service_pb2 as pb
from tidemill.api.cache.v1.cache_service_pb2_grpc import CacheServiceStub
from tidemill.errors import CacheUnavailable, InvalidRequest
from tidemill.kv.breaker import Breaker
from tidemill.kv.pieces import HASH_BYTES, Assembly, sha256
from tidemill.kv.wire import Wire, store_call, store_requests
from tidemill.rpc.status import from_rpc_error

if TYPE_CHECKING:  # stands in the stub file only
    from tidemill.api.cache.v1.cache_service_pb2_grpc import CacheServiceAsyncStub

MAX_BLOCKS = 16384  # a chain's bound in the proto: one million tokens
INLINE_HASH_BYTES = 1 << 18  # below this a thread costs more than the hash


class CacheTier(enum.Enum):
    """Where outside of a worker a block lay; the values name the fields of PromptUsage."""

    RAM = "cache_ram"
    DISK = "cache_disk"
    PEER = "peer"


@dataclass(frozen=True)
class CacheNamespace:
    """Whose blocks, of which model. The first and last field are for statistics only.

    `cache_scope` is the salt of the scope, `layout_fingerprint` that of the KvLayout; 32 bytes
    each.
    """

    tenant_id: str
    cache_scope: bytes
    layout_fingerprint: bytes
    model: str

    def __post_init__(self) -> None:
        if len(self.cache_scope) != HASH_BYTES or len(self.layout_fingerprint) != HASH_BYTES:
            raise ValueError(f"cache_scope and layout_fingerprint must be {HASH_BYTES} bytes")


@dataclass(frozen=True)
class CacheClientConfig:
    """Seconds that the cache may cost before the caller computes instead, and bounds.

    `stall_s` is the longest wait for a fetch's next piece, `fetch_s` and `store_s` bound the
    whole call. After a failure the node is skipped for `pause_s`, doubling up to `most_pause_s`.
    """

    lookup_s: float = 0.25
    stall_s: float = 0.5
    fetch_s: float = 10.0
    store_s: float = 30.0
    pause_s: float = 1.0
    most_pause_s: float = 15.0
    max_block_bytes: int = 64 << 20


@dataclass(frozen=True)
class HeldBlocks:
    """What a lookup found: the held start of a chain. `holders` are (node address, hashes)."""

    namespace: CacheNamespace
    tiers: tuple[CacheTier, ...]
    holders: tuple[tuple[str, tuple[bytes, ...]], ...]

    def __len__(self) -> int:
        return len(self.tiers)

    def first(self, num_blocks: int) -> "HeldBlocks":
        """No more than so many of them."""
        holders, room = [], num_blocks
        for address, hashes in self.holders:
            if room > 0:
                holders.append((address, hashes[:room]))
                room -= len(hashes)
        return HeldBlocks(self.namespace, self.tiers[:num_blocks], tuple(holders))


@dataclass(frozen=True)
class FetchedBlock:
    """One whole block, its SHA-256 verified here. `index` is its place in the hashes asked."""

    index: int
    payload: bytes
    tier: CacheTier


@dataclass(frozen=True)
class StoreResult:
    """How many blocks were stored, and how many were held already or found no room."""

    stored: int
    skipped: int


class CacheClient:
    """Talks to one node of the cache, and through `connect` to the others that it names.

    `connect(address)` opens a channel to another node; without it, blocks that lie elsewhere are
    misses. With `peer` the far side is another worker, and its blocks are of no other tier. Every
    method raises CacheUnavailable when the cache does not answer in time, refuses, or is being
    skipped after a failure; InvalidRequest when the arguments are out of bounds.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        config: CacheClientConfig | None = None,
        *,
        connect: Callable[[str], grpc.aio.Channel] | None = None,
        peer: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config or CacheClientConfig()
        self._connect = connect
        self._peer = peer
        self._clock = clock
        self._nodes = {"": self._node(channel)}

    @property
    def available(self) -> bool:
        """Whether the first node answered when it was last asked."""
        return self._nodes[""].breaker.closed

    async def lookup(self, namespace: CacheNamespace, hashes: Sequence[bytes]) -> HeldBlocks:
        """How much of the chain `hashes`, from its start on, is held, and where."""
        request = pb.LookupBlocksRequest(
            namespace=_to_proto(namespace), block_hashes=hashes[:MAX_BLOCKS]
        )
        node = self._nodes[""]
        node.admit()
        with node.watch():
            answer = await node.stub.LookupBlocks(request, timeout=self._config.lookup_s)
        tiers = tuple(map(self._tier, answer.tiers[: len(hashes)]))
        return _held(namespace, hashes, tiers, answer.holders)

    async def fetch(
        self, namespace: CacheNamespace, hashes: Sequence[bytes]
    ) -> AsyncGenerator[FetchedBlock, None]:
        """Look up the chain `hashes` and yield its held blocks, in order and without gaps.

        Ends early at the first block that is missing or fails its checksum: the caller computes
        the rest. When CacheUnavailable comes after some blocks, those are good.
        """
        held = await self.lookup(namespace, hashes)
        async with aclosing(self.fetch_held(held)) as blocks:
            async for block in blocks:
                yield block

    async def fetch_held(self, held: HeldBlocks) -> AsyncGenerator[FetchedBlock, None]:
        """`fetch` after a lookup whose answer the caller has weighed."""
        index = 0
        for address, hashes in held.holders:
            node = self._node_at(address)
            if node is None:
                return
            end = index + len(hashes)
            async with aclosing(self._fetch_from(node, held.namespace, hashes)) as found:
                async for payload, tier in found:
                    yield FetchedBlock(index, payload, tier)
                    index += 1
            if index < end:
                return

    async def store(
        self, namespace: CacheNamespace, blocks: Sequence[tuple[bytes, bytes]]
    ) -> StoreResult:
        """Store (hash, payload) pairs. Blocks already held are skipped by the service."""
        if not blocks:
            return StoreResult(0, 0)
        node = self._nodes[""]
        node.admit()
        with node.watch():
            call = node.store_blocks(
                _store_requests(namespace, blocks), timeout=self._config.store_s
            )
            answer = await call
        return StoreResult(answer.stored_blocks, answer.skipped_blocks)

    async def stats(self, tenant_id: str | None = None) -> pb.GetCacheStatsResponse:
        """Hit statistics by tenant and model, and how full the node's memory is."""
        node = self._nodes[""]
        node.admit()
        with node.watch():
            return await node.stub.GetCacheStats(
                pb.GetCacheStatsRequest(tenant_id=tenant_id), timeout=self._config.fetch_s
            )

    async def close(self) -> None:
        """Close the channels, the one given to the constructor too."""
        for node in self._nodes.values():
            await node.channel.close()

    def _tier(self, said: int) -> CacheTier:
        """What a block's tier is for the bill, whatever the far side calls it."""
        if self._peer:
            return CacheTier.PEER
        return CacheTier.DISK if said == pb.CACHE_TIER_DISK else CacheTier.RAM

    def _node(self, channel: grpc.aio.Channel) -> "_Node":
        breaker = Breaker(self._config.pause_s, self._config.most_pause_s, clock=self._clock)
        return _Node(channel, breaker)

    def _node_at(self, address: str) -> "_Node | None":
        node = self._nodes.get(address)
        if node is None and self._connect is not None:
            node = self._nodes[address] = self._node(self._connect(address))
        return node

    async def _fetch_from(
        self, node: "_Node", namespace: CacheNamespace, hashes: Sequence[bytes]
    ) -> AsyncGenerator[tuple[bytes, CacheTier], None]:
        """Whole verified payloads of `hashes` from one node, as far as they come."""
        request = pb.FetchBlocksRequest(namespace=_to_proto(namespace), block_hashes=hashes)
        node.admit()
        call = node.stub.FetchBlocks(request, timeout=self._config.fetch_s)
        ahead: asyncio.Task[tuple[Assembly, CacheTier] | None] | None = None
        try:
            for block_hash in hashes:
                with node.watch():
                    found = await (ahead or self._read_block(call))
                if found is None:
                    return
                block, tier = found
                payload = block.payload()
                # While a large block is hashed here and used by the caller, the next one comes.
                ahead = None
                if len(payload) >= INLINE_HASH_BYTES:
                    ahead = asyncio.create_task(self._read_block(call))
                sound = await digest(payload) == block.payload_sha256
                if block.block_hash != block_hash or not sound:
                    return
                yield payload, tier
        finally:
            call.cancel()
            if ahead is not None:
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)

    async def _read_block(
        self, call: "grpc.aio.UnaryStreamCall[pb.FetchBlocksRequest, pb.FetchBlocksResponse]"
    ) -> tuple[Assembly, CacheTier] | None:
        """The next block, whole and not yet verified; None if the stream ends or makes no sense."""
        assembly: Assembly | None = None
        tier = CacheTier.RAM
        try:
            while assembly is None or not assembly.complete:
                async with asyncio.timeout(self._config.stall_s):
                    answer = await call.read()
                if not isinstance(answer, pb.FetchBlocksResponse):  # the end of the stream
                    return None
                if assembly is None:
                    tier = self._tier(answer.tier)
                    limit = self._config.max_block_bytes
                    assembly = Assembly(answer.piece, max_bytes=limit)
                else:
                    assembly.add(answer.piece)
        except InvalidRequest:
            return None
        return assembly, tier


class _Node:
    """One node of the cache: its stub and its breaker."""

    def __init__(self, channel: grpc.aio.Channel, breaker: Breaker) -> None:
        self.channel = channel
        self.breaker = breaker
        self.stub = async_stub(channel)
        self.store_blocks = store_call(channel)

    def admit(self) -> None:
        """Raises CacheUnavailable at once while the node is being skipped."""
        if not self.breaker.admits():
            raise CacheUnavailable(
                "the context cache is being skipped after a failure",
                retry_after_s=self.breaker.retry_after_s(),
            )

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Tells the breaker how the call inside went, and gives its failure our class."""
        try:
            yield
        except TimeoutError as error:
            self.breaker.failed()
            raise CacheUnavailable("the context cache stalled") from error
        except grpc.RpcError as error:
            cause = from_rpc_error(error)
            if isinstance(cause, InvalidRequest):
                self.breaker.succeeded()
                raise cause from error
            self.breaker.failed()
            raise CacheUnavailable(f"the context cache does not serve: {cause}") from error
        self.breaker.succeeded()


def async_stub(channel: grpc.aio.Channel) -> "CacheServiceAsyncStub":
    """The service's stub, typed for asyncio: one class serves both of grpc's stacks."""
    return cast("CacheServiceAsyncStub", CacheServiceStub(channel))


async def digest(payload: bytes) -> bytes:
    """SHA-256 of a payload, in a thread when it is long enough to hold up the event loop."""
    if len(payload) < INLINE_HASH_BYTES:
        return sha256(payload)
    return await asyncio.to_thread(sha256, payload)


async def _store_requests(
    namespace: CacheNamespace, blocks: Sequence[tuple[bytes, bytes]]
) -> AsyncIterator[pb.StoreBlocksRequest | Wire]:
    yield pb.StoreBlocksRequest(namespace=_to_proto(namespace))
    hashing = asyncio.create_task(digest(blocks[0][1]))
    try:
        for index, (block_hash, payload) in enumerate(blocks):
            payload_sha256 = await hashing
            if index + 1 < len(blocks):
                hashing = asyncio.create_task(digest(blocks[index + 1][1]))
            for request in store_requests(block_hash, payload, payload_sha256):
                yield request
    finally:
        hashing.cancel()


def _to_proto(namespace: CacheNamespace) -> pb.BlockNamespace:
    return pb.BlockNamespace(
        tenant_id=namespace.tenant_id,
        cache_scope=namespace.cache_scope,
        layout_fingerprint=namespace.layout_fingerprint,
        model=namespace.model,
    )


def _held(
    namespace: CacheNamespace,
    hashes: Sequence[bytes],
    tiers: tuple[CacheTier, ...],
    runs: Iterable[pb.BlockHolder],
) -> HeldBlocks:
    """The answer in our terms; never more blocks than were asked for."""
    holders = []
    start = 0
    for address, num_blocks in [(run.address, run.num_blocks) for run in runs] or [
        ("", len(tiers))
    ]:
        run = tuple(hashes[start : min(start + num_blocks, len(tiers))])
        if run:
            holders.append((address, run))
        start += len(run)
    return HeldBlocks(namespace, tiers[:start], tuple(holders))
