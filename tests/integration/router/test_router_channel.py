"""Chunks of many attempts in one stream from a scripted worker: order, breaks, slowness."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.redis_process import RedisProcess
from tests.router_harness import (
    MODEL,
    Heard,
    RouterHarness,
    listen,
    router_config,
    running_router,
    scripted,
    spell,
)
from tests.scripted_worker import Script, ScriptedWorker, Talk
from tidemill.api.common.v1 import lifecycle_pb2, sampling_pb2
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.errors import Internal
from tidemill.rpc.tls import TlsFiles

pytestmark = pytest.mark.redis

TEXT = "hello there"
Tls = Callable[[str], TlsFiles]


def ask(
    text: str = TEXT, request_id: str = "r1", n: int = 1, **fields: Any
) -> router_pb2.GenerateRequest:
    sampling = sampling_pb2.Sampling(max_tokens=len(text), n=n, **fields)
    return router_pb2.GenerateRequest(
        request_id=request_id, model=MODEL, prompt="x" * 100, sampling=sampling
    )


@pytest.fixture
def ids(model_dir: Path) -> list[int]:
    return spell(model_dir, TEXT)


@pytest.fixture
def decodes() -> list[ScriptedWorker]:
    return [ScriptedWorker(f"decode-{each}", "decode", until_told, routes=True) for each in (0, 1)]


@pytest.fixture
def limits() -> dict[str, Any]:
    return {"final_wait_s": 0.5}


@pytest.fixture
async def router(
    model_dir: Path,
    ledger: RedisProcess,
    decodes: list[ScriptedWorker],
    tls_files: Tls,
    limits: dict[str, Any],
) -> AsyncIterator[RouterHarness]:
    async with scripted([ScriptedWorker("p", "prefill"), *decodes], tls_files) as endpoints:
        config = router_config(model_dir, ledger, endpoints, tls_files("router"), **limits)
        async with running_router(config) as harness:
            await harness.until(lambda: len(harness.process.fleet) == 3 and all_open(harness))
            yield harness


def all_open(router: RouterHarness) -> bool:
    return all(each.chunks is not None and each.chunks.is_open for each in decoders(router))


def decoders(router: RouterHarness) -> list[Any]:
    return list(router.process.fleet.decoders())


async def until_told(talk: Talk) -> None:
    raise AssertionError("no script")


def play(decodes: list[ScriptedWorker], *scripts: Script) -> None:
    """Attempts play `scripts` in turn, at whichever worker."""
    left = list(scripts)

    async def next_one(talk: Talk) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(talk)

    for decode in decodes:
        decode.scripts = [next_one]


def goes_on(ids: Sequence[int]) -> Script:
    """The rest of the answer, token by token, each in the channel; Final at once after them."""

    async def script(talk: Talk) -> None:
        assert talk.start.HasField("route")
        begin = talk.start.relayed_tokens
        await talk.prefill_done(ids[begin])
        for token_id in ids[begin + 1 :]:
            await talk.tokens([token_id])
        await talk.final("LENGTH")

    return script


async def stopped(talk: Talk) -> None:
    """The Final that a Stop asks for."""
    stop = await talk.stopped
    await talk.final(lifecycle_pb2.FinishReason.Name(stop.reason).removeprefix("FINISH_REASON_"))


def whole(heard: Heard, ids: Sequence[int]) -> None:
    assert heard.error is None, heard.error
    assert heard.token_ids == list(ids)
    assert [chunk.sequence for chunk in heard.chunks] == list(range(len(heard.chunks)))
    usage = heard.completed.usage
    assert usage.completion_tokens == len(ids)
    unbilled = usage.unbilled
    assert usage.generated_tokens == len(ids) + (
        unbilled.overrun_tokens
        + unbilled.failover_redo_tokens
        + unbilled.lost_tokens
        + unbilled.server_fault_tokens
    )


async def test_answers_come_through_the_channel_of_their_worker(
    router: RouterHarness, decodes: list[ScriptedWorker], ids: list[int]
) -> None:
    play(decodes, goes_on(ids))
    heard = await asyncio.gather(*(router.generate(ask(request_id=f"r{i}")) for i in range(8)))
    for each in heard:
        whole(each, ids)
        assert each.completed.receipt.attempts == 1
    for decode in decodes:
        numbers = [start.route.number for start in decode.starts]
        assert len(set(numbers)) == len(numbers)
        assert {start.route.channel_id for start in decode.starts} <= set(decode.channels[:1])


async def test_a_final_that_overtakes_its_tokens_waits_for_them(
    router: RouterHarness, decodes: list[ScriptedWorker], ids: list[int]
) -> None:
    for decode in decodes:
        decode.flowing.clear()
    play(decodes, goes_on(ids))
    call = router.call(ask())
    kinds = [(await call.read()).WhichOneof("event") for _ in range(2)]
    assert kinds == ["accepted", "chunk"]
    await router.until(lambda: sum(decode.running for decode in decodes) == 0)  # Final has left
    for decode in decodes:
        decode.flowing.set()
    rest = await listen(call)
    assert rest.token_ids == ids[1:]
    assert rest.completed.usage.generated_tokens == len(ids)
    assert rest.completed.receipt.attempts == 1


@pytest.mark.parametrize("breaks", [True, False])
async def test_a_channel_that_ends_in_the_middle_is_outlived_without_a_gap(
    router: RouterHarness, decodes: list[ScriptedWorker], ids: list[int], *, breaks: bool
) -> None:
    read = asyncio.Event()

    async def dies(talk: Talk) -> None:
        await talk.prefill_done(ids[0])
        await talk.tokens(ids[1:4])
        await read.wait()
        talk.worker.end_channel(breaks=breaks)
        talk.counts[0] += 2  # which it could not send
        talk.worker.finals[1] = talk.last_word("SERVER_FAULT")
        if breaks:
            await talk.stopped
        await talk.final("SERVER_FAULT")

    play(decodes, dies, goes_on(ids))
    call = router.call(ask())
    begun = Heard()
    while len(begun.token_ids) < 4:
        begun.messages.append(await call.read())
    read.set()
    heard = await listen(call)
    heard.messages[:0] = begun.messages
    whole(heard, ids)
    assert heard.completed.receipt.attempts == 2
    assert heard.completed.usage.unbilled.failover_redo_tokens == 2
    first, second = sorted(
        (start for decode in decodes for start in decode.starts),
        key=lambda start: start.task.id.attempt,
    )
    assert (first.relayed_tokens, second.relayed_tokens) == (0, 4)
    await router.until(lambda: all_open(router))
    assert [len(decode.channels) for decode in decodes].count(2) == 1
    assert all(len(set(decode.channels)) == len(decode.channels) for decode in decodes)


async def test_a_channel_that_breaks_after_final_changes_nothing(
    router: RouterHarness, decodes: list[ScriptedWorker], ids: list[int]
) -> None:
    async def ends_first(talk: Talk) -> None:
        await talk.prefill_done(ids[0])
        await talk.tokens(ids[1:5])
        await talk.final("BUDGET")
        await talk.hung_up.wait()
        talk.worker.end_channel(breaks=True)
        await asyncio.sleep(0.1)

    play(decodes, ends_first)
    heard = await router.generate(ask())
    whole(heard, ids[:5])
    assert heard.completed.finish_reason == lifecycle_pb2.FINISH_REASON_BUDGET
    assert heard.completed.receipt.attempts == 1


async def test_a_final_whose_tokens_never_come_is_waited_for_no_longer_than_any_other(
    router: RouterHarness, decodes: list[ScriptedWorker], ids: list[int]
) -> None:
    async def keeps_some(talk: Talk) -> None:
        await talk.prefill_done(ids[0])
        await talk.tokens(ids[1:3])
        await talk.final("LENGTH", generated=len(ids))

    play(decodes, keeps_some, goes_on(ids))
    heard = await router.generate(ask())
    whole(heard, ids)
    assert heard.completed.usage.unbilled.failover_redo_tokens == len(ids) - 3


async def test_a_channel_that_brings_nothing_holds_up_no_cancel(
    router: RouterHarness, decodes: list[ScriptedWorker], ids: list[int]
) -> None:
    for decode in decodes:
        decode.flowing.clear()

    async def slow(talk: Talk) -> None:
        await talk.prefill_done(ids[0])
        await talk.tokens(ids[1:4])
        await stopped(talk)

    play(decodes, slow)
    call = router.call(ask())
    for _ in range(2):
        await call.read()
    assert await router.cancel("r1")
    rest = await listen(call)
    assert rest.completed.finish_reason == lifecycle_pb2.FINISH_REASON_CANCELLED
    assert rest.completed.usage.completion_tokens == 4  # all up to Final are billed


async def test_one_attempt_that_breaks_its_contract_leaves_the_others_in_peace(
    router: RouterHarness, decodes: list[ScriptedWorker], ids: list[int]
) -> None:
    async def skips(talk: Talk) -> None:
        await talk.prefill_done(ids[0])
        route = talk.start.route.number
        talk.worker.route(route, decode_pb2.Chunk(first_index=3, token_ids=ids[3:5]))
        await stopped(talk)

    async def by_length(talk: Talk) -> None:
        await (skips if talk.sampling.max_tokens == 3 else goes_on(ids))(talk)

    play(decodes, by_length)
    bad, *good = await asyncio.gather(
        router.generate(ask("bad", "bad")),
        *(router.generate(ask(request_id=f"r{i}")) for i in range(3)),
    )
    assert isinstance(bad.error, Internal)
    assert bad.error.reason == "WORKER_FAULT"
    for each in good:
        whole(each, ids)
        assert each.completed.receipt.attempts == 1


async def test_each_of_several_choices_ends_after_its_own_tokens(
    router: RouterHarness, decodes: list[ScriptedWorker], ids: list[int]
) -> None:
    async def late(talk: Talk) -> None:
        await talk.prefill_done(ids[0], ids[0])
        talk.counts = [len(ids), len(ids)]
        for choice in (1, 0):
            await talk.choice_ended(choice, "LENGTH")
        await talk.final("LENGTH")
        for choice in (0, 1):
            chunk = decode_pb2.Chunk(choice=choice, first_index=1, token_ids=ids[1:])
            talk.worker.route(talk.start.route.number, chunk)

    play(decodes, late)
    heard = await router.generate(ask(n=2))
    for choice in (0, 1):
        own = [chunk for chunk in heard.chunks if chunk.choice == choice]
        assert [token for chunk in own for token in chunk.token_ids] == ids
    kinds = [message.WhichOneof("event") for message in heard.messages]
    assert kinds.count("choice_end") == 2
    assert heard.completed.usage.generated_tokens == 2 * len(ids)


async def test_a_router_that_comes_again_has_a_channel_of_its_own(
    model_dir: Path, ledger: RedisProcess, tls_files: Tls, ids: list[int]
) -> None:
    decode = ScriptedWorker("d", "decode", goes_on(ids), routes=True)
    async with scripted([ScriptedWorker("p", "prefill"), decode], tls_files) as endpoints:
        config = router_config(model_dir, ledger, endpoints, tls_files("router"))
        for number in range(2):
            async with running_router(config) as router:
                await router.until(lambda: all_open(router))
                whole(await router.generate(ask(request_id=f"r{number}")), ids)
    assert len(set(decode.channels)) == 2
    assert [start.route.channel_id for start in decode.starts] == decode.channels


async def test_a_worker_without_channels_is_served_through_its_calls(
    model_dir: Path, ledger: RedisProcess, tls_files: Tls, ids: list[int]
) -> None:
    async def script(talk: Talk) -> None:
        assert not talk.start.HasField("route")
        await talk.prefill_done(ids[0])
        await talk.tokens(ids[1:])
        await talk.final("LENGTH")

    decode = ScriptedWorker("d", "decode", script)
    async with scripted([ScriptedWorker("p", "prefill"), decode], tls_files) as endpoints:
        config = router_config(model_dir, ledger, endpoints, tls_files("router"))
        async with running_router(config) as router:
            whole(await router.generate(ask()), ids)
