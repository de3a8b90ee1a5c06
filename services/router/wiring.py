"""One router process: everything built from its configuration, and its life."""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.router.admin_service import AdminService
from services.router.admission import Admission
from services.router.authentication import (
    Access,
    Authenticator,
    KeyGuard,
    current_tenant_id,
)
from services.router.billing_service import BillingService
from services.router.cancellations import Cancellations
from services.router.config import RouterConfig
from services.router.dispatch import Dispatcher
from services.router.fleet import Expected, Fleet
from services.router.fleet_hours import FleetHours
from services.router.inter_token import InterTokenLatency
from services.router.keys import KeyStore
from services.router.margin import MarginReports
from services.router.metrics import RouterMetrics
from services.router.models import Catalogue, load_model
from services.router.money.assembly import Money
from services.router.money.ledger import Ledger
from services.router.money.metrics import LedgerMetrics
from services.router.money.signing import Signer
from services.router.quoting import Quoting
from services.router.registry import Registry
from services.router.requests import RequestBook
from services.router.router import Router
from services.router.service import RouterService
from services.router.statements import Statements
from services.router.tasks import OwnedTasks
from tidemill.api.billing.v1 import billing_service_pb2, billing_service_pb2_grpc
from tidemill.api.router.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    router_service_pb2,
    router_service_pb2_grpc,
)
from tidemill.billing import load_price_book
from tidemill.errors import ConfigError
from tidemill.rpc import tasks
from tidemill.rpc.metrics import RpcMetrics
from tidemill.rpc.options import SHARED_PUBLIC_SERVER
from tidemill.rpc.places import Shares
from tidemill.rpc.server import RpcServer

_BILLING = billing_service_pb2.DESCRIPTOR.services_by_name["BillingService"]
_ROUTER = router_service_pb2.DESCRIPTOR.services_by_name["RouterService"]
_ADMIN = admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"]
_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
_MIN_SECRET_CHARS = 32
_REDIS_TIMEOUT_S = 2.0
_TASKS_S = 3.0  # for acknowledgements and ledger commands
_SEE_WORKERS_S = 2.0
_LOOK_S = 0.02
_WRITE_OFF_S = 5.0  # for calls to end whose drain time is over

logger = logging.getLogger(__name__)


def system_now_ms() -> int:
    """This machine's clock, milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000


class RouterProcess:
    """Build, `start()`, wait, `stop()`. `shared_port`: others like it may listen there too."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        registry: CollectorRegistry = REGISTRY,
        now_ms: Callable[[], int] = system_now_ms,
        shared_port: bool = False,
    ) -> None:
        self._config = config
        self._shared_port = shared_port
        self._now_ms = now_ms
        self._stopping = False
        self._background: list[asyncio.Task[None]] = []
        self._pool = ThreadPoolExecutor(config.limits.tokenizer_threads, "tokenize")
        self.tasks = OwnedTasks()
        book = load_price_book(config.price_book)
        catalogue = Catalogue(load_model(model, book, now_ms()) for model in config.models)
        self.ledger = Ledger(config.ledger, LedgerMetrics(registry))
        self._signer = Signer.load(config.money.signing_key_file, config.money.signing_keys_dir)
        self.fleet = _fleet(config, catalogue)
        url = config.fleet.cache_url
        self._cache_redis = _cache_redis(url) if url else None
        self._hours = FleetHours(self.ledger, now_ms)
        self._registry = Registry(
            config.fleet,
            self.fleet,
            redis=self._cache_redis,
            clock=time.monotonic,
            hours=self._hours,
        )
        self.dispatchers = {
            model.name: _dispatcher(config, model.name, self.fleet) for model in catalogue
        }
        limits = config.limits
        self.requests = RequestBook()
        admission = Admission(
            catalogue=catalogue,
            fleet=self.fleet,
            book=book,
            limits=limits,
            pool=self._pool,
            rng=random.SystemRandom(),
            now_ms=now_ms,
        )
        metrics = RouterMetrics(registry, config.money.accelerator_hour_nano)
        self.money = Money(
            config.money,
            ledger=self.ledger,
            book=book,
            signer=self._signer,
            workers=self.fleet,
            owned=self.tasks,
            requests=metrics,
            registry=registry,
            now_ms=now_ms,
        )
        self._cancellations = Cancellations(
            self.ledger, self.money.accounts, router_id=self.money.router_id
        )
        self.router = self._router(admission, metrics)
        self.server = self._server(admission, RpcMetrics(registry), InterTokenLatency(registry))

    def _router(self, admission: Admission, metrics: RouterMetrics) -> Router:
        metrics.watch(
            queued=lambda: sum(map(len, self.dispatchers.values())),
            queued_tokens=lambda: sum(each.queued_tokens for each in self.dispatchers.values()),
            running=lambda: len(self.requests),
        )
        return Router(
            admission=admission,
            dispatchers=self.dispatchers,
            treasury=self.money.treasury,
            cancellations=self._cancellations,
            book=self.requests,
            tasks=self.tasks,
            limits=self._config.limits,
            metrics=metrics,
            clock=time.monotonic,
        )

    def _server(
        self, admission: Admission, metrics: RpcMetrics, inter_token: InterTokenLatency
    ) -> RpcServer:
        config = self._config.ledger
        pepper = _read_secret(config.pepper_file, "ledger.pepper_file")
        admin_key = _read_secret(config.admin_key_file, "ledger.admin_key_file")
        store = KeyStore(self.ledger, pepper.encode(), self._now_ms)
        authenticator = Authenticator(store, cache_s=config.key_cache_s, clock=time.monotonic)
        server = RpcServer(
            self._config.server,
            public=True,
            readiness=self._readiness,
            guards=(
                KeyGuard(_access(), authenticator, admin_key),
                Shares(self._config.server.max_concurrent_rpcs, lambda _: current_tenant_id()),
            ),
            metrics=metrics,
            options=SHARED_PUBLIC_SERVER if self._shared_port else None,
            service="tidemill-router",
        )
        service = RouterService(
            self.router,
            admission,
            inter_token=inter_token,
            slow_reader_s=self._config.limits.slow_reader_s,
            now_ms=self._now_ms,
        )
        router_service_pb2_grpc.add_RouterServiceServicer_to_server(service, server.server)
        admin = AdminService(
            store=store,
            accounts=self.money.accounts,
            book=admission.book,
            margin=MarginReports(
                accounts=self.money.accounts,
                store=store,
                hours=self._hours,
                hour_nano=self._config.money.accelerator_hour_nano,
            ),
            now_ms=self._now_ms,
        )
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(admin, server.server)
        billing = self._billing(admission)
        billing_service_pb2_grpc.add_BillingServiceServicer_to_server(billing, server.server)
        for descriptor in (_ROUTER, _ADMIN, _BILLING):
            server.add_service_name(descriptor.full_name)
        return server

    def _billing(self, admission: Admission) -> BillingService:
        return BillingService(
            accounts=self.money.accounts,
            statements=Statements(
                accounts=self.money.accounts,
                signer=self._signer,
                pending=self.money.treasury.pending,
                now_ms=self._now_ms,
            ),
            quoting=Quoting(
                admission=admission,
                dispatchers=self.dispatchers,
                accounts=self.money.accounts,
                now_ms=self._now_ms,
            ),
            book=admission.book,
            signer=self._signer,
            now_ms=self._now_ms,
        )

    @property
    def ready(self) -> bool:
        """Whether it can serve, as health says."""
        return self._readiness() is None

    async def start(self) -> None:
        """Check the ledger, then listen; ConfigError says why not."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        await self.ledger.check_settings()
        await self._registry.check()
        await self.money.start()
        for coroutine in (
            self._registry.run(),
            self._hours.run(),
            self._cancellations.run(self.router.cancel_here),
            *(dispatcher.run() for dispatcher in self.dispatchers.values()),
        ):
            self._background.append(asyncio.create_task(coroutine))
        await self._see_workers()
        await self.server.start()

    async def _see_workers(self) -> None:
        """Know the workers before anybody asks for one: what else there is starts empty."""
        began = time.monotonic()
        while self._registry.asking and time.monotonic() - began < _SEE_WORKERS_S:  # noqa: ASYNC110 - many tasks tell
            await asyncio.sleep(_LOOK_S)
        took_s = round(time.monotonic() - began, 3)
        logger.info("workers seen", extra={"workers": len(self.fleet), "after_s": took_s})

    async def stop(self) -> None:
        """Hear no new requests, give running ones the drain time, write off the rest.

        The port is closed first, so that clients call the other routers there, or behind the same
        name, at once.
        """
        if self._stopping:
            return
        self._stopping = True
        draining = asyncio.create_task(self.server.drain(and_s=_WRITE_OFF_S))
        await self.router.close(self._config.server.drain_s)
        await draining
        await self.tasks.join(_TASKS_S)
        await tasks.end(*self._background)
        await self.money.stop()
        await self.ledger.close()
        if self._cache_redis is not None:
            await self._cache_redis.aclose()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _readiness(self) -> str | None:
        if self._stopping:
            return "the router is stopping"
        if why := self.money.readiness:
            return why
        for name in self.dispatchers:
            if why := self.fleet.readiness(name):
                return why
        return None


def _cache_redis(url: str) -> Redis:
    return Redis.from_url(
        url,
        socket_timeout=_REDIS_TIMEOUT_S,
        socket_connect_timeout=_REDIS_TIMEOUT_S,
        retry=Retry(NoBackoff(), 1),
    )


def _fleet(config: RouterConfig, catalogue: Catalogue) -> Fleet:
    expected = {
        model.name: Expected(
            model.tokenizer.vocab_size, bytes.fromhex(model.config.model_digest or "") or None
        )
        for model in catalogue
    }
    return Fleet(expected, clock=time.monotonic, stale_after_s=config.balancer.stale_after_s)


def _dispatcher(config: RouterConfig, model: str, fleet: Fleet) -> Dispatcher:
    return Dispatcher(
        model,
        fleet,
        limits=config.queue,
        balancer=config.balancer,
        rng=random.SystemRandom(),
        clock=time.monotonic,
    )


def _access() -> dict[str, Access]:
    """Every method of the services, by its full name, and reflection, where it is served."""
    methods = {
        f"/{service.full_name}/{method.name}": access
        for service, access in (
            (_ROUTER, Access.TENANT),
            (_BILLING, Access.TENANT),
            (_ADMIN, Access.ADMIN),
        )
        for method in service.methods
    }
    return {**methods, _REFLECTION: Access.TENANT}


def _read_secret(path: Path, key: str) -> str:
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"router.{key}: {path} cannot be read: {error}") from error
    if len(secret) < _MIN_SECRET_CHARS:
        raise ConfigError(f"router.{key}: {path} holds fewer than {_MIN_SECRET_CHARS} characters")
    return secret
