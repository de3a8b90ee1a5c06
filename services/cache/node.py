"""One node of the context cache, wired together."""

import asyncio
import logging
import time
from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry

from services.cache.config import CacheConfig
from services.cache.disk import DiskTier
from services.cache.disk_files import BlockFolder
from services.cache.index import BlockIndex, Node
from services.cache.metrics import CacheMetrics
from services.cache.redis_link import RedisLink
from services.cache.service import ALLOWED_ROLES, SERVICE, CacheServicer
from services.cache.stats import StatsBook
from services.cache.store import BlockStore
from services.cache.tiers import CacheTiers
from tidemill.rpc import tasks
from tidemill.rpc.address import is_loopback
from tidemill.rpc.interceptors import RoleGuard
from tidemill.rpc.metrics import MetricsEndpoint, RpcMetrics, serve_metrics
from tidemill.rpc.server import RpcServer

logger = logging.getLogger(__name__)

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
        metrics = CacheMetrics(registry)
        tiers = CacheTiers(self.store, metrics)
        self.disk = tiers.disk = self._disk(tiers)
        self.link: RedisLink | None = None
        self.index: BlockIndex | None = None
        node = Node(config.node_id, time.time_ns() // 1_000_000)
        if config.redis_url is not None:
            self.link = RedisLink(config.redis_url, config.redis_timeout_s, clock=clock)
            self.index = tiers.index = BlockIndex(
                self.link, node, tiers.holdings, entry_ttl_s=config.entry_ttl_s, clock=clock
            )
        self.stats = StatsBook(self.link, f"{node.node_id} {node.epoch}")
        self._metrics_port: MetricsEndpoint | None = None
        self._upkeep: asyncio.Task[None] | None = None
        self.server = RpcServer(
            config.server,
            public=False,
            readiness=self._why_not_ready,
            guards=[RoleGuard(ALLOWED_ROLES)],
            metrics=RpcMetrics(registry),
            service="tidemill-cache",
        )
        self.server.add_service_name(SERVICE)
        metrics.watch(self.store, self.disk, lambda: self.redis_up)
        self.servicer = CacheServicer(config, tiers, self.stats, metrics)
        self.servicer.add_to_server(self.server.server)

    @property
    def address(self) -> str:
        """Where clients reach this node, once it has started."""
        return self._config.advertise or self.server.address

    @property
    def redis_up(self) -> bool:
        """Whether the shared index and statistics can be used now."""
        return self.link is not None and self.link.up

    async def start(self) -> None:
        """Take the disk, look for Redis, listen, announce. Raises ConfigError."""
        if self.disk is not None:
            await self.disk.start()
        if self.link is not None:
            await self.link.start()
        await self.server.start()
        if self.index is not None:
            self.index.address = self.address
        metrics_address = self._config.server.metrics_address
        if metrics_address is not None:
            tls = None if is_loopback(metrics_address) else self._config.server.tls
            self._metrics_port = serve_metrics(metrics_address, tls=tls, registry=self.registry)
        self._upkeep = asyncio.create_task(self._keep_up())

    async def close(self) -> None:
        """Drain, leave the index, write down what memory holds, stop."""
        await self.server.drain()
        if self._upkeep is not None:
            await tasks.end(self._upkeep)
        if self.link is not None and self.index is not None:
            await self.index.leave()
            await self.stats.flush()
            await self.link.close()
        if self.disk is not None:
            await self.disk.close(self.store)
        if self._metrics_port is not None:
            self._metrics_port.close()

    def _disk(self, tiers: CacheTiers) -> DiskTier | None:
        config = self._config
        if config.disk_path is None or config.disk_capacity_bytes is None:
            return None
        return DiskTier(
            BlockFolder(config.disk_path),
            config.disk_capacity_bytes,
            tiers,
            timeout_s=config.disk_timeout_s,
            clock=self._clock,
        )

    def _why_not_ready(self) -> str | None:
        upkeep = self._upkeep
        if upkeep is not None and upkeep.done():
            return "upkeep has failed"
        return None if self.disk is None else self.disk.failure

    async def _keep_up(self) -> None:
        """Everything that no request waits for. Its failure is logged and fails readiness."""
        flush_at = 0.0
        try:
            while True:
                if self.link is not None and self.index is not None:
                    await self.link.check()
                    await self.index.flush()
                if self._clock() >= flush_at:
                    flush_at = self._clock() + FLUSH_STATS_S
                    await self.stats.flush()
                await asyncio.sleep(UPKEEP_S)
        except Exception:
            logger.exception("upkeep has failed: the index is no longer written")
            raise
