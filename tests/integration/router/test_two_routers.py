"""Two routers over one ledger: what a client asks of one holds at the other."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from services.router.keys import Tenant
from services.router.wiring import RouterProcess
from tests.redis_process import RedisProcess
from tests.router_harness import (
    ADMIN_KEY,
    MODEL,
    RouterHarness,
    bearer,
    listen,
    router_config,
    running_router,
    scripted,
)
from tests.scripted_worker import ScriptedWorker, Talk
from tests.stopwatch import stopwatch
from tidemill.api.billing.v1 import account_pb2
from tidemill.api.common.v1 import lifecycle_pb2
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.errors import LedgerUnavailable
from tidemill.rpc.tls import TlsFiles

pytestmark = pytest.mark.redis


async def endless(talk: Talk) -> None:
    """Generates one token, and ends when it is told to."""
    await talk.prefill_done(50)
    await talk.tokens([51])
    reason = lifecycle_pb2.FinishReason.Name((await talk.stopped).reason)
    await talk.final(reason.removeprefix("FINISH_REASON_"))


@pytest.fixture
async def routers(
    model_dir: Path, ledger: RedisProcess, tls_files: Callable[[str], TlsFiles]
) -> AsyncIterator[tuple[RouterHarness, RouterHarness]]:
    worker = ScriptedWorker("both-0", "both", endless)
    async with AsyncExitStack() as stack:
        endpoints = await stack.enter_async_context(scripted([worker], tls_files))
        config = router_config(model_dir, ledger, endpoints, tls_files("router"))
        first = await stack.enter_async_context(running_router(config))
        second = await stack.enter_async_context(running_router(config))
        yield first, second


def ask(request_id: str) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(request_id=request_id, model=MODEL, prompt="hello")


async def test_a_request_is_cancelled_at_whichever_router(
    routers: tuple[RouterHarness, RouterHarness],
) -> None:
    here, elsewhere = routers
    call = here.call(ask("r1"))
    while not (await call.read()).HasField("chunk"):
        pass
    stranger = await elsewhere.make_tenant("stranger")
    assert not await elsewhere.cancel("r1", key=stranger)
    assert not await elsewhere.cancel("r2")
    async with stopwatch() as watch:
        assert await elsewhere.cancel("r1")
        heard = await listen(call)
    assert watch.seconds < 2.0
    assert heard.completed.finish_reason == lifecycle_pb2.FINISH_REASON_CANCELLED
    assert heard.completed.usage.completion_tokens == 2
    assert not await elsewhere.cancel("r1")


async def test_limits_hold_over_all_routers_together(
    routers: tuple[RouterHarness, RouterHarness],
) -> None:
    here, elsewhere = routers
    one_at_once = admin_pb2.SetLimitsRequest(
        tenant_id="acme", operation_id="limits", limits=account_pb2.Limits(concurrency=1)
    )
    await here.admin.SetLimits(one_at_once, metadata=bearer(ADMIN_KEY))
    call = here.call(ask("r1"))
    while not (await call.read()).HasField("chunk"):
        pass
    refused = (await elsewhere.generate(ask("r2"))).error
    assert refused is not None
    assert refused.reason == "CONCURRENCY_LIMITED"
    assert await elsewhere.cancel("r1")
    await listen(call)
    call = elsewhere.call(ask("r2"))
    while not (await call.read()).HasField("chunk"):
        pass
    assert await here.cancel("r2")
    assert (await listen(call)).completed.usage.completion_tokens == 2


async def test_nobody_is_told_that_nothing_runs_while_nobody_can_know(
    routers: tuple[RouterHarness, RouterHarness], ledger: RedisProcess
) -> None:
    router = routers[0].process.router
    acme = Tenant("acme", "USD", b"")
    assert not await router.cancel(acme, "r1")
    ledger.kill()
    try:
        with pytest.raises(LedgerUnavailable):
            await router.cancel(acme, "r1")
    finally:
        ledger.start()


async def test_a_router_that_listens_knows_the_workers_and_what_they_hold(
    model_dir: Path,
    ledger: RedisProcess,
    tls_files: Callable[[str], TlsFiles],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.router.wiring._SEE_WORKERS_S", 60.0)
    worker = ScriptedWorker("both-0", "both", endless)
    worker.held = [11, 12, 13]
    async with scripted([worker], tls_files) as endpoints:
        nobody = "both@127.0.0.1:1"
        config = router_config(model_dir, ledger, [*endpoints, nobody], tls_files("router"))
        process = RouterProcess(config, registry=CollectorRegistry())
        async with asyncio.timeout(30):  # not for as long as it might wait for workers
            await process.start()
        try:
            assert process.fleet.readiness(MODEL) is None
            held = process.fleet.prefixes.overlap([11, 12, 13, 14], time.monotonic())
            assert held["both-0"].blocks == 3
        finally:
            await process.stop()
