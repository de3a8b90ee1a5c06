"""Receipts of the whole stack: what clients were told, what is listed and what adds up agree."""

import asyncio
import json
import sys
from pathlib import Path

from services.stack.plan import PRICE_BOOK
from tests.stack_harness import ONE_WORKER_MODEL, Stack, words
from tidemill.client import AsyncClient

FOREVER_MS = 2**47
COMMAND = Path(sys.executable).with_name("tidemill")


async def tidemill(stack: Stack, key: str, *arguments: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        COMMAND,
        *arguments,
        env={
            "TIDEMILL_ADDRESS": stack.address,
            "TIDEMILL_CA": str(stack.ca),
            "TIDEMILL_API_KEY": key,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    return process.returncode, said.decode()


async def ask_all(client: AsyncClient) -> list[dict[str, object]]:
    """Receipts of streams on separate workers and on one, with hits and without, as received."""
    models = [model.name for model in await client.models()]
    assert ONE_WORKER_MODEL in models
    answers = await asyncio.gather(
        *(
            client.generate(words(20 + 10 * (number % 2)), model=model, max_tokens=4 + number)
            for number in range(4)
            for model in models
        )
    )
    return [answer.receipt.to_dict() for answer in answers if answer.receipt]


async def test_an_export_holds_every_receipt_and_verifies_offline(
    stack: Stack, tmp_path: Path
) -> None:
    key = await stack.key_of("ida")
    async with stack.client(key) as client:
        before = await client.balance()
        received = await ask_all(client)
        listed = [receipt async for receipt in client.receipts(0, FOREVER_MS)]
        after = await client.balance()
        rows = await client.usage(0, FOREVER_MS, by=["model", "window"])
        (public, *_) = await client.signing_keys()
    by_position = sorted(received, key=lambda receipt: str(receipt["request_id"]))
    assert sorted((each.to_dict() for each in listed), key=lambda each: each["request_id"]) == (
        by_position
    )
    charged = sum(receipt.amount_nano for receipt in listed)
    assert before.available_nano - after.available_nano == charged
    assert after.held_nano == 0
    assert sum(row.amount_nano for row in rows) == charged
    assert sum(row.requests for row in rows) == len(received) == 8

    export = tmp_path / "receipts.jsonl"
    assert await tidemill(stack, key, "receipts", "export", "--out", str(export)) == (0, "")
    check = ("receipts", "verify", str(export), "--book", str(PRICE_BOOK))
    signed = ("--public-key", public.public_key.hex())
    status, said = await tidemill(stack, key, *check, *signed)
    assert (status, said) == (0, "8 receipts, all verify; signatures checked\n")

    first, *rest = [json.loads(line) for line in export.read_text().splitlines()]
    first["amount_nano"] -= 1
    export.write_text("".join(json.dumps(each) + "\n" for each in (first, *rest)))
    status, said = await tidemill(stack, key, *check, *signed)
    assert status == 1
    assert f"receipt {first['request_id']} (line 1): amount_nano is " in said
    assert said.endswith("8 receipts, 1 at fault; signatures checked\n")
