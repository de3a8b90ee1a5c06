"""docs/metrics.md is what /metrics shows, and each metric moves when what it counts happens."""

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.stack.plan import MODEL
from tests.stack_harness import ONE_WORKER_MODEL, Stack, words
from tidemill.client import AsyncClient
from tidemill.errors import FailedPrecondition, NotFound

pytestmark = [pytest.mark.e2e, pytest.mark.redis]

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(tidemill_\w+)` \| (\w+) \| (.*?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
SERVING = "serving"


@dataclass
class Seen:
    """What one metric looked like: all values that its samples had, each time they were read."""

    kind: str = ""
    text: str = ""
    labels: set[str] = field(default_factory=set)
    values: set[tuple[tuple[str, float], ...]] = field(default_factory=set)

    @property
    def moved(self) -> bool:
        """Whether it changed; what counts began at 0, and may have counted for a test before."""
        counts = self.kind in ("counter", "histogram")
        return len(self.values) > 1 or (
            counts and any(value for each in self.values for _, value in each)
        )


def pages(stack: Stack) -> Iterator[str]:
    for port in stack.metrics_ports.values():
        with urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            yield page.read().decode()


def look(stack: Stack, seen: dict[str, Seen]) -> None:
    """Read every process's page."""
    for page in pages(stack):
        for family in text_string_to_metric_families(page):
            if not family.name.startswith("tidemill_"):
                continue
            name = family.name + "_total" * (family.type == "counter")
            metric = seen[name]
            metric.kind, metric.text = family.type, family.documentation
            samples = [each for each in family.samples if not each.name.endswith("_created")]
            metric.labels.update(*(set(each.labels) - {"le"} for each in samples))
            metric.values.add(tuple((str(each.labels), each.value) for each in samples))


@asynccontextmanager
async def watching(stack: Stack, seen: dict[str, Seen]) -> AsyncIterator[None]:
    """Look again and again meanwhile: some gauges are back at rest when a request has ended."""

    async def watch() -> None:
        while True:
            await asyncio.to_thread(look, stack, seen)
            await asyncio.sleep(0.1)

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def serve_all_sorts(stack: Stack, client: AsyncClient) -> None:
    """Answers with hits and without, side by side; a stream given up; refusals."""
    prompt = "metrics: " + words(100)
    for model in (MODEL, ONE_WORKER_MODEL):
        for _ in range(2):
            await client.generate(prompt, model=model, max_tokens=8)
    longer = [words(500) + str(number) for number in range(4)]
    await asyncio.gather(*(client.generate(text, model=MODEL, max_tokens=64) for text in longer))
    stream = await client.generate(words(20), model=MODEL, max_tokens=2000, stream=True)
    async with stream:
        async for _ in stream:
            if len(stream.token_ids) >= 5:
                break
    with pytest.raises(NotFound):
        await client.generate("nobody has it", model="nosuch", max_tokens=1)
    async with stack.client(await stack.key_of("penniless", paid_nano=1)) as poor:
        with pytest.raises(FailedPrecondition):
            await poor.generate("for nothing", model=MODEL, max_tokens=1)


def unmoved(seen: dict[str, Seen], rows: dict[str, tuple[str, ...]]) -> list[str]:
    """Gauges that serving should move and has not been seen to."""
    gauges = [name for name, row in rows.items() if row[0] == "gauge" and row[-1] == SERVING]
    return [name for name in gauges if name in seen and not seen[name].moved]


async def test_every_metric_is_documented_and_moves(stack: Stack, client: AsyncClient) -> None:
    seen: dict[str, Seen] = defaultdict(Seen)
    rows = {row[0]: row[1:] for row in ROW.findall((ROOT / "docs/metrics.md").read_text())}
    await asyncio.to_thread(look, stack, seen)
    async with watching(stack, seen):
        await serve_all_sorts(stack, client)
        async with asyncio.timeout(60):
            while unmoved(seen, rows):  # a gauge that was at rest at each look
                await client.generate(words(100), model=MODEL, max_tokens=64)
    await asyncio.to_thread(look, stack, seen)
    assert sorted(rows) == sorted(seen)
    for name, metric in seen.items():
        kind, labels, text, moved_by = rows[name]
        assert (kind, text) == (metric.kind, metric.text), name
        if metric.labels:
            assert labels == ", ".join(sorted(metric.labels)), name
        if moved_by == SERVING:
            assert metric.moved, f"{name} did not move"
        else:
            short = re.sub(r"^tidemill_(router|worker|cache|rpc)_", "", name)
            source = (ROOT / moved_by.strip("`")).read_text()
            assert re.search(rf"\b(\w*_)?{short}\b", source), f"{moved_by} does not name {name}"


def test_the_recording_rules_ask_for_metrics_that_there_are() -> None:
    documented = {row[0] for row in ROW.findall((ROOT / "docs/metrics.md").read_text())}
    rules = (ROOT / "deploy/prometheus/vllm-names.yml").read_text()
    asked = set(re.findall(r"tidemill_\w+", rules.split("groups:")[1])) - {"tidemill"}
    assert {re.sub("_bucket$", "", name) for name in asked} <= documented
    assert len(asked) >= 8
