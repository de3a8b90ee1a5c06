"""What hostile clients cost a router process: bounded memory, and nobody else's service."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from tests.attacked_router import MB, Victim, ask, attacked, note, open_stream
from tests.mock_worker import MockConfig
from tests.router_harness import RouterCaller, bearer
from tidemill.rpc.tls import TlsFiles

pytestmark = pytest.mark.redis


async def test_readers_that_stop_reading_cost_little_and_are_let_go(
    write: Callable[..., Path], dev_certs: Path, tls_files: Callable[[str], TlsFiles]
) -> None:
    """Their tokens wait for them, in full messages, as long as a slow reader is given."""
    num_readers, num_tokens = 16, 6_000
    config = MockConfig(worker_id="b", role="both", tokens_per_message=8)
    async with attacked(write, dev_certs, tls_files, config, slow_reader_s=1.5) as victim:
        before = victim.resident
        async with victim.channel() as channel:
            key = victim.router.key
            calls = [
                open_stream(channel, key, f"slow-{each}", max_tokens=num_tokens)
                for each in range(num_readers)
            ]
            await asyncio.gather(*(call.read() for call in calls))
            peak = before
            async with asyncio.timeout(60):
                while (await victim.mock.counts())["b"].running:
                    peak = max(peak, victim.resident)
                    await asyncio.sleep(0.02)
            for call in calls:
                call.cancel()
        await victim.until_idle()
        await victim.serves("after")
        generated = (await victim.mock.counts())["b"].generated_tokens
        per_token = (peak - before) / generated
        note("stopped readers", peak_mb=(peak - before) / MB, bytes_per_token=per_token)
    assert generated > num_readers * num_tokens / 4
    assert per_token < 400


async def flood_of_resets(victim: Victim, number: int) -> tuple[int, int]:
    """Requests that are taken back as soon as they are sent; growth of memory, then after more."""

    async def flood(name: str) -> int:
        async with victim.channel() as channel:
            for each in range(number):
                call = open_stream(channel, victim.router.key, f"{name}-{each}", max_tokens=1000)
                await asyncio.sleep(0)
                if each % 8 == 0:
                    await call.initial_metadata()
                call.cancel()
        await victim.serves(f"{name}-after")
        await victim.until_idle()
        return victim.resident

    before = victim.resident
    first, second = await flood("warm"), await flood("again")
    note("resets", number=number, first_mb=(first - before) / MB, second_mb=(second - first) / MB)
    return first - before, second - first


async def test_a_flood_of_resets_leaves_nothing_behind(
    write: Callable[..., Path], dev_certs: Path, tls_files: Callable[[str], TlsFiles]
) -> None:
    config = MockConfig(worker_id="b", role="both", decode_step_s=0.01)
    async with attacked(write, dev_certs, tls_files, config) as victim:
        first, second = await flood_of_resets(victim, 200)
    assert first < 48 * MB
    assert second < 8 * MB


async def test_huge_metadata_is_refused_before_it_costs_anything(
    write: Callable[..., Path], dev_certs: Path, tls_files: Callable[[str], TlsFiles]
) -> None:
    config = MockConfig(worker_id="b", role="both")
    async with attacked(write, dev_certs, tls_files, config) as victim:
        before = victim.resident
        async with victim.channel() as channel:
            for size in (64 << 10, MB):
                metadata = (*bearer(victim.router.key), ("x-note", "n" * size))
                calls = [
                    RouterCaller(channel).stub.Generate(
                        ask(f"huge-{size}-{each}", max_tokens=4), metadata=metadata
                    )
                    for each in range(32)
                ]
                ends = await asyncio.gather(*(call.code() for call in calls))
                assert set(ends) <= {
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.INTERNAL,
                }
        await victim.serves("after")
        grown = victim.resident - before
        note("huge metadata", sent_mb=32 * ((64 << 10) + MB) / MB, grown_mb=grown / MB)
    assert grown < 16 * MB
