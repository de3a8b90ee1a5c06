"""What the operator's command says of the whole stack's time and money."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from tests.stack_harness import ONE_WORKER_MODEL, Stack, eventually, words

COMMAND = Path(sys.executable).with_name("tidemill")


async def margin(stack: Stack, *arguments: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        COMMAND,
        *("margin", "--json", "--accelerator-hour-price", "2", *arguments),
        env={
            "TIDEMILL_ADDRESS": stack.address,
            "TIDEMILL_CA": str(stack.ca),
            "TIDEMILL_ADMIN_KEY": stack.admin_key,
        },
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(said)
    return found


async def busy_us(stack: Stack) -> float:
    workers = [await stack.metrics(name) for name in stack.workers]
    return 1e6 * sum(each.total("tidemill_worker_busy_seconds_total") for each in workers)


async def test_margin_tells_all_that_workers_were_busy_and_what_each_phase_earned(
    stack: Stack,
) -> None:
    key = await stack.key_of("mara")
    async with stack.client(key) as client:
        for model in [model.name for model in await client.models()]:
            await client.generate(words(30), model=model, max_tokens=8)
        (usage,) = await client.usage(0, 2**47)

    async def all_told() -> bool:
        rows = (await margin(stack))["rows"]
        told = sum(row["accelerator_us"] for row in rows if row["phase"] != "idle")
        return bool(told >= await busy_us(stack) - 10)

    await eventually(all_told)
    report = await margin(stack, "--by", "tenant,model,phase")
    idle = {row["model"] for row in report["rows"] if row["phase"] == "idle"}
    assert ONE_WORKER_MODEL in idle
    assert len(idle) == 2
    mine = [row for row in report["rows"] if row["tenant_id"] == "mara"]
    assert {(row["model"] in idle, row["phase"]) for row in mine} == {
        (True, "prefill"),
        (True, "decode"),
    }
    assert all(row["cost_nano"] > 0 for row in mine)
    assert sum(row["revenue_nano"] for row in mine) == usage.amount_nano
