"""What a client of the router sees on its stream; the workers are scripted."""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from services.router.worker_task import wire_id
from tests.router_harness import BOOK_PATH, EOS_ID, MODEL, RouterHarness, listen, spell
from tests.scripted_worker import ScriptedWorker, Talk, answer
from tidemill.api.common.v1 import lifecycle_pb2, sampling_pb2, usage_pb2
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.billing import Reuse, Unbilled, Usage, issue_receipt, load_price_book

pytestmark = pytest.mark.redis


def ask(request_id: str = "r1", **fields: Any) -> router_pb2.GenerateRequest:
    if not fields.keys() & {"prompt", "chat", "tokens"}:
        fields["prompt"] = "x" * 100
    return router_pb2.GenerateRequest(request_id=request_id, model=MODEL, **fields)


async def test_one_request_from_prompt_to_receipt(
    model_dir: Path, router: RouterHarness, decode: ScriptedWorker
) -> None:
    decode.scripts = [answer(spell(model_dir, "hello"), device=64)]
    heard = await router.generate(ask())
    assert heard.kinds == ["accepted", "chunk", "completed"]
    accepted = heard.messages[0].accepted
    assert (accepted.request_id, accepted.position, accepted.prompt_tokens) == ("r1", 0, 100)
    assert heard.text == "hello"
    assert heard.token_ids == spell(model_dir, "hello")
    assert [chunk.sequence for chunk in heard.chunks] == list(range(len(heard.chunks)))
    completed = heard.completed
    assert completed.finish_reason == lifecycle_pb2.FINISH_REASON_LENGTH
    usage = completed.usage
    assert (usage.cache_hit_tokens, usage.cache_miss_tokens) == (64, 36)
    assert (usage.completion_tokens, usage.generated_tokens) == (5, 5)
    assert usage.prompt.reused_device_tokens == 64
    assert usage.prompt.prefill_worker_id == "prefill-0"
    assert completed.timing.first_token_us > 0
    assert completed.timing.prefill_us == 7
    assert completed.timing.decode_busy_seconds == 0.25


async def test_the_receipt_can_be_recomputed_from_its_counts(router: RouterHarness) -> None:
    heard = await router.generate(ask())
    receipt = heard.completed.receipt
    again = issue_receipt(
        load_price_book(BOOK_PATH),
        request_id="r1",
        tenant_id="acme",
        key_id=receipt.key_id,
        model=MODEL,
        price_model="deepseek-chat",
        currency="USD",
        usage=Usage(
            prompt_tokens=100,
            computed_tokens=100,
            reused=Reuse(),
            completion_tokens=5,
            generated_tokens=5,
            unbilled=Unbilled(),
        ),
        admitted_at_ms=receipt.admitted_at_ms,
        decided_at_ms=receipt.decided_at_ms,
        hold_nano=receipt.hold_nano,
        attempts=1,
    )
    assert receipt.content_sha256.hex() == again.content_sha256
    assert receipt.amount_nano == again.charge.amount_nano
    assert receipt.admitted_at_ms <= receipt.decided_at_ms


async def test_workers_get_ids_and_numbers_and_never_text(
    router: RouterHarness, decode: ScriptedWorker, prefill: ScriptedWorker, model_dir: Path
) -> None:
    sampling = sampling_pb2.Sampling(top_k=7, max_tokens=3, stop_token_ids=[9])
    await router.generate(ask(sampling=sampling))
    start = decode.starts[0]
    assert list(start.task.token_ids) == spell(model_dir, "x" * 100)
    assert start.task.id.request_id == wire_id("acme", "r1")
    assert (start.task.id.attempt, start.task.id.fence) == (1, 1)
    assert len(start.task.cache_scope) == 32
    assert start.task.model_digest == decode.digest
    assert start.prefill.worker_id == "prefill-0"
    assert start.prefill.address == prefill.endpoint.removeprefix("prefill@")
    resolved = start.task.sampling
    assert (resolved.temperature, resolved.top_p, resolved.top_k) == (0.6, 0.95, 7)
    assert resolved.max_tokens == 3
    assert list(resolved.stop_token_ids) == [EOS_ID, 9]
    assert not start.HasField("funded_tokens")


async def test_tenants_do_not_share_a_cache_scope_or_a_request_id(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    other = await router.make_tenant("wayne", "CNY")
    first, second = await asyncio.gather(
        router.generate(ask("same")), router.generate(ask("same"), key=other)
    )
    assert first.completed.receipt.currency == "USD"
    assert second.completed.receipt.currency == "CNY"
    tasks = [start.task for start in decode.starts]
    assert len({task.cache_scope for task in tasks}) == 2
    assert len({task.id.request_id for task in tasks}) == 2


async def test_the_seed_is_drawn_once_and_reported(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    drawn = await router.generate(ask("r1"))
    given = await router.generate(ask("r2", sampling=sampling_pb2.Sampling(seed=5)))
    assert drawn.completed.seed == decode.starts[0].task.sampling.seed
    assert given.completed.seed == decode.starts[1].task.sampling.seed == 5


async def test_chat_goes_through_the_template(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    message = router_pb2.ChatMessage(role=router_pb2.CHAT_ROLE_USER, content="hi")
    await router.generate(ask(chat=router_pb2.ChatInput(messages=[message])))
    assert list(decode.starts[0].task.token_ids) == spell(model_dir, "user:hi;")


async def test_max_tokens_is_cut_to_what_the_context_leaves(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    sampling = sampling_pb2.Sampling(max_tokens=500)
    heard = await router.generate(ask(prompt="x" * 1020, sampling=sampling))
    assert decode.starts[0].task.sampling.max_tokens == 4
    assert heard.text == "hell"
    await router.generate(ask("r2"))
    assert decode.starts[1].task.sampling.max_tokens == 64


async def test_a_stop_string_ends_the_bill_with_the_token_that_completes_it(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    ids = spell(model_dir, "one STOP two three")

    async def play(talk: Talk) -> None:
        await talk.prefill_done(ids[0])
        await talk.tokens(ids[1:6])
        await talk.tokens(ids[6:10])
        stop = await talk.stopped
        await talk.tokens(ids[10:12])
        await talk.final("STOP")
        assert stop.keep_tokens == 8

    decode.scripts = [play]
    heard = await router.generate(ask(stop=["STOP", "never"]))
    assert heard.text == "one "
    assert heard.token_ids == ids[:8]
    usage = heard.completed.usage
    assert heard.completed.finish_reason == lifecycle_pb2.FINISH_REASON_STOP
    assert (usage.completion_tokens, usage.generated_tokens) == (8, 12)
    assert usage.unbilled.overrun_tokens == 4


async def test_characters_arrive_whole(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    decode.scripts = [answer(spell(model_dir, "水车🌊"))]
    heard = await router.generate(ask())
    assert heard.text == "水车🌊"
    assert len(heard.token_ids) == 10
    assert "\ufffd" not in "".join(chunk.text for chunk in heard.chunks)


async def test_reasoning_is_told_apart_and_counted(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    decode.scripts = [answer(spell(model_dir, "<think>why</think>so"))]
    heard = await router.generate(ask())
    assert "".join(chunk.reasoning_text for chunk in heard.chunks) == "why"
    assert heard.text == "so"
    assert heard.completed.usage.reasoning_tokens == 5
    assert heard.completed.usage.completion_tokens == 7


async def test_every_chunk_says_what_it_has_cost_so_far(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    decode.scripts = [answer(spell(model_dir, "hello"), pause_s=0.02)]
    heard = await router.generate(ask())
    seen = 0
    for chunk in heard.chunks:
        assert chunk.first_index == seen
        seen += len(chunk.token_ids)
        assert chunk.usage.completion_tokens == seen
        assert chunk.usage.prompt.prompt_tokens == 100


async def test_a_reader_that_is_behind_gets_fewer_and_fuller_messages(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    decode.scripts = [answer(spell(model_dir, "abcdefghijklmnopqrstuvwxyz" * 2))]
    heard = await router.generate(ask())
    assert heard.text == "abcdefghijklmnopqrstuvwxyz" * 2
    assert max(len(chunk.token_ids) for chunk in heard.chunks) <= 8


async def test_tokens_beyond_max_tokens_are_overrun(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    async def play(talk: Talk) -> None:
        await talk.prefill_done(7)
        await talk.final("LENGTH", generated=4)

    decode.scripts = [play]
    heard = await router.generate(ask(sampling=sampling_pb2.Sampling(max_tokens=1)))
    usage = heard.completed.usage
    assert (usage.completion_tokens, usage.unbilled.overrun_tokens) == (1, 3)


async def test_a_final_is_acknowledged_once_it_is_settled(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    await router.generate(ask())
    await router.until(lambda: len(decode.acknowledged) == 1)
    assert decode.acknowledged[0] == decode.starts[0].task.id


@pytest.mark.parametrize(
    "usage",
    [
        usage_pb2.PromptUsage(prompt_tokens=100, computed_tokens=99),
        usage_pb2.PromptUsage(prompt_tokens=90, computed_tokens=90),
    ],
)
async def test_counts_that_do_not_add_up_are_never_billed(
    router: RouterHarness, decode: ScriptedWorker, usage: usage_pb2.PromptUsage
) -> None:
    async def lie(talk: Talk) -> None:
        done = lifecycle_pb2.PrefillDone(first_token_id=5, usage=usage)
        await talk.send(decode_pb2.DecodeResponse(prefill_done=done))
        await talk.stopped
        await talk.final("SERVER_FAULT")

    decode.scripts = [lie]
    heard = await router.generate(ask())
    assert heard.error is not None
    assert (heard.error.code.name, heard.error.reason) == ("INTERNAL", "WORKER_FAULT")
    assert router.metric("tidemill_router_revenue_nano_total", model=MODEL, currency="USD") == 0


async def test_metrics_tell_tokens_money_and_refusals(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    decode.scripts = [answer(spell(model_dir, "hello"), device=64)]
    heard = await router.generate(ask())
    await router.generate(ask("r2", prompt="x" * 5000))
    amount = heard.completed.receipt.amount_nano
    assert router.metric("tidemill_router_requests_total", model=MODEL, finish_reason="length") == 1
    assert router.metric("tidemill_router_prompt_tokens_total", model=MODEL, source="device") == 64
    assert (
        router.metric("tidemill_router_prompt_tokens_total", model=MODEL, source="computed") == 36
    )
    assert router.metric("tidemill_router_completion_tokens_total", model=MODEL) == 5
    assert (
        router.metric("tidemill_router_revenue_nano_total", model=MODEL, currency="USD") == amount
    )
    assert router.metric("tidemill_router_refusals_total", reason="CONTEXT_EXCEEDED") == 1
    assert router.metric("tidemill_router_time_to_first_token_seconds_count", model=MODEL) == 1


async def test_models_are_listed_with_present_prices(router: RouterHarness) -> None:
    metadata = (("authorization", f"Bearer {router.key}"),)
    answered = await router.stub.ListModels(router_pb2.ListModelsRequest(), metadata=metadata)
    (model,) = answered.models
    assert (model.name, model.context_tokens, model.currency) == (MODEL, 1024, "USD")
    assert model.max_output_tokens == 1023  # of the configured 32768, what the context leaves
    assert model.prices.miss_pico in {270_000, 135_000}
    assert model.window in {"standard", "off-peak"}
    assert model.window_ends_at_ms > 0
    assert (model.prefill_workers, model.decode_workers) == (1, 1)


async def test_many_streams_at_once_each_get_their_own_answer(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    async def echo(talk: Talk) -> None:
        await answer(list(talk.start.task.token_ids), pause_s=0.001)(talk)

    decode.scripts = [echo]
    prompts = [hashlib.sha256(bytes([number])).hexdigest()[:40] for number in range(32)]
    heard = await asyncio.gather(
        *(router.generate(ask(f"r{i}", prompt=prompt)) for i, prompt in enumerate(prompts))
    )
    assert [each.text for each in heard] == prompts


async def test_position_is_told_while_a_request_waits(
    router: RouterHarness, decode: ScriptedWorker, prefill: ScriptedWorker
) -> None:
    decode.free_blocks = 0
    await router.until_seen(decode)
    calls = [router.call(ask(f"r{number}")) for number in range(3)]
    positions = [(await call.read()).accepted.position for call in calls]
    assert sorted(positions) == [0, 1, 2]
    assert len(router.process.dispatchers[MODEL]) == 3
    assert router.metric("tidemill_router_queued_requests") == 3
    assert router.metric("tidemill_router_queued_prompt_tokens") == 300
    first = calls[positions.index(0)]
    last = calls[positions.index(2)]
    first.cancel()
    while (moved := await last.read()).queued.position == 2:
        pass  # how long it will wait can be told before
    assert moved.queued.position == 1
    decode.free_blocks = 100
    rest = [await listen(call) for call in calls if call is not first]
    assert all(heard.completed.receipt.amount_nano > 0 for heard in rest)
