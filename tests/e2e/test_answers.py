"""One prompt through four processes, and what it costs when it is asked again."""

import signal
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from services.stack.plan import MODEL
from tests.stack_harness import BOOK_PATH, ONE_WORKER_MODEL, Stack, eventually, words
from tests.x1 import reference_gaps
from tidemill.billing import load_price_book
from tidemill.blocks import BLOCK_TOKENS, max_hit_tokens
from tidemill.client import (
    Accepted,
    AsyncClient,
    Completed,
    Completion,
    FinishReason,
    Queued,
    TextChunk,
)

pytestmark = [pytest.mark.e2e, pytest.mark.redis]

both_ways = pytest.mark.parametrize("model", [MODEL, ONE_WORKER_MODEL])


def check_bill(completion: Completion) -> None:
    """U1, U2 and M4, and that anyone can recompute the receipt (M5)."""
    completion.usage.check()
    assert completion.receipt is not None
    completion.receipt.verify(load_price_book(BOOK_PATH))
    billed = completion.receipt.to_billing().usage
    assert billed.prompt_tokens == completion.usage.prompt_tokens
    assert billed.completion_tokens == completion.usage.completion_tokens
    assert billed.cache_hit_tokens == completion.usage.cache_hit_tokens


@both_ways
async def test_text_streams_and_ends_with_usage_and_a_bill(
    stack: Stack, client: AsyncClient, model: str
) -> None:
    prompt = f"streamed by {model}: " + words(60)
    stream = await client.generate(prompt, model=model, max_tokens=48, temperature=0.0, stream=True)
    async with stream:
        events = [event async for event in stream]
        completion = await stream.completion()
    assert isinstance(events[0], Accepted)
    assert isinstance(events[-1], Completed)
    chunks = [event for event in events[1:-1] if not isinstance(event, Queued)]
    assert len(chunks) > 3
    assert all(isinstance(chunk, TextChunk) for chunk in chunks)
    assert completion.text
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.usage.completion_tokens == len(completion.token_ids) == 48
    assert events[0].prompt_tokens == completion.usage.prompt_tokens > 4 * 64
    site = "prefill_worker" if model == MODEL else "decode_worker"
    assert completion.usage.prefill_site == site
    check_bill(completion)


@both_ways
async def test_asked_again_all_whole_blocks_but_the_last_token_s_are_hits(
    stack: Stack, client: AsyncClient, model: str
) -> None:
    prompt = f"asked twice of {model}: " + words(100)
    first = await client.generate(prompt, model=model, max_tokens=8, temperature=0.0)
    again = await client.generate(prompt, model=model, max_tokens=8, temperature=0.0)
    num_tokens = first.usage.prompt_tokens
    assert first.usage.computed_tokens == num_tokens
    assert first.usage.cache_hit_tokens == 0
    assert again.usage.cache_hit_tokens == max_hit_tokens(num_tokens) > 0
    assert again.usage.reuse.device == again.usage.reuse.total == max_hit_tokens(num_tokens)
    assert again.token_ids == first.token_ids
    assert first.receipt is not None
    assert again.receipt is not None
    assert again.receipt.amount_nano < first.receipt.amount_nano
    assert again.receipt.saved_nano > first.receipt.saved_nano == 0
    for completion in (first, again):
        check_bill(completion)


@both_ways
async def test_another_tenant_asking_the_same_reuses_nothing(
    stack: Stack, client: AsyncClient, model: str
) -> None:
    prompt = f"said to {model} by two tenants: " + words(100)
    await client.generate(prompt, model=model, max_tokens=2)
    async with stack.client(await stack.key_of("bob")) as stranger:
        theirs = await stranger.generate(prompt, model=model, max_tokens=2)
    ours = await client.generate(prompt, model=model, max_tokens=2)
    assert theirs.usage.reuse.total == theirs.usage.cache_hit_tokens == 0
    assert theirs.usage.computed_tokens == theirs.usage.prompt_tokens
    assert ours.usage.cache_hit_tokens > 0
    check_bill(theirs)


async def stored_blocks(stack: Stack) -> int:
    return int((await stack.metrics("prefill")).total("tidemill_worker_cache_stored_blocks_total"))


async def answered_and_stored(stack: Stack, client: AsyncClient, prompt: str) -> Completion:
    """The answer, once the context cache has all whole blocks of the prompt."""
    before = await stored_blocks(stack)
    answer = await client.generate(prompt, model=MODEL, max_tokens=8, temperature=0.0)
    num_blocks = answer.usage.prompt_tokens // BLOCK_TOKENS

    async def all_stored() -> bool:
        return await stored_blocks(stack) - before >= num_blocks

    await eventually(all_stored)
    return answer


async def test_after_a_restart_of_prefill_hits_come_from_the_context_cache(
    stack: Stack, client: AsyncClient
) -> None:
    prompt = "computed before a restart: " + words(100)
    first = await answered_and_stored(stack, client, prompt)
    epoch = (await stack.load("prefill")).epoch
    stack["prefill"].send(signal.SIGTERM)
    assert await stack["prefill"].ended() == 0
    await stack.start()
    assert (await stack.load("prefill")).epoch != epoch

    again = await client.generate(prompt, model=MODEL, max_tokens=8, temperature=0.0)
    hits = max_hit_tokens(first.usage.prompt_tokens)
    assert again.usage.cache_hit_tokens == again.usage.reuse.cache_ram == hits
    assert again.usage.reuse.total == hits
    assert again.token_ids == first.token_ids
    check_bill(again)

    async with stack.client(await stack.key_of("bob")) as stranger:
        theirs = await stranger.generate(prompt, model=MODEL, max_tokens=8)
    assert theirs.usage.reuse.total == 0


async def test_after_a_restart_of_cache_and_prefill_hits_come_from_disk_and_are_billed_so(
    stack: Stack, client: AsyncClient
) -> None:
    prompt = "written down before a restart: " + words(100)
    first = await answered_and_stored(stack, client, prompt)
    for name in ("prefill", "cache"):
        stack[name].send(signal.SIGTERM)
        assert await stack[name].ended() == 0
    await stack.start()

    again = await client.generate(prompt, model=MODEL, max_tokens=8, temperature=0.0)
    hits = max_hit_tokens(first.usage.prompt_tokens)
    assert again.usage.cache_hit_tokens == again.usage.reuse.cache_disk == hits
    assert again.token_ids == first.token_ids
    check_bill(again)


async def test_one_worker_and_two_draw_the_same_tokens(
    stack: Stack, client: AsyncClient, tiny_model: Path
) -> None:
    prompt = "drawn the same: " + words(30)

    async def ask(model: str, *, temperature: float = 0.0) -> Completion:
        return await client.generate(
            prompt, model=model, max_tokens=24, temperature=temperature, seed=7
        )

    greedy, alone = [await ask(model) for model in (MODEL, ONE_WORKER_MODEL)]
    if greedy.token_ids != alone.token_ids:
        prompt_ids = tokenize(tiny_model, prompt)
        gaps = reference_gaps(tiny_model, [*prompt_ids, *greedy.token_ids])
        pairs = zip(greedy.token_ids, alone.token_ids, strict=True)
        parting = next(index for index, (one, other) in enumerate(pairs) if one != other)
        assert gaps.excuses(len(prompt_ids) + parting - 1)
    drawn = [await ask(MODEL, temperature=0.9) for _ in range(2)]
    assert drawn[0].token_ids == drawn[1].token_ids != greedy.token_ids
    assert [completion.seed for completion in drawn] == [7, 7]


def tokenize(model_dir: Path, text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode(text).ids
    return ids


@both_ways
async def test_a_stop_string_ends_the_text_before_it_and_the_bill_with_it(
    stack: Stack, client: AsyncClient, model: str
) -> None:
    prompt = "stopped at a word: " + words(20)

    async def ask(*stop: str) -> Completion:
        return await client.generate(
            prompt, model=model, max_tokens=200, temperature=0.0, stop=stop
        )

    whole = await ask()
    stop = whole.text[10:13]
    cut = await ask(stop)
    assert cut.finish_reason is FinishReason.STOP
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.usage.completion_tokens < whole.usage.completion_tokens
    unbilled = cut.usage.unbilled
    assert cut.usage.generated_tokens == cut.usage.completion_tokens + unbilled.overrun
    check_bill(cut)
    assert cut.receipt is not None
    assert whole.receipt is not None
    assert cut.receipt.amount_nano < whole.receipt.amount_nano
