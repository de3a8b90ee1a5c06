"""A worker that slows down is left alone before it fails."""

import asyncio
import time
import zlib
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.redis_process import RedisProcess
from tests.router_harness import RouterHarness
from tests.router_workers import TlsOf, ask, router_over
from tests.worker_harness import metric, prompt_of, settled, slow_down, worker_at
from tidemill.policy import BalancerConfig
from tidemill.worker.config import Role
from tidemill.worker.process import RunningWorker

pytestmark = pytest.mark.redis

BALANCER = BalancerConfig()
STEP_S = 0.1
ROLES = {"p1": Role.PREFILL, "p2": Role.PREFILL, "d1": Role.DECODE, "d2": Role.DECODE}
WORK = {Role.PREFILL: "computed_tokens_total", Role.DECODE: "generated_tokens_total"}


async def answer(router: RouterHarness, *request_ids: str) -> None:
    """All at once, to their ends; no prompt begins as another does."""
    requests = [ask(each) for each in request_ids]
    for request in requests:
        seed = zlib.crc32(request.request_id.encode())
        request.tokens.token_ids[:] = prompt_of(200, seed=seed)
    heard = await asyncio.gather(*(router.generate(request) for request in requests))
    assert all(each.completed.usage.completion_tokens == 12 for each in heard)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_a_worker_that_slows_down_gets_no_more_work(
    role: Role, tiny_dir: Path, ledger: RedisProcess, tls_files: TlsOf
) -> None:
    async with AsyncExitStack() as stack:
        workers: dict[str, RunningWorker] = {
            name: await stack.enter_async_context(
                worker_at(each, tiny_dir, tls_files, worker_id=name)
            )
            for name, each in ROLES.items()
        }
        endpoints = [f"{ROLES[name].value}@{each.address}" for name, each in workers.items()]
        router = await stack.enter_async_context(
            router_over(tiny_dir, ledger, tls_files, *endpoints, slow_ratio=BALANCER.slow_ratio)
        )
        slow, sound = (workers[f"{role.value[0]}{number}"] for number in (1, 2))

        def done(running: RunningWorker) -> float:
            return metric(running, WORK[role])

        def seconds(running: RunningWorker) -> float:
            """For a token, or for a step, as the router was told; 0 if it was not."""
            known = router.process.fleet.get(running.worker.worker_id)
            assert known is not None
            assert known.load is not None
            if role is Role.DECODE:
                return known.load.decode_step_us / 1e6
            pace = known.load.prefill_tokens_per_s
            return 1 / pace if pace else 0.0

        begun = done(slow)
        for batch in range(5):
            await answer(router, *(f"warm-{batch}-{number}" for number in range(4)))
            if done(slow) > begun:
                break
        assert done(slow) > begun, "it had its part"

        slow_down(slow, STEP_S)
        tried = done(slow)
        for batch in range(8):
            await answer(router, *(f"slowing-{batch}-{number}" for number in range(4)))
            if done(slow) > tried:
                break
        assert done(slow) > tried, "nobody can know before it has had something to do"
        await router.until(lambda: 0 < BALANCER.slow_ratio * seconds(sound) < seconds(slow))

        given, elsewhere = done(slow), done(sound)
        began = time.monotonic()
        for batch in range(4):
            await answer(router, *(f"later-{batch}-{number}" for number in range(4)))
        one_try = {Role.PREFILL: 200, Role.DECODE: 12}[role]
        tries = 1 + (time.monotonic() - began) // BALANCER.probe_s
        assert done(slow) - given <= one_try * tries, "but for one in probe_s"
        assert BALANCER.probe_s >= 5
        assert done(sound) > elsewhere
        await settled(*workers.values())
