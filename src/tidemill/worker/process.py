"""A worker process: everything wired, served, drained and taken down in order."""

import argparse
import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from tidemill import config as settings
from tidemill.api.decode.v1.decode_service_pb2_grpc import add_DecodeServiceServicer_to_server
from tidemill.api.worker.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server
from tidemill.engine import Engine
from tidemill.errors import CheckpointError, ConfigError
from tidemill.kv.cache_client import CacheClient
from tidemill.kv.shm import SharedMemory
from tidemill.policy import FetchOrRecompute
from tidemill.rpc import process
from tidemill.rpc.address import is_loopback
from tidemill.rpc.channel import bulk_channel, internal_channel
from tidemill.rpc.interceptors import RoleGuard
from tidemill.rpc.metrics import RpcMetrics, serve_metrics
from tidemill.rpc.server import RpcServer
from tidemill.rpc.tls import TlsFiles
from tidemill.worker.attempt_table import AttemptTable
from tidemill.worker.background import Background
from tidemill.worker.block_fetcher import BlockFetcher
from tidemill.worker.block_storer import BlockStorer
from tidemill.worker.config import (
    MOST_IN_PLACE_TOKENS,
    RegistryConfig,
    Role,
    WorkerConfig,
)
from tidemill.worker.decode_service import DecodeService
from tidemill.worker.engine_thread import EngineThread
from tidemill.worker.kv_peers import KvPeers
from tidemill.worker.load_progress import LoadProgress
from tidemill.worker.metrics import WorkerMetrics
from tidemill.worker.pace import Pace
from tidemill.worker.peer_service import PeerService
from tidemill.worker.prefill_service import PrefillService
from tidemill.worker.prompt import PromptReuse
from tidemill.worker.registration import Registration
from tidemill.worker.remote_prefill import MakeTransport, PrefillPeers
from tidemill.worker.warm_up import tokens_within, warm_up
from tidemill.worker.watchdog import Watchdog
from tidemill.worker.worker import Worker
from tidemill.worker.worker_service import WorkerService

_PACKAGE = "tidemill.api"
WORKER_SERVICE = f"{_PACKAGE}.worker.v1.WorkerService"
PREFILL_SERVICE = f"{_PACKAGE}.prefill.v1.PrefillService"
DECODE_SERVICE = f"{_PACKAGE}.decode.v1.DecodeService"
PEER_SERVICE = f"{_PACKAGE}.cache.v1.CacheService"

ALLOWED = {
    **{
        f"/{WORKER_SERVICE}/{method}": {"router", "prefill", "decode"}
        for method in ("DescribeWorker", "WatchLoad")
    },
    f"/{WORKER_SERVICE}/WatchKv": {"router"},
    **{
        f"/{PREFILL_SERVICE}/{method}": {"decode"}
        for method in ("Prefill", "PullKv", "RenewHandover", "ReleaseHandover", "StopPrefill")
    },
    **{
        f"/{DECODE_SERVICE}/{method}": {"router"}
        for method in ("Decode", "WatchChunks", "AckFinal", "GetFinal", "ListFinals")
    },
    **{
        f"/{PEER_SERVICE}/{method}": {"prefill", "decode"}
        for method in ("LookupBlocks", "FetchBlocks")
    },
}

SWEEP_S = 1.0
SHM_SWEEP_S = 5.0
FINALS_S = 1.0  # kept back from a drain for sending Finals

logger = logging.getLogger(__name__)


class RunningWorker:
    """A worker that serves; `address` is where others dial it."""

    def __init__(
        self,
        worker: Worker,
        server: RpcServer,
        decode: DecodeService | None,
        attempts: AttemptTable,
    ) -> None:
        self.worker = worker
        self.server = server
        self.attempts = attempts
        self._decode = decode

    @property
    def address(self) -> str:
        """host:port for the registry."""
        return self.worker.config.advertise or self.server.address

    async def drain(self) -> None:
        """Refuse new work, let what runs end, and stop the rest while Finals can still be sent."""
        self.worker.draining = True
        if self._decode is not None:
            self._decode.drain()
        stopping = asyncio.create_task(self._stop_late())
        await self.server.drain()
        stopping.cancel()
        if self._decode is not None:
            await self._decode.stop_all()

    async def _stop_late(self) -> None:
        drain_s = self.worker.config.server.drain_s
        await asyncio.sleep(drain_s - min(drain_s / 2, FINALS_S))
        if self._decode is not None:
            await self._decode.stop_all()


@asynccontextmanager
async def running_worker(
    config: WorkerConfig,
    role: Role,
    *,
    metrics: WorkerMetrics | None = None,
    rpc_metrics: RpcMetrics | None = None,
    engine: Engine | None = None,
    make_transport: MakeTransport | None = None,
) -> AsyncIterator[RunningWorker]:
    """Serve until the block is left; drains then. `engine` spares loading one.

    Raises ConfigError and CheckpointError before anything listens.
    """
    tls = config.server.tls
    if tls is None:
        raise ConfigError("a worker needs server.tls: cert, key and ca")
    metrics = metrics or WorkerMetrics()
    if engine is None:
        progress = LoadProgress(config.model_dir)
        engine = await asyncio.to_thread(Engine.load, config.model_dir, config.engine, progress)
    async with AsyncExitStack() as stack:
        cache = _cache_client(config, tls, stack)
        background = await stack.enter_async_context(Background())
        storer = None
        if cache is not None and config.cache is not None:
            storer = BlockStorer(
                engine.pool, cache, max_blocks=config.cache.store_queue_blocks, metrics=metrics
            )
            background.start("block storer", storer.run)
        pace = Pace(engine, on_decode_step=metrics.decode_step_seconds.observe)
        thread = stack.enter_context(EngineThread(engine, pace=pace))
        reuse = PromptReuse(
            engine,
            model=config.model,
            worker_id=config.worker_id,
            fetcher=_fetcher(config, tls, stack, engine=engine, cache=cache, metrics=metrics),
            storer=storer,
        )
        shared = _shared_memory(config, stack, background)
        worker = Worker(
            config,
            role,
            thread,
            reuse,
            storer=storer,
            metrics=metrics,
            background=background,
            shared=shared,
        )
        stack.push_async_callback(worker.grammars.close)
        peers = PrefillPeers(
            lambda address: internal_channel(address, role="prefill", tls=tls),
            config.handover,
            metrics=metrics,
            connect_bulk=lambda address: bulk_channel(address, role="prefill", tls=tls),
            arenas=None if shared is None else shared.arenas,
            make_transport=make_transport,
        )
        stack.push_async_callback(peers.close)
        background.start("watchdog", Watchdog(thread, stall_s=config.stall_s).run)
        attempts = AttemptTable(retention_s=config.final_retention_s, clock=worker.clock)
        _watch(worker, attempts)
        server, decode = _serve(worker, attempts, peers, rpc_metrics)
        await warm_up(thread, reuse.policy)
        if role is Role.DECODE:
            worker.in_place_tokens = _in_place_tokens(config, reuse.policy)
        await server.start()
        running = RunningWorker(worker, server, decode, attempts)
        stack.push_async_callback(running.drain)
        background.start("sweeper", lambda: _sweep(worker, attempts))
        if config.registry is not None:
            await stack.enter_async_context(_registered(running, config.registry))
        yield running


def main(service: str, roles: tuple[Role, ...]) -> int:
    """`python -m services.{service}`: parse the command line, serve until told to stop."""
    parser = argparse.ArgumentParser(prog=f"python -m services.{service}")
    parser.add_argument("--config", type=Path, help=f"TOML file with a [{service}] section")
    choices = [role.value for role in roles]
    parser.add_argument("--role", choices=choices, default=choices[0], help="default: %(default)s")
    arguments = parser.parse_args()

    async def serve(stop: asyncio.Event) -> None:
        config = settings.load(WorkerConfig, service, arguments.config, os.environ)
        endpoint = None
        address = config.server.metrics_address
        if address is not None:
            tls = None if is_loopback(address) else config.server.tls
            endpoint = serve_metrics(address, tls=tls)
        role = Role(arguments.role)
        try:
            async with running_worker(config, role, rpc_metrics=RpcMetrics()) as worker:
                logger.info("serving", extra={"address": worker.address, "role": role.value})
                await stop.wait()
        except CheckpointError as error:
            raise ConfigError(f"{config.model_dir}: {error}") from error
        if endpoint is not None:
            endpoint.close()

    return process.run(service, serve)


def _serve(
    worker: Worker, attempts: AttemptTable, peers: PrefillPeers, rpc_metrics: RpcMetrics | None
) -> tuple[RpcServer, DecodeService | None]:
    server = RpcServer(
        worker.config.server,
        public=False,
        readiness=worker.readiness,
        guards=(RoleGuard(ALLOWED),),
        metrics=rpc_metrics,
        service=f"tidemill-{worker.role.value}",
    )
    add_WorkerServiceServicer_to_server(WorkerService(worker), server.server)
    server.add_service_name(WORKER_SERVICE)
    PeerService(worker).add_to_server(server.server)
    server.add_service_name(PEER_SERVICE)
    if worker.role.prefills:
        PrefillService(worker).add_to_server(server.server)
        server.add_service_name(PREFILL_SERVICE)
    if not worker.role.decodes:
        return server, None
    decode = DecodeService(worker, attempts, peers)
    add_DecodeServiceServicer_to_server(decode, server.server)
    server.add_service_name(DECODE_SERVICE)
    return server, decode


def _cache_client(config: WorkerConfig, tls: TlsFiles, stack: AsyncExitStack) -> CacheClient | None:
    if config.cache is None:
        return None

    def connect(address: str) -> grpc.aio.Channel:
        return bulk_channel(address, role="cache", tls=tls)

    channel = connect(config.cache.address)
    channel.get_state(try_to_connect=True)  # the first fetch's budget is not for shaking hands
    client = CacheClient(channel, config.cache.client, connect=connect)
    stack.push_async_callback(client.close)
    return client


def _fetcher(
    config: WorkerConfig,
    tls: TlsFiles,
    stack: AsyncExitStack,
    *,
    engine: Engine,
    cache: CacheClient | None,
    metrics: WorkerMetrics,
) -> BlockFetcher:
    def connect(address: str, role: str) -> grpc.aio.Channel:
        return bulk_channel(address, role=role, tls=tls)

    peers = KvPeers(connect, config.peers)
    stack.push_async_callback(peers.close)
    return BlockFetcher(
        FetchOrRecompute(config.fetch, clock=time.monotonic),
        block_bytes=engine.layout.block_bytes,
        cache=cache,
        peers=peers,
        metrics=metrics,
    )


def _shared_memory(
    config: WorkerConfig, stack: AsyncExitStack, background: Background
) -> SharedMemory | None:
    if config.handover.shm_dir is None:
        return None
    shared = SharedMemory(config.handover.shm_dir)
    stack.callback(shared.close)

    async def sweep() -> None:
        while True:
            await asyncio.sleep(SHM_SWEEP_S)
            await asyncio.to_thread(shared.sweep)

    background.start("shared memory sweeper", sweep)
    return shared


def _in_place_tokens(config: WorkerConfig, policy: FetchOrRecompute) -> int:
    if config.in_place_tokens is not None:
        return config.in_place_tokens
    return min(tokens_within(policy, config.in_place_stall_s), MOST_IN_PLACE_TOKENS)


def _watch(worker: Worker, attempts: AttemptTable) -> None:
    pool, metrics = worker.engine.pool, worker.metrics
    metrics.watch("blocks", "KV blocks of the device tier.", lambda: pool.num_blocks)
    metrics.watch("blocks_free", "Of those, free or evictable.", lambda: pool.num_free)
    metrics.watch("host_blocks", "KV blocks of the host tier.", lambda: pool.num_host_blocks)
    metrics.watch("host_blocks_held", "Of those, findable.", lambda: pool.num_host_held)
    metrics.watch("running", "Sequences in the engine.", lambda: worker.thread.num_sequences)
    metrics.watch(
        "queued_uncached_tokens", "Prompt tokens to be computed.", lambda: worker.backlog.num_tokens
    )
    metrics.watch("open_handovers", "Hand-overs not yet released.", lambda: len(worker.handovers))
    metrics.watch("finals_kept", "Finals not yet acknowledged.", lambda: attempts.num_finals)
    metrics.watch_hours(lambda: worker.thread.hours)
    metrics.watch("step_age_seconds", "Age of the running step.", lambda: worker.thread.step_age_s)


async def _sweep(worker: Worker, attempts: AttemptTable) -> None:
    """End what nobody comes back for: hand-overs past their lease, Finals past their retention."""
    period_s = min(SWEEP_S, worker.config.handover.lease_s / 4)
    while True:
        await asyncio.sleep(period_s)
        expired, forgotten = worker.handovers.sweep(), attempts.sweep()
        if expired or forgotten:
            logger.warning("swept", extra={"handovers": expired, "finals": forgotten})


@asynccontextmanager
async def _registered(running: RunningWorker, config: RegistryConfig) -> AsyncIterator[None]:
    redis = Redis.from_url(
        config.url,
        socket_timeout=config.heartbeat_s,
        socket_connect_timeout=config.heartbeat_s,
        retry=Retry(NoBackoff(), 0),
    )
    worker = running.worker
    registration = Registration(
        worker, config, redis, address=running.address, metrics=worker.metrics
    )
    try:
        await registration.begin()
        async with Background() as heartbeat:
            heartbeat.start("heartbeat", registration.run)
            yield
        await registration.remove()
    finally:
        await redis.aclose()
