"""Every kind of port at once: a router, a worker of both roles and a cache, all of them real."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc

from services.cache.node import CacheNode
from tests.cache_node import Tls, cache_node
from tests.redis_process import RedisProcess
from tests.router_harness import RouterHarness, router_config, running_router
from tests.security import surface
from tests.worker_harness import PATIENT, settled, worker_at
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.probe import probe
from tidemill.rpc.tls import TlsFiles, channel_credentials, role_name
from tidemill.worker.config import CacheConfig, Role
from tidemill.worker.process import RunningWorker


@dataclass(frozen=True)
class Port:
    """Where services listen; `role` is what the process proves to callers, None: TLS of its own."""

    address: str
    role: str
    services: tuple[str, ...]

    @property
    def methods(self) -> list[surface.Method]:
        """All that it serves."""
        return surface.methods(*self.services)


@dataclass
class Deployment:
    """One of each."""

    router: RouterHarness
    worker: RunningWorker
    cache: CacheNode
    tls: Tls

    @property
    def worker_port(self) -> Port:
        """The worker's, for every role that it has."""
        served = (surface.WORKER, surface.PREFILL, surface.DECODE, surface.CACHE)
        return Port(self.worker.address, "decode", served)

    @property
    def cache_port(self) -> Port:
        """The cache's."""
        return Port(self.cache.server.address, "cache", (surface.CACHE,))

    @property
    def internal_ports(self) -> list[Port]:
        """Those that demand a certificate."""
        return [self.worker_port, self.cache_port]

    @asynccontextmanager
    async def holding(self, port: Port, certificate: str) -> AsyncIterator[grpc.aio.Channel]:
        """A channel to `port` for whoever holds one of our certificates."""
        async with self.presenting(port, self.tls(certificate)) as channel:
            yield channel

    @asynccontextmanager
    async def presenting(self, port: Port, tls: TlsFiles) -> AsyncIterator[grpc.aio.Channel]:
        """A channel to `port` with any certificate."""
        async with internal_channel(port.address, role=port.role, tls=tls) as channel:
            yield channel

    @asynccontextmanager
    async def without_certificate(self, port: Port) -> AsyncIterator[grpc.aio.Channel]:
        """A channel to `port` that trusts our authority and shows nothing itself."""
        credentials = channel_credentials(self.tls("router").ca)
        options = (("grpc.ssl_target_name_override", role_name(port.role)),)
        async with grpc.aio.secure_channel(port.address, credentials, options=options) as channel:
            yield channel

    async def check_alive(self) -> None:
        """Every port says that it serves, and no pool has lost anything (R1)."""
        self.router.process.server.set_readiness_now()
        assert await probe(self.router.channel) == "SERVING"
        for port in self.internal_ports:
            async with self.holding(port, "redis") as channel:
                assert await probe(channel) == "SERVING"
        await settled(self.worker)
        await self.router.check_idle()
        self.cache.store.check_integrity()
        assert self.cache.servicer.staging.num_bytes == 0


@asynccontextmanager
async def deployed(
    model_dir: Path, ledger: RedisProcess, tls: Tls, **worker: Any
) -> AsyncIterator[Deployment]:
    """All of it on free ports of this machine; idle and whole at the end."""
    async with AsyncExitStack() as stack:
        cache = await stack.enter_async_context(cache_node(tls))
        settings = CacheConfig(cache.server.address, client=PATIENT)
        both = await stack.enter_async_context(
            worker_at(Role.BOTH, model_dir, tls, cache=settings, **worker)
        )
        router = await stack.enter_async_context(
            router_at(model_dir, ledger, tls, [f"both@{both.address}"])
        )
        router.process.server.set_readiness_now()
        made = Deployment(router, both, cache, tls)
        yield made
        await made.check_alive()


@asynccontextmanager
async def router_at(
    model_dir: Path, ledger: RedisProcess, tls: Tls, workers: Sequence[str]
) -> AsyncIterator[RouterHarness]:
    """A router that tells what its methods are to whoever has a key."""
    config = router_config(model_dir, ledger, workers, tls("router"))
    config = replace(config, server=replace(config.server, reflection=True))
    async with running_router(config) as router:
        yield router
