"""Every way in which a request ends: cancel, deadlines, slow readers, lost workers, repeats."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.redis_process import RedisProcess
from tests.router_harness import (
    MODEL,
    RouterHarness,
    listen,
    router_config,
    running_router,
    scripted,
    spell,
)
from tests.scripted_worker import ScriptedWorker, Talk, answer
from tests.stopwatch import stopwatch
from tidemill.api.common.v1 import lifecycle_pb2, sampling_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.api.router.v1.router_service_pb2_grpc import RouterServiceStub
from tidemill.errors import AlreadyExists, DeadlineExceeded, RequestInProgress, WorkerLost
from tidemill.rpc.channel import sdk_aio_channel
from tidemill.rpc.options import SDK_CLIENT
from tidemill.rpc.tls import TlsFiles

pytestmark = pytest.mark.redis

CANCELLED = lifecycle_pb2.FINISH_REASON_CANCELLED
DEADLINE = lifecycle_pb2.FINISH_REASON_DEADLINE
LONG = sampling_pb2.Sampling(max_tokens=900)


def ask(request_id: str = "r1", **fields: Any) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(
        request_id=request_id, model=MODEL, prompt="x" * 100, **fields
    )


def endless(pause_s: float = 0.01) -> Callable[[Talk], Any]:
    """Generates until it is told to stop, then two tokens more."""

    async def play(talk: Talk) -> None:
        await talk.prefill_done(50)
        while not talk.stopped.done():
            await talk.tokens([51])
            await asyncio.sleep(pause_s)
        await talk.tokens([52, 53])
        reason = lifecycle_pb2.FinishReason.Name(talk.stopped.result().reason)
        await talk.final(reason.removeprefix("FINISH_REASON_"))

    return play


async def silent(talk: Talk) -> None:
    """Never generates; obeys Stop."""
    stop = await talk.stopped
    reason = lifecycle_pb2.FinishReason.Name(stop.reason)
    await talk.final(reason.removeprefix("FINISH_REASON_"))


async def deaf(talk: Talk) -> None:
    """Generates and ignores Stop."""
    await talk.prefill_done(50)
    await talk.tokens([51, 52])
    await asyncio.sleep(60)


async def read_chunks(call: Any, count: int) -> None:
    while count:
        count -= (await call.read()).HasField("chunk")


async def test_cancel_generation_closes_the_stream_with_a_bill(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    decode.scripts = [endless()]
    call = router.call(ask())
    await read_chunks(call, 3)
    assert await router.cancel("r1")
    heard = await listen(call)
    completed = heard.completed
    assert completed.finish_reason == CANCELLED
    usage = completed.usage
    assert usage.completion_tokens == usage.generated_tokens > 3
    assert completed.receipt.amount_nano > 0
    assert [stop.reason for stop in decode.stops] == [CANCELLED]
    assert not await router.cancel("r1")


async def test_only_its_own_tenant_can_cancel_a_request(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    decode.scripts = [endless()]
    other = await router.make_tenant("globex")
    call = router.call(ask())
    await read_chunks(call, 1)
    assert not await router.cancel("r1", key=other)
    assert await router.cancel("r1")
    await listen(call)


async def test_a_client_that_leaves_pays_for_all_tokens_up_to_final(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    decode.scripts = [endless()]
    call = router.call(ask())
    await read_chunks(call, 3)
    call.cancel()
    await router.until(lambda: bool(decode.acknowledged))
    assert [stop.reason for stop in decode.stops] == [CANCELLED]
    again = await router.generate(ask())
    usage = again.completed.usage
    assert again.kinds == ["completed"]
    assert usage.completion_tokens == usage.generated_tokens > 3
    assert len(decode.starts) == 1


async def test_a_cancel_before_the_first_token_costs_nothing(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    decode.scripts = [silent, answer(spell(model_dir, "hello"))]
    call = router.call(ask())
    await call.read()
    await router.until(lambda: bool(decode.starts))
    assert await router.cancel("r1")
    heard = await listen(call)
    assert heard.completed.finish_reason == CANCELLED
    assert heard.completed.receipt.amount_nano == 0
    assert not heard.completed.usage.HasField("prompt")
    assert (await router.generate(ask())).text == "hello"


async def test_a_cancel_in_the_queue_reaches_no_worker(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    decode.free_blocks = 0
    await router.until_seen(decode)
    call = router.call(ask())
    await call.read()
    assert await router.cancel("r1")
    heard = await listen(call)
    assert heard.completed.finish_reason == CANCELLED
    assert decode.starts == []


async def test_the_first_token_has_a_deadline(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    decode.scripts = [silent]
    heard = await router.generate(ask(first_token_timeout_ms=1000))
    assert isinstance(heard.error, DeadlineExceeded)
    assert heard.error.request_id == "r1"
    assert [stop.reason for stop in decode.stops] == [DEADLINE]


async def test_the_last_token_has_a_deadline(router: RouterHarness, decode: ScriptedWorker) -> None:
    decode.scripts = [endless()]
    heard = await router.generate(ask(total_timeout_ms=1500, sampling=LONG))
    completed = heard.completed
    assert completed.finish_reason == DEADLINE
    assert completed.usage.completion_tokens == len(heard.token_ids)
    receipt = completed.receipt
    assert receipt.decided_at_ms <= receipt.admitted_at_ms + 1500


async def test_the_bill_comes_before_the_calls_own_deadline(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    decode.scripts = [endless()]
    heard = await router.generate(ask(sampling=LONG), timeout=3.0)
    assert heard.completed.finish_reason == DEADLINE


async def test_a_worker_that_sends_no_final_counts_as_lost(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    decode.scripts = [deaf]
    call = router.call(ask())
    await read_chunks(call, 2)
    started = time.monotonic()
    async with stopwatch() as watch:
        await router.cancel("r1")
        heard = await listen(call)
    assert time.monotonic() - started > 1.5
    assert watch.seconds < 4
    assert heard.completed.finish_reason == CANCELLED
    assert heard.completed.usage.completion_tokens == 3


async def test_a_worker_lost_in_mid_stream_with_no_other_is_an_error_and_no_bill(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    decode.scripts = [endless()]
    call = router.call(ask())
    await read_chunks(call, 3)
    async with stopwatch() as watch:
        await decode.vanish()
        heard = await listen(call)
    assert watch.seconds < 3
    assert isinstance(heard.error, WorkerLost)
    assert heard.error.request_id == "r1"
    lost = router.metric("tidemill_router_unbilled_tokens_total", model=MODEL, why="lost")
    assert lost >= 3
    assert router.metric("tidemill_router_completion_tokens_total", model=MODEL) == 0


async def test_a_worker_lost_before_the_first_token_is_replaced(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    async def play(talk: Talk) -> None:
        raise WorkerLost("prefill worker is gone", metadata={"worker_id": "decode-9"})

    decode.scripts = [play, answer(spell(model_dir, "hello"))]
    heard = await router.generate(ask(), timeout=30)
    assert heard.text == "hello"
    assert heard.completed.receipt.attempts == 2
    assert [start.task.id.attempt for start in decode.starts] == [1, 2]


async def test_with_no_other_worker_a_loss_before_the_first_token_is_told_within_two_seconds(
    router: RouterHarness, decode: ScriptedWorker, prefill: ScriptedWorker
) -> None:
    async def play(talk: Talk) -> None:
        await prefill.vanish()
        raise WorkerLost("prefill worker is gone", metadata={"worker_id": "prefill-0"})

    decode.scripts = [play]
    began = time.monotonic()
    async with stopwatch() as watch:
        heard = await router.generate(ask(), timeout=30)
    assert time.monotonic() - began > 1.0
    assert watch.seconds < 2.5
    assert isinstance(heard.error, WorkerLost)
    assert heard.error.request_id == "r1"
    assert len(decode.starts) == 1
    assert router.metric("tidemill_router_revenue_nano_total", model=MODEL, currency="USD") == 0


async def test_a_worker_that_is_back_in_time_takes_the_request_again(
    router: RouterHarness,
    decode: ScriptedWorker,
    prefill: ScriptedWorker,
    tls_files: Callable[[str], TlsFiles],
) -> None:
    address = prefill.endpoint.partition("@")[2]

    async def play(talk: Talk) -> None:
        await prefill.vanish()
        prefill.epoch = 2
        await prefill.start(tls_files("prefill"), address=address)
        raise WorkerLost("prefill worker is gone", metadata={"worker_id": "prefill-0"})

    decode.scripts = [play, answer([50, 51])]
    heard = await router.generate(ask(), timeout=30)
    assert heard.completed.usage.completion_tokens == 2
    assert heard.completed.receipt.attempts == 2


async def test_that_all_workers_are_busy_is_no_reason_to_give_a_lost_request_up(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    async def play(talk: Talk) -> None:
        decode.free_blocks = 0
        raise WorkerLost("prefill worker is gone", metadata={"worker_id": "prefill-9"})

    decode.scripts = [play, answer([50, 51])]
    call = router.call(ask())
    await router.until(lambda: len(decode.starts) == 1)
    await asyncio.sleep(2.5)
    decode.free_blocks = 100
    assert (await listen(call)).completed.usage.completion_tokens == 2


@pytest.mark.slow
async def test_a_request_whose_workers_keep_being_lost_fails_after_two_more_attempts(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    async def play(talk: Talk) -> None:
        raise WorkerLost("prefill worker is gone", metadata={"worker_id": "decode-9"})

    decode.scripts = [play]
    heard = await router.generate(ask(), timeout=20)
    assert isinstance(heard.error, WorkerLost)
    assert len(decode.starts) == 3


async def test_a_running_id_is_not_run_twice(router: RouterHarness, decode: ScriptedWorker) -> None:
    decode.scripts = [endless()]
    call = router.call(ask())
    await read_chunks(call, 1)
    again = await router.generate(ask())
    assert isinstance(again.error, RequestInProgress)
    assert again.error.retry_after_s is not None
    other = await router.generate(ask(stop=["x"]))
    assert isinstance(other.error, AlreadyExists)
    await router.cancel("r1")
    await listen(call)
    assert len(decode.starts) == 1


async def test_a_repeated_request_gets_the_same_receipt_and_no_text(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    first = await router.generate(ask())
    again = await router.generate(ask())
    assert again.kinds == ["completed"]
    assert again.completed.HasField("text_replayed")
    assert not again.completed.text_replayed
    again.completed.ClearField("text_replayed")
    assert again.completed == first.completed
    other = await router.generate(ask(stop=["x"]))
    assert isinstance(other.error, AlreadyExists)
    assert len(decode.starts) == 1


async def flood(talk: Talk) -> None:
    """Generates as fast as it can until it is told to stop."""
    await talk.prefill_done(50)
    while not talk.stopped.done():
        await talk.tokens([51] * 8)
        await asyncio.sleep(0)
    await talk.final("SLOW_READER")


class TestSlowReader:
    @pytest.fixture
    def limits(self) -> dict[str, Any]:
        return {"slow_reader_s": 0.5}

    @pytest.fixture
    def decode(self) -> ScriptedWorker:
        return ScriptedWorker("decode-0", "decode", flood, context_tokens=1 << 20)

    async def test_a_reader_that_stalls_is_stopped_and_billed(
        self, router: RouterHarness, decode: ScriptedWorker
    ) -> None:
        narrow = (*SDK_CLIENT, ("grpc.http2.bdp_probe", 0))
        address = router.process.server.address
        async with sdk_aio_channel(address, insecure=True, options=narrow) as channel:
            router.stub = RouterServiceStub(channel)
            await self._stall(router, decode)

    async def _stall(self, router: RouterHarness, decode: ScriptedWorker) -> None:
        call = router.call(ask(sampling=sampling_pb2.Sampling(max_tokens=32_000)))
        await router.until(lambda: bool(decode.acknowledged), timeout_s=60)
        assert [stop.reason for stop in decode.stops] == [lifecycle_pb2.FINISH_REASON_SLOW_READER]
        heard = await listen(call)
        assert heard.error is not None
        assert heard.error.reason == "SLOW_READER"
        billed = router.metric("tidemill_router_completion_tokens_total", model=MODEL)
        assert billed > 100


async def test_a_stopping_router_settles_what_runs(
    model_dir: Path,
    ledger: RedisProcess,
    tls_files: Callable[[str], TlsFiles],
) -> None:
    decode = ScriptedWorker("decode-0", "decode", endless())
    prefill = ScriptedWorker("prefill-0", "prefill")
    async with scripted([prefill, decode], tls_files) as endpoints:
        config = router_config(model_dir, ledger, endpoints, tls_files("router"), drain_s=0.2)
        async with running_router(config) as router:
            call = router.call(ask())
            await read_chunks(call, 2)
            stopping = asyncio.create_task(router.process.stop())
            heard = await listen(call)
            await stopping
            assert heard.error is not None
            assert heard.error.reason == "ROUTER_STOPPING"
            assert len(decode.stops) == len(decode.acknowledged) == 1
            fault = {"model": MODEL, "why": "server_fault"}
            assert router.metric("tidemill_router_unbilled_tokens_total", **fault) >= 4
