"""The SDK against the real router, its ledger, and scripted workers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.router_harness import ADMIN_KEY, BOOK_PATH, MODEL, RouterHarness, spell
from tests.scripted_worker import ScriptedWorker, Talk, answer
from tidemill import errors
from tidemill.billing import load_price_book
from tidemill.client import AsyncClient, Client, FinishReason, RetryPolicy

pytestmark = pytest.mark.redis
LONG = "x" * 200


@pytest.fixture
async def client(router: RouterHarness) -> AsyncIterator[AsyncClient]:
    address = router.process.server.address
    async with AsyncClient(
        address, router.key, retry=RetryPolicy(initial_s=0.01, max_retries=1)
    ) as made:
        yield made


async def test_an_answer_comes_with_usage_and_a_receipt_that_verify(
    client: AsyncClient, decode: ScriptedWorker, model_dir: Any
) -> None:
    decode.scripts = [answer(spell(model_dir, "grind"), device=64, cache_ram=64)]
    completion = await client.generate(LONG, model=MODEL, max_tokens=5)
    assert completion.text == "grind"
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.usage.prompt_tokens == 200
    assert completion.usage.cache_hit_tokens == 128
    assert (completion.usage.reuse.device, completion.usage.reuse.cache_ram) == (64, 64)
    assert completion.usage.completion_tokens == len(completion.token_ids) == 5
    completion.usage.check()
    assert completion.receipt is not None
    completion.receipt.verify(load_price_book(BOOK_PATH))
    assert not completion.replayed
    assert 0 < completion.timing.first_token_s <= completion.timing.total_s


async def test_every_snapshot_of_usage_holds_on_the_way(
    client: AsyncClient, decode: ScriptedWorker, model_dir: Any
) -> None:
    decode.scripts = [answer(spell(model_dir, "abcdefgh"), pause_s=0.02, host=64)]
    async with await client.chat("y" * 200, model=MODEL, stream=True, max_tokens=8) as stream:
        async for _ in stream:
            stream.usage.check()
    assert stream.text == "abcdefgh"


async def test_cancel_brings_the_bill_of_what_was_generated(
    client: AsyncClient, decode: ScriptedWorker, model_dir: Any
) -> None:
    decode.scripts = [answer(spell(model_dir, "z" * 500), pause_s=0.02)]
    async with await client.generate(LONG, model=MODEL, stream=True, max_tokens=500) as stream:
        async for _ in stream:
            if len(stream.token_ids) >= 3 and stream.completed is None:
                await stream.cancel()
    assert stream.completed is not None
    assert stream.completed.finish_reason is FinishReason.CANCELLED
    assert stream.completed.receipt is not None
    assert 3 <= stream.completed.usage.completion_tokens < 500
    stream.completed.usage.check()
    assert not await stream.cancel()


async def test_the_router_closes_its_side_once_it_has_read_final(
    client: AsyncClient, decode: ScriptedWorker, model_dir: Any
) -> None:
    talks: list[Talk] = []

    async def script(talk: Talk) -> None:
        talks.append(talk)
        await answer(spell(model_dir, "ab"))(talk)
        await asyncio.wait_for(talk.hung_up.wait(), 5)

    decode.scripts = [script]
    completion = await client.generate("p", model=MODEL, max_tokens=2)
    assert completion.text == "ab"
    assert talks[0].hung_up.is_set()


async def test_a_worker_lost_on_the_way_is_told_with_what_it_cost(
    client: AsyncClient, decode: ScriptedWorker, model_dir: Any
) -> None:
    decode.scripts = [answer(spell(model_dir, "z" * 500), pause_s=0.02)]
    stream = await client.generate(LONG, model=MODEL, stream=True)
    while len(stream.token_ids) < 3:
        await anext(stream)
    vanishing = asyncio.create_task(decode.vanish())
    with pytest.raises(errors.WorkerLost) as raised:
        await stream.completion()
    await vanishing
    assert raised.value.request_id == stream.request_id
    assert stream.text.startswith("zzz")
    assert stream.usage.prompt_tokens == 200


async def test_the_same_id_again_gives_the_same_bill_and_says_so(client: AsyncClient) -> None:
    first = await client.generate("p", model=MODEL, request_id="once", max_tokens=5)
    again = await client.generate("p", model=MODEL, request_id="once", max_tokens=5)
    assert again.replayed
    assert again.receipt == first.receipt
    assert again.text == ""
    with pytest.raises(errors.AlreadyExists):
        await client.generate("another", model=MODEL, request_id="once", max_tokens=5)


@pytest.mark.parametrize(
    ("options", "error", "field"),
    [
        ({"model": "nobody"}, errors.ModelNotFound, None),
        ({"temperature": float("nan")}, errors.InvalidRequest, "sampling.temperature"),
        ({"top_p": -0.5}, errors.InvalidRequest, "sampling.top_p"),
        ({"stop": ["x"] * 10_000}, errors.InvalidRequest, "stop"),
        ({"request_id": "no spaces here"}, errors.InvalidRequest, "request_id"),
    ],
)
async def test_bad_input_comes_back_typed_and_named(
    client: AsyncClient, options: dict[str, Any], error: type[Exception], field: str | None
) -> None:
    with pytest.raises(error) as raised:
        await client.generate("p", **{"model": MODEL, **options})
    assert isinstance(raised.value, errors.TidemillError)
    assert raised.value.request_id
    if isinstance(raised.value, errors.InvalidRequest) and field:
        assert field in [path for path, _ in raised.value.violations]


async def test_an_unknown_key_is_refused(router: RouterHarness) -> None:
    async with AsyncClient(router.process.server.address, "tm_nobody.secret") as stranger:
        with pytest.raises(errors.Unauthenticated):
            await stranger.generate("p", model=MODEL)
        with pytest.raises(errors.TidemillError):
            await stranger.admin.list_keys()


async def test_the_operator_makes_and_revokes_keys(router: RouterHarness) -> None:
    address = router.process.server.address
    async with AsyncClient(address, ADMIN_KEY) as operator:
        assert await operator.admin.create_tenant("mill", currency="CNY")
        assert not await operator.admin.create_tenant("mill", currency="CNY")
        made = await operator.admin.create_key("mill", label="ci")
        (listed,) = await operator.admin.list_keys("mill")
        assert (listed.key_id, listed.label, listed.revoked) == (made.key_id, "ci", False)
        async with AsyncClient(address, made.key) as tenant:
            (model,) = await tenant.models()
            assert (model.name, model.currency) == (MODEL, "CNY")
        assert await operator.admin.revoke_key(made.key_id)
        assert not await operator.admin.revoke_key(made.key_id)


async def test_the_synchronous_client_reads_the_same_stream(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Any
) -> None:
    decode.scripts = [answer(spell(model_dir, "grind"), device=64)]

    def ask() -> tuple[str, int]:
        with Client(router.process.server.address, router.key) as made:
            completion = made.generate(LONG, model=MODEL, max_tokens=5, stop=["d"])
        completion.usage.check()
        return completion.text, completion.usage.completion_tokens

    assert await asyncio.to_thread(ask) == ("grin", 5)
