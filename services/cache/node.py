"""One node of the context cache, wired together."""

import asyncio
import time
from collections.abc import Callable, Iterator

from prometheus_client import REGISTRY, CollectorRegistry

from services.cache.config import CacheConfig
from services.cache.index import BlockIndex, Node
from services.cache.metrics import CacheMetrics
from services.cache.redis_link import RedisLink
from services.cache.service import ALLOWED_ROLES, SERVICE, CacheServicer
from services.cache.stats import StatsBook
from services.cache.store import BlockStore
from tidemill.api.cache.v1.cache_service_pb2 import CACHE_TIER_RAM
from tidemill.api.cache.v1.cache_service_pb2_grpc import add_CacheServiceServicer_to_server
from tidemill.rpc.interceptors import RoleGuard
from tidemill.rpc.metrics import MetricsEndpoint, RpcMetrics, serve_metrics
from tidemill.rpc.server import RpcServer

UPKEEP_S = 0.2
FLUSH_STATS_S = 1.0


class CacheNode:
    """A cache service from start() to close(); serves as soon as it listens, Redis or not."""

    def __init__(
        self,
        config: CacheConfig,
        *,
        registry: CollectorRegistry = REGISTRY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self.registry = registry
        self._clock = clock
        self.store = BlockStore(config.capacity_bytes)
        self.link: RedisLink | None = None
        self._index: BlockIndex | None = None
        node = Node(config.node_id, time.time_ns() // 1_000_000)
        if config.redis_url is not None:
            self.link = RedisLink(config.redis_url, config.redis_timeout_s, clock=clock)
            self._index = BlockIndex(
                self.link,
                node,
                self._held,
                tier=CACHE_TIER_RAM,
                entry_ttl_s=config.entry_ttl_s,
                clock=clock,
            )
        self._stats = StatsBook(self.link, f"{node.node_id} {node.epoch}")
        self._metrics_port: MetricsEndpoint | None = None
        self._upkeep: asyncio.Task[None] | None = None
        self.server = RpcServer(
            config.server,
            public=False,
            readiness=lambda: None,
            guards=[RoleGuard(ALLOWED_ROLES)],
            metrics=RpcMetrics(registry),
        )
        self.server.add_service_name(SERVICE)
        metrics = CacheMetrics(self.store, lambda: self.redis_up, registry)
        self.servicer = CacheServicer(config, self.store, self._index, self._stats, metrics)
        add_CacheServiceServicer_to_server(self.servicer, self.server.server)

    @property
    def address(self) -> str:
        """Where clients reach this node, once it has started."""
        return self._config.advertise or self.server.address

    @property
    def redis_up(self) -> bool:
        """Whether the shared index and statistics can be used now."""
        return self.link is not None and self.link.up

    async def start(self) -> None:
        """Look for Redis, listen, announce. Raises ConfigError."""
        if self.link is not None:
            await self.link.start()
        await self.server.start()
        if self._index is not None:
            self._index.address = self.address
        metrics_address = self._config.server.metrics_address
        if metrics_address is not None:
            self._metrics_port = serve_metrics(
                metrics_address, tls=self._config.server.tls, registry=self.registry
            )
        self._upkeep = asyncio.create_task(self._keep_up())

    async def close(self) -> None:
        """Drain, leave the index, stop."""
        await self.server.drain()
        if self._upkeep is not None:
            self._upkeep.cancel()
            await asyncio.wait([self._upkeep])
        if self.link is not None and self._index is not None:
            await self._index.leave()
            await self._stats.flush()
            await self.link.close()
        if self._metrics_port is not None:
            self._metrics_port.close()

    def _held(self) -> Iterator[tuple[bytes, bytes, int]]:
        for block_hash, block in self.store:
            yield block_hash, block.namespace, len(block.payload)

    async def _keep_up(self) -> None:
        """Everything that no request waits for."""
        flush_at = 0.0
        while True:
            if self.link is not None and self._index is not None:
                await self.link.check()
                await self._index.flush()
            if self._clock() >= flush_at:
                flush_at = self._clock() + FLUSH_STATS_S
                await self._stats.flush()
            await asyncio.sleep(UPKEEP_S)
