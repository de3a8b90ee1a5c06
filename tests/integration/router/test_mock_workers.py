"""What load is measured with: mock workers behind a real router."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from tests.mock_worker import MockConfig, token_at
from tests.mock_workers import MockProcess, mock_workers
from tests.redis_process import RedisProcess
from tests.router_harness import MODEL, RouterHarness, router_config, running_router
from tidemill.api.common.v1 import sampling_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.rpc.tls import TlsFiles

Tls = Callable[[str], TlsFiles]
Served = tuple[RouterHarness, list[MockProcess]]


@asynccontextmanager
async def served(
    model_dir: Path, ledger: RedisProcess, tls: Tls, *configs: MockConfig
) -> AsyncIterator[Served]:
    async with mock_workers(tls, *configs) as processes:
        endpoints = [endpoint for each in processes for endpoint in each.endpoints]
        config = router_config(model_dir, ledger, endpoints, tls("router"))
        async with running_router(config) as router:
            yield router, processes


def ask(
    request_id: str, *, prompt_tokens: int = 100, max_tokens: int
) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(
        request_id=request_id,
        model=MODEL,
        tokens=router_pb2.TokenInput(token_ids=[9] * prompt_tokens),
        sampling=sampling_pb2.Sampling(max_tokens=max_tokens),
    )


async def test_every_token_is_counted_alike_by_client_and_worker(
    model_dir: Path, ledger: RedisProcess, tls_files: Tls
) -> None:
    prefill = MockConfig(worker_id="p", role="prefill")
    decode = MockConfig(worker_id="d", role="decode", tokens_per_message=4, keeps_times=True)
    async with served(model_dir, ledger, tls_files, prefill, decode) as (router, processes):
        heard = await asyncio.gather(
            *(router.generate(ask(f"r{each}", max_tokens=30)) for each in range(8))
        )
        await router.check_idle()
        counts = (await processes[0].counts()) | (await processes[1].counts())
        times = await processes[1].times()
    assert all(each.token_ids == [token_at(index) for index in range(30)] for each in heard)
    assert counts["d"].generated_tokens == 8 * 30
    assert counts["d"].finals == counts["d"].acknowledged == 8
    assert counts["p"].computed_tokens == 8 * 100
    assert {each.completed.usage.prompt.prefill_worker_id for each in heard} == {"p"}
    assert [len(each) for each in times.values()] == [30] * 8


async def test_prompts_and_steps_take_their_time_and_a_full_worker_refuses(
    model_dir: Path, ledger: RedisProcess, tls_files: Tls
) -> None:
    prefill = MockConfig(worker_id="p", role="prefill", prefill_tokens_per_s=1000)
    decode = MockConfig(worker_id="d", role="decode", decode_step_s=0.01, max_running=2)
    async with served(model_dir, ledger, tls_files, prefill, decode) as (router, processes):
        begun = time.monotonic()
        heard = await asyncio.gather(
            *(router.generate(ask(f"r{each}", max_tokens=20)) for each in range(3))
        )
        seconds = time.monotonic() - begun
        refused = (await processes[1].counts())["d"].refused
    assert [len(each.token_ids) for each in heard] == [20] * 3
    assert refused > 0
    assert seconds > 2 * (0.1 + 19 * 0.008)  # the third waited for a whole other one
    timings = sorted(each.completed.timing.total_us for each in heard)
    assert timings[0] > 100_000 + 19 * 8_000


async def test_a_prefill_worker_takes_one_prompt_after_the_other(
    model_dir: Path, ledger: RedisProcess, tls_files: Tls
) -> None:
    both = MockConfig(worker_id="b", role="both", prefill_tokens_per_s=2000)
    async with served(model_dir, ledger, tls_files, both) as (router, processes):
        heard = await asyncio.gather(
            *(router.generate(ask(f"r{each}", max_tokens=1)) for each in range(4))
        )
        await processes[0].change("b", prefill_tokens_per_s=200.0)
        slow = await router.generate(ask("slow", max_tokens=1))
    first_tokens = sorted(each.completed.timing.first_token_us for each in heard)
    assert all(us >= 50_000 * place * 0.95 for place, us in enumerate(first_tokens, start=1)), (
        first_tokens
    )
    assert slow.completed.timing.first_token_us >= 500_000
