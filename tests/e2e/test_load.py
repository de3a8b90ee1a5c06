"""`python -m loadtest` against the whole stack: its last word is that the books agree."""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.request import urlopen

import pytest
from typing_extensions import override

from services.stack.plan import ROOT
from tests.stack_harness import Stack

pytestmark = [pytest.mark.e2e, pytest.mark.redis]

GENERATED = "tidemill_worker_generated_tokens_total "


async def run_load(stack: Stack, output: Path, pages: list[str]) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtest", "--rate", "8", "--run-time", "3s", "--scale", "0.05"),
        *("--shared-tokens", "130", "--cancel-share", "0.25", "--hang-up-share", "0.15"),
        *("--again-share", "0.2", "--metrics", " ".join(pages), "--output", str(output)),
        *("--address", stack.address),
        cwd=ROOT,
        env=os.environ | {"TIDEMILL_ADMIN_KEY": stack.admin_key, "TIDEMILL_CA": str(stack.ca)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


def pages_of(stack: Stack) -> list[str]:
    return [f"http://127.0.0.1:{stack.metrics_ports[name]}/metrics" for name in stack.workers]


@contextmanager
def altered(url: str, alter: Callable[[str, int], str]) -> Iterator[str]:
    """The page at `url` after `alter(its text, how often it was read before)`."""
    reads = iter(range(1_000))

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with urlopen(url, timeout=10) as page:  # noqa: S310 - our own loopback port
                text = alter(page.read().decode(), next(reads))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        @override
        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def one_more_each_time(text: str, reads: int) -> str:
    lines = text.splitlines()
    for index, line in enumerate(lines):
        if line.startswith(GENERATED):
            lines[index] = f"{GENERATED}{float(line.split()[1]) + reads}"
    return "\n".join(lines) + "\n"


async def test_a_run_ends_with_customers_receipts_ledger_and_engines_agreeing_to_the_token(
    stack: Stack, tmp_path: Path
) -> None:
    output = tmp_path / "run.json"
    status, out = await run_load(stack, output, pages_of(stack))
    assert status == 0, out
    assert "the books: 0 differences" in out
    summary = json.loads(output.read_text(encoding="utf-8"))["summary"]
    told = summary["reconciled"]["sides"]
    assert summary["ends"]["whole"] > 0
    assert summary["behaviours"]["asks again"] > 0
    assert told["ledger"]["amount_nano"] == told["receipts"]["amount_nano"] > 0
    assert told["ledger"]["requests"] >= told["customers"]["requests"] > 0
    assert told["engines"]["generated_tokens"] >= summary["completion_tokens"] > 0


async def test_an_engine_that_counts_one_token_more_fails_the_run(
    stack: Stack, tmp_path: Path
) -> None:
    first, *others = pages_of(stack)
    with altered(first, one_more_each_time) as page:
        status, out = await run_load(stack, tmp_path / "run.json", [page, *others])
    assert status == 1, out
    assert "the books: 1 differences" in out
    assert "difference: engines generated" in out
