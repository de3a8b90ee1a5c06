"""An attempt's life on a decode worker: funds, stops, Finals, fences, broken streams."""

import asyncio
import random
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.worker_harness import (
    Answer,
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
from tidemill.api.common.v1.lifecycle_pb2 import AttemptId, FinishReason
from tidemill.api.common.v1.usage_pb2 import PREFILL_SITE_DECODE_WORKER
from tidemill.api.decode.v1 import decode_service_pb2 as pb
from tidemill.errors import (
    AlreadyExists,
    DecodeFull,
    FailedPrecondition,
    Internal,
    InvalidRequest,
    NotFound,
    PrefillFull,
    TidemillError,
)
from tidemill.rpc.status import from_rpc_error
from tidemill.worker.config import HandoverConfig, Role
from tidemill.worker.process import RunningWorker


async def error_of(call: Any) -> TidemillError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


def id_of(request_id: str = "r1", attempt: int = 1, fence: int = 1) -> AttemptId:
    return AttemptId(request_id=request_id, attempt=attempt, fence=fence)


async def test_one_worker_prefills_in_place_and_says_so(model_dir: Path, tls_files: Tls) -> None:
    async with both_roles(model_dir, tls_files) as (worker, router):
        first = await router.ask(make_start(prompt_of(200), "a"))
        assert first.events[0] == "prefill_done"
        assert first.usage.prefill_site == PREFILL_SITE_DECODE_WORKER
        assert first.usage.computed_tokens == 200
        assert first.final.prompt == first.usage
        assert first.final.generated_tokens == len(first.tokens) == 8
        assert first.final.busy_seconds > 0
        again = await router.ask(make_start(prompt_of(200), "b", prefill=worker))
        assert again.usage.reused_device_tokens == 192
        assert again.usage.prefill_site == PREFILL_SITE_DECODE_WORKER
        assert again.tokens == first.tokens


async def test_a_stop_token_ends_the_attempt(model_dir: Path, tls_files: Tls) -> None:
    async with split_roles(model_dir, tls_files) as (prefill, _, router):
        tokens = (await router.ask(make_start(prompt_of(100), "a", prefill=prefill))).tokens
        last = next(t for i, t in enumerate(tokens) if i and t not in tokens[:i])
        answer = await router.ask(
            make_start(prompt_of(100), "b", prefill=prefill, stop_token_ids=[last])
        )
        assert answer.tokens == tokens[: tokens.index(last) + 1]
        assert answer.reason == "STOP"
        first = await router.ask(
            make_start(prompt_of(100), "c", prefill=prefill, stop_token_ids=[tokens[0]])
        )
        assert (first.tokens, first.reason) == (tokens[:1], "STOP")
        one = await router.ask(make_start(prompt_of(100), "d", prefill=prefill, max_tokens=1))
        assert (one.tokens, one.reason) == (tokens[:1], "LENGTH")


async def test_generation_pauses_at_its_funds_and_goes_on_when_funded(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files, fund_wait_s=20.0) as (worker, router):
        whole = await router.ask(make_start(prompt_of(50), "a", max_tokens=12))
        attempt = await router.begin(make_start(prompt_of(50), "b", max_tokens=12, funded_tokens=5))
        while len(attempt.answer.tokens) < 5:
            await attempt.next()
        await asyncio.sleep(0.2)
        assert worker.worker.engine.load_snapshot().running == 0
        await attempt.fund(9)
        while len(attempt.answer.tokens) < 9:
            await attempt.next()
        await attempt.fund(12)
        answer = await attempt.finish()
        assert answer.tokens == whole.tokens
        assert answer.reason == "LENGTH"


async def test_funds_that_come_during_prefill_count(model_dir: Path, tls_files: Tls) -> None:
    async with split_roles(model_dir, tls_files, fund_wait_s=20.0) as (prefill, decode, router):
        slow_down(prefill, 0.05)
        start = make_start(prompt_of(300), prefill=prefill, max_tokens=12, funded_tokens=3)
        attempt = await router.begin(start)
        await eventually(lambda: decode.worker.num_waiting == 1)
        await attempt.fund(12)
        answer = await attempt.finish()
        assert (len(answer.tokens), answer.reason) == (12, "LENGTH")


@pytest.mark.parametrize("in_place", [True, False])
async def test_a_stop_right_behind_start_prefills_nothing(
    model_dir: Path, tls_files: Tls, in_place: bool
) -> None:
    async with split_roles(model_dir, tls_files) as (prefill, decode, router):
        start = make_start(prompt_of(900), prefill=None if in_place else prefill)
        slow_down(prefill, 0.05)
        slow_down(decode, 0.05)
        attempt = await router.begin(start)
        await attempt.stop()
        answer = await attempt.finish()
        assert (answer.reason, answer.events) == ("CANCELLED", ["final"])
        await settled(prefill, decode)
        assert metric(prefill, "stopped_prefill_tokens_total") < 200


async def test_funds_that_do_not_come_end_the_attempt(model_dir: Path, tls_files: Tls) -> None:
    async with split_roles(model_dir, tls_files, fund_wait_s=0.2) as (prefill, _, router):
        start = make_start(prompt_of(50), prefill=prefill, max_tokens=12, funded_tokens=5)
        answer = await router.ask(start)
        assert (len(answer.tokens), answer.reason) == (5, "BUDGET")
        assert answer.final.generated_tokens == 5


async def test_a_stop_that_crosses_final_breaks_nothing(model_dir: Path, tls_files: Tls) -> None:
    async with both_roles(model_dir, tls_files) as (_, router):
        attempted = await router.begin(make_start(prompt_of(20), max_tokens=1))
        response: Any = await attempted.call.read()
        while not response.HasField("final"):
            response = await attempted.call.read()
        await asyncio.sleep(0.2)  # a stream that the worker closed would be known closed by now
        await attempted.stop()
        await attempted.call.done_writing()
        assert await attempted.call.read() is grpc.aio.EOF
        assert await attempted.call.code() is grpc.StatusCode.OK


async def test_stop_during_decode_gives_one_final_with_all_that_was_generated(
    model_dir: Path, tls_files: Tls
) -> None:
    async with split_roles(model_dir, tls_files) as (prefill, decode, router):
        slow_down(decode, 0.01)
        attempt = await router.begin(make_start(prompt_of(50), prefill=prefill, max_tokens=500))
        while len(attempt.answer.tokens) < 5:
            await attempt.next()
        await attempt.stop("CANCELLED", keep_tokens=3)
        await attempt.stop("DEADLINE")
        answer = await attempt.finish()
        assert answer.error is None
        assert answer.reason == "CANCELLED"
        assert 5 <= answer.final.generated_tokens == len(answer.tokens) < 500


async def test_stop_during_prefill_elsewhere_reaches_the_prefill_worker(
    model_dir: Path, tls_files: Tls
) -> None:
    async with split_roles(model_dir, tls_files) as (prefill, decode, router):
        slow_down(prefill, 0.05)
        attempt = await router.begin(make_start(prompt_of(900), prefill=prefill))
        await eventually(lambda: 0 < prefill.worker.backlog.num_tokens < 900)
        await attempt.stop()
        answer = await attempt.finish()
        assert answer.events == ["final"]
        assert (answer.reason, answer.final.generated_tokens) == ("CANCELLED", 0)
        assert not answer.final.HasField("prompt")
        await settled(prefill, decode)
        assert metric(prefill, "stopped_prefill_tokens_total") < 900


async def test_stop_during_prefill_in_place(model_dir: Path, tls_files: Tls) -> None:
    async with both_roles(model_dir, tls_files) as (worker, router):
        slow_down(worker, 0.05)
        attempt = await router.begin(make_start(prompt_of(900)))
        await eventually(lambda: 0 < worker.worker.backlog.num_tokens < 900)
        await attempt.stop("DEADLINE")
        answer = await attempt.finish()
        assert answer.events == ["final"]
        assert (answer.reason, answer.final.generated_tokens) == ("DEADLINE", 0)


@pytest.mark.parametrize("in_place", [True, False])
async def test_a_broken_stream_stops_the_attempt_and_keeps_its_final(
    model_dir: Path, tls_files: Tls, in_place: bool
) -> None:
    async with split_roles(model_dir, tls_files) as (prefill, decode, router):
        slow_down(decode, 0.01)
        start = make_start(prompt_of(50), prefill=None if in_place else prefill, max_tokens=500)
        attempt = await router.begin(start)
        while len(attempt.answer.tokens) < 5:
            await attempt.next()
        attempt.call.cancel()
        await settled(prefill, decode)
        final = (await router.stub.GetFinal(pb.GetFinalRequest(id=id_of()))).final
        assert final.reason == FinishReason.FINISH_REASON_SERVER_FAULT
        assert 5 <= final.generated_tokens < 500
        assert final.prompt.prompt_tokens == 50


async def test_a_deadline_ends_the_attempt_with_that_reason(
    model_dir: Path, tls_files: Tls
) -> None:
    async with split_roles(model_dir, tls_files) as (prefill, decode, router):
        slow_down(decode, 0.01)
        attempt = await router.begin(
            make_start(prompt_of(50), prefill=prefill, max_tokens=900), timeout=1.0
        )
        answer = await attempt.finish()
        assert answer.error is not None
        assert answer.error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await settled(prefill, decode)
        final = (await router.stub.GetFinal(pb.GetFinalRequest(id=id_of()))).final
        assert final.reason == FinishReason.FINISH_REASON_DEADLINE


async def test_finals_are_kept_until_acknowledged(model_dir: Path, tls_files: Tls) -> None:
    async with both_roles(model_dir, tls_files) as (worker, router):
        slow_down(worker, 0.01)
        stub, ref = router.stub, id_of()
        assert isinstance(await error_of(stub.GetFinal(pb.GetFinalRequest(id=ref))), NotFound)
        attempt = await router.begin(make_start(prompt_of(50)))
        await attempt.until("prefill_done")
        running = await error_of(stub.GetFinal(pb.GetFinalRequest(id=ref)))
        assert running.reason == "ATTEMPT_RUNNING"
        listed = await stub.ListFinals(pb.ListFinalsRequest(request_id=ref.request_id))
        assert (list(listed.finals), listed.running) == ([], True)
        answer = await attempt.finish()
        assert (await stub.GetFinal(pb.GetFinalRequest(id=ref))).final == answer.final
        listed = await stub.ListFinals(pb.ListFinalsRequest(request_id=ref.request_id))
        assert (list(listed.finals), listed.running) == ([answer.final], False)
        assert metric(worker, "finals_kept") == 1
        assert (await stub.AckFinal(pb.AckFinalRequest(id=ref))).held
        assert not (await stub.AckFinal(pb.AckFinalRequest(id=ref))).held
        assert isinstance(await error_of(stub.GetFinal(pb.GetFinalRequest(id=ref))), NotFound)
        listed = await stub.ListFinals(pb.ListFinalsRequest(request_id=ref.request_id))
        assert not listed.finals


async def test_finals_nobody_asks_for_are_forgotten_after_two_leases(
    model_dir: Path, tls_files: Tls
) -> None:
    short = HandoverConfig(lease_s=0.2)
    async with both_roles(model_dir, tls_files, handover=short) as (worker, router):
        await router.ask(make_start(prompt_of(50)))
        assert worker.attempts.num_finals == 1
        await eventually(lambda: worker.attempts.num_finals == 0)


async def test_fences_and_attempts_are_unique(model_dir: Path, tls_files: Tls) -> None:
    async with both_roles(model_dir, tls_files) as (worker, router):
        slow_down(worker, 0.01)
        attempt = await router.begin(make_start(prompt_of(50), fence=2, max_tokens=300))
        await attempt.until("prefill_done")
        stale = await router.ask(make_start(prompt_of(50), fence=1, attempt=2))
        assert isinstance(stale.error, FailedPrecondition)
        assert stale.error.reason == "STALE_FENCE"
        twice = await router.ask(make_start(prompt_of(50), fence=2))
        assert isinstance(twice.error, AlreadyExists)
        taken_over = await router.ask(make_start(prompt_of(50), fence=3))
        assert taken_over.error is None
        superseded = await attempt.finish()
        assert superseded.reason == "SERVER_FAULT"
        finished = await router.ask(make_start(prompt_of(50), fence=3))
        assert isinstance(finished.error, AlreadyExists)
        await router.stub.AckFinal(pb.AckFinalRequest(id=id_of(fence=3)))
        stale = await router.ask(make_start(prompt_of(50), fence=2, attempt=3))
        assert stale.error is not None
        assert stale.error.reason == "STALE_FENCE"


async def test_a_full_decode_worker_refuses_and_keeps_what_it_has(
    model_dir: Path, tls_files: Tls
) -> None:
    async with split_roles(model_dir, tls_files, num_blocks=8) as (prefill, decode, router):
        slow_down(decode, 0.01)
        attempts = [  # together as long as the pool and the swap space
            await router.begin(
                make_start(prompt_of(50, seed=seed), f"r{seed}", prefill=prefill, max_tokens=460)
            )
            for seed in (1, 3)
        ]
        for attempt in attempts:
            await attempt.until("prefill_done")
        refused = await router.ask(
            make_start(prompt_of(50, seed=2), "r2", prefill=prefill, max_tokens=100)
        )
        assert isinstance(refused.error, DecodeFull)
        assert refused.error.retry_after_s is not None
        assert refused.events == []
        assert metric(decode, "refusals_total", reason="DECODE_FULL") == 1
        for attempt in attempts:
            await attempt.stop()
            await attempt.finish()
        retried = await router.ask(
            make_start(prompt_of(50, seed=2), "r2", prefill=prefill, max_tokens=100)
        )
        assert retried.error is None


async def test_attempts_that_outgrow_the_pool_take_turns_and_change_no_token(
    model_dir: Path, tls_files: Tls
) -> None:
    starts = [make_start(prompt_of(50, seed=seed), f"r{seed}", max_tokens=300) for seed in (1, 2)]
    async with both_roles(model_dir, tls_files) as (_, router):
        alone = [(await router.ask(start)).tokens for start in starts]
    async with both_roles(model_dir, tls_files, num_blocks=8) as (worker, router):
        slow_down(worker, 0.002)
        attempts = [await router.begin(start) for start in starts]
        await eventually(lambda: worker.worker.load().swapped == 1, 60.0)
        refused = await router.ask(make_start(prompt_of(3), "r3", max_tokens=1))
        assert isinstance(refused.error, DecodeFull)
        answers = [await attempt.finish() for attempt in attempts]
        assert [answer.tokens for answer in answers] == alone
        assert [answer.final.generated_tokens for answer in answers] == [300, 300]
        assert worker.worker.load().swapped == 0
        await settled(worker)


async def test_a_stopped_attempt_frees_what_it_has_swapped_out(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files, num_blocks=8) as (worker, router):
        slow_down(worker, 0.002)
        starts = [make_start(prompt_of(50, seed=n), f"r{n}", max_tokens=300) for n in (1, 2)]
        attempts = [await router.begin(start) for start in starts]
        await eventually(lambda: worker.worker.load().swapped == 1, 60.0)
        await attempts[1].stop()
        assert (await attempts[1].finish()).reason == "CANCELLED"
        assert len((await attempts[0].finish()).tokens) == 300
        await settled(worker)
        assert worker.worker.readiness() is None


async def test_a_refusal_by_the_prefill_worker_may_be_tried_again_as_the_same_attempt(
    model_dir: Path, tls_files: Tls
) -> None:
    async with split_roles(model_dir, tls_files) as (prefill, decode, router):
        prefill.worker.draining = True
        refused = await router.ask(make_start(prompt_of(50), prefill=prefill))
        assert isinstance(refused.error, PrefillFull)
        assert refused.finals == []
        check_whole(decode.worker)
        prefill.worker.draining = False
        assert (await router.ask(make_start(prompt_of(50), prefill=prefill))).error is None


async def test_more_attempts_than_the_bound_are_refused(model_dir: Path, tls_files: Tls) -> None:
    async with both_roles(model_dir, tls_files, max_attempts=1) as (worker, router):
        slow_down(worker, 0.01)
        attempt = await router.begin(make_start(prompt_of(50), max_tokens=200))
        await attempt.until("prefill_done")
        refused = await router.ask(make_start(prompt_of(50), "r2"))
        assert isinstance(refused.error, DecodeFull)
        await attempt.stop()
        await attempt.finish()


async def test_bad_starts_are_refused_by_field(model_dir: Path, tls_files: Tls) -> None:
    async with both_roles(model_dir, tls_files) as (_, router):
        bad = {
            "task.token_ids": make_start([1, 2, 512]),
            "funded_tokens": make_start([1, 2, 3, 4], relayed_tokens=3, funded_tokens=3),
            "task.sampling.max_tokens": make_start([1, 2, 3], relayed_tokens=2, max_tokens=2),
            "relayed_tokens": make_start([1, 2], relayed_tokens=2),
        }
        for field, start in bad.items():
            error = (await router.ask(start)).error
            assert isinstance(error, InvalidRequest)
            assert error.violations[0][0] == field
        attempt = router.stub.Decode()
        await attempt.write(pb.DecodeRequest(fund=pb.Fund(total_tokens=3)))
        assert isinstance(await error_of(attempt.read()), InvalidRequest)


async def test_a_call_that_is_closed_before_start_has_begun_nothing(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files) as (worker, router):
        call = router.stub.Decode()
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        assert worker.attempts.num_running == 0


async def test_a_second_start_ends_the_attempt_with_a_final(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files) as (worker, router):
        slow_down(worker, 0.01)
        start = make_start(prompt_of(50), max_tokens=300)
        attempt = await router.begin(start)
        await attempt.until("prefill_done")
        await attempt.send(start=start)
        answer = await attempt.finish()
        assert answer.reason == "SERVER_FAULT"
        assert isinstance(answer.error, InvalidRequest)


async def test_a_later_attempt_continues_where_the_first_was_cut(
    model_dir: Path, tls_files: Tls
) -> None:
    async with split_roles(model_dir, tls_files) as (prefill, _, router):
        prompt = prompt_of(90)
        options: dict[str, Any] = {"prefill": prefill, "max_tokens": 16}
        for seed, temperature in ((0, 0.0), (11, 0.9)):
            sampling = options | {"seed": seed, "temperature": temperature}
            whole = await router.ask(make_start(prompt, f"whole{seed}", **sampling))
            rest = await router.ask(
                make_start(
                    prompt + whole.tokens[:6],
                    f"rest{seed}",
                    attempt=2,
                    relayed_tokens=6,
                    funded_tokens=16,
                    **sampling,
                )
            )
            assert rest.tokens == whole.tokens[6:]
            assert rest.reason == "LENGTH"


@pytest.mark.parametrize("max_tokens", [40, 79, 80, 93])
async def test_the_next_turn_reuses_what_was_generated(
    model_dir: Path, tls_files: Tls, max_tokens: int
) -> None:
    async with (
        both_roles(model_dir, tls_files) as (_, router),
        both_roles(model_dir, tls_files, worker_id="fresh") as (_, elsewhere),
    ):
        first = await router.ask(make_start(prompt_of(50), "a", max_tokens=max_tokens))
        turn = prompt_of(50) + first.tokens + prompt_of(30, seed=9)
        second = await router.ask(make_start(turn, "b"))
        # The last token generated has no latent yet.
        assert second.usage.reused_device_tokens == (50 + max_tokens - 1) // 64 * 64
        assert second.tokens == (await elsewhere.ask(make_start(turn, "b"))).tokens


async def test_what_a_stopped_attempt_generated_is_reused_too(
    model_dir: Path, tls_files: Tls
) -> None:
    async with split_roles(model_dir, tls_files) as (prefill, decode, router):
        slow_down(decode, 0.002)
        start = make_start(prompt_of(60), "a", prefill=prefill, max_tokens=300)
        attempt = await router.begin(start)
        while len(attempt.answer.tokens) < 70:
            await attempt.next()
        await attempt.stop()
        answer = await attempt.finish()
        turn = prompt_of(60) + answer.tokens + [7]
        worker = decode.worker
        prompt = await worker.reuse.identify(make_start(turn).task)
        assert worker.engine.pool.match(prompt.hashes) == (60 + len(answer.tokens) - 1) // 64


async def test_a_failed_engine_is_told_to_all_and_to_health(
    model_dir: Path, tls_files: Tls
) -> None:
    async with (
        worker_at(Role.BOTH, model_dir, tls_files) as worker,
        router_of(worker, tls_files) as router,
    ):
        slow_down(worker, 0.01)
        attempts = [
            await router.begin(make_start(prompt_of(50), f"r{i}", max_tokens=300)) for i in range(3)
        ]
        for attempt in attempts:
            await attempt.until("prefill_done")
        assert worker.worker.readiness() is None

        def fail() -> list[Any]:
            raise RuntimeError("out of luck")

        worker.worker.engine.step = fail  # type: ignore[method-assign]
        for attempt in attempts:
            answer = await attempt.finish()
            assert answer.reason == "SERVER_FAULT"
            assert isinstance(answer.error, Internal)
            assert answer.error.error_id
            assert answer.final.generated_tokens == len(answer.tokens)
        assert "engine failed" in (worker.worker.readiness() or "")
        late = await router.ask(make_start(prompt_of(50), "late"))
        assert isinstance(late.error, Internal)
        check_whole(worker.worker)


async def test_tokens_produced_while_the_reader_is_slow_arrive_together(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files, num_blocks=20) as (worker, router):
        # With alternatives the tokens outgrow what the connection holds for one that does not read.
        attempt = await router.begin(make_start(prompt_of(50), max_tokens=900, logprobs=20))
        await eventually(lambda: worker.worker.thread.num_sequences == 0, 60.0)
        answer = await attempt.finish()
        assert len(answer.tokens) == 900
        assert len(answer.events) < 900


async def run_one(
    router: RouterSide, prefill: RunningWorker, index: int, rng: random.Random
) -> Answer:
    """A request of random size; every third is stopped, every sixth vanishes, at some moment."""
    start = make_start(
        prompt_of(rng.randrange(1, 400), seed=rng.randrange(3)),
        f"mixed{index}",
        prefill=None if index % 4 == 0 else prefill,
        max_tokens=rng.randrange(1, 40),
    )
    delay = rng.uniform(0, 1.0)
    attempt = await router.begin(start)
    if index % 3:
        return await attempt.finish()
    reading = asyncio.create_task(attempt.finish())
    await asyncio.sleep(delay)
    if index % 6:
        await attempt.stop()
        return await reading
    reading.cancel()
    attempt.call.cancel()
    return attempt.answer


async def test_32_streams_with_cancels_leave_whole_pools_and_one_final_each(
    model_dir: Path, tls_files: Tls
) -> None:
    rng = random.Random(5)
    settings = {"num_blocks": 300}
    async with split_roles(model_dir, tls_files, **settings) as (prefill, decode, router):
        answers = await asyncio.gather(
            *(run_one(router, prefill, index, random.Random(rng.random())) for index in range(32))
        )
        for index, answer in enumerate(answers):
            if index % 6 == 0:
                continue
            assert answer.error is None
            assert answer.final.generated_tokens == len(answer.tokens)
            assert answer.events.count("final") == 1
            assert answer.events[-1] == "final"
        await settled(prefill, decode)
        assert metric(prefill, "open_handovers") == 0
        kept = await asyncio.gather(
            *(
                router.stub.GetFinal(pb.GetFinalRequest(id=id_of(f"mixed{index}")))
                for index in range(0, 32, 6)
                if answers[index].done is not None
            )
        )
        assert all(each.final.generated_tokens > 0 for each in kept)
