"""Real workers on free ports, and a router's side of the Decode stream."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import torch
from prometheus_client import CollectorRegistry

from tidemill.api.common.v1.lifecycle_pb2 import (
    AttemptId,
    FinishReason,
    Grammar,
    PrefillDone,
    ResolvedSampling,
    WorkerTask,
)
from tidemill.api.common.v1.logprobs_pb2 import TokenLogprobs
from tidemill.api.common.v1.usage_pb2 import PromptUsage
from tidemill.api.decode.v1 import decode_service_pb2 as pb
from tidemill.api.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from tidemill.engine import EngineConfig, Output
from tidemill.errors import TidemillError
from tidemill.kv.cache_client import CacheClientConfig
from tidemill.policy import FetchConfig
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.server import ServerConfig
from tidemill.rpc.status import from_rpc_error
from tidemill.rpc.tls import TlsFiles
from tidemill.worker.config import Role, WorkerConfig
from tidemill.worker.metrics import WorkerMetrics
from tidemill.worker.process import RunningWorker, running_worker
from tidemill.worker.worker import Worker

if TYPE_CHECKING:  # a name that only the stubs have
    from tidemill.api.decode.v1.decode_service_pb2_grpc import DecodeServiceAsyncStub

Tls = Callable[[str], TlsFiles]
SCOPE = b"s" * 32
ALWAYS_FETCH = FetchConfig(margin=1e6)
PATIENT = CacheClientConfig(lookup_s=10, stall_s=10, pause_s=0.2, most_pause_s=1)
CERTIFICATES = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.BOTH: "worker"}


def prompt_of(num_tokens: int, *, seed: int = 1, vocab_size: int = 512) -> list[int]:
    """Random token ids, the same for the same seed; a longer prompt begins with the shorter one."""
    drawn = torch.randint(
        6, vocab_size, (max(num_tokens, 1024),), generator=torch.Generator().manual_seed(seed)
    )
    return [int(token) for token in drawn[:num_tokens]]


@asynccontextmanager
async def worker_at(
    role: Role,
    model_dir: Path,
    tls: Tls,
    *,
    worker_id: str | None = None,
    num_blocks: int = 96,
    step_tokens: int = 64,
    host_cache_blocks: int = 0,
    make_transport: Any = None,
    **settings: Any,
) -> AsyncIterator[RunningWorker]:
    """A worker of `role` over the tiny model, single-threaded.

    It fetches whatever it can: computing this model is quicker, and so is a busy machine's whim. If
    it only decodes it prefills nothing in place, unless told so.
    """
    settings.setdefault("in_place_tokens", 0)
    settings.setdefault("fetch", ALWAYS_FETCH)
    settings.setdefault("peers", PATIENT)
    config = WorkerConfig(
        worker_id=worker_id or role.value,
        model="tiny",
        model_dir=model_dir,
        engine=EngineConfig(
            num_blocks=num_blocks,
            step_tokens=step_tokens,
            host_cache_blocks=host_cache_blocks,
            num_threads=1,
        ),
        server=ServerConfig(tls=tls(CERTIFICATES[role]), drain_s=0.2),
        **settings,
    )
    metrics = WorkerMetrics(CollectorRegistry())
    async with running_worker(
        config, role, metrics=metrics, make_transport=make_transport
    ) as running:
        yield running


def metric(running: RunningWorker, name: str, **labels: str) -> float:
    """Value of tidemill_worker_`name`."""
    registry = running.worker.metrics.registry
    return registry.get_sample_value(f"tidemill_worker_{name}", labels) or 0.0


def target(prefill: RunningWorker) -> pb.PrefillTarget:
    """What Start says about a prefill worker."""
    return pb.PrefillTarget(worker_id=prefill.worker.worker_id, address=prefill.address)


def make_start(
    token_ids: list[int],
    request_id: str = "r1",
    *,
    prefill: RunningWorker | None = None,
    attempt: int = 1,
    fence: int = 1,
    max_tokens: int = 8,
    funded_tokens: int | None = None,
    relayed_tokens: int = 0,
    stop_token_ids: Iterable[int] = (),
    scope: bytes = SCOPE,
    temperature: float = 0.0,
    seed: int = 0,
    grammar: Grammar | None = None,
    **sampling: Any,
) -> pb.Start:
    """A Start as the router would send it; greedy unless told otherwise."""
    start = pb.Start(
        task=WorkerTask(
            id=AttemptId(request_id=request_id, attempt=attempt, fence=fence),
            tenant_id="alice",
            cache_scope=scope,
            token_ids=token_ids,
            sampling=ResolvedSampling(
                temperature=temperature,
                top_p=1.0,
                seed=seed,
                max_tokens=max_tokens,
                stop_token_ids=stop_token_ids,
                **sampling,
            ),
            relayed_tokens=relayed_tokens,
            grammar=grammar,
        ),
        relayed_tokens=relayed_tokens,
    )
    if prefill is not None:
        start.prefill.CopyFrom(target(prefill))
    if funded_tokens is not None:
        start.funded_tokens = funded_tokens
    return start


@dataclass
class Answer:
    """Everything that a Decode stream said.

    `choices` are each one's tokens, `logprobs` the first one's.
    """

    choices: list[list[int]] = field(default_factory=lambda: [[]])
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ends: dict[int, str] = field(default_factory=dict)
    done: PrefillDone | None = None
    finals: list[pb.Final] = field(default_factory=list)
    error: TidemillError | None = None
    events: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """Of the first choice, mostly the only one."""
        return self.choices[0]

    @property
    def usage(self) -> PromptUsage:
        assert self.done is not None
        return self.done.usage

    @property
    def final(self) -> pb.Final:
        (final,) = self.finals
        return final

    @property
    def reason(self) -> str:
        return FinishReason.Name(self.final.reason).removeprefix("FINISH_REASON_")


class Attempted:
    """One attempt in progress, from the router's side."""

    def __init__(self, stub: "DecodeServiceAsyncStub", timeout: float | None) -> None:
        self.call = stub.Decode(timeout=timeout)
        self.answer = Answer()

    async def send(self, **command: Any) -> None:
        await self.call.write(pb.DecodeRequest(**command))

    async def stop(
        self,
        reason: str = "CANCELLED",
        keep_tokens: int | None = None,
        *,
        choice: int | None = None,
    ) -> None:
        value = FinishReason.Value(f"FINISH_REASON_{reason}")
        if self.answer.finals:
            return
        await self.send(stop=pb.Stop(reason=value, keep_tokens=keep_tokens, choice=choice))

    async def fund(self, total: int) -> None:
        await self.send(fund=pb.Fund(total_tokens=total))

    async def next(self) -> str | None:
        """Read one event into the answer; returns its name, None at the end."""
        answer = self.answer
        try:
            response = await self.call.read()
        except grpc.aio.AioRpcError as error:
            answer.error = from_rpc_error(error)
            return None
        if not isinstance(response, pb.DecodeResponse):
            return None
        name = cast(str, response.WhichOneof("event"))
        answer.events.append(name)
        if name == "prefill_done":
            done = answer.done = response.prefill_done
            first = done.first_token_ids or [done.first_token_id]
            answer.choices = [[token_id] for token_id in first]
            answer.logprobs += done.first_logprobs[:1]
        elif name == "chunk":
            tokens = answer.choices[response.chunk.choice]
            assert response.chunk.first_index == len(tokens)
            tokens += response.chunk.token_ids
            if response.chunk.choice == 0:
                answer.logprobs += response.chunk.logprobs
            assert response.chunk.generated_tokens == sum(map(len, answer.choices))
        elif name == "choice_ended":
            ended = response.choice_ended
            assert ended.choice not in answer.ends
            assert ended.generated_tokens == len(answer.choices[ended.choice])
            reason = FinishReason.Name(ended.reason)
            answer.ends[ended.choice] = reason.removeprefix("FINISH_REASON_")
        else:
            answer.finals.append(response.final)
            if not self.call.done():
                await self.call.done_writing()
            await self.call.done_writing()  # as the router does; the worker waits for it
        return name

    async def until(self, name: str) -> None:
        while await self.next() != name:
            assert self.answer.error is None, self.answer.error

    async def finish(self) -> Answer:
        while await self.next() is not None:
            pass
        return self.answer


class RouterSide:
    """What a router holds of one decode worker."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.stub = cast("DecodeServiceAsyncStub", DecodeServiceStub(channel))

    async def begin(self, start: pb.Start, *, timeout: float | None = 60.0) -> Attempted:
        attempted = Attempted(self.stub, timeout)
        await attempted.send(start=start)
        return attempted

    async def ask(self, start: pb.Start) -> Answer:
        """Run an attempt to its end."""
        return await (await self.begin(start)).finish()


@asynccontextmanager
async def router_of(
    decode: RunningWorker, tls: Tls, *, role: str = "router"
) -> AsyncIterator[RouterSide]:
    """A router's channel to `decode`."""
    channel = internal_channel(decode.address, role="decode", tls=tls(role))
    try:
        yield RouterSide(channel)
    finally:
        await channel.close()


@asynccontextmanager
async def both_roles(
    model_dir: Path, tls: Tls, **settings: Any
) -> AsyncIterator[tuple[RunningWorker, RouterSide]]:
    """One worker that prefills in place, and a router's side of it; whole again at the end (R1)."""
    async with (
        worker_at(Role.BOTH, model_dir, tls, **settings) as worker,
        router_of(worker, tls) as router,
    ):
        yield worker, router
        await settled(worker)


@asynccontextmanager
async def split_roles(
    model_dir: Path, tls: Tls, **settings: Any
) -> AsyncIterator[tuple[RunningWorker, RunningWorker, RouterSide]]:
    """A prefill and a decode worker, and a router's side of the latter; whole again at the end.

    What Start says decides where a prompt is prefilled: in place goes, unless told otherwise.
    """
    settings.setdefault("in_place_tokens", 10_000)
    async with (
        worker_at(Role.PREFILL, model_dir, tls, **settings) as prefill,
        worker_at(Role.DECODE, model_dir, tls, **settings) as decode,
        router_of(decode, tls) as router,
    ):
        yield prefill, decode, router
        await settled(prefill, decode)


def split_of(usage: PromptUsage) -> dict[str, int]:
    """The usage's non-zero parts; asserts U1, and that whole blocks less the last token hit."""
    parts = {
        "computed": usage.computed_tokens,
        "device": usage.reused_device_tokens,
        "host": usage.reused_host_tokens,
        "cache_ram": usage.reused_cache_ram_tokens,
        "cache_disk": usage.reused_cache_disk_tokens,
        "peer": usage.reused_peer_tokens,
    }
    assert sum(parts.values()) == usage.prompt_tokens
    reused = usage.prompt_tokens - usage.computed_tokens
    assert reused % 64 == 0 or reused == usage.prompt_tokens - 1
    assert reused < usage.prompt_tokens
    return {name: count for name, count in parts.items() if count}


async def settled(*workers: RunningWorker, within_s: float = 30.0) -> None:
    """Wait until nobody should hold a block, then check that nobody does (R1)."""
    for running in workers:
        await _idle(running.worker, within_s)
        check_whole(running.worker)


async def _idle(worker: Worker, within_s: float) -> None:
    await eventually(lambda: worker.idle, within_s)


async def eventually(holds: Callable[[], bool], within_s: float = 30.0) -> None:
    """Wait until `holds()`; TimeoutError if it never does."""
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110 - what tests wait for has no event
            await asyncio.sleep(0.005)


def slow_down(running: RunningWorker, seconds: float) -> None:
    """Let every engine step take at least so long."""
    step = running.worker.engine.step

    def slowly() -> list[Output]:
        time.sleep(seconds)
        return step()

    running.worker.engine.step = slowly  # type: ignore[method-assign]


def check_whole(worker: Worker) -> None:
    worker.engine.pool.check_integrity()
    assert worker.engine.pool.num_referenced == 0
    assert worker.engine.num_swapped == 0
