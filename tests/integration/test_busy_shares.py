"""Workers' busy time on real workers: attempts report all of it, and what is not busy is idle."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tests.worker_harness import (
    Answer,
    RouterSide,
    Tls,
    both_roles,
    eventually,
    make_start,
    metric,
    prompt_of,
    slow_down,
    split_roles,
)
from tidemill.api.worker.v1 import worker_service_pb2 as worker_pb2
from tidemill.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tidemill.engine import BusyTime
from tidemill.worker.process import RunningWorker

if TYPE_CHECKING:  # a name that only the stubs have
    from tidemill.api.worker.v1.worker_service_pb2_grpc import WorkerServiceAsyncStub


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def spent(worker: RunningWorker, since: BusyTime) -> tuple[int, int]:
    busy = worker.worker.thread.hours.busy
    return busy.prefill_ns - since.prefill_ns, busy.decode_ns - since.decode_ns


def reported(answers: list[Answer]) -> tuple[int, int]:
    finals = [answer.final for answer in answers]
    return (
        sum(nanoseconds(final.prefill_busy_seconds) for final in finals),
        sum(nanoseconds(final.busy_seconds) for final in finals),
    )


async def stopped_in_prefill(
    router: RouterSide, computing: RunningWorker, prefill: RunningWorker | None = None
) -> Answer:
    """An attempt that is stopped after at least one chunk of its prompt, and before the last."""
    thread = computing.worker.thread
    before = thread.hours.busy.prefill_ns
    attempted = await router.begin(make_start(prompt_of(900, seed=9), "stopped", prefill=prefill))
    await eventually(lambda: thread.hours.busy.prefill_ns > before)
    await attempted.stop()
    answer = await attempted.finish()
    assert answer.done is None
    assert answer.final.prefill_busy_seconds > 0
    assert answer.final.prefill_worker_id == computing.worker.worker_id
    return answer


async def many(router: RouterSide, prefill: RunningWorker | None = None) -> list[Answer]:
    """Attempts side by side: chunked prompts, several choices, one stopped while it decodes."""
    starts = [
        make_start(
            prompt_of(90 + 70 * number, seed=number),
            f"r{number}",
            prefill=prefill,
            max_tokens=20,
            n=1 + 2 * (number == 1),
            temperature=1.0,
        )
        for number in range(4)
    ]
    cut = await router.begin(make_start(prompt_of(80), "cut", prefill=prefill, max_tokens=200))
    asked = [asyncio.create_task(router.ask(start)) for start in starts]
    await cut.until("chunk")
    await cut.stop()
    return [await cut.finish(), *await asyncio.gather(*asked)]


async def test_attempts_report_all_that_one_worker_was_busy(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files) as (worker, router):
        warmed_up = worker.worker.thread.hours.busy
        assert warmed_up.prefill_ns > 0
        answers = await many(router)
        slow_down(worker, 0.02)
        answers.append(await stopped_in_prefill(router, worker))
        for answer in answers[:-1]:
            assert answer.done is not None
            assert answer.done.busy_seconds == answer.final.prefill_busy_seconds > 0
            assert answer.final.busy_seconds > 0
        assert reported(answers) == spent(worker, warmed_up)


async def test_attempts_report_all_that_both_workers_were_busy(
    model_dir: Path, tls_files: Tls
) -> None:
    async with split_roles(model_dir, tls_files) as (prefill, decode, router):
        warmed_up = [each.worker.thread.hours.busy for each in (prefill, decode)]
        answers = await many(router, prefill)
        slow_down(prefill, 0.02)
        answers.append(await stopped_in_prefill(router, prefill, prefill))
        prefill_ns, decode_ns = reported(answers)
        assert spent(prefill, warmed_up[0]) == (prefill_ns, 0)
        assert spent(decode, warmed_up[1]) == (0, decode_ns)


async def test_what_is_not_busy_is_idle_in_reports_and_metrics(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files, accelerators=8) as (worker, router):
        stub = cast("WorkerServiceAsyncStub", WorkerServiceStub(router.channel))
        described = await stub.DescribeWorker(worker_pb2.DescribeWorkerRequest())
        assert described.accelerators == 8
        reports = aiter(stub.WatchLoad(worker_pb2.WatchLoadRequest(min_interval_ms=10)))
        first = await anext(reports)
        await many(router)
        busy = worker.worker.thread.hours.busy
        load = await anext(reports)
        while load.decode_busy_us < busy.decode_ns // 1000:
            load = await anext(reports)
        assert load.prefill_busy_us == busy.prefill_ns // 1000 > first.prefill_busy_us
        assert load.decode_busy_us == busy.decode_ns // 1000
        gone_by = load.uptime_us - first.uptime_us
        assert 0 < load.decode_busy_us - first.decode_busy_us < gone_by
        hours = worker.worker.thread.hours
        assert hours.busy.total_ns + hours.idle_ns == hours.uptime_ns
        assert metric(worker, "busy_seconds_total", phase="prefill") == busy.prefill_ns / 1e9
        assert metric(worker, "busy_seconds_total", phase="decode") == busy.decode_ns / 1e9
        assert metric(worker, "idle_seconds_total") >= hours.idle_ns / 1e9


async def test_passing_time_alone_is_no_change_of_load(model_dir: Path, tls_files: Tls) -> None:
    async with both_roles(model_dir, tls_files) as (_, router):
        stub = cast("WorkerServiceAsyncStub", WorkerServiceStub(router.channel))
        reports = aiter(stub.WatchLoad(worker_pb2.WatchLoadRequest(min_interval_ms=10)))
        first, second = await anext(reports), await anext(reports)
        assert second.uptime_us - first.uptime_us > 500_000
