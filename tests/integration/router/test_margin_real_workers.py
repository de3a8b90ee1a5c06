"""Margin of real work: what requests tell of is what the workers were busy, and costs add up."""

import asyncio
import time
from pathlib import Path

import pytest

from tests.redis_process import RedisProcess
from tests.router_harness import ADMIN_KEY, bearer, listen
from tests.router_workers import TlsOf, ask, split_pair
from tests.worker_harness import slow_down
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb2
from tidemill.billing.margin import HOUR_MS

pytestmark = pytest.mark.redis
PRICE = 2_000_000_000
HOUR_US = 3_600_000_000


@pytest.mark.parametrize("in_place_tokens", [0, 100])
async def test_journals_and_workers_agree_on_who_was_busy_for_how_long(
    tiny_dir: Path, ledger: RedisProcess, tls_files: TlsOf, in_place_tokens: int
) -> None:
    """Wherever the last turn was prefilled: it is on the decode worker that all of it lies."""
    pair = split_pair(tiny_dir, ledger, tls_files, in_place_tokens=in_place_tokens)
    async with pair as (prefill, decode, router):
        workers = (prefill, decode)
        warm_up = sum(each.worker.thread.hours.busy.total_ns for each in workers) // 1000
        requests = [ask(f"r{n}", 64 + 80 * n, max_tokens=20) for n in range(4)]
        requests[3].sampling.n, requests[3].sampling.temperature = 3, 1.0
        heard = list(await asyncio.gather(*(router.generate(each) for each in requests)))
        turn = ask("turn", 64 + 80 * 3 + 30)
        heard.append(await router.generate(turn))
        in_place = heard[-1].completed.usage.prompt.prefill_worker_id == "d"
        assert in_place == (in_place_tokens > 0)
        charged = sum(each.completed.receipt.amount_nano for each in heard)
        slow_down(prefill, 0.03)
        stopped = router.call(ask("stopped", 900))
        busy_before = prefill.worker.thread.hours.busy.prefill_ns
        await router.until(lambda: prefill.worker.thread.hours.busy.prefill_ns > busy_before)
        await router.cancel("stopped")
        assert not (await listen(stopped)).token_ids
        busy = sum(each.worker.thread.hours.busy.total_ns for each in workers) // 1000

        now_ms = time.time_ns() // 1_000_000
        request = admin_pb2.GetMarginRequest(
            from_ms=now_ms // HOUR_MS * HOUR_MS - HOUR_MS,
            to_ms=now_ms // HOUR_MS * HOUR_MS + HOUR_MS,
            by=[admin_pb2.MARGIN_DIMENSION_PHASE],
            currency="USD",
            accelerator_hour_nano=PRICE,
        )
        async with asyncio.timeout(60):
            while True:
                answer = await router.admin.GetMargin(request, metadata=bearer(ADMIN_KEY))
                rows = {row.phase: row for row in answer.rows}
                reported = (
                    sum(row.accelerator_us for row in answer.rows) - rows["idle"].accelerator_us
                )
                if reported >= busy - 2 * len(workers):
                    break
                await asyncio.sleep(0.2)
        told = rows["prefill"].accelerator_us + rows["decode"].accelerator_us
        assert told == pytest.approx(busy - warm_up, abs=20)  # cut to microseconds, part by part
        assert rows["unattributed"].accelerator_us == pytest.approx(warm_up, abs=20)
        assert rows["prefill"].revenue_nano + rows["decode"].revenue_nano == charged > 0
        whole_us = sum(row.accelerator_us for row in answer.rows)
        cost_nano = sum(row.cost_nano for row in answer.rows)
        assert abs(cost_nano - whole_us * PRICE // HOUR_US) <= 2  # one rounding an hour
