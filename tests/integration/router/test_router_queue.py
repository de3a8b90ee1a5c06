"""A router whose workers are busy: what those who wait are told, and who is sent away at once."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.mock_worker import MockConfig
from tests.mock_workers import mock_workers
from tests.redis_process import RedisProcess
from tests.router_harness import MODEL, RouterHarness, listen, router_config, running_router
from tidemill.api.common.v1 import sampling_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.errors import DeadlineUnreachable, InvalidRequest
from tidemill.rpc.tls import TlsFiles

PROMPT_TOKENS = 200


@pytest.fixture
async def router(
    model_dir: Path, ledger: RedisProcess, tls_files: Callable[[str], TlsFiles]
) -> AsyncIterator[RouterHarness]:
    """One worker that prefills 2000 tokens a second and has one prompt waiting."""
    busy = MockConfig(worker_id="b", role="both", prefill_tokens_per_s=2000)
    async with mock_workers(tls_files, busy) as (process,):
        config = router_config(model_dir, ledger, process.endpoints, tls_files("router"))
        config = replace(config, balancer=replace(config.balancer, max_queued_tokens=PROMPT_TOKENS))
        async with running_router(config) as harness:
            yield harness


def ask(request_id: str, **fields: Any) -> router_pb2.GenerateRequest:
    token_ids = Random(request_id).choices(range(4, 250), k=PROMPT_TOKENS)
    return router_pb2.GenerateRequest(
        request_id=request_id,
        model=MODEL,
        tokens=router_pb2.TokenInput(token_ids=token_ids),
        sampling=sampling_pb2.Sampling(max_tokens=1),
        **fields,
    )


async def test_waits_are_told_and_what_cannot_make_its_deadline_is_refused_at_once(
    router: RouterHarness,
) -> None:
    calls = [router.call(ask(f"r{number}")) for number in range(24)]
    reading = [asyncio.create_task(listen(call)) for call in calls]
    await router.until(lambda: router.metric("tidemill_router_queued_requests") >= 12)
    hasty = await router.generate(ask("hasty", first_token_timeout_ms=300))
    assert router.metric("tidemill_router_queued_requests") > 0, "it waited for the others"
    patient = asyncio.create_task(router.generate(ask("patient", first_token_timeout_ms=20_000)))
    heard = [*await asyncio.gather(*reading), await patient]
    assert isinstance(hasty.error, DeadlineUnreachable), hasty
    assert hasty.messages == []
    assert hasty.error.retry_after_s is not None
    assert int(hasty.error.metadata["expected_first_token_ms"]) > 300
    assert router.metric("tidemill_router_refusals_total", reason="DEADLINE_UNREACHABLE") == 1
    assert all(each.completed.usage.completion_tokens == 1 for each in heard)
    told = [message.queued for each in heard for message in each.messages if _is_queued(message)]
    assert any(each.HasField("expected_wait_ms") and each.expected_wait_ms > 0 for each in told)
    accepted = heard[-1].messages[0].accepted
    assert accepted.HasField("expected_wait_ms")
    real_ms = heard[-1].completed.timing.queued_us / 1000
    assert abs(accepted.expected_wait_ms - real_ms) < 0.5 * real_ms + 200


async def test_batch_requests_wait_for_standard_ones(router: RouterHarness) -> None:
    ended: list[str] = []

    async def until_ended(name: str, priority: "router_pb2.Priority.ValueType") -> None:
        heard = await router.generate(ask(name, priority=priority))
        assert heard.error is None
        ended.append(name)

    batch = [
        asyncio.create_task(until_ended(f"b{number}", router_pb2.PRIORITY_BATCH))
        for number in range(8)
    ]
    await router.until(lambda: router.metric("tidemill_router_queued_requests") >= 4)
    standard = [
        asyncio.create_task(until_ended(f"s{number}", router_pb2.PRIORITY_STANDARD))
        for number in range(6)
    ]
    await asyncio.gather(*batch, *standard)
    last_standard = max(ended.index(f"s{number}") for number in range(6))
    after = [name for name in ended[last_standard:] if name.startswith("b")]
    assert len(after) >= 3, ended


async def test_a_prompt_that_no_worker_can_ever_hold_does_not_keep_others_waiting(
    model_dir: Path, ledger: RedisProcess, tls_files: Callable[[str], TlsFiles]
) -> None:
    small = MockConfig(worker_id="s", role="both", prefill_tokens_per_s=2000, num_blocks=3)
    async with mock_workers(tls_files, small) as (process,):
        config = router_config(model_dir, ledger, process.endpoints, tls_files("router"))
        async with running_router(config) as router:
            large = await router.generate(ask("large"))  # 200 tokens lie in four blocks
            assert isinstance(large.error, InvalidRequest)
            assert large.error.reason == "CONTEXT_EXCEEDED"
            request = ask("fits")
            del request.tokens.token_ids[120:]
            assert (await router.generate(request)).error is None


def _is_queued(message: router_pb2.GenerateResponse) -> bool:
    return message.HasField("queued")
