"""Finding workers and listening to them.

Workers register in the cache Redis: sorted set tm:workers of worker ids, and for each a hash
tm:worker:<id> with its address and role. Each address found, there or in the configuration, gets
one link: DescribeWorker, then WatchLoad and WatchKv for as long as they last. While the cache Redis
is away the links that live stay.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import grpc
from redis.asyncio import Redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    RedisError,
)

from services.router.chunk_channel import ChunkChannel
from services.router.config import FleetConfig
from services.router.fleet import DECODE, PREFILL, Description, Fleet, OpenAttempts, Worker
from services.router.fleet_hours import FleetHours
from services.router.kv_watch import watch_kv
from services.router.tasks import OwnedTasks
from tidemill.api.common.v1 import kv_pb2
from tidemill.api.decode.v1 import decode_service_pb2_grpc
from tidemill.api.worker.v1 import worker_service_pb2 as worker_pb2
from tidemill.api.worker.v1 import worker_service_pb2_grpc
from tidemill.errors import ConfigError
from tidemill.policy import ReportClock, WorkerLoad
from tidemill.rpc import tasks
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.options import INTERNAL_CLIENT

if TYPE_CHECKING:  # these names exist in the stubs alone
    from tidemill.api.decode.v1.decode_service_pb2_grpc import DecodeServiceAsyncStub
    from tidemill.api.worker.v1.worker_service_pb2_grpc import WorkerServiceAsyncStub

_ROLES = {
    worker_pb2.WORKER_ROLE_PREFILL: frozenset({PREFILL}),
    worker_pb2.WORKER_ROLE_DECODE: frozenset({DECODE}),
    worker_pb2.WORKER_ROLE_BOTH: frozenset({PREFILL, DECODE}),
}
_DIALLED_AS = {"prefill": PREFILL, "decode": DECODE, "both": DECODE}
_CHANNEL_OPTIONS = (
    *INTERNAL_CLIENT,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_DESCRIBE_TIMEOUT_S = 2.0
_RETRY_S = (0.1, 0.2, 0.5, 1.0)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a worker listens, and as what it must identify itself: prefill or decode."""

    address: str
    role: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "role@host:port"; ConfigError if it is not that."""
        role, at, address = text.partition("@")
        if not at or role not in _DIALLED_AS or ":" not in address:
            raise ConfigError(f"router.fleet.workers: {text!r} is not role@host:port")
        return cls(address, _DIALLED_AS[role])


class Registry:
    """Keeps one link to every worker that it can find; `fleet` is what they tell."""

    def __init__(
        self,
        config: FleetConfig,
        fleet: Fleet,
        *,
        redis: Redis | None,
        clock: Callable[[], float],
        hours: FleetHours,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._redis = redis
        self._clock = clock
        self._hours = hours
        self._static = {Endpoint.parse(text) for text in config.workers}
        self._links: dict[Endpoint, Link] = {}
        self._looked = False

    @property
    def asking(self) -> bool:
        """Whether there may be workers that have neither reported nor failed to yet."""
        return not self._looked or not all(link.asked for link in self._links.values())

    async def check(self) -> None:
        """Raise ConfigError if the cache Redis refuses us; its being away is no error."""
        try:
            await self._registered()
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise ConfigError(f"the cache Redis refuses: {error}") from error
        except (RedisError, OSError) as error:
            logger.warning("cache Redis is away", extra={"error": repr(error)})

    async def run(self) -> None:
        """Look for workers until cancelled, then hang up on all."""
        try:
            while True:
                await self._refresh()
                self._looked = True
                await asyncio.sleep(self._config.discover_interval_s)
        finally:
            await asyncio.gather(*(link.close() for link in self._links.values()))
            self._links.clear()

    async def _refresh(self) -> None:
        try:
            found = self._static | await self._registered()
        except (RedisError, OSError) as error:
            logger.warning("cache Redis is away; known workers stay", extra={"error": repr(error)})
            found = self._static | set(self._links)
        for endpoint in found - set(self._links):
            self._links[endpoint] = Link(
                endpoint, self._config, self._fleet, self._clock, self._hours
            )
        unused = {endpoint for endpoint, link in self._links.items() if not link.in_use}
        for endpoint in unused - found:
            await self._links.pop(endpoint).close()

    async def _registered(self) -> set[Endpoint]:
        if self._redis is None:
            return set()
        redis: Any = self._redis  # redis-py types one method for both its stacks
        found = set()
        for worker_id in await redis.zrange("tm:workers", 0, -1):
            fields = await redis.hgetall(f"tm:worker:{worker_id.decode()}")
            role = fields.get(b"role", b"").decode()
            if b"address" in fields and role in _DIALLED_AS:
                found.add(Endpoint(fields[b"address"].decode(), _DIALLED_AS[role]))
        return found


class Link:
    """One worker's connection: asks what it is, then follows load and blocks, again and again."""

    def __init__(
        self,
        endpoint: Endpoint,
        config: FleetConfig,
        fleet: Fleet,
        clock: Callable[[], float],
        hours: FleetHours,
    ) -> None:
        self._endpoint = endpoint
        self._interval_ms = config.load_interval_ms
        self._fleet = fleet
        self._clock = clock
        self._hours = hours
        self._worker: Worker | None = None
        self._asked = False
        self._open_attempts = OpenAttempts()
        self._watches = OwnedTasks()
        self._channel = internal_channel(
            endpoint.address, role=endpoint.role, tls=config.tls, options=_CHANNEL_OPTIONS
        )
        self._stub = cast(
            "WorkerServiceAsyncStub", worker_service_pb2_grpc.WorkerServiceStub(self._channel)
        )
        self._decode = cast(
            "DecodeServiceAsyncStub", decode_service_pb2_grpc.DecodeServiceStub(self._channel)
        )
        self._chunks = ChunkChannel(self._decode, endpoint.address)
        self._chunks_task: asyncio.Task[None] | None = None
        self._task = asyncio.create_task(self._run(), name=f"link to {endpoint.address}")

    @property
    def asked(self) -> bool:
        """Whether the worker has told its load and its blocks, or has failed to."""
        worker = self._worker
        return self._asked and (worker is None or self._fleet.prefixes.heard(worker.id) is not None)

    @property
    def in_use(self) -> bool:
        """Whether the worker is connected, or has drained away and still ends its attempts."""
        return self._worker is not None or self._open_attempts.count > 0

    async def close(self) -> None:
        """Hang up."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._chunks_task is not None:
            await tasks.end(self._chunks_task)
        await self._channel.close()

    def _watch_chunks(self) -> None:
        """For as long as the link: attempts outlast the worker's place in the fleet."""
        if self._chunks_task is None or self._chunks_task.done():
            self._chunks_task = self._watches.spawn(self._chunks.run(), name="watch chunks")

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                await self._follow()
                failures = 0
            except grpc.aio.AioRpcError as error:
                logger.info(
                    "worker does not answer",
                    extra={"address": self._endpoint.address, "error": error.details()},
                )
                failures += 1
            except ValueError as error:
                logger.error("worker is not used: %s", error)
                failures += 1
            self._asked = True
            await asyncio.sleep(_RETRY_S[min(failures, len(_RETRY_S) - 1)])

    async def _follow(self) -> None:
        """Returns when the worker has restarted or ended its stream."""
        answer = await self._stub.DescribeWorker(
            worker_pb2.DescribeWorkerRequest(), timeout=_DESCRIBE_TIMEOUT_S
        )
        description = _description(answer, self._endpoint.address)
        worker = Worker(
            description, self._decode, chunks=self._chunks, open_attempts=self._open_attempts
        )
        if DECODE in description.roles:
            self._watch_chunks()
        self._fleet.join(worker)
        self._worker = worker
        reports = ReportClock()
        watching = self._watches.spawn(
            watch_kv(self._stub, worker.id, self._fleet.prefixes), name="watch KV"
        )
        try:
            request = worker_pb2.WatchLoadRequest(min_interval_ms=self._interval_ms)
            async for message in self._stub.WatchLoad(request):
                if message.epoch != description.epoch:
                    return
                made_at = reports.made_at(message.uptime_us / 1e6, now=self._clock())
                self._fleet.report(worker, _load(message, worker.id, made_at))
                self._asked = True
                self._hours.saw(
                    description,
                    uptime_us=message.uptime_us,
                    prefill_us=message.prefill_busy_us,
                    decode_us=message.decode_busy_us,
                )
        finally:
            await tasks.end(watching)
            self._worker = None
            self._fleet.leave(worker)


def _description(answer: worker_pb2.DescribeWorkerResponse, address: str) -> Description:
    if answer.role not in _ROLES:
        raise ValueError(f"{answer.worker_id} has no role that this router knows")
    return Description(
        worker_id=answer.worker_id,
        epoch=answer.epoch,
        address=address,
        roles=_ROLES[answer.role],
        model=answer.model,
        digest=answer.layout.model_digest,
        kv_format=_kv_format(answer.layout),
        context_tokens=answer.max_context_tokens,
        vocab_size=answer.vocab_size,
        accelerators=max(answer.accelerators, 1),
        in_place_tokens=answer.in_place_tokens,
    )


def _kv_format(layout: kv_pb2.KvLayout) -> str:
    """As the engine names it, so that router and engine hash blocks alike."""
    shape = f"{layout.num_layers}x{layout.block_tokens}x{layout.latent_dim}"
    return f"mla.{layout.dtype}.{shape}.mtp{layout.mtp:d}"


def _load(message: worker_pb2.WatchLoadResponse, worker_id: str, made_at: float) -> WorkerLoad:
    device = [tier for tier in message.tiers if tier.tier == worker_pb2.KV_TIER_DEVICE]
    return WorkerLoad(
        worker_id=worker_id,
        epoch=message.epoch,
        sequence=message.sequence,
        observed_at=made_at,
        queued_uncached_tokens=message.queued_uncached_tokens,
        queued_attention_pairs=message.queued_attention_pairs,
        prefill_tokens_per_s=message.prefill_tokens_per_s,
        decode_step_us=message.decode_step_us,
        running=message.running,
        prefilling=message.prefilling,
        waiting=message.waiting + message.swapped,
        free_blocks=sum(tier.free_blocks for tier in device),
        total_blocks=sum(tier.total_blocks for tier in device),
        draining=message.draining,
    )
