"""A worker that only decodes prefills short rests itself: who is asked, what is counted."""

from pathlib import Path

import pytest

from tests.worker_harness import (
    Tls,
    eventually,
    make_start,
    metric,
    prompt_of,
    settled,
    slow_down,
    split_of,
    split_roles,
    worker_at,
)
from tidemill.api.common.v1.usage_pb2 import PREFILL_SITE_DECODE_WORKER
from tidemill.errors import PrefillFull
from tidemill.policy import FetchConfig, FetchOrRecompute
from tidemill.worker.config import Role
from tidemill.worker.warm_up import tokens_within


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


@pytest.mark.parametrize("stall_s", [0.0, 0.02, 0.2])
async def test_how_much_is_measured_at_the_start(
    model_dir: Path, tls_files: Tls, stall_s: float
) -> None:
    """By what the warm-up's prompts took: so many tokens as take the stall that is allowed."""
    async with worker_at(
        Role.DECODE, model_dir, tls_files, in_place_tokens=None, in_place_stall_s=stall_s
    ) as running:
        worker = running.worker
        tokens = worker.describe().in_place_tokens
        assert tokens == worker.in_place_tokens
        block_s = worker.reuse.policy.compute_s(1)
        assert (tokens - 1) * block_s / 64 <= stall_s <= (tokens + 1) * block_s / 64


def test_how_much_is_what_more_tokens_cost_not_what_a_step_costs() -> None:
    policy = FetchOrRecompute(FetchConfig(), clock=lambda: 0.0)
    for num_blocks in (1, 8):
        policy.computed(num_blocks, 0.1 + 0.01 * num_blocks)
    assert tokens_within(policy, 0.0201) == 128


async def test_only_a_worker_that_only_decodes_says_how_much(
    model_dir: Path, tls_files: Tls
) -> None:
    for role, expected in ((Role.DECODE, 100), (Role.BOTH, 0), (Role.PREFILL, 0)):
        async with worker_at(role, model_dir, tls_files, in_place_tokens=100) as running:
            assert running.worker.describe().in_place_tokens == expected


async def test_a_follow_up_turn_is_prefilled_where_the_turn_before_was_decoded(
    model_dir: Path, tls_files: Tls
) -> None:
    """U1 and U3, and who was busy; and the answer is that of the long way round (X1)."""
    async with split_roles(model_dir, tls_files, in_place_tokens=64) as (prefill, decode, router):
        turn = await router.ask(make_start(prompt_of(100), "turn", prefill=prefill, max_tokens=40))
        follow_up = [*prompt_of(100), *turn.tokens, *prompt_of(20, seed=7)]
        before = [each.worker.thread.hours.busy for each in (prefill, decode)]
        here = await router.ask(make_start(follow_up, "here"))
        after = [each.worker.thread.hours.busy for each in (prefill, decode)]
        there = await router.ask(make_start(follow_up, "there", prefill=prefill))
        assert split_of(here.usage) == {"computed": 32, "device": 128}
        assert here.usage.prefill_site == PREFILL_SITE_DECODE_WORKER
        assert here.usage.prefill_worker_id == "decode" == here.final.prefill_worker_id
        assert here.final.prompt == here.usage
        assert metric(decode, "computed_tokens_total") == 32
        assert here.tokens == there.tokens
        assert before[0] == after[0]
        assert here.done is not None
        assert here.done.busy_seconds == here.final.prefill_busy_seconds
        assert (
            nanoseconds(here.final.prefill_busy_seconds),
            nanoseconds(here.final.busy_seconds),
        ) == (
            after[1].prefill_ns - before[1].prefill_ns,
            after[1].decode_ns - before[1].decode_ns,
        )


async def test_more_than_it_may_compute_in_place_is_refused_and_takes_nothing(
    model_dir: Path, tls_files: Tls
) -> None:
    """The router believed that more of the prompt lay here."""
    async with split_roles(model_dir, tls_files, in_place_tokens=63) as (prefill, decode, router):
        refused = await router.ask(make_start(prompt_of(64), "a"))
        assert isinstance(refused.error, PrefillFull)
        assert not refused.finals
        await settled(decode)
        assert metric(decode, "refusals_total", reason="PREFILL_FULL") == 1
        elsewhere = await router.ask(make_start(prompt_of(64), "a", prefill=prefill))
        assert elsewhere.error is None
        assert (await router.ask(make_start(prompt_of(100), "b"))).error is None


async def test_all_that_is_computed_in_place_together_stays_within_the_limit(
    model_dir: Path, tls_files: Tls
) -> None:
    async with split_roles(model_dir, tls_files, in_place_tokens=100) as (_, decode, router):
        slow_down(decode, 1.0)
        first = await router.begin(make_start(prompt_of(60), "a", max_tokens=1))
        await eventually(lambda: decode.worker.backlog.num_tokens == 60)
        refused = await router.ask(make_start(prompt_of(41, seed=2), "b"))
        assert isinstance(refused.error, PrefillFull)
        second = await router.begin(make_start(prompt_of(40, seed=3), "c", max_tokens=1))
        assert (await first.finish()).error is None
        assert (await second.finish()).error is None
