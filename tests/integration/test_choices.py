"""Several completions of one prompt on real workers: one prefill, shared blocks, one Final."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.worker_harness import (
    Answer,
    Attempted,
    RouterSide,
    Tls,
    both_roles,
    check_whole,
    eventually,
    make_start,
    metric,
    prompt_of,
    router_of,
    settled,
    slow_down,
    split_roles,
    worker_at,
)
from tidemill.api.common.v1.kv_pb2 import KvSegment
from tidemill.api.decode.v1.decode_service_pb2 import DecodeResponse as Response
from tidemill.api.prefill.v1.prefill_service_pb2 import HandoverRef, ShmTarget
from tidemill.engine import Output
from tidemill.errors import FailedPrecondition, InvalidRequest
from tidemill.kv.transport import GrpcKvTransport
from tidemill.policy.seeds import choice_seed
from tidemill.worker.config import Role

SEED = 20_260_101
NUM_PROMPT_TOKENS = 150  # two whole blocks and a part of a third


def ask(n: int, request_id: str = "n", **fields: Any) -> Any:
    fields = {"temperature": 1.0, "seed": SEED, "max_tokens": 12, **fields}
    return make_start(prompt_of(NUM_PROMPT_TOKENS), request_id, n=n, **fields)


async def one_by_one(router: RouterSide, n: int, **fields: Any) -> list[list[int]]:
    """What single requests with the choices' seeds answer."""
    answers = [
        await router.ask(ask(1, f"s{index}", **{**fields, "seed": choice_seed(SEED, index)}))
        for index in range(n)
    ]
    return [answer.tokens for answer in answers]


def check(answer: Answer, n: int) -> None:
    """Every choice has ended, and the one Final counts all of them."""
    assert answer.error is None
    assert sorted(answer.ends) == list(range(n))
    assert len(answer.choices) == n
    assert answer.final.generated_tokens == sum(map(len, answer.choices))


async def test_in_place_choices_are_what_single_requests_with_their_seeds_answer(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files) as (worker, router):
        answer = await router.ask(ask(3))
        check(answer, 3)
        assert len({tuple(tokens) for tokens in answer.choices}) == 3
        assert answer.usage.prompt_tokens == answer.usage.computed_tokens == NUM_PROMPT_TOKENS
        assert metric(worker, "computed_tokens_total") == NUM_PROMPT_TOKENS
        assert metric(worker, "generated_tokens_total") == 36
        assert answer.choices == await one_by_one(router, 3)


async def test_handed_over_choices_are_what_single_requests_with_their_seeds_answer(
    model_dir: Path, tls_files: Tls
) -> None:
    async with split_roles(model_dir, tls_files) as (prefill, decode, router):
        answer = await router.ask(ask(3, prefill=prefill))
        check(answer, 3)
        assert metric(prefill, "computed_tokens_total") == NUM_PROMPT_TOKENS
        assert metric(decode, "computed_tokens_total") == 0
        assert answer.choices == await one_by_one(router, 3, prefill=prefill)


async def test_choices_share_the_blocks_of_their_prompt(model_dir: Path, tls_files: Tls) -> None:
    async with both_roles(model_dir, tls_files, num_blocks=24) as (worker, router):
        slow_down(worker, 0.01)
        attempted = await router.begin(ask(8, max_tokens=20))
        await attempted.until("chunk")
        # Two whole blocks of the prompt are shared; each choice has its own third.
        assert worker.worker.engine.pool.num_referenced <= 2 + 8
        check(await attempted.finish(), 8)


async def test_a_single_token_of_each_choice(model_dir: Path, tls_files: Tls) -> None:
    async with split_roles(model_dir, tls_files) as (prefill, _, router):
        places: list[dict[str, Any]] = [{}, {"prefill": prefill}]
        for place in places:
            answer = await router.ask(ask(4, f"one-{len(place)}", max_tokens=1, **place))
            check(answer, 4)
            assert [len(tokens) for tokens in answer.choices] == [1, 1, 1, 1]
            assert set(answer.ends.values()) == {"LENGTH"}


@pytest.mark.parametrize("place", ["in place", "handed over"])
async def test_a_choice_that_is_stopped_leaves_the_others_alone(
    model_dir: Path, tls_files: Tls, place: str
) -> None:
    async with split_roles(model_dir, tls_files) as (prefill, decode, router):
        where: dict[str, Any] = {"prefill": prefill} if place == "handed over" else {}
        whole = await one_by_one(router, 3, max_tokens=60, **where)
        slow_down(decode, 0.01)
        attempted = await router.begin(ask(3, max_tokens=60, **where))
        await attempted.until("chunk")
        await attempted.stop("STOP", 1, choice=1)
        answer = await attempted.finish()
        check(answer, 3)
        assert answer.ends == {0: "LENGTH", 1: "STOP", 2: "LENGTH"}
        assert len(answer.choices[1]) < 60
        assert answer.reason == "LENGTH"
        assert [answer.choices[0], answer.choices[2]] == [whole[0], whole[2]]


async def test_when_every_choice_is_stopped_the_attempt_is_over(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files) as (worker, router):
        slow_down(worker, 0.01)
        attempted = await router.begin(ask(2, max_tokens=200))
        await attempted.until("chunk")
        await attempted.stop("STOP", choice=0)
        await attempted.stop("STOP", choice=1)
        answer = await attempted.finish()
        check(answer, 2)
        assert (answer.ends, answer.reason) == ({0: "STOP", 1: "STOP"}, "STOP")


class HeldTransport:
    """The gRPC transport, which delivers nothing before `gate` opens."""

    def __init__(self, stub: Any, gate: asyncio.Event) -> None:
        self._inner = GrpcKvTransport(stub, max_message_bytes=65_536)
        self._gate = gate

    async def pull(
        self, handover: HandoverRef, *, timeout_s: float, shm: ShmTarget | None = None
    ) -> AsyncGenerator[Sequence[KvSegment], None]:
        await self._gate.wait()
        async for segments in self._inner.pull(handover, timeout_s=timeout_s, shm=shm):
            yield segments


async def test_choices_may_be_stopped_before_the_latents_have_landed(
    model_dir: Path, tls_files: Tls
) -> None:
    gate = asyncio.Event()

    def held(stub: Any) -> HeldTransport:
        return HeldTransport(stub, gate)

    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        worker_at(Role.DECODE, model_dir, tls_files, make_transport=held) as decode,
        router_of(decode, tls_files) as router,
    ):
        for name, stopped in (("all", [0, 1, 2]), ("some", [0, 2])):
            attempted = await router.begin(ask(3, name, max_tokens=6, prefill=prefill))
            await attempted.until("prefill_done")
            for choice in stopped:
                await attempted.stop("STOP", choice=choice)
            if name == "some":
                await asyncio.sleep(0.2)
                gate.set()
            answer = await attempted.finish()
            check(answer, 3)
            assert {choice: answer.ends[choice] for choice in stopped} == dict.fromkeys(
                stopped, "STOP"
            )
            lengths = [1 if choice in stopped else 6 for choice in range(3)]
            assert [len(tokens) for tokens in answer.choices] == lengths
        await settled(prefill, decode)


async def test_funds_are_shared_and_what_a_choice_leaves_goes_to_the_others(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files) as (_, router):
        whole = (await router.ask(ask(3, "free", max_tokens=30))).choices
        attempted = await router.begin(ask(3, max_tokens=30, funded_tokens=31))
        await eventually_said(attempted, 31)
        sizes = [len(tokens) for tokens in attempted.answer.choices]
        assert sizes == [11, 10, 10]
        await attempted.stop("STOP", choice=1)
        await attempted.fund(40)
        await eventually_said(attempted, 40)
        assert [len(tokens) for tokens in attempted.answer.choices] == [15, 10, 15]
        await attempted.fund(90)
        answer = await attempted.finish()
        check(answer, 3)
        assert answer.ends == {0: "LENGTH", 1: "STOP", 2: "LENGTH"}
        assert answer.choices == [whole[0], whole[1][:10], whole[2]]


async def eventually_said(attempted: Attempted, num_tokens: int) -> None:
    while sum(map(len, attempted.answer.choices)) < num_tokens:
        assert await attempted.next() is not None


async def test_choices_without_more_funds_end_together(model_dir: Path, tls_files: Tls) -> None:
    async with both_roles(model_dir, tls_files, fund_wait_s=0.2) as (_, router):
        answer = await router.ask(ask(3, max_tokens=30, funded_tokens=14))
        check(answer, 3)
        assert [len(tokens) for tokens in answer.choices] == [5, 5, 4]
        assert (set(answer.ends.values()), answer.reason) == ({"BUDGET"}, "BUDGET")


async def test_a_cancel_ends_every_choice_and_frees_all(model_dir: Path, tls_files: Tls) -> None:
    async with both_roles(model_dir, tls_files) as (worker, router):
        slow_down(worker, 0.02)
        for event in ("chunk", None):  # while they decode, and while the prompt is computed
            attempted = await router.begin(ask(3, f"c{event}", max_tokens=300))
            if event:
                await attempted.until(event)
            await attempted.stop("CANCELLED")
            answer = await attempted.finish()
            assert answer.reason == "CANCELLED"
            if event:
                check(answer, 3)
            await settled(worker)


async def test_a_router_that_vanishes_leaves_no_choice_behind(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files) as (worker, router):
        slow_down(worker, 0.01)
        attempted = await router.begin(ask(4, max_tokens=500))
        await attempted.until("chunk")
        attempted.call.cancel()
        await eventually(lambda: worker.worker.idle)
        check_whole(worker.worker)


async def test_choices_that_outgrow_the_pool_are_swapped_and_answer_the_same(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files) as (_, router):
        wanted = (await router.ask(ask(3, max_tokens=90))).choices
    # Two shared blocks and twice two of each choice's own would be needed at once.
    async with both_roles(model_dir, tls_files, num_blocks=6) as (worker, router):
        engine = worker.worker.engine
        step, swapped = engine.step, set[int]()

        def watched() -> list[Output]:
            outputs = step()
            swapped.add(engine.num_swapped)
            return outputs

        engine.step = watched  # type: ignore[method-assign]
        assert (await router.ask(ask(3, max_tokens=90))).choices == wanted
        assert max(swapped) > 0


async def test_more_than_the_memory_can_hold_is_refused_by_name(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files, num_blocks=4) as (_, router):
        refused = await router.ask(ask(16, max_tokens=100))
        assert isinstance(refused.error, FailedPrecondition)
        assert refused.error.reason == "KV_POOL_TOO_SMALL"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"funded_tokens": 2}, "funded_tokens"),
        ({"relayed_tokens": 5}, "relayed_tokens"),
    ],
)
async def test_what_cannot_be_said_of_several_choices_is_refused(
    model_dir: Path, tls_files: Tls, fields: dict[str, Any], field: str
) -> None:
    async with both_roles(model_dir, tls_files) as (_, router):
        refused = await router.ask(ask(3, **fields))
        assert isinstance(refused.error, InvalidRequest)
        assert refused.error.violations[0][0] == field


async def test_a_stop_of_a_choice_that_there_is_not_ends_the_attempt(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files) as (worker, router):
        slow_down(worker, 0.01)
        attempted = await router.begin(ask(2, max_tokens=200))
        await attempted.until("chunk")
        await attempted.stop("STOP", choice=2)
        answer = await attempted.finish()
        assert answer.reason == "SERVER_FAULT"
        assert isinstance(answer.error, InvalidRequest)


async def test_log_probabilities_come_with_the_tokens_of_each_choice(
    model_dir: Path, tls_files: Tls
) -> None:
    async with split_roles(model_dir, tls_files) as (prefill, _, router):
        places: list[dict[str, Any]] = [{}, {"prefill": prefill}]
        for place in places:
            fields = {"max_tokens": 4, "logprobs": 2, "prompt_logprobs": 1, **place}
            start = ask(2, f"l{len(place)}", **fields)
            call = (await router.begin(start)).call
            told: dict[int, list[float]] = {0: [], 1: []}
            while isinstance(response := await call.read(), Response):
                if response.HasField("prefill_done"):
                    done = response.prefill_done
                    assert len(done.prompt_logprobs) == NUM_PROMPT_TOKENS - 1
                    assert len(done.first_token_ids) == 2
                    for choice, first in enumerate(done.first_logprobs):
                        told[choice].append(first.logprob)
                elif response.HasField("chunk"):
                    chunk = response.chunk
                    assert len(chunk.logprobs) == len(chunk.token_ids)
                    assert all(len(each.top_token_ids) == 2 for each in chunk.logprobs)
                    told[chunk.choice] += [each.logprob for each in chunk.logprobs]
                elif response.HasField("final"):
                    await call.done_writing()
            assert [len(found) for found in told.values()] == [4, 4]
            assert all(logprob < 0 for found in told.values() for logprob in found)
