"""A prompt that is held to its last token, wherever it lies: 63 tokens of its last block count."""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cache_node import cache_node
from tests.integration.test_tiers import evict_device, latents_of, peer_of, start_with
from tests.worker_harness import (
    PATIENT,
    Tls,
    both_roles,
    eventually,
    make_start,
    metric,
    prompt_of,
    router_of,
    settled,
    split_of,
    split_roles,
    worker_at,
)
from tidemill.policy.seeds import choice_seed
from tidemill.worker.config import CacheConfig, Role
from tidemill.worker.process import RunningWorker

NUM_TOKENS = 128


def ask(request_id: str, **options: Any) -> Any:
    return make_start(prompt_of(NUM_TOKENS), request_id, **options)


async def hashes_of(running: RunningWorker) -> list[bytes]:
    return list((await running.worker.reuse.identify(ask("name").task)).hashes)


async def test_in_place_from_the_device_and_from_host_memory(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files, host_cache_blocks=16) as (worker, router):
        first = await router.ask(ask("a"))
        before = latents_of(worker, await hashes_of(worker))
        for tier in ("device", "host"):
            if tier == "host":
                evict_device(worker)
            again = await router.ask(ask(tier))
            assert split_of(again.usage) == {tier: 127, "computed": 1}
            assert again.tokens == first.tokens
            after = latents_of(worker, await hashes_of(worker))
            assert all(one.equal(other) for one, other in zip(before, after, strict=True))
        assert metric(worker, "computed_tokens_total") == NUM_TOKENS + 2


async def test_from_the_cache_and_from_a_peer(model_dir: Path, tls_files: Tls) -> None:
    async with cache_node(tls_files) as cache, AsyncExitStack() as stack:
        shared = CacheConfig(cache.address, client=PATIENT)
        holder, first = await stack.enter_async_context(
            both_roles(model_dir, tls_files, cache=shared)
        )
        one = await first.ask(ask("a", max_tokens=1))
        await eventually(lambda: len(cache.store) == 2)
        before = latents_of(holder, await hashes_of(holder))
        for tier, settings in (("cache_ram", {"cache": shared}), ("peer", {})):
            asker, router = await stack.enter_async_context(
                both_roles(model_dir, tls_files, worker_id=tier, **settings)
            )
            peers = [] if settings else [peer_of(holder, "decode")]
            start = start_with(prompt_of(NUM_TOKENS), tier, *peers, max_tokens=1)
            answer = await router.ask(start)
            assert split_of(answer.usage) == {tier: 127, "computed": 1}
            assert answer.tokens == one.tokens
            fetched = latents_of(asker, await hashes_of(asker))
            assert all(a.equal(b) for a, b in zip(before, fetched, strict=True))


async def test_a_hand_over_brings_the_bytes_that_were_computed_first(
    model_dir: Path, tls_files: Tls
) -> None:
    async with (
        split_roles(model_dir, tls_files) as (prefill, decode, router),
        worker_at(Role.DECODE, model_dir, tls_files) as other,
        router_of(other, tls_files) as elsewhere,
    ):
        first = await router.ask(ask("a", prefill=prefill))
        before = latents_of(prefill, await hashes_of(prefill))
        for number, asked in enumerate((elsewhere, router)):  # who holds nothing, and who holds all
            again = await asked.ask(ask(f"b{number}", prefill=prefill))
            assert split_of(again.usage) == {"device": 127, "computed": 1}
            assert again.tokens == first.tokens
        for worker in (prefill, decode, other):
            latents = latents_of(worker, await hashes_of(worker))
            assert all(one.equal(same) for one, same in zip(before, latents, strict=True))
        assert metric(prefill, "computed_tokens_total") == NUM_TOKENS + 2
        await settled(other)


@pytest.mark.parametrize("split", [False, True])
async def test_several_choices_are_what_single_requests_are(
    model_dir: Path, tls_files: Tls, split: bool
) -> None:
    sampled: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12}
    async with AsyncExitStack() as stack:
        if split:
            prefill, _, router = await stack.enter_async_context(split_roles(model_dir, tls_files))
            sampled["prefill"] = prefill
        else:
            _, router = await stack.enter_async_context(both_roles(model_dir, tls_files))
        singles = [
            (await router.ask(ask(f"s{number}", seed=choice_seed(7, number), **sampled))).tokens
            for number in range(3)
        ]
        answer = await router.ask(ask("n", n=3, seed=7, **sampled))
        assert split_of(answer.usage) == {"device": 127, "computed": 1}
        assert answer.choices == singles


async def test_a_scored_prompt_reuses_nothing(model_dir: Path, tls_files: Tls) -> None:
    async with both_roles(model_dir, tls_files) as (_, router):
        await router.ask(ask("a"))
        start = ask("b")
        start.task.sampling.prompt_logprobs = 0
        assert split_of((await router.ask(start)).usage) == {"computed": NUM_TOKENS}
