"""Several completions of one prompt as a client sees and pays for them; workers are scripted."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.router_harness import MODEL, Heard, RouterHarness, listen, spell
from tests.scripted_worker import Script, ScriptedWorker, Talk, likelihood
from tidemill.api.common.v1 import lifecycle_pb2, sampling_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2

pytestmark = pytest.mark.redis

STOP = lifecycle_pb2.FINISH_REASON_STOP
LENGTH = lifecycle_pb2.FINISH_REASON_LENGTH
CANCELLED = lifecycle_pb2.FINISH_REASON_CANCELLED


def ask(n: int, request_id: str = "r1", **fields: Any) -> router_pb2.GenerateRequest:
    sampling = sampling_pb2.Sampling(n=n, **fields.pop("sampling", {}))
    return router_pb2.GenerateRequest(
        request_id=request_id, model=MODEL, prompt="x" * 100, sampling=sampling, **fields
    )


def answers(*texts: list[int], pause_s: float = 0.0) -> Script:
    """One choice for each text, token by token in turns, until each is stopped or done."""

    async def play(talk: Talk) -> None:
        await talk.prefill_done(*(text[0] for text in texts))
        left = {choice: list(text[1:]) for choice, text in enumerate(texts)}
        reason = "LENGTH"
        while left:
            await asyncio.sleep(pause_s)
            for choice, tokens in list(left.items()):
                stops = [
                    each.result() for each in (talk.stopped, talk.stops[choice]) if each.done()
                ]
                if tokens and not stops:
                    await talk.tokens([tokens.pop(0)], choice=choice)
                    continue
                number = stops[0].reason if stops else LENGTH
                reason = lifecycle_pb2.FinishReason.Name(number).removeprefix("FINISH_REASON_")
                del left[choice]
                await talk.choice_ended(choice, reason)
        await talk.final(reason)

    return play


def of_choice(heard: Heard, choice: int) -> tuple[str, list[int]]:
    chunks = [chunk for chunk in heard.chunks if chunk.choice == choice]
    position = 0
    for chunk in chunks:
        assert chunk.first_index == position
        position += len(chunk.token_ids)
    return (
        "".join(chunk.text for chunk in chunks),
        [token_id for chunk in chunks for token_id in chunk.token_ids],
    )


def ends(heard: Heard) -> dict[int, tuple[int, int]]:
    found = [each.choice_end for each in heard.messages if each.HasField("choice_end")]
    assert len({end.choice for end in found}) == len(found), "a choice ended twice"
    return {end.choice: (end.finish_reason, end.completion_tokens) for end in found}


async def test_each_choice_has_its_own_text_and_the_prompt_is_billed_once(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    texts = ["hello there", "good-bye, and thanks", "水车"]
    ids = [spell(model_dir, text) for text in texts]
    decode.scripts = [answers(*ids)]
    heard = await router.generate(ask(3))
    for choice in range(3):
        assert of_choice(heard, choice) == (texts[choice], ids[choice])
    assert ends(heard) == {choice: (LENGTH, len(ids[choice])) for choice in range(3)}
    assert [chunk.sequence for chunk in heard.chunks] == list(range(len(heard.chunks)))
    usage = heard.completed.usage
    assert (usage.prompt.prompt_tokens, usage.cache_miss_tokens) == (100, 100)
    assert usage.completion_tokens == usage.generated_tokens == sum(map(len, ids))
    assert heard.completed.finish_reason == LENGTH
    assert len(decode.starts) == 1
    assert decode.starts[0].task.sampling.n == 3


async def test_usage_so_far_counts_all_choices_and_never_falls(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    ids = spell(model_dir, "abcdefghijklmnopqrstuvwxyz")
    decode.scripts = [answers(ids, ids, ids, ids)]
    heard = await router.generate(ask(4))
    counts = [chunk.usage.completion_tokens for chunk in heard.chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 4 * 26


async def test_a_stop_string_ends_its_choice_alone(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    ids = [spell(model_dir, text) for text in ("one two STOP", "STOP at once", "goes on and on")]
    decode.scripts = [answers(*ids, pause_s=0.01)]
    heard = await router.generate(ask(3, stop=["STOP"]))
    assert of_choice(heard, 0) == ("one two ", ids[0])
    assert of_choice(heard, 1) == ("", ids[1][:4])
    assert of_choice(heard, 2) == ("goes on and on", ids[2])
    assert ends(heard) == {0: (STOP, 12), 1: (STOP, 4), 2: (LENGTH, 14)}
    assert [(stop.choice, stop.keep_tokens) for stop in decode.stops] == [(1, 4), (0, 12)]
    usage = heard.completed.usage
    assert usage.completion_tokens == 12 + 4 + 14
    assert usage.generated_tokens == usage.completion_tokens + usage.unbilled.overrun_tokens
    assert heard.completed.finish_reason == LENGTH


async def test_tokens_that_follow_a_stop_string_are_overrun_of_that_choice(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    late, other = spell(model_dir, "ab."), spell(model_dir, "xyz")

    async def play(talk: Talk) -> None:
        await talk.prefill_done(late[0], other[0])
        await talk.tokens(late[1:])
        await talk.stops[0]
        await talk.tokens(late)
        await talk.choice_ended(0, "STOP")
        await talk.tokens(other[1:], choice=1)
        await talk.choice_ended(1, "LENGTH")
        await talk.final("LENGTH")

    decode.scripts = [play]
    heard = await router.generate(ask(2, stop=["."]))
    assert ends(heard) == {0: (STOP, 3), 1: (LENGTH, 3)}
    usage = heard.completed.usage
    assert (usage.completion_tokens, usage.unbilled.overrun_tokens) == (6, 3)


async def test_when_all_choices_came_to_a_stop_string_the_request_ends_though_no_final_comes(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    ids = spell(model_dir, "a.")

    async def play(talk: Talk) -> None:
        await talk.prefill_done(ids[0], ids[0])
        await talk.tokens(ids[1:])
        await talk.tokens(ids[1:], choice=1)
        await asyncio.sleep(60)

    decode.scripts = [play]
    heard = await router.generate(ask(2, stop=["."]))
    assert ends(heard) == {0: (STOP, 2), 1: (STOP, 2)}
    assert heard.completed.finish_reason == STOP
    assert heard.completed.usage.completion_tokens == 4


async def test_a_cancel_ends_all_choices_with_what_they_have(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    short, long = spell(model_dir, "ab"), spell(model_dir, "z" * 500)
    decode.scripts = [answers(short, long, long, pause_s=0.005)]
    call = router.call(ask(3, sampling={"max_tokens": 600}))
    read = [await call.read() for _ in range(12)]
    assert await router.cancel("r1")
    heard = await listen(call)
    heard.messages[:0] = read
    reasons = {choice: reason for choice, (reason, _) in ends(heard).items()}
    assert reasons == {0: LENGTH, 1: CANCELLED, 2: CANCELLED}
    assert heard.completed.finish_reason == CANCELLED
    usage = heard.completed.usage
    assert 2 < usage.completion_tokens == usage.generated_tokens < 1000
    assert usage.unbilled.overrun_tokens == 0


async def test_each_choice_has_its_own_max_tokens(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    ids = spell(model_dir, "abcdef")
    decode.scripts = [answers(ids[:2], ids)]  # a worker that goes too far with one
    heard = await router.generate(ask(2, sampling={"max_tokens": 4}))
    assert ends(heard) == {0: (LENGTH, 2), 1: (LENGTH, 4)}
    usage = heard.completed.usage
    assert (usage.completion_tokens, usage.unbilled.overrun_tokens) == (6, 2)


async def test_reasoning_is_split_and_counted_for_each_choice(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    ids = [spell(model_dir, text) for text in ("<think>a</think>b", "plain", "<think>cd</think>e")]
    decode.scripts = [answers(*ids)]
    heard = await router.generate(ask(3))
    reasons = ["", "", ""]
    for chunk in heard.chunks:
        reasons[chunk.choice] += chunk.reasoning_text
    assert reasons == ["a", "", "cd"]
    assert [of_choice(heard, choice)[0] for choice in range(3)] == ["b", "plain", "e"]
    assert heard.completed.usage.reasoning_tokens == 3 + 0 + 4


async def test_log_probabilities_stay_with_their_choice(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    ids = [spell(model_dir, "abcdefghijklm"), spell(model_dir, "nopqrstuvwxyz")]
    decode.scripts = [answers(*ids)]
    heard = await router.generate(ask(2, sampling={"logprobs": 1}))
    for chunk in heard.chunks:
        assert list(chunk.logprobs) == [likelihood(each, 1) for each in chunk.token_ids]
    assert [of_choice(heard, choice)[1] for choice in range(2)] == ids


async def test_a_worker_that_forgets_a_choice_ends_the_request(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    ids = spell(model_dir, "ab")

    async def play(talk: Talk) -> None:
        await talk.prefill_done(ids[0], ids[0])
        await talk.stopped
        await talk.final("SERVER_FAULT")

    decode.scripts = [play]
    heard = await router.generate(ask(3))
    assert heard.error is not None
    assert heard.error.reason == "WORKER_FAULT"
    assert router.metric("tidemill_router_revenue_nano_total", model=MODEL, currency="USD") == 0
