"""Many streams at once, a third given up at random moments: every token is accounted for."""

import asyncio
from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest

from loadtest.checks import check
from services.stack.plan import MODEL
from tests.stack_harness import BOOK_PATH, ONE_WORKER_MODEL, Stack, eventually, sum_of, words
from tidemill.billing import Receipt, load_price_book, verify
from tidemill.client import AsyncClient, AsyncStream, FinishReason

pytestmark = [pytest.mark.e2e, pytest.mark.redis]

NUM_STREAMS = 64
SEED = 20250227
BILLED = ("completion_tokens", *(f"unbilled_{why}_tokens" for why in ("overrun", "lost")))
UNBILLED = ("unbilled_failover_redo_tokens", "unbilled_server_fault_tokens")
LONG_WORDS = 900  # seconds of prefill: enough to be given up before the first token


@dataclass(frozen=True)
class Plan:
    """One request. `end` is how it is given up, at token `at`, or "read" to its end."""

    model: str
    prompt: str
    max_tokens: int
    n: int
    temperature: float
    seed: int
    end: str
    at: int


def plans(rng: Random) -> list[Plan]:
    """Mixed lengths; prompts of a few families share their beginnings."""
    ends = ["cancel"] * 9 + ["hang up"] * 8 + ["cancel early"] * 3 + ["hang up early"] * 2
    ends += ["read"] * (NUM_STREAMS - len(ends))
    rng.shuffle(ends)
    made = []
    for index, end in enumerate(ends):
        early = end.endswith("early")
        num_words = LONG_WORDS + index if early else rng.choice([1, 5, 20, 40, 80, 160])
        max_tokens = rng.randint(1, 80) if end == "read" else rng.randint(200, 600)
        made.append(
            Plan(
                model=ONE_WORKER_MODEL if index % 4 == 0 else MODEL,
                prompt=words(num_words, start=rng.choice([0, 3000, 6000])),
                max_tokens=max_tokens,
                n=rng.choice([1, 1, 1, 2, 3]),
                temperature=rng.choice([0.0, 0.8]),
                seed=rng.getrandbits(64),
                end=end,
                at=0 if early else rng.randint(0, 100),
            )
        )
    return made


async def follow(client: AsyncClient, plan: Plan) -> AsyncStream:
    """Read the stream, as far as the plan goes."""
    stream = await client.generate(
        plan.prompt,
        model=plan.model,
        max_tokens=plan.max_tokens,
        n=plan.n,
        temperature=plan.temperature,
        seed=plan.seed,
        stream=True,
    )
    given_up = plan.end == "read"
    async with stream:
        async for _ in stream:
            stream.usage.check()
            if given_up or len(stream.token_ids) < plan.at:
                continue
            if plan.end.startswith("hang up"):
                break
            await stream.cancel()
            given_up = True
    return stream


async def generated_tokens(stack: Stack) -> int:
    metrics = [await stack.metrics(name) for name in stack.workers]
    return int(sum(each.total("tidemill_worker_generated_tokens_total") for each in metrics))


async def prompt_tokens(stack: Stack, *counters: str) -> int:
    metrics = [await stack.metrics(name) for name in stack.workers]
    names = [f"tidemill_worker_{counter}_tokens_total" for counter in counters]
    return int(sum(each.total(name) for each in metrics for name in names))


async def test_every_token_of_64_streams_is_billed_or_accounted_for(stack: Stack) -> None:
    book = load_price_book(BOOK_PATH)
    settled_before = set(stack.settled())
    generated_before = await generated_tokens(stack)
    computed_before = await prompt_tokens(stack, "computed", "stopped_prefill")
    reused_before = await prompt_tokens(stack, "reused")
    wanted = plans(Random(SEED))
    keys = [await stack.key_of(tenant) for tenant in ("carol", "dave")]
    async with stack.client(keys[0]) as carol, stack.client(keys[1]) as dave:
        streams = await asyncio.gather(
            *(follow((carol, dave)[index % 2], plan) for index, plan in enumerate(wanted))
        )
    await stack.until_idle()

    ends: Counter[str] = Counter()
    for plan, stream in zip(wanted, streams, strict=True):
        if plan.end.startswith("hang up"):
            continue
        assert stream.completed is not None, plan
        check(stream, stream.completed)
        assert stream.completed.receipt is not None
        stream.completed.receipt.verify(book)
        ends[f"{plan.end}: {stream.completed.finish_reason}"] += 1
        if plan.end == "read":
            assert stream.completed.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
            assert all(len(choice.token_ids) <= plan.max_tokens for choice in stream.choices)
            assert all(choice.finish_reason for choice in stream.choices)
    assert ends["cancel: cancelled"] >= 6  # of 9; others came to a stop token before
    assert ends["cancel early: cancelled"] == 3
    early = [
        stream
        for plan, stream in zip(wanted, streams, strict=True)
        if plan.end == "cancel early"
        and stream.completed is not None
        and stream.completed.usage.prompt_tokens == 0
    ]
    assert early, "no stream was given up before its first token"
    for stream in early:
        assert stream.completed is not None
        assert stream.completed.receipt is not None
        assert stream.completed.receipt.amount_nano == 0

    async def all_settled() -> bool:
        return len(set(stack.settled()) - settled_before) == NUM_STREAMS

    await eventually(all_settled)
    settled = stack.settled()
    receipts = [settled[stream.request_id] for stream in streams]
    for receipt in receipts:
        digest = str(receipt.pop("content_sha256"))
        verify(Receipt.from_fields(receipt, content_sha256=digest), book)
    generated = await generated_tokens(stack) - generated_before
    assert generated == sum_of(receipts, *BILLED, *UNBILLED) == sum_of(receipts, "generated_tokens")
    computed = await prompt_tokens(stack, "computed", "stopped_prefill") - computed_before
    reused = await prompt_tokens(stack, "reused") - reused_before
    assert computed >= sum_of(receipts, "computed_tokens")
    assert reused >= sum_of(receipts, "reused_device_tokens", "reused_cache_ram_tokens") > 0

    # Idle workers check their pools at least every 5 s; one that is not whole is not ready (R2).
    await asyncio.sleep(6.0)
    for name in (*stack.workers, "cache", "router"):
        assert await stack.health(name) == "SERVING"
