"""`python -m loadtest` against the whole stack: its last word is that the books agree."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from loadtest.books import compare
from services.stack.plan import ROOT
from tests.stack_harness import Stack
from tidemill.client import Receipt

pytestmark = [pytest.mark.e2e, pytest.mark.redis]


async def test_a_run_ends_with_receipts_journal_and_engines_agreeing_to_the_token(
    stack: Stack, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    pages = " ".join(
        f"http://127.0.0.1:{stack.metrics_ports[name]}/metrics" for name in stack.workers
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtest", "--users", "4", "--run-time", "3s"),
        *("--address", stack.address, "--think", "0.1", "--scale", "0.05"),
        *("--metrics", pages, "--report", str(report)),
        cwd=ROOT,
        env=os.environ | {"TIDEMILL_ADMIN_KEY": stack.admin_key, "TIDEMILL_CA": str(stack.ca)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    assert ": 0 differences" in out.decode()
    summary = json.loads(report.read_text(encoding="utf-8"))
    books = summary["reconciled"]
    assert summary["answers"] > 0
    assert books["amount_nano"] == summary["amount_nano"] > 0
    assert books["generated_tokens"] >= summary["completion_tokens"] > 0
    assert 0 < books["num_charges"] <= summary["answers"] + summary["cancelled"]


def test_a_receipt_without_its_charge_is_a_difference() -> None:
    def receipt(request_id: str, state: str = "settled") -> Receipt:
        content: dict[str, str | int] = {"request_id": request_id, "amount_nano": 5}
        return Receipt(content=content, state=state, content_sha256="aa")

    charge = {"content_sha256": "aa"}
    assert compare([receipt("r1"), receipt("r2", "priced")], [("r1", charge)]) == []
    assert compare([receipt("r1")], []) == ["r1 has a settled receipt and no charge"]
    assert compare([receipt("r1", "pending")], []) == ["r1 has a pending receipt and no charge"]
    assert compare([receipt("r1")], [("r1", {"content_sha256": "bb"})]) == [
        "r1 has another receipt than its charge"
    ]
    assert compare([], [("r1", charge), ("r1", charge)]) == ["r1 was charged 2 times"]
