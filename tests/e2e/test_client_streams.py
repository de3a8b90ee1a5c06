"""The SDK against the whole stack: many streams at once, a third of them cancelled."""

import asyncio
from pathlib import Path
from random import Random

import pytest

from loadtest.checks import check
from services.stack.demo import make_key
from services.stack.launcher import run_stack
from services.stack.plan import MODEL, Plan
from tests.tiny_model import make_tiny_checkpoint
from tidemill.billing import load_price_book
from tidemill.client import AsyncClient, AsyncStream, FinishReason

pytestmark = [pytest.mark.e2e, pytest.mark.redis]

NUM_STREAMS = 64
NUM_SHARED_TOKENS = 200
BOOK_PATH = Path(__file__).parents[2] / "prices" / "deepseek-2025-02.toml"


async def ask(client: AsyncClient, rng: Random, *, cancelled: bool) -> AsyncStream:
    """One stream, read to its end; `cancelled` at a random moment, before any token or after."""
    num_tail_tokens, max_tokens = rng.randint(1, 300), rng.randint(48, 128)
    shared = Random(0).choices(range(2, 500), k=NUM_SHARED_TOKENS)
    stream = await client.generate(
        model=MODEL,
        token_ids=[*shared, *rng.choices(range(2, 500), k=num_tail_tokens)],
        max_tokens=max_tokens,
        seed=rng.getrandbits(64),
        stream=True,
    )
    cancel_at = rng.randrange(max_tokens // 3) if cancelled else None
    async with stream:
        async for _ in stream:
            if cancel_at is not None and len(stream.token_ids) >= cancel_at:
                cancel_at = None
                await stream.cancel()
    return stream


async def test_64_streams_a_third_cancelled_all_bill_true_and_leave_nothing(
    tmp_path: Path,
) -> None:
    make_tiny_checkpoint(tmp_path / "model")
    streams: list[AsyncStream] = []

    async def use(plan: Plan) -> None:
        key = await make_key(plan, "acme", "test")
        async with AsyncClient(plan.address, key, plan.ca) as client:
            rngs = [Random(number) for number in range(NUM_STREAMS)]
            streams.extend(
                await asyncio.gather(
                    *(
                        ask(client, rng, cancelled=number % 3 == 0)
                        for number, rng in enumerate(rngs)
                    )
                )
            )
        # Idle workers check their pools; one that is not whole fails its readiness (R1, R2).
        await asyncio.sleep(3.0)
        for child in plan.services():
            assert await child.ready(), child.name

    await run_stack(
        tmp_path / "state", use, model_dir=tmp_path / "model", both=False, port=0, say=print
    )
    book = load_price_book(BOOK_PATH)
    ends = []
    for stream in streams:
        assert stream.completed is not None
        assert stream.completed.receipt is not None
        check(stream, stream.completed)
        stream.completed.receipt.verify(book)
        ends.append(stream.completed.finish_reason)
    assert ends.count(FinishReason.CANCELLED) >= NUM_STREAMS // 6
    assert set(ends) <= {FinishReason.CANCELLED, FinishReason.LENGTH, FinishReason.STOP}
    assert sum(stream.usage.cache_hit_tokens for stream in streams) > 0
