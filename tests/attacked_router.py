"""A router process of its own with one mock worker behind it, for clients that mean it harm."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from tests.mock_worker import MockConfig
from tests.mock_workers import MockProcess, mock_workers
from tests.router_harness import MODEL, Heard, RouterCaller, bearer
from tidemill.api.common.v1 import sampling_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.rpc.channel import sdk_aio_channel
from tidemill.rpc.options import SDK_CLIENT
from tidemill.rpc.tls import TlsFiles

REPOSITORY = Path(__file__).parents[1]
MB = 1 << 20
# Nothing is read ahead of the reader, and no refusal is hidden by another try.
OPTIONS = (
    *(each for each in SDK_CLIENT if each[0] != "grpc.service_config"),
    ("grpc.enable_retries", 0),
    ("grpc.http2.bdp_probe", 0),
)


@dataclass
class Victim:
    """A router process over one mock worker, "b"."""

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

    @property
    def cpu_s(self) -> float:
        """CPU time it has used."""
        user, system = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    async def serves(self, request_id: str) -> None:
        """It has a place and an answer for an honest client."""
        async with asyncio.timeout(60):
            while (await self.ask(request_id)).error is not None:  # noqa: ASYNC110 - is refused
                await asyncio.sleep(0.1)

    async def ask(self, request_id: str, *, max_tokens: int = 4) -> Heard:
        """An honest client's whole stream."""
        return await self.router.generate(ask(request_id, max_tokens=max_tokens))

    async def until_running(self, number: int) -> None:
        """The worker generates for so many, or for more."""
        async with asyncio.timeout(120):
            while (await self.mock.counts())["b"].running < number:  # noqa: ASYNC110 - it is asked
                await asyncio.sleep(0.05)

    async def until_idle(self) -> None:
        """The worker has nothing to do, and every Final was acknowledged."""
        async with asyncio.timeout(60):
            while True:
                (counts,) = (await self.mock.counts()).values()
                if not counts.running and counts.finals == counts.acknowledged:
                    return
                await asyncio.sleep(0.05)


def ask(request_id: str, *, max_tokens: int) -> router_pb2.GenerateRequest:
    """64 prompt tokens, which are one block."""
    return router_pb2.GenerateRequest(
        request_id=request_id,
        model=MODEL,
        tokens=router_pb2.TokenInput(token_ids=[9] * 64),
        sampling=sampling_pb2.Sampling(max_tokens=max_tokens),
    )


def open_stream(channel: grpc.aio.Channel, key: str, request_id: str, *, max_tokens: int) -> Any:
    """A call that nobody reads yet."""
    stub = RouterCaller(channel).stub
    return stub.Generate(ask(request_id, max_tokens=max_tokens), metadata=bearer(key))


@asynccontextmanager
async def attacked(
    write: Callable[..., Path],
    dev_certs: Path,
    tls: Callable[[str], TlsFiles],
    config: MockConfig,
    *,
    slow_reader_s: float = 60.0,
    places: int | None = None,
) -> AsyncIterator[Victim]:
    """It runs, and has served an honest client of the tenant "acme"."""
    async with AsyncExitStack() as stack:
        (mock,) = await stack.enter_async_context(mock_workers(tls, config))
        limits = f"limits = {{slow_reader_s = {slow_reader_s}}}"
        server = "" if places is None else f"max_concurrent_rpcs = {places}"
        path = write(workers=mock.endpoints[0], extra=limits, metrics=server)
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
