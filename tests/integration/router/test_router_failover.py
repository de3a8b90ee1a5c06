"""A worker lost in the middle: another goes on from what was relayed; workers are scripted."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence, Sized
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from services.router.attempt import Attempt, OpenCall
from services.router.finish import Finish
from services.router.fleet import Worker
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
from tests.scripted_worker import Script, ScriptedWorker, Talk, likelihood
from tidemill.api.common.v1 import lifecycle_pb2, sampling_pb2
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2
from tidemill.api.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.errors import DecodeFull, Internal, WorkerLost
from tidemill.policy.seeds import choice_seed
from tidemill.rpc.tls import TlsFiles

pytestmark = pytest.mark.redis

STOP = lifecycle_pb2.FINISH_REASON_STOP
LENGTH = lifecycle_pb2.FINISH_REASON_LENGTH
CANCELLED = lifecycle_pb2.FINISH_REASON_CANCELLED
NUM_PROMPT = 100
SEED = 11


def ask(answer: Sized, n: int = 1, **fields: Any) -> router_pb2.GenerateRequest:
    """A request whose completions are as long as `answer`."""
    sampling = {"max_tokens": len(answer), "n": n, "seed": SEED, **fields.pop("sampling", {})}
    return router_pb2.GenerateRequest(
        request_id="r1",
        model=MODEL,
        prompt="x" * NUM_PROMPT,
        sampling=sampling_pb2.Sampling(**sampling),
        **fields,
    )


def lost(talk: Talk) -> None:
    raise WorkerLost("gone")


def lost_in_prefill(talk: Talk) -> None:
    raise WorkerLost("gone", metadata={"worker_id": talk.start.prefill.worker_id})


def failed(talk: Talk) -> None:
    raise Internal("the worker's engine failed")


def silent(talk: Talk) -> None:
    """The stream ends, and that is all."""


def goes_on(
    *texts: Sequence[int],
    until: int | None = None,
    final: str | None = None,
    unsent: int = 0,
    then: Callable[[Talk], None] = lost,
    pause_s: float = 0.0,
) -> Script:
    """Generates each choice of `texts` from the tokens that were relayed on, by its seed.

    With `until` it comes to as many tokens of each choice and dies as `then` says, after `final`
    if that is given, which counts `unsent` tokens more than were sent.
    """
    by_seed = {choice_seed(SEED, index): index for index in range(len(texts))}

    async def play(talk: Talk) -> None:
        first, n = by_seed[talk.sampling.seed], talk.sampling.n
        begin = talk.start.relayed_tokens
        assert talk.start.task.relayed_tokens == begin
        for index in range(first, first + n):
            relayed = list(talk.start.task.token_ids)[NUM_PROMPT:]
            assert relayed == list(texts[index])[:begin]
        end = talk.sampling.max_tokens if until is None else until
        if end > begin:
            await talk.prefill_done(*(text[begin] for text in texts[first : first + n]))
        reason = "LENGTH"
        for position in range(begin + 1, end):
            await asyncio.sleep(pause_s)
            if talk.stopped.done():
                reason = lifecycle_pb2.FinishReason.Name(talk.stopped.result().reason)
                reason = reason.removeprefix("FINISH_REASON_")
                break
            for choice in range(n):
                await talk.tokens([texts[first + choice][position]], choice=choice)
        if until is not None and final is None:
            return then(talk)
        for choice in range(n if n > 1 else 0):
            await talk.choice_ended(choice, final or reason)
        await talk.final(final or reason, generated=talk.generated + unsent)
        return then(talk) if until is not None else None

    return play


@pytest.fixture
def decodes() -> list[ScriptedWorker]:
    """Three to choose from; scripts are the test's."""
    return [ScriptedWorker(f"decode-{number}", "decode", goes_on([])) for number in range(3)]


@pytest.fixture
async def router(
    model_dir: Path,
    ledger: RedisProcess,
    decodes: list[ScriptedWorker],
    tls_files: Callable[[str], TlsFiles],
    limits: dict[str, Any],
) -> AsyncIterator[RouterHarness]:
    workers = [ScriptedWorker(f"prefill-{number}", "prefill") for number in range(2)]
    async with scripted([*workers, *decodes], tls_files) as endpoints:
        config = router_config(model_dir, ledger, endpoints, tls_files("router"), **limits)
        async with running_router(config) as harness:
            await harness.until(lambda: len(harness.process.fleet) == 5)
            yield harness


def script(decodes: list[ScriptedWorker], *scripts: Script) -> list[Any]:
    """Attempts play `scripts` in turn, at whichever worker; returns the Starts as they come."""
    starts: list[Any] = []
    left = list(scripts)

    async def play(talk: Talk) -> None:
        starts.append((talk.worker.worker_id, talk.start))
        await (left.pop(0) if len(left) > 1 else left[0])(talk)

    for decode in decodes:
        decode.scripts = [play]
    return starts


def whole(heard: Heard, ids: Sequence[int], choice: int = 0) -> None:
    """The stream of a choice has no gap."""
    chunks = [chunk for chunk in heard.chunks if chunk.choice == choice]
    found: list[int] = []
    for chunk in chunks:
        assert chunk.first_index == len(found)
        found += chunk.token_ids
    assert found == list(ids)


LOSSES = {
    "the call breaks": lambda ids, until: goes_on(ids, until=until),
    "a Final comes first": lambda ids, until: goes_on(ids, until=until, final="SERVER_FAULT"),
    "the prefill worker is gone": lambda ids, until: goes_on(
        ids, until=until, final="SERVER_FAULT", then=lost_in_prefill
    ),
    "the stream just ends": lambda ids, until: goes_on(ids, until=until, then=silent),
    "it is given up": lambda ids, until: goes_on(
        ids, until=until, final="SERVER_FAULT", then=silent
    ),
    "the engine fails": lambda ids, until: goes_on(ids, until=until, then=failed),
}


@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("until", [0, 1, 7, 21])
async def test_another_worker_goes_on_and_the_stream_has_no_gap(
    router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path, how: str, until: int
) -> None:
    text = "hello there, water 水车"
    ids = spell(model_dir, text)
    starts = script(decodes, LOSSES[how](ids, until=until), goes_on(ids))
    heard = await router.generate(ask(ids))
    whole(heard, ids)
    assert heard.text == text
    assert heard.kinds[0] == "accepted"
    assert heard.kinds.count("accepted") == 1
    assert [chunk.sequence for chunk in heard.chunks] == list(range(len(heard.chunks)))
    usage = heard.completed.usage
    assert (usage.prompt.prompt_tokens, usage.completion_tokens) == (NUM_PROMPT, len(ids))
    assert usage.generated_tokens == len(ids)
    assert heard.completed.receipt.attempts == 2
    assert heard.completed.finish_reason == LENGTH
    assert [start.task.id.attempt for _, start in starts] == [1, 2]
    assert starts[1][1].relayed_tokens == until
    assert starts[1][1].task.sampling.max_tokens == len(ids)
    if "prefill" in how:
        assert starts[0][1].prefill.worker_id != starts[1][1].prefill.worker_id
    else:
        assert starts[0][0] != starts[1][0]


async def test_two_losses_are_outlived_and_a_third_is_not(
    router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
) -> None:
    ids = spell(model_dir, "a long answer")
    starts = script(decodes, *(goes_on(ids, until=end) for end in (3, 5)), goes_on(ids))
    whole(await router.generate(ask(ids)), ids)
    assert [start.relayed_tokens for _, start in starts] == [0, 3, 5]
    assert len({worker for worker, _ in starts}) == 3

    starts = script(decodes, *(goes_on(ids, until=end) for end in (3, 5, 8)))
    request = ask(ids)
    request.request_id = "r2"
    heard = await router.generate(request)
    assert isinstance(heard.error, WorkerLost)
    assert heard.error.request_id == "r2"
    whole(heard, ids[:8])
    assert len(starts) == 3
    unbilled = {"name": "tidemill_router_unbilled_tokens_total", "model": MODEL}
    assert router.metric(**unbilled, why="lost") == 8
    assert router.metric("tidemill_router_completion_tokens_total", model=MODEL) == len(ids)


async def test_tokens_that_only_the_dead_workers_final_counted_are_redone(
    router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
) -> None:
    ids = spell(model_dir, "a long answer")
    script(decodes, goes_on(ids, until=4, final="SERVER_FAULT", unsent=2), goes_on(ids))
    usage = (await router.generate(ask(ids))).completed.usage
    assert (usage.completion_tokens, usage.unbilled.failover_redo_tokens) == (len(ids), 2)
    assert usage.generated_tokens == len(ids) + 2


async def test_a_worker_that_lives_on_after_its_call_broke_is_asked_for_its_final(
    router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
) -> None:
    ids = spell(model_dir, "a long answer")

    def cut(talk: Talk) -> None:
        talk.worker.finals[1] = talk.last_word("SERVER_FAULT", generated=6)
        lost(talk)

    script(decodes, goes_on(ids, until=4, then=cut), goes_on(ids))
    usage = (await router.generate(ask(ids))).completed.usage
    assert (usage.completion_tokens, usage.unbilled.failover_redo_tokens) == (len(ids), 2)
    await router.check_idle()
    acknowledged = [id_.attempt for decode in decodes for id_ in decode.acknowledged]
    assert sorted(acknowledged) == [1, 2]
    workers = [router.process.fleet.get(decode.worker_id) for decode in decodes]
    assert [worker.open_attempts.count for worker in workers if worker] == [0, 0, 0]


async def test_the_first_split_is_the_bills(
    router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
) -> None:
    ids = spell(model_dir, "abcdef")

    async def hit(talk: Talk) -> None:
        await talk.prefill_done(ids[0], device=64)
        lost(talk)

    script(decodes, hit, goes_on(ids))
    usage = (await router.generate(ask(ids))).completed.usage
    assert (usage.prompt.prompt_tokens, usage.prompt.reused_device_tokens) == (NUM_PROMPT, 64)
    assert (usage.cache_hit_tokens, usage.completion_tokens) == (64, 6)


@pytest.mark.parametrize("final", [None, "SERVER_FAULT"])
async def test_a_worker_that_dies_after_the_last_token_is_not_replaced(
    router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path, final: str | None
) -> None:
    ids = spell(model_dir, "all there is")
    starts = script(decodes, goes_on(ids, until=len(ids), final=final))
    heard = await router.generate(ask(ids))
    whole(heard, ids)
    assert (heard.completed.finish_reason, heard.completed.receipt.attempts) == (LENGTH, 1)
    assert heard.completed.usage.completion_tokens == len(ids)
    assert len(starts) == 1


async def test_a_worker_that_dies_after_a_stop_token_is_not_replaced(
    router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
) -> None:
    ids = [*spell(model_dir, "short"), 1]
    starts = script(decodes, goes_on([*ids, 9, 9], until=len(ids)))
    heard = await router.generate(ask(ids, sampling={"max_tokens": 50}))
    whole(heard, ids)
    assert heard.completed.finish_reason == STOP
    assert len(starts) == 1


async def test_a_worker_that_dies_after_a_stop_string_is_not_replaced(
    router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
) -> None:
    ids = spell(model_dir, "one two STOP and more")
    starts = script(decodes, goes_on(ids, until=15))
    heard = await router.generate(ask(ids, stop=["STOP"]))
    assert heard.text == "one two "
    assert heard.completed.finish_reason == STOP
    usage = heard.completed.usage
    assert usage.completion_tokens == 12
    assert usage.generated_tokens == 12 + usage.unbilled.overrun_tokens
    assert len(starts) == 1


async def test_stop_strings_characters_and_tags_may_span_the_loss(
    router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
) -> None:
    text = "<think>why 水</think>be水cause.STOP never"
    ids = spell(model_dir, text)
    kept = spell(model_dir, text[: text.index(" never")])
    for number, until in enumerate((3, 6, 12, 18, len(kept) - 2)):
        starts = script(decodes, goes_on(ids, until=until), goes_on(ids, pause_s=0.01))
        request = ask(ids, stop=["STOP"])
        request.request_id = f"r{number}"
        heard = await router.generate(request)
        assert heard.text == "be水cause."
        assert "".join(chunk.reasoning_text for chunk in heard.chunks) == "why 水"
        whole(heard, kept)
        usage = heard.completed.usage
        assert usage.completion_tokens == len(kept)
        assert usage.reasoning_tokens == len(spell(model_dir, "<think>why 水</think>"))
        assert len(starts) == 2
    stop = next(stop for decode in decodes for stop in decode.stops)
    assert stop.keep_tokens < len(kept), "counted from the attempt's own first token"


async def test_log_probabilities_go_on_and_the_prompts_come_once(
    router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
) -> None:
    ids = spell(model_dir, "likely")

    async def resume(talk: Talk) -> None:
        assert talk.start.relayed_tokens == 3
        talk.sampling.ClearField("prompt_logprobs")  # as a worker does: they were scored before
        await goes_on(ids)(talk)

    script(decodes, goes_on(ids, until=3), resume)
    heard = await router.generate(ask(ids, sampling={"logprobs": 1, "prompt_logprobs": 0}))
    assert heard.error is None
    told = [one for chunk in heard.chunks for one in chunk.logprobs]
    assert told == [likelihood(token_id, 1) for token_id in ids]
    assert sum(len(each.prompt_scored.logprobs) for each in heard.messages) == NUM_PROMPT - 1


async def test_a_cancel_after_a_loss_bills_both_attempts_tokens(
    router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
) -> None:
    ids = spell(model_dir, "z" * 300)
    starts = script(decodes, goes_on(ids, until=5), goes_on(ids, pause_s=0.01))
    call = router.call(ask(ids))
    await router.until(lambda: len(starts) == 2)
    await asyncio.sleep(0.1)
    assert await router.cancel("r1")
    heard = await listen(call)
    completed = heard.completed
    assert completed.finish_reason == CANCELLED
    assert 5 < completed.usage.completion_tokens == completed.usage.generated_tokens < 300
    assert completed.usage.completion_tokens == len(heard.token_ids)


async def test_a_cancel_while_no_worker_has_room_for_the_rest_bills_what_came(
    router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
) -> None:
    ids = spell(model_dir, "z" * 300)

    def full(talk: Talk) -> Any:
        raise DecodeFull("no room", retry_after_s=0.05)

    starts = script(decodes, goes_on(ids, until=5), goes_on(ids, until=5, then=full))
    call = router.call(ask(ids))
    await router.until(lambda: len(starts) > 3)
    assert await router.cancel("r1")
    completed = (await listen(call)).completed
    assert completed.finish_reason == CANCELLED
    assert completed.usage.completion_tokens == completed.usage.generated_tokens == 5


async def test_the_deadline_goes_on_counting(
    router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
) -> None:
    ids = spell(model_dir, "z" * 300)
    script(decodes, goes_on(ids, until=5, pause_s=0.05), goes_on(ids, pause_s=0.05))
    heard = await router.generate(ask(ids, total_timeout_ms=1500))
    completed = heard.completed
    assert completed.finish_reason == lifecycle_pb2.FINISH_REASON_DEADLINE
    assert 5 < completed.usage.completion_tokens < 40
    assert completed.receipt.decided_at_ms <= completed.receipt.admitted_at_ms + 1500


async def test_what_cannot_be_placed_any_more_fails_and_costs_nothing(
    router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
) -> None:
    ids = spell(model_dir, "z" * 300)
    script(decodes, goes_on(ids, pause_s=0.02))
    call = router.call(ask(ids))
    for _ in range(5):
        await call.read()
    await asyncio.gather(*(decode.vanish() for decode in decodes))
    heard = await listen(call)
    assert isinstance(heard.error, WorkerLost)
    assert router.metric("tidemill_router_revenue_nano_total", model=MODEL, currency="USD") == 0


async def test_a_stop_of_an_attempt_that_could_not_start_waits_for_nobody(
    free_port: Callable[[], int],
) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{free_port()}") as channel:
        worker = Worker(
            cast(Any, SimpleNamespace(worker_id="w")), cast(Any, DecodeServiceStub(channel))
        )
        attempt = Attempt(OpenCall(worker, "r1"), decode_pb2.Start(), final_wait_s=1.0)
        stopping = asyncio.create_task(attempt.stop(Finish.CANCELLED))
        with pytest.raises(WorkerLost):
            await attempt.follow(lambda _: None)
        await asyncio.wait_for(stopping, 1.0)
        await attempt.close()
        assert worker.open_attempts.count == 0


class TestChoices:
    TEXTS = ("the first answer", "another one here", "and a third one.")

    @pytest.mark.parametrize("final", [None, "SERVER_FAULT"])
    @pytest.mark.parametrize("until", [0, 1, 9])
    async def test_each_goes_on_alone_with_its_own_seed_and_tokens(
        self,
        router: RouterHarness,
        decodes: list[ScriptedWorker],
        model_dir: Path,
        until: int,
        final: str | None,
    ) -> None:
        ids = [spell(model_dir, text) for text in self.TEXTS]
        starts = script(decodes, goes_on(*ids, until=until, final=final), goes_on(*ids))
        heard = await router.generate(ask(self.TEXTS[0], 3))
        for choice in range(3):
            whole(heard, ids[choice], choice)
        ends = [each.choice_end for each in heard.messages if each.HasField("choice_end")]
        assert sorted((end.choice, end.finish_reason, end.completion_tokens) for end in ends) == [
            (choice, LENGTH, 16) for choice in range(3)
        ]
        usage = heard.completed.usage
        assert (usage.prompt.prompt_tokens, usage.completion_tokens) == (NUM_PROMPT, 48)
        assert usage.generated_tokens == 48
        numbers = sorted(start.task.id.attempt for _, start in starts)
        assert numbers == ([1, 2] if until == 0 else [1, 2, 3, 4])
        assert heard.completed.receipt.attempts == len(starts)

    async def test_those_that_have_ended_are_left_alone(
        self, router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
    ) -> None:
        texts = ("STOP and no more", "another one here", "and a third one.")
        ids = [spell(model_dir, text) for text in texts]
        starts = script(decodes, goes_on(*ids, until=9), goes_on(*ids))
        heard = await router.generate(ask(texts[0], 3, stop=["STOP"]))
        whole(heard, ids[0][:4], 0)
        whole(heard, ids[1], 1)
        whole(heard, ids[2], 2)
        seeds = {start.task.sampling.seed for _, start in starts[1:]}
        assert seeds == {choice_seed(SEED, 1), choice_seed(SEED, 2)}
        assert [start.task.sampling.n for _, start in starts] == [3, 1, 1]

    async def test_one_that_is_lost_too_often_ends_them_all(
        self, router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
    ) -> None:
        ids = [spell(model_dir, "z" * 400), spell(model_dir, "y" * 400)]
        fatal = choice_seed(SEED, 1)

        async def play(talk: Talk) -> None:
            doomed = talk.sampling.n == 2 or talk.sampling.seed == fatal
            end = talk.start.relayed_tokens + 2 if doomed else None
            await goes_on(*ids, until=end, pause_s=0.01)(talk)

        starts = script(decodes, play)
        heard = await router.generate(ask("z" * 400, 2))
        assert isinstance(heard.error, WorkerLost)
        assert len(starts) == 4
        await router.until(lambda: not any(decode.running for decode in decodes))
        revenue = router.metric("tidemill_router_revenue_nano_total", model=MODEL, currency="USD")
        assert revenue == 0

    async def test_a_cancel_ends_all_lanes(
        self, router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
    ) -> None:
        ids = [spell(model_dir, letter * 400) for letter in "abc"]
        starts = script(decodes, goes_on(*ids, until=3), goes_on(*ids, pause_s=0.01))
        call = router.call(ask("z" * 400, 3))
        await router.until(lambda: len(starts) == 4)
        await asyncio.sleep(0.1)
        assert await router.cancel("r1")
        heard = await listen(call)
        assert heard.completed.finish_reason == CANCELLED
        ends = [each.choice_end for each in heard.messages if each.HasField("choice_end")]
        assert sorted((end.choice, end.finish_reason) for end in ends) == [
            (choice, CANCELLED) for choice in range(3)
        ]
        usage = heard.completed.usage
        assert usage.completion_tokens == sum(end.completion_tokens for end in ends) > 9
        assert usage.generated_tokens == usage.completion_tokens


async def test_a_lost_worker_leaves_the_others_streams_alone_and_its_own_go_on(
    router: RouterHarness, decodes: list[ScriptedWorker], model_dir: Path
) -> None:
    ids = spell(model_dir, "z" * 80)
    starts = script(decodes, goes_on(ids, pause_s=0.02))
    requests = [ask(ids) for _ in range(8)]
    for number, request in enumerate(requests):
        request.request_id = f"r{number}"
    calls = [router.call(request) for request in requests]
    await router.until(lambda: len(starts) == 8)
    await asyncio.sleep(0.3)
    struck = decodes[0].running
    await decodes[0].vanish()
    heard = await asyncio.gather(*(listen(call) for call in calls))
    for each in heard:
        whole(each, ids)
    assert sum(each.completed.receipt.attempts for each in heard) == 8 + struck
