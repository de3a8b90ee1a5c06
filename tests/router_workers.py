"""A router over real workers on the tiny model."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.redis_process import RedisProcess
from tests.router_harness import MODEL, Heard, RouterHarness, router_config, running_router
from tests.worker_harness import prompt_of, settled, worker_at
from tidemill.api.common.v1 import sampling_pb2, usage_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.rpc.tls import TlsFiles
from tidemill.worker.config import Role
from tidemill.worker.process import RunningWorker

TlsOf = Callable[[str], TlsFiles]
Pair = tuple[RunningWorker, RunningWorker, RouterHarness]


def ask(
    request_id: str, num_tokens: int = 200, *, max_tokens: int = 12, **fields: Any
) -> router_pb2.GenerateRequest:
    """Greedy, after a prompt of so many tokens; shorter ones are the start of longer ones."""
    return router_pb2.GenerateRequest(
        request_id=request_id,
        model=MODEL,
        tokens=router_pb2.TokenInput(token_ids=prompt_of(num_tokens)),
        sampling=sampling_pb2.Sampling(temperature=0, max_tokens=max_tokens),
        **fields,
    )


@asynccontextmanager
async def router_over(
    tiny_dir: Path,
    ledger: RedisProcess,
    tls_files: TlsOf,
    *endpoints: str,
    slow_ratio: float = 1e9,
) -> AsyncIterator[RouterHarness]:
    """A router that knows the workers at `endpoints`.

    It avoids none for being slow unless told so: on a busy machine anyone may look it.
    """
    config = router_config(tiny_dir, ledger, endpoints, tls_files("router"))
    config = replace(config, balancer=replace(config.balancer, slow_ratio=slow_ratio))
    async with running_router(config) as router:
        yield router


@asynccontextmanager
async def split_pair(
    tiny_dir: Path, ledger: RedisProcess, tls_files: TlsOf, *, in_place_tokens: int = 0
) -> AsyncIterator[Pair]:
    """A prefill worker, a decode worker, and a router over them; pools whole at the end."""
    in_place = {"in_place_tokens": in_place_tokens}
    async with (
        worker_at(Role.PREFILL, tiny_dir, tls_files, worker_id="p") as prefill,
        worker_at(Role.DECODE, tiny_dir, tls_files, worker_id="d", **in_place) as decode,
        router_over(
            tiny_dir, ledger, tls_files, f"prefill@{prefill.address}", f"decode@{decode.address}"
        ) as router,
    ):
        yield prefill, decode, router
        await settled(prefill, decode)


def check_usage(heard: Heard, num_prompt: int) -> usage_pb2.Usage:
    """U1, U2 and M4 of a completed stream."""
    usage = heard.completed.usage
    prompt = usage.prompt
    reused = (
        prompt.reused_device_tokens
        + prompt.reused_host_tokens
        + prompt.reused_cache_ram_tokens
        + prompt.reused_cache_disk_tokens
        + prompt.reused_peer_tokens
    )
    assert prompt.prompt_tokens == num_prompt == prompt.computed_tokens + reused
    assert usage.cache_hit_tokens % 64 == 0
    assert usage.cache_hit_tokens <= min(reused, (num_prompt - 1) // 64 * 64)
    assert usage.cache_hit_tokens + usage.cache_miss_tokens == num_prompt
    unbilled = usage.unbilled
    assert usage.generated_tokens == usage.completion_tokens + unbilled.overrun_tokens
    return usage
