"""What hostile clients cost a router process: bounded memory, and nobody else's service."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.mock_worker import MockConfig
from tests.mock_workers import MockProcess, mock_workers
from tests.router_harness import MODEL, Heard, RouterCaller, bearer
from tidemill.api.common.v1 import sampling_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.rpc.channel import sdk_aio_channel
from tidemill.rpc.options import SDK_CLIENT
from tidemill.rpc.tls import TlsFiles

pytestmark = pytest.mark.redis

REPOSITORY = Path(__file__).parents[3]
MB = 1 << 20
# gRPC cuts a refused call off; its client sees the refusal or the cut, whichever it reads first.
TURNED_AWAY = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED}
# One's own connection, on which nothing is read ahead of the reader.
OPTIONS = (*SDK_CLIENT, ("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0))


@dataclass
class Victim:
    """A router process over one mock worker."""

    pid: int
    address: str
    ca: Path
    router: RouterCaller
    mock: MockProcess

    def channel(self) -> grpc.aio.Channel:
        """A connection of its own."""
        return sdk_aio_channel(self.address, ca=self.ca, options=OPTIONS)

    @property
    def resident(self) -> int:
        """Bytes of its memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    async def serves(self, request_id: str) -> None:
        """It has a place and an answer for an honest client."""
        async with asyncio.timeout(60):
            while (await self.ask(request_id)).error is not None:  # noqa: ASYNC110 - is refused
                await asyncio.sleep(0.1)

    async def ask(self, request_id: str, *, max_tokens: int = 4) -> Heard:
        return await self.router.generate(ask(request_id, max_tokens=max_tokens))

    async def until_idle(self) -> None:
        """The worker has nothing to do, and every Final was acknowledged."""
        async with asyncio.timeout(60):
            while True:
                (counts,) = (await self.mock.counts()).values()
                if not counts.running and counts.finals == counts.acknowledged:
                    return
                await asyncio.sleep(0.05)


def ask(request_id: str, *, max_tokens: int) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(
        request_id=request_id,
        model=MODEL,
        tokens=router_pb2.TokenInput(token_ids=[9] * 64),
        sampling=sampling_pb2.Sampling(max_tokens=max_tokens),
    )


@asynccontextmanager
async def attacked(
    write: Callable[..., Path],
    dev_certs: Path,
    tls: Callable[[str], TlsFiles],
    config: MockConfig,
    *,
    slow_reader_s: float = 60.0,
) -> AsyncIterator[Victim]:
    async with AsyncExitStack() as stack:
        (mock,) = await stack.enter_async_context(mock_workers(tls, config))
        limits = f"limits = {{slow_reader_s = {slow_reader_s}}}"
        path = write(workers=mock.endpoints[0], extra=limits)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.router", "--config", str(path)),
            cwd=REPOSITORY,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        stack.push_async_callback(process.wait)
        stack.callback(process.kill)
        assert process.stdout is not None
        found = re.search(r"listening on (\S+)", (await process.stdout.readline()).decode())
        assert found is not None
        ca = dev_certs / "ca.pem"
        channel = sdk_aio_channel(found[1], ca=ca, options=OPTIONS)
        await stack.enter_async_context(channel)
        router = RouterCaller(channel)
        router.key = await router.make_tenant("acme")
        victim = Victim(process.pid, found[1], ca, router, mock)
        await victim.serves("first")
        yield victim
        assert process.returncode is None


def note(name: str, **figures: float) -> None:
    """Print what was measured (pytest -s)."""
    rounded = {key: round(each, 3) for key, each in figures.items()}
    sys.stdout.write(json.dumps({"hostile": name} | rounded) + "\n")


async def test_readers_that_stop_reading_cost_little_and_are_let_go(
    write: Callable[..., Path], dev_certs: Path, tls_files: Callable[[str], TlsFiles]
) -> None:
    """Their tokens wait for them, in full messages, as long as a slow reader is given."""
    num_readers, num_tokens = 16, 6_000
    config = MockConfig(worker_id="b", role="both", tokens_per_message=8)
    async with attacked(write, dev_certs, tls_files, config, slow_reader_s=1.5) as victim:
        before = victim.resident
        async with victim.channel() as channel:
            stub = RouterCaller(channel).stub
            calls = [
                stub.Generate(
                    ask(f"slow-{each}", max_tokens=num_tokens), metadata=bearer(victim.router.key)
                )
                for each in range(num_readers)
            ]
            await asyncio.gather(*(call.read() for call in calls))
            peak = before
            async with asyncio.timeout(20):
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
            stub = RouterCaller(channel).stub
            for each in range(number):
                call = stub.Generate(
                    ask(f"{name}-{each}", max_tokens=1000), metadata=bearer(victim.router.key)
                )
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


async def hold_idle(victim: Victim, number: int) -> tuple[int, int]:
    """So many streams on which nothing comes after the first token: those let in, and memory."""
    before = victim.resident

    async def began(call: Any) -> bool:
        with suppress(grpc.aio.AioRpcError):
            while isinstance(message := await call.read(), router_pb2.GenerateResponse):
                if message.HasField("chunk"):
                    return True
        assert await call.code() in TURNED_AWAY
        return False

    async with AsyncExitStack() as stack:
        calls = []
        for connection in range(number // 250):
            channel = await stack.enter_async_context(victim.channel())
            stub = RouterCaller(channel).stub
            calls += [
                stub.Generate(
                    ask(f"idle-{connection}-{each}", max_tokens=4),
                    metadata=bearer(victim.router.key),
                )
                for each in range(250)
            ]
        let_in = sum(await asyncio.gather(*map(began, calls)))
        grown = victim.resident - before
        for call in calls:
            call.cancel()
    await victim.mock.change("b", decode_step_s=0.0)
    await victim.serves("after")
    await victim.until_idle()
    left = victim.resident - before
    note("idle", number=number, let_in=let_in, grown_mb=grown / MB, left_mb=left / MB)
    return let_in, grown


async def test_idle_streams_take_a_bounded_memory(
    write: Callable[..., Path], dev_certs: Path, tls_files: Callable[[str], TlsFiles]
) -> None:
    number = 250
    config = MockConfig(worker_id="b", role="both", max_running=2000)
    async with attacked(write, dev_certs, tls_files, config) as victim:
        await victim.mock.change("b", decode_step_s=100.0)
        let_in, grown = await hold_idle(victim, number)
    assert let_in == number
    assert grown < number * 320 * 1024
