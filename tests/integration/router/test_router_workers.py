"""How the router finds workers, picks among them and outlives them."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.redis_process import RedisProcess
from tests.router_harness import (
    MODEL,
    RouterHarness,
    router_config,
    running_router,
    scripted,
)
from tests.scripted_worker import ScriptedWorker, Talk, answer
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.errors import DecodeFull, PrefillFull
from tidemill.rpc.tls import TlsFiles

pytestmark = pytest.mark.redis

TlsOf = Callable[[str], TlsFiles]
hello = answer([50, 51, 52])


def ask(request_id: str = "r1", prompt: str = "x" * 200) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(request_id=request_id, model=MODEL, prompt=prompt)


def refuses(error: Exception) -> Callable[[Talk], Any]:
    async def play(talk: Talk) -> None:
        raise error

    return play


Start = Callable[..., Any]


@pytest.fixture
def start(model_dir: Path, ledger: RedisProcess, tls_files: TlsOf) -> Start:
    """(*workers, **config) -> a router that knows them, as a context manager."""

    @asynccontextmanager
    async def run(*workers: ScriptedWorker, **config: Any) -> AsyncIterator[RouterHarness]:
        async with scripted(workers, tls_files) as endpoints:
            settings = router_config(model_dir, ledger, endpoints, tls_files("router"), **config)
            async with running_router(settings) as router:
                await router.until(lambda: connected(router) == len(workers))
                yield router

    return run


def connected(router: RouterHarness) -> int:
    return len(router.process.fleet)


def starts(workers: Sequence[ScriptedWorker]) -> list[int]:
    return [len(worker.starts) for worker in workers]


async def test_one_worker_may_do_both(start: Start) -> None:
    worker = ScriptedWorker("both-0", "both", hello)
    async with start(worker) as router:
        assert (await router.generate(ask())).completed.usage.completion_tokens == 3
    assert not worker.starts[0].HasField("prefill")


@pytest.mark.parametrize("refusal", [DecodeFull, PrefillFull])
async def test_a_refused_request_goes_elsewhere_and_costs_once(
    start: Start, refusal: type[DecodeFull] | type[PrefillFull]
) -> None:
    full = refuses(refusal("no room", retry_after_s=0.05))
    decode = ScriptedWorker("decode-0", "decode", full, full, hello)
    prefills = [ScriptedWorker(f"prefill-{number}", "prefill") for number in range(2)]
    async with start(decode, *prefills) as router:
        heard = await router.generate(ask())
        assert heard.completed.usage.completion_tokens == 3
        assert heard.completed.usage.unbilled.lost_tokens == 0
        assert heard.completed.receipt.attempts == 1
    attempts = [(start.task.id.attempt, start.prefill.worker_id) for start in decode.starts]
    assert [attempt for attempt, _ in attempts] == [1, 1, 1], "a refused one never began"
    if refusal is PrefillFull:
        assert attempts[0][1] != attempts[1][1]


async def test_work_spreads_over_decode_workers(start: Start) -> None:
    slow = answer([50] * 20, pause_s=0.02)
    decodes = [ScriptedWorker(f"decode-{number}", "decode", slow) for number in range(3)]
    async with start(ScriptedWorker("prefill-0", "prefill"), *decodes) as router:
        await asyncio.gather(*(router.generate(ask(f"r{each}")) for each in range(24)))
    assert min(starts(decodes)) >= 4


async def test_a_prompt_returns_to_the_worker_that_knows_it(start: Start) -> None:
    decode = ScriptedWorker("decode-0", "decode", hello)
    prefills = [ScriptedWorker(f"prefill-{number}", "prefill") for number in range(4)]
    async with start(decode, *prefills) as router:
        for number in range(6):
            prompt = "same words " * 60 + str(number)
            assert (await router.generate(ask(f"r{number}", prompt))).error is None
    assert len({start.prefill.worker_id for start in decode.starts}) == 1


@pytest.mark.parametrize("how", ["draining", "silent"])
async def test_a_worker_that_drains_or_falls_silent_is_not_picked(start: Start, how: str) -> None:
    decodes = [ScriptedWorker(f"decode-{number}", "decode", hello) for number in range(2)]
    async with start(ScriptedWorker("prefill-0", "prefill"), *decodes) as router:
        decodes[0].draining = how == "draining"
        decodes[0].reporting = how != "silent"
        usable = router.process.fleet.usable
        # By name: on a busy machine the other one may look silent too, for a moment.
        await router.until(lambda: [w.id for w in usable(MODEL, "decode")] == ["decode-1"])
        for number in range(4):
            assert (await router.generate(ask(f"r{number}"))).error is None
    assert starts(decodes) == [0, 4]


async def test_weights_are_never_mixed_under_one_name(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    other = hashlib.sha256(b"other weights").digest()
    workers = [
        ScriptedWorker("one", "both", hello),
        ScriptedWorker("two", "both", hello, digest=other),
    ]
    async with start(*workers) as router:
        for number in range(6):
            assert (await router.generate(ask(f"r{number}"))).error is None
        assert sorted(starts(workers)) == [0, 6]
        assert "model digest" in caplog.text
        used, unused = sorted(workers, key=lambda worker: not worker.starts)
        await used.vanish()
        await router.until(lambda: router.process.ready)
        assert (await router.generate(ask("r6"))).error is None
        assert unused.starts[0].task.model_digest == unused.digest


async def test_a_worker_of_another_model_or_a_smaller_vocabulary_is_not_used(
    start: Start,
) -> None:
    other = ScriptedWorker("other", "decode", hello, model="gpt")
    small = ScriptedWorker("small", "decode", hello, vocab_size=10)
    good = ScriptedWorker("good", "both", hello)
    async with start(other, small, good) as router:
        for number in range(4):
            assert (await router.generate(ask(f"r{number}"))).error is None
    assert (other.starts, small.starts) == ([], [])


async def test_a_restarted_worker_is_met_anew(start: Start, tls_files: TlsOf) -> None:
    worker = ScriptedWorker("both-0", "both", hello)
    async with start(worker) as router:
        assert (await router.generate(ask("r1"))).error is None
        address = worker.endpoint.partition("@")[2]
        await worker.vanish()
        await router.until(lambda: connected(router) == 0)
        heard = await router.generate(ask("r2"))
        assert heard.error is not None
        assert (heard.error.code, heard.error.reason) == (
            grpc.StatusCode.UNAVAILABLE,
            "NO_WORKERS",
        )
        worker.epoch = 2
        await worker.start(tls_files("worker"), address=address)
        await router.until(lambda: router.process.ready)
        assert (await router.generate(ask("r3"))).error is None
        found = router.process.fleet.get("both-0")
        assert found is not None
        assert found.description.epoch == 2


async def test_a_peer_with_another_role_cannot_pose_as_a_worker(
    model_dir: Path, ledger: RedisProcess, tls_files: TlsOf
) -> None:
    impostor = ScriptedWorker("impostor", "decode", hello)
    await impostor.start(tls_files("cache"))
    config = router_config(model_dir, ledger, [impostor.endpoint], tls_files("router"))
    async with running_router(config, wait_ready=False) as router:
        await asyncio.sleep(0.5)
        assert connected(router) == 0
    await impostor.vanish()


async def test_health_tells_whether_a_model_can_be_served(start: Start) -> None:
    worker = ScriptedWorker("both-0", "both", hello)
    async with start(worker) as router:
        health: Any = health_pb2_grpc.HealthStub(router.channel)
        serving = health_pb2.HealthCheckResponse.SERVING

        async def status() -> int:
            router.process.server.set_readiness_now()
            answered = await health.Check(health_pb2.HealthCheckRequest())
            return int(answered.status)

        assert await status() == serving
        await worker.vanish()
        await router.until(lambda: connected(router) == 0)
        assert await status() != serving


async def test_workers_are_found_in_the_cache_redis_and_outlive_it(
    model_dir: Path,
    ledger: RedisProcess,
    redis_server: Callable[..., RedisProcess],
    tls_files: TlsOf,
) -> None:
    cache = redis_server()
    worker = ScriptedWorker("both-0", "both", hello)
    async with scripted([worker], tls_files) as endpoints:
        client = redis.Redis.from_url(cache.url)
        address = endpoints[0].partition("@")[2]
        client.hset("tm:worker:both-0", mapping={"address": address, "role": "both"})
        client.hset("tm:worker:broken", mapping={"role": "both"})
        client.zadd("tm:workers", {"both-0": 1, "broken": 2, "expired": 3})
        client.close()
        config = router_config(model_dir, ledger, [], tls_files("router"), cache_url=cache.url)
        async with running_router(config) as router:
            assert (await router.generate(ask("r1"))).error is None
            cache.kill()
            await asyncio.sleep(0.3)
            assert (await router.generate(ask("r2"))).error is None
            cache.start()
            await asyncio.sleep(0.3)
            assert connected(router) == 1
            await worker.vanish()
            await router.until(lambda: connected(router) == 0)
