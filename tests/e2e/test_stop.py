"""SIGTERM: what runs is finished, what comes is refused, and everybody leaves in time."""

import asyncio
import signal
import time

import pytest

from services.stack.plan import MODEL
from tests.stack_harness import BOOK_PATH, ONE_WORKER_MODEL, Stack, eventually, words
from tidemill.billing import load_price_book
from tidemill.client import AsyncClient, AsyncStream, FinishReason
from tidemill.errors import Unavailable

pytestmark = [pytest.mark.e2e, pytest.mark.redis]

ANSWER_TOKENS = 500
GRACE_S = 65.0  # drain_s and some: a busy machine decodes slowly


async def decoding(client: AsyncClient, model: str) -> AsyncStream:
    """A stream some tokens into its answer."""
    stream = await client.generate(
        words(20), model=model, max_tokens=ANSWER_TOKENS, temperature=0.0, stream=True
    )
    async for _ in stream:
        if len(stream.token_ids) >= 5:
            break
    return stream


async def check_whole(stream: AsyncStream) -> None:
    completion = await stream.completion()
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.usage.completion_tokens == len(completion.token_ids) == ANSWER_TOKENS
    completion.usage.check()
    assert completion.receipt is not None
    completion.receipt.verify(load_price_book(BOOK_PATH))


async def test_a_router_told_to_stop_finishes_its_streams_and_refuses_new_ones(
    stack: Stack, client: AsyncClient
) -> None:
    stream = await decoding(client, MODEL)
    told_at = stack["router"].send(signal.SIGTERM)

    async def has_closed_its_port() -> bool:
        return await stack.health("router") == "UNAVAILABLE"

    await eventually(has_closed_its_port)
    with pytest.raises(Unavailable) as raised:
        await client.generate("too late?", model=MODEL, max_tokens=1)
    assert raised.value.reason in ("ROUTER_STOPPING", "UNAVAILABLE")
    assert stream.completed is None
    await check_whole(stream)
    assert await stack["router"].ended(GRACE_S) == 0
    assert time.monotonic() - told_at < GRACE_S


async def test_a_decode_told_to_stop_finishes_its_streams_and_its_successor_serves(
    stack: Stack, client: AsyncClient
) -> None:
    stream = await decoding(client, MODEL)
    stack["decode"].send(signal.SIGTERM)
    await check_whole(stream)
    assert await stack["decode"].ended(GRACE_S) == 0
    waiting = asyncio.ensure_future(client.generate("next?", model=MODEL, max_tokens=3))
    await stack.start()
    completion = await waiting
    completion.usage.check()
    assert completion.usage.completion_tokens > 0


async def test_all_told_at_once_finish_their_streams_and_leave(
    stack: Stack, client: AsyncClient
) -> None:
    streams = [await decoding(client, model) for model in (MODEL, ONE_WORKER_MODEL)]
    services = [name for name in stack.processes if not name.startswith("redis")]
    for name in services:
        told_at = stack[name].send(signal.SIGTERM)
    await asyncio.gather(*(check_whole(stream) for stream in streams))
    statuses = {name: await stack[name].ended(GRACE_S) for name in services}
    assert statuses == dict.fromkeys(services, 0)
    assert time.monotonic() - told_at < GRACE_S
    assert all(stack.settled()[stream.request_id]["attempts"] == 1 for stream in streams)
