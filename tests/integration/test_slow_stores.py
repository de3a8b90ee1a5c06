"""A store or a peer that is slow, or dies while it sends, costs little and loses nothing."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.cache_node import cache_node
from tests.slow_link import SlowLink
from tests.worker_harness import (
    ALWAYS_FETCH,
    PATIENT,
    Answer,
    RouterSide,
    Tls,
    eventually,
    make_start,
    metric,
    prompt_of,
    router_of,
    settled,
    worker_at,
)
from tidemill.api.common.v1.lifecycle_pb2 import KvPeer
from tidemill.policy import FetchConfig
from tidemill.worker.config import CacheConfig, Role
from tidemill.worker.process import RunningWorker

NUM_TOKENS = 961
NUM_BLOCKS = 15
STEP_S = 0.03  # computes one block; it dwarfs everything else here, and any machine's noise
BLOCK_BYTES = 3 * 64 * 48 * 4  # of the tiny model, in float32
TOO_SLOW = BLOCK_BYTES / (10 * STEP_S)  # bytes a second: fetching takes ten times as long


def compute_slowly(running: RunningWorker) -> None:
    """As a model would for which fetching pays: every step of 64 tokens takes STEP_S."""
    runner: Any = running.worker.engine._runner
    forward = runner.forward

    def slowly(step: Any) -> Any:
        time.sleep(STEP_S)
        return forward(step)

    runner.forward = slowly


@dataclass
class Asked:
    """A worker that prefills in place, and its router."""

    running: RunningWorker
    router: RouterSide
    num_asked: int = 0

    async def ask(self, seed: int, *peers: KvPeer) -> Answer:
        self.num_asked += 1
        start = make_start(
            prompt_of(NUM_TOKENS, seed=seed), f"{seed}.{self.num_asked}", max_tokens=1
        )
        start.task.peers.extend(peers)
        return await self.router.ask(start)

    async def ask_until_fetched(self, seed: int) -> None:
        """Ask until all came from the cache; however long the pause until the next try, it ends."""
        reuse = self.running.worker.reuse
        for hours in range(6):
            reuse.policy._clock = partial(later, 3600 * hours)
            if reused(await self.ask(seed), "cache_ram") == NUM_BLOCKS:
                return
            self.forget()
        raise AssertionError("a quick store was not fetched from")

    def forget(self) -> None:
        """Let the pool forget what was computed."""
        pool = self.running.worker.engine.pool
        pool.release(pool.allocate(pool.num_free))

    async def timed(self, seed: int) -> tuple[float, float]:
        """Seconds of prefill, and those of them that went to fetching."""
        done = (await self.ask(seed)).done
        assert done is not None
        return done.prefill_us / 1e6, done.fetch_us / 1e6


def later(seconds: float) -> float:
    return time.monotonic() + seconds


@asynccontextmanager
async def asked(model_dir: Path, tls: Tls, name: str, **settings: Any) -> AsyncIterator[Asked]:
    async with (
        worker_at(Role.BOTH, model_dir, tls, worker_id=name, **settings) as running,
        router_of(running, tls) as router,
    ):
        yield Asked(running, router)
        await settled(running)


@contextmanager
def slow_link(port: int, address: str) -> Iterator[SlowLink]:
    link = SlowLink(port, int(address.rpartition(":")[2]))
    try:
        yield link
    finally:
        link.close()


def reused(answer: Answer, tier: str) -> int:
    """Blocks reused from the tier; asserts U1 and that the tier is the only one."""
    usage = answer.usage
    num_reused: int = getattr(usage, f"reused_{tier}_tokens")
    assert usage.prompt_tokens == usage.computed_tokens + num_reused == NUM_TOKENS
    assert num_reused % 64 == 0
    return num_reused // 64


async def test_a_store_ten_times_slower_than_computing_costs_less_than_a_tenth(
    model_dir: Path, tls_files: Tls, free_port: Any
) -> None:
    async with cache_node(tls_files) as cache, AsyncExitStack() as stack:
        link = stack.enter_context(slow_link(free_port(), cache.address))
        opened = stack.enter_async_context
        filler = await opened(
            asked(model_dir, tls_files, "filler", cache=CacheConfig(cache.address, client=PATIENT))
        )
        off = await opened(asked(model_dir, tls_files, "off"))
        shared = CacheConfig(f"127.0.0.1:{link.port}", client=PATIENT)
        it = await opened(asked(model_dir, tls_files, "it", cache=shared, fetch=FetchConfig()))
        for seed in range(12):
            await filler.ask(seed)
        await eventually(lambda: len(cache.store) == 12 * NUM_BLOCKS)
        compute_slowly(off.running)
        compute_slowly(it.running)
        computed_s = statistics.median([(await off.timed(seed))[0] for seed in range(100, 105)])
        await it.ask(100)  # nobody holds it

        await it.ask_until_fetched(0)
        quick = [await it.timed(seed) for seed in range(1, 4)]
        assert min(prefill_s for prefill_s, _ in quick) < 0.75 * computed_s

        # What such a store adds to a prefill is what goes to fetching: the rest is computing.
        link.bytes_per_s = TOO_SLOW
        learning = [(await it.timed(seed))[1] for seed in (4, 5)]
        assert max(learning) < 0.4 * computed_s
        throttled = [(await it.timed(seed))[1] for seed in range(6, 11)]
        assert statistics.median(throttled) < 0.1 * computed_s
        assert metric(it.running, "fetch_failed_blocks_total", tier="cache_ram", cause="cut") > 0

        link.bytes_per_s = None
        await it.ask_until_fetched(11)


async def test_what_came_before_the_cache_was_killed_counts_and_the_rest_is_computed(
    model_dir: Path, tls_files: Tls, free_port: Any
) -> None:
    async with cache_node(tls_files) as cache, AsyncExitStack() as stack:
        shared = CacheConfig(cache.address, client=PATIENT)
        filler = await stack.enter_async_context(
            asked(model_dir, tls_files, "filler", cache=shared)
        )
        first = await filler.ask(1)
        await eventually(lambda: len(cache.store) == NUM_BLOCKS)
        with slow_link(free_port(), cache.address) as link:
            behind = CacheConfig(f"127.0.0.1:{link.port}", client=PATIENT)
            it = await stack.enter_async_context(
                asked(model_dir, tls_files, "it", cache=behind, fetch=ALWAYS_FETCH)
            )
            answer = await cut_midway(it, link)
        assert 0 < reused(answer, "cache_ram") < NUM_BLOCKS
        assert answer.tokens == first.tokens
        lost = metric(
            it.running, "fetch_failed_blocks_total", tier="cache_ram", cause="unavailable"
        )
        assert lost == NUM_BLOCKS - reused(answer, "cache_ram")


async def test_what_came_before_a_peer_was_killed_counts_and_the_rest_is_computed(
    model_dir: Path, tls_files: Tls, free_port: Any
) -> None:
    async with (
        asked(model_dir, tls_files, "holder") as holder,
        asked(model_dir, tls_files, "it") as it,
    ):
        first = await holder.ask(1)
        with slow_link(free_port(), holder.running.address) as link:
            peer = KvPeer(worker_id="holder", address=f"127.0.0.1:{link.port}", role="decode")
            answer = await cut_midway(it, link, peer)
        assert 0 < reused(answer, "peer") < NUM_BLOCKS
        assert answer.tokens == first.tokens
        assert metric(it.running, "cache_errors_total", call="peer") == 1


async def cut_midway(it: Asked, link: SlowLink, *peers: KvPeer) -> Answer:
    """Ask, and drop the wire for good when some blocks have landed."""
    link.bytes_per_s = 400_000
    backlog = it.running.worker.backlog

    async def cut() -> None:
        await eventually(lambda: 0 < backlog.num_tokens < NUM_TOKENS - 2 * 64)
        link.close()

    cutting = asyncio.create_task(cut())
    answer = await it.ask(1, *peers)
    await cutting
    return answer
