"""`python -m loadtest` as a process of its own, against a scripted router."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any

import pytest

from loadtest.lengths import look_alike, read_trace
from tests.scripted_router import Context, Script, ScriptedRouter, answer, serve
from tidemill.api.router.v1 import router_service_pb2 as pb
from tidemill.errors import ConfigError

ROOT = Path(__file__).parents[2]


async def run_load(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtest", "--users", "2", "--run-time", "2s", *arguments),
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


async def test_a_run_ends_by_itself_with_a_table(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    async with serve(ScriptedRouter([answer(*["tide "] * 30)])) as address:
        status, out = await run_load(
            *("--address", address, "--think", "0.1", "--report", str(report))
        )
    assert status == 0, out
    assert "0 failed, 0 usage violations" in out
    summary = json.loads(report.read_text(encoding="utf-8"))
    assert summary["answers"] > 5
    assert summary["cancelled"] > 0
    assert summary["cache_hit_share"] == pytest.approx(128 / 130, abs=1e-4)
    assert 0 < summary["ttft_ms"]["p50"] <= summary["ttft_ms"]["p99"]
    assert summary["tpot_ms"]["p50"] > 0


async def test_a_bill_that_breaks_an_invariant_fails_the_run() -> None:
    async with serve(ScriptedRouter([overcharge(answer("a", "b"))])) as address:
        status, out = await run_load("--address", address)
    assert status == 1, out
    assert "violation: U2 does not hold: 127 hit tokens billed" in out


async def test_only_this_machine_is_loaded_unasked() -> None:
    status, out = await run_load("--address", "mill.example:7443")
    assert status == 2
    assert "error: CONFIG_ERROR: mill.example:7443 is not loopback" in out


def test_the_look_alike_has_the_trace_s_middle() -> None:
    rng = Random(0)
    drawn = [look_alike(rng) for _ in range(20_000)]
    prompts = [lengths.num_prompt_tokens for lengths in drawn]
    outputs = [lengths.num_output_tokens for lengths in drawn]
    assert 900 < mean(prompts) < 1300
    assert 600 < median(prompts) < 1100
    assert 180 < mean(outputs) < 240
    assert 120 < median(outputs) < 180


def test_a_trace_is_read_and_a_wrong_one_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374,44\n")
    assert [(row.num_prompt_tokens, row.num_output_tokens) for row in read_trace(trace)] == [
        (374, 44)
    ]
    trace.write_text("TIMESTAMP,Context\n1,2\n")
    with pytest.raises(ConfigError, match=r"trace\.csv"):
        read_trace(trace)
