"""Brings blocks of a chain from the cache and from other workers, where that beats computing."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from itertools import cycle, groupby

from tidemill.api.common.v1.lifecycle_pb2 import KvPeer
from tidemill.errors import CacheUnavailable, InvalidRequest
from tidemill.kv.cache_client import CacheClient, CacheNamespace, CacheTier, HeldBlocks
from tidemill.policy import Budget, FetchOrRecompute, Run, Source
from tidemill.worker.kv_peers import KvPeers
from tidemill.worker.metrics import WorkerMetrics

CACHE = "cache"
MOST_PEERS_ASKED = 2

# (index in the hashes wanted, payload, tier) -> when the block is in the pool
Land = Callable[[int, bytes, CacheTier], Awaitable[None]]


class BlockFetcher:
    """Asks the cache, then peers, for what follows in a chain, and whoever may go on from there.

    All of it is within one budget. Whatever does not come, comes damaged or would come too late is
    left to be computed, and counted by tier and cause; none of it is an error.
    """

    def __init__(
        self,
        policy: FetchOrRecompute,
        *,
        block_bytes: int,
        cache: CacheClient | None,
        peers: KvPeers | None,
        metrics: WorkerMetrics,
    ) -> None:
        self.policy = policy
        self._block_bytes = block_bytes
        self._cache = cache
        self._peers = peers
        self._metrics = metrics

    async def fetch(
        self,
        namespace: CacheNamespace,
        hashes: Sequence[bytes],
        land: Land,
        *,
        peers: Sequence[KvPeer] = (),
    ) -> int:
        """Land the start of `hashes`, as far as it is held and worth it; returns how many."""
        chain = _Chain(namespace, hashes, land, self.policy.budget(len(hashes)))
        holders = await self._holders(peers)
        num_asked = 0  # since the last block landed; who sent it gave what it has
        for asked, client in cycle(holders):
            if not chain.wanted or chain.overdue or num_asked == len(holders):
                break
            before = chain.num_landed
            await self._ask(asked, client, chain)
            num_asked = 1 if chain.num_landed > before else num_asked + 1
        return chain.num_landed

    async def _holders(self, peers: Sequence[KvPeer]) -> list[tuple[str, CacheClient]]:
        """Whom to ask, and by which name the policy knows them."""
        holders = [] if self._cache is None else [(CACHE, self._cache)]
        if self._peers is not None:
            holders += [
                (f"peer {peer.worker_id}", await self._peers.at(peer))
                for peer in peers[:MOST_PEERS_ASKED]
            ]
        return holders

    async def _ask(self, asked: str, client: CacheClient, chain: "_Chain") -> None:
        wanted = chain.wanted
        if not self.policy.worth_asking(asked, len(wanted)):
            return
        part = _Part(self.policy, asked, len(wanted))
        try:
            async with asyncio.timeout(None) as timer:
                timer.reschedule(chain.due_at())
                held = self._choose(asked, await client.lookup(chain.namespace, wanted), part)
                async with aclosing(client.fetch_held(held)) as fetched:
                    async for block in fetched:
                        if len(block.payload) != self._block_bytes:
                            break
                        await chain.land(block.payload, block.tier)
                        part.landed()
                        timer.reschedule(chain.due_at())
            part.ended()
            self._count_failed(part, "missing")
        except (CacheUnavailable, InvalidRequest):
            self._count_failed(part, "unavailable")
            self._metrics.cache_errors.labels("fetch" if asked == CACHE else "peer").inc()
        except TimeoutError:
            part.cut()
            self._count_failed(part, "cut")

    def _choose(self, asked: str, held: HeldBlocks, part: "_Part") -> HeldBlocks:
        """As much of what is held as is worth fetching."""
        chosen = held.first(self.policy.choose(runs_of(asked, held)))
        for tier in held.tiers[len(chosen) :]:
            self._metrics.fetch_skipped_blocks.labels(tier.value).inc()
        part.begin(runs_of(asked, chosen))
        return chosen

    def _count_failed(self, part: "_Part", cause: str) -> None:
        for tier, num_blocks in part.missing:
            self._metrics.fetch_failed_blocks.labels(tier, cause).inc(num_blocks)


class _Chain:
    """One prompt's fetch: what is wanted, what has landed, and the time that is left."""

    def __init__(
        self, namespace: CacheNamespace, hashes: Sequence[bytes], land: Land, budget: Budget
    ) -> None:
        self.namespace = namespace
        self.num_landed = 0
        self._hashes = hashes
        self._land = land
        self._budget = budget
        self._began = asyncio.get_running_loop().time()

    @property
    def wanted(self) -> Sequence[bytes]:
        """Hashes that have not landed."""
        return self._hashes[self.num_landed :]

    @property
    def overdue(self) -> bool:
        """Whether the next block would come too late."""
        due_at = self.due_at()
        return due_at is not None and asyncio.get_running_loop().time() >= due_at

    def due_at(self) -> float | None:
        """When, by the loop's clock, the next block must have landed."""
        allowed_s = self._budget.allowed_s(self.num_landed)
        return None if math.isinf(allowed_s) else self._began + allowed_s

    async def land(self, payload: bytes, tier: CacheTier) -> None:
        """The next block is here."""
        await self._land(self.num_landed, payload, tier)
        self.num_landed += 1


class _Part:
    """What one holder was asked for and delivered; tells the policy what each source cost."""

    def __init__(self, policy: FetchOrRecompute, asked: str, num_wanted: int) -> None:
        self._policy = policy
        self._asked = asked
        self._num_wanted = num_wanted
        self._runs: list[Run] = []
        self._in_run = 0
        self._since = asyncio.get_running_loop().time()

    @property
    def missing(self) -> list[tuple[str, int]]:
        """(tier, blocks) that were to come and have not landed."""
        left = [(run.source.tier, run.num_blocks) for run in self._runs]
        return [(tier, num - (i == 0) * self._in_run) for i, (tier, num) in enumerate(left)]

    def begin(self, runs: Sequence[Run]) -> None:
        """These are to come; the lookup before them counts as part of the first."""
        self._runs = list(runs)

    def landed(self) -> None:
        """One more block is in the pool."""
        self._in_run += 1
        if self._in_run == self._runs[0].num_blocks:
            self._policy.fetched(self._runs[0].source, self._in_run, self._lap_s())
            del self._runs[0]
            self._in_run = 0

    def ended(self) -> None:
        """Nothing more came."""
        if self._in_run:
            self._policy.fetched(self._runs[0].source, self._in_run, self._lap_s())

    def cut(self) -> None:
        """Time was up."""
        if self._runs:
            source, num_blocks = self._runs[0]
            self._policy.cut(source, num_blocks, self._in_run, self._lap_s())
        else:
            self._policy.stalled(self._asked, self._num_wanted, self._lap_s())

    def _lap_s(self) -> float:
        now = asyncio.get_running_loop().time()
        since, self._since = self._since, now
        return now - since


def runs_of(asked: str, held: HeldBlocks) -> list[Run]:
    """What was found, as runs of one source each."""
    remote = [bool(address) for address, hashes in held.holders for _ in hashes]
    sources = (Source(asked, tier.value, far) for tier, far in zip(held.tiers, remote, strict=True))
    return [Run(source, len(list(blocks))) for source, blocks in groupby(sources)]
