"""kill -9 of the only one of its kind, while requests run: what cannot go on is told at once.

Where there is another of its kind the streams go on: see test_rounds.py.
"""

import asyncio
from functools import partial

import pytest

from services.stack.plan import MODEL
from tests.slow_link import SlowLink
from tests.stack_harness import BOOK_PATH, Stack, eventually, words
from tests.stopwatch import Stopwatch, stopwatch
from tidemill.billing import load_price_book
from tidemill.client import AsyncClient, AsyncStream, Completion, FinishReason, Receipt
from tidemill.errors import DeadlineExceeded, LedgerUnavailable, TidemillError, WorkerLost

pytestmark = [pytest.mark.e2e, pytest.mark.redis]

TOLD_WITHIN_S = 2.0
LONG_PROMPT_WORDS = 1500  # over a second of prefill
LONG_ANSWER_TOKENS = 1000  # seconds of decode


async def begun(client: AsyncClient, prompt: str, *, max_tokens: int) -> AsyncStream:
    """A greedy stream that has a place in the queue."""
    return await client.generate(
        prompt, model=MODEL, max_tokens=max_tokens, temperature=0.0, stream=True
    )


async def decoding(client: AsyncClient, prompt: str) -> AsyncStream:
    """A stream some tokens into a long answer."""
    stream = await begun(client, prompt, max_tokens=LONG_ANSWER_TOKENS)
    async for _ in stream:
        if len(stream.token_ids) >= 5:
            return stream
    raise AssertionError("the answer was short")


async def error_of(stream: AsyncStream, watch: Stopwatch) -> tuple[TidemillError, float]:
    """What the stream ends with, and when."""
    with pytest.raises(TidemillError) as raised:
        async for _ in stream:
            pass
    return raised.value, watch.seconds


def check_whole(completion: Completion, num_tokens: int) -> None:
    """All tokens asked for, and a bill that can be recomputed."""
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.usage.completion_tokens == len(completion.token_ids) == num_tokens
    completion.usage.check()
    assert completion.receipt is not None
    completion.receipt.verify(load_price_book(BOOK_PATH))


async def answers(client: AsyncClient, prompt: str) -> Completion:
    """A short answer, checked."""
    completion = await client.generate(prompt, model=MODEL, max_tokens=4, temperature=0.0)
    check_whole(completion, 4)
    return completion


async def is_whole(stack: Stack, name: str) -> bool:
    """Whether a worker holds nothing for anybody."""
    load = await stack.load(name)
    held = [tier.total_blocks - tier.free_blocks for tier in load.tiers]
    return not any([*held, load.running, load.waiting, load.prefilling, load.open_handovers])


async def hands_over(stack: Stack) -> bool:
    """Whether a prompt of LONG_PROMPT_WORDS is being prefilled, its first chunks computed."""
    load = await stack.load("prefill")
    return load.open_handovers > 0 and 0 < load.queued_uncached_tokens < 6500


async def says(stack: Stack, name: str, status: str) -> None:
    """Wait until a process's health is `status`."""

    async def said() -> bool:
        return await stack.health(name) == status

    await eventually(said)


async def test_a_prefill_lost_before_the_first_token_is_told_within_two_seconds(
    stack: Stack, client: AsyncClient
) -> None:
    old_epoch = (await stack.load("prefill")).epoch
    stream = await begun(client, "begun once: " + words(LONG_PROMPT_WORDS), max_tokens=4)
    await eventually(partial(hands_over, stack))
    assert not stream.token_ids
    stack["prefill"].kill()
    async with stopwatch() as watch:
        error, told_at = await error_of(stream, watch)
    assert told_at < TOLD_WITHIN_S
    assert isinstance(error, WorkerLost)
    assert error.reason == "WORKER_LOST"
    assert error.request_id == stream.request_id
    await eventually(partial(is_whole, stack, "decode"))
    assert stream.request_id not in stack.settled()

    with pytest.raises(DeadlineExceeded):
        await client.generate("nobody can begin", model=MODEL, first_token_timeout=0.5)
    await says(stack, "router", "NOT_SERVING")

    await stack.start()
    assert (await stack.load("prefill")).epoch != old_epoch
    completion = await answers(client, "begun once: " + words(LONG_PROMPT_WORDS))
    assert completion.usage.reuse.total == completion.usage.reuse.cache_ram  # stored before


async def test_a_prefill_lost_during_the_hand_over_is_told_within_two_seconds(
    stack: Stack, client: AsyncClient, wire: SlowLink
) -> None:
    wire.bytes_per_s = 300_000  # near five seconds for these latents
    stream = await begun(client, "handed over slowly: " + words(500), max_tokens=64)
    async for _ in stream:
        if stream.token_ids:
            break
    assert len(stream.token_ids) == 1
    load = await stack.load("decode")
    assert (load.waiting, load.running) == (1, 0), "all latents have landed already"
    stack["prefill"].kill()
    wire.cut()
    async with stopwatch() as watch:
        error, told_at = await error_of(stream, watch)
    assert told_at < TOLD_WITHIN_S
    assert isinstance(error, WorkerLost)
    assert error.reason == "WORKER_LOST"
    assert error.request_id == stream.request_id
    await eventually(partial(is_whole, stack, "decode"))
    wire.bytes_per_s = None
    await stack.start()
    await says(stack, "router", "SERVING")
    await answers(client, "after the hand-over: " + words(30))


async def test_a_decode_lost_mid_stream_is_told_within_two_seconds(
    stack: Stack, client: AsyncClient
) -> None:
    streams = await asyncio.gather(
        *(decoding(client, f"lost in decode {index}: " + words(40)) for index in range(3))
    )
    pulling = await begun(client, "not begun yet: " + words(LONG_PROMPT_WORDS), max_tokens=4)
    await eventually(partial(hands_over, stack))
    old_epoch = (await stack.load("decode")).epoch
    stack["decode"].kill()
    async with stopwatch() as watch:
        whole = asyncio.create_task(eventually(partial(is_whole, stack, "prefill")))
        whole_at: list[float] = []
        whole.add_done_callback(lambda _: whole_at.append(watch.seconds))
        ends = await asyncio.gather(*(error_of(stream, watch) for stream in [*streams, pulling]))
        await whole
    assert max(whole_at) < TOLD_WITHIN_S
    for stream, (error, told_at) in zip([*streams, pulling], ends, strict=True):
        assert told_at < TOLD_WITHIN_S
        assert isinstance(error, WorkerLost)
        assert error.reason == "WORKER_LOST"
        assert error.request_id == stream.request_id
        assert (stream.usage.prompt_tokens > 0) == (stream is not pulling)
    assert not set(stack.settled()) & {stream.request_id for stream in [*streams, pulling]}

    await stack.start()
    assert (await stack.load("decode")).epoch != old_epoch
    again = await answers(client, "lost in decode 0: " + words(40))
    assert again.usage.reuse.device == again.usage.cache_hit_tokens > 0


async def test_streams_go_on_without_the_cache_and_use_it_again_when_it_is_back(
    stack: Stack, client: AsyncClient
) -> None:
    stream = await decoding(client, "while the cache dies: " + words(40))
    stack["cache"].kill()
    async with stopwatch() as watch:
        meanwhile = await answers(client, "without a cache: " + words(40))
    assert watch.seconds < TOLD_WITHIN_S
    assert meanwhile.usage.computed_tokens == meanwhile.usage.prompt_tokens
    check_whole(await stream.completion(), LONG_ANSWER_TOKENS)
    assert await stack.health("router") == "SERVING"

    await stack.start()
    before = await stored_blocks(stack)
    asked = 0

    async def stored_again() -> bool:
        nonlocal asked
        asked += 1
        await answers(client, f"stored again {asked}: " + words(40))
        return await stored_blocks(stack) > before

    await eventually(stored_again)


async def is_settled(client: AsyncClient, pending: Receipt) -> bool:
    """Whether a receipt that was pending stands in the ledger, and just as it was."""
    found = (await client.receipt(str(pending.content["request_id"]))).receipt
    assert found.content == pending.content
    return found.state == "settled"


async def stored_blocks(stack: Stack) -> float:
    return (await stack.metrics("prefill")).total("tidemill_worker_cache_stored_blocks_total")


async def test_streams_go_on_without_the_cache_s_redis_and_workers_register_again(
    stack: Stack, client: AsyncClient
) -> None:
    stream = await decoding(client, "while the registry dies: " + words(40))
    stack["redis-cache"].kill()
    async with stopwatch() as watch:
        await answers(client, "without a registry: " + words(40))
    assert watch.seconds < TOLD_WITHIN_S
    check_whole(await stream.completion(), LONG_ANSWER_TOKENS)
    for name in ("prefill", "decode", "cache", "router"):
        assert await stack.health(name) == "SERVING"

    await stack.start()
    stack["router"].kill()  # a new router knows only what the registry tells it
    await stack.start()
    await answers(client, "found in the registry: " + words(40))


async def test_without_the_ledger_streams_run_to_their_bill_and_new_keys_are_turned_away(
    stack: Stack, client: AsyncClient
) -> None:
    unused = await stack.key_of("frank")
    stream = await decoding(client, "while the ledger dies: " + words(40))
    stack["redis-ledger"].kill()
    async with stack.client(unused) as newcomer:
        async with stopwatch() as watch:
            with pytest.raises(LedgerUnavailable) as raised:
                await newcomer.generate("who am I?", model=MODEL)
        assert watch.seconds < TOLD_WITHIN_S
        assert raised.value.reason == "LEDGER_UNAVAILABLE"
        assert raised.value.retry_after_s is not None
        completion = await stream.completion()
        check_whole(completion, LONG_ANSWER_TOKENS)
        assert completion.receipt is not None
        assert completion.receipt.state == "pending"
        await says(stack, "router", "NOT_SERVING")
        await stack.start()
        await says(stack, "router", "SERVING")
        await answers(newcomer, "the ledger remembers: " + words(10))
    await eventually(partial(is_settled, client, completion.receipt))
    await answers(client, "both keys: " + words(10))
