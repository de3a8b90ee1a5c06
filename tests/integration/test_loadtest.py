"""`python -m loadtest` as a process of its own, against a scripted router."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from tests.scripted_router import Context, Script, ScriptedRouter, answer, serve
from tidemill.api.router.v1 import router_service_pb2 as pb

ROOT = Path(__file__).parents[2]


async def run_load(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtest", "--rate", "20", "--run-time", "2s", *arguments),
        cwd=ROOT,
        env={"TIDEMILL_API_KEY": "tm_key.secret"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


def overcharge(script: Script) -> Script:
    """The answer of `script`, billed one hit token too few and one miss too many."""

    async def changed(
        router: ScriptedRouter, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[Any]:
        async for message in script(router, request, context):
            if message.WhichOneof("event") == "completed":
                message.completed.usage.cache_hit_tokens -= 1
                message.completed.usage.cache_miss_tokens += 1
            yield message

    return changed


def late(script: Script, seconds: float) -> Script:
    """The answer of `script`, its first message after so long."""

    async def slowed(
        router: ScriptedRouter, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[Any]:
        await asyncio.sleep(seconds)
        async for message in script(router, request, context):
            yield message

    return slowed


async def test_a_run_ends_by_itself_with_a_table(tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    async with serve(ScriptedRouter([answer(*["tide "] * 30)])) as address:
        status, out = await run_load(
            *("--address", address, "--output", str(output), "--hang-up-share", "0"),
            *("--cancel-share", "0.3", "--again-share", "0.3"),
        )
    assert status == 0, out
    assert ", 0 usage violations" in out
    assert all(kind in out for kind in ("TTFT", "TPOT", "ITL", "goodput"))
    run = json.loads(output.read_text(encoding="utf-8"))
    summary = run["summary"]
    assert summary["ends"]["whole"] == summary["requests"] == len(run["requests"]) + 1
    assert all(summary["behaviours"][each] for each in ("reads", "cancels", "asks again"))
    assert summary["cache_hit_share"] == pytest.approx(128 / 130, abs=1e-4)
    assert 0 < summary["ttft_ms"]["p50"] <= summary["ttft_ms"]["p99"]
    assert summary["tpot_ms"]["p50"] > 0
    assert 0 < summary["goodput_per_s"] < summary["requests_per_s"]
    assert summary["elapsed_s"] >= 2


async def test_a_bill_that_breaks_an_invariant_fails_the_run() -> None:
    async with serve(ScriptedRouter([overcharge(answer("a", "b"))])) as address:
        status, out = await run_load("--address", address)
    assert status == 1, out
    assert "violation: U2 does not hold: 127 hit tokens billed" in out


async def test_a_slow_service_is_sent_no_less(tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    async with serve(ScriptedRouter([late(answer("a", "b"), 1.0)])) as address:
        status, out = await run_load("--address", address, "--output", str(output))
    assert status == 0, out
    rows = json.loads(output.read_text(encoding="utf-8"))["requests"]
    assert len(rows) > 20  # customers who wait for their answers would have asked twice each
    assert max(row["sent_s"] - row["due_s"] for row in rows) < 0.5


async def test_no_more_requests_are_open_or_sent_than_allowed(tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    router = ScriptedRouter([late(answer("a", "b"), 0.5)])
    async with serve(router) as address:
        bounds = ("--most-open", "3", "--most-requests", "9")
        status, out = await run_load("--address", address, "--output", str(output), *bounds)
    assert status == 0, out
    run = json.loads(output.read_text(encoding="utf-8"))
    assert run["summary"]["requests"] <= 9
    assert run["summary"]["held_back"] > 0
    begun = [(row["sent_s"], 1) for row in run["requests"]]
    ended = [(row["ended_s"], -1) for row in run["requests"]]
    assert max(accumulate(step for _, step in sorted(begun + ended))) <= 3


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--address", "mill.example:7443"), "mill.example:7443 is not loopback"),
        (("--address", "127.0.0.1:1", "--run-time", "9h"), "--run-time must be at most"),
        (("--address", "127.0.0.1:1", "--most-requests", "0"), "--most-requests must be from 1"),
    ],
)
async def test_load_stays_on_this_machine_and_has_an_end(
    arguments: tuple[str, ...], problem: str
) -> None:
    status, out = await run_load(*arguments)
    assert status == 2
    assert f"error: CONFIG_ERROR: {problem}" in out
