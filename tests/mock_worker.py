"""A worker that keeps time and computes nothing, on the real protocol.

A mock prefill worker takes prompts one after the other at its rate. A mock decode worker asks it as
a real one does, moves no KV, and then sends tokens step by step. Nothing is ever reused.
"""

import asyncio
import hashlib
import itertools
import math
import secrets
import time
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
from typing_extensions import override

from tidemill.api.common.v1 import kv_pb2, lifecycle_pb2, usage_pb2
from tidemill.api.common.v1.lifecycle_pb2 import FinishReason
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2
from tidemill.api.decode.v1.decode_service_pb2_grpc import (
    DecodeServiceServicer,
    add_DecodeServiceServicer_to_server,
)
from tidemill.api.prefill.v1 import prefill_service_pb2 as prefill_pb2
from tidemill.api.prefill.v1.prefill_service_pb2_grpc import (
    PrefillServiceServicer,
    PrefillServiceStub,
    add_PrefillServiceServicer_to_server,
)
from tidemill.api.worker.v1 import worker_service_pb2 as worker_pb2
from tidemill.api.worker.v1.worker_service_pb2_grpc import (
    WorkerServiceServicer,
    add_WorkerServiceServicer_to_server,
)
from tidemill.blocks import BLOCK_TOKENS
from tidemill.errors import (
    DecodeFull,
    InvalidRequest,
    NotFound,
    PrefillFull,
    Unavailable,
    WorkerLost,
)
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.server import RpcServer, ServerConfig
from tidemill.rpc.status import from_rpc_error
from tidemill.rpc.tls import TlsFiles
from tidemill.worker.chunk_channel import ChunkChannel, ChunkChannels

Context = grpc.aio.ServicerContext[Any, Any]

_ROLES = {
    "prefill": worker_pb2.WORKER_ROLE_PREFILL,
    "decode": worker_pb2.WORKER_ROLE_DECODE,
    "both": worker_pb2.WORKER_ROLE_BOTH,
}
_FUNDS_PATIENCE_S = 2.0
_RETRY_S = 0.1
_LEASE_MS = 30_000
_LONG_S = 0.5  # a step that a Stop cuts short


@dataclass(frozen=True, kw_only=True)
class MockConfig:
    """One mock worker. Seconds and tokens; a rate or a time of 0 takes no time at all.

    A decode worker with `max_running` attempts refuses the next one, as does one without blocks for
    its prompt; a prefill worker refuses what would bring it beyond `max_queued_tokens`.
    `tokens_per_message` are put into one Chunk. With `keeps_times` it remembers when each token was
    due, for `MockProcess.times`.
    """

    worker_id: str
    role: str
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    tokens_per_message: int = 1
    max_running: int = 1024
    max_queued_tokens: int = 1 << 24
    num_blocks: int = 1 << 20
    context_tokens: int = 1 << 17
    vocab_size: int = 512
    model: str = "tiny"
    digest: bytes = hashlib.sha256(b"weights").digest()
    keeps_times: bool = False


@dataclass
class MockCounts:
    """What one worker has done so far."""

    started: int = 0
    refused: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    finals: int = 0
    acknowledged: int = 0
    running: int = 0


def token_at(index: int) -> int:
    """The token that every mock decode worker generates as a request's `index`th."""
    return 30 + index % 64


@dataclass(eq=False)
class _Attempt:
    """One attempt in the decode pool; `generated` are its tokens."""

    start: decode_pb2.Start
    generated: int = 0
    prompt: usage_pb2.PromptUsage | None = None
    prefill_busy_s: float = 0.0
    funded: int | None = None
    stop: decode_pb2.Stop | None = None
    told: asyncio.Event = field(default_factory=asyncio.Event)
    channel: ChunkChannel | None = None
    waiting: decode_pb2.Chunk | None = None
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, chunk: decode_pb2.Chunk, context: Context) -> None:
        """Until it has left, in the call or in the channel."""
        if self.channel is None:
            await context.write(decode_pb2.DecodeResponse(chunk=chunk))
            return
        self.waiting = chunk
        self.left.clear()
        self.channel.ready(self.start.route.number, self)
        await self.left.wait()

    @property
    def has_tokens(self) -> bool:
        return self.waiting is not None

    def take_chunks(self, most_tokens: int) -> Iterator[decode_pb2.Chunk]:  # noqa: ARG002 - few
        chunk, self.waiting = self.waiting, None
        self.left.set()
        if chunk is not None:
            yield chunk

    def unheard(self) -> None:
        """The channel broke."""
        self.stop = decode_pb2.Stop(reason=lifecycle_pb2.FINISH_REASON_SERVER_FAULT)
        self.told.set()
        self.left.set()

    @property
    def num_blocks(self) -> int:
        return math.ceil((len(self.start.task.token_ids) + self.generated) / BLOCK_TOKENS)

    @property
    def key(self) -> tuple[str, int, int]:
        return _key(self.start.task.id)


def _key(attempt: lifecycle_pb2.AttemptId) -> tuple[str, int, int]:
    return attempt.request_id, attempt.fence, attempt.attempt


class MockWorker(DecodeServiceServicer, PrefillServiceServicer, WorkerServiceServicer):
    """The services of one mock worker, whatever its role."""

    def __init__(self, config: MockConfig, tls: TlsFiles) -> None:
        self.config = config
        self.counts = MockCounts()
        self.times: dict[str, array[float]] = {}
        self.draining = False
        self._tls = tls
        self._epoch = secrets.randbits(63)
        self._began = time.monotonic()
        self._running: dict[tuple[str, int, int], _Attempt] = {}
        self._waiting = 0
        self._finals: dict[tuple[str, int, int], decode_pb2.Final] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._chunks = ChunkChannels()
        self._prefilling = asyncio.Lock()
        self._queue: dict[int, int] = {}  # prompt tokens by ticket
        self._begun: dict[int, float] = {}  # when, of what is being computed
        self._tickets = itertools.count()
        self._prefill_busy_s = self._decode_busy_s = 0.0
        self._server: RpcServer | None = None

    async def start(self) -> str:
        """Listen; role@host:port, as the router's configuration wants it."""
        config = ServerConfig(tls=self._tls, drain_s=0.0, max_concurrent_rpcs=4096)
        self._server = RpcServer(config, public=False, readiness=lambda: None)
        add_DecodeServiceServicer_to_server(self, self._server.server)
        add_PrefillServiceServicer_to_server(self, self._server.server)
        add_WorkerServiceServicer_to_server(self, self._server.server)
        await self._server.start()
        return f"{self.config.role}@{self._server.address}"

    @override
    async def Decode(  # type: ignore[override]  # writes to the context
        self, request_iterator: AsyncIterator[decode_pb2.DecodeRequest], context: Context
    ) -> None:
        first = await anext(request_iterator, None)
        if first is None:
            return
        attempt = _Attempt(first.start)
        self._admit(attempt)
        following = asyncio.create_task(_follow(request_iterator, attempt))
        reason = lifecycle_pb2.FINISH_REASON_SERVER_FAULT
        try:
            await self._prefill_for(attempt, context)
            reason = await self._generate(attempt, context)
            await context.write(decode_pb2.DecodeResponse(final=self._final(attempt, reason)))
            await asyncio.wait([following], timeout=_FUNDS_PATIENCE_S)
        finally:
            if attempt.prompt is not None and attempt.key not in self._finals:
                self._final(attempt, reason)  # nobody read it: whoever settles will ask
            if attempt.channel is not None:
                attempt.channel.detach(attempt.start.route.number)
            del self._running[attempt.key]
            following.cancel()

    @override
    async def WatchChunks(
        self, request: decode_pb2.WatchChunksRequest, context: Context
    ) -> AsyncIterator[decode_pb2.WatchChunksResponse]:
        with self._chunks.open(request.channel_id) as channel:
            async for message in channel.messages():
                yield message

    def _admit(self, attempt: _Attempt) -> None:
        task, config = attempt.start.task, self.config
        if task.sampling.n > 1:
            raise InvalidRequest("a mock worker generates one choice", violations=[("n", "is > 1")])
        if (
            self.draining
            or len(self._running) >= config.max_running
            or attempt.num_blocks > self._free_blocks
        ):
            self.counts.refused += 1
            raise DecodeFull("no room", retry_after_s=_RETRY_S)
        if attempt.start.HasField("funded_tokens"):
            attempt.funded = attempt.start.funded_tokens - attempt.start.relayed_tokens
        attempt.channel = self._chunks.route(attempt.start)
        if attempt.channel is not None:
            attempt.channel.attach(attempt.start.route.number, attempt.unheard)
        self._running[attempt.key] = attempt
        self.counts.started += 1

    async def _prefill_for(self, attempt: _Attempt, context: Context) -> None:
        """Have the prompt prefilled where Start says, and tell of the first token."""
        start = attempt.start
        with self._waits():
            if start.HasField("prefill") and start.prefill.worker_id != self.config.worker_id:
                done = await self._remotely(start)
            else:
                done = await self._prefilled(start.task, usage_pb2.PREFILL_SITE_DECODE_WORKER)
        attempt.prompt, attempt.prefill_busy_s = done.usage, done.busy_seconds
        self._note_due(attempt, time.monotonic())
        attempt.generated = 1
        self.counts.generated_tokens += 1
        await context.write(decode_pb2.DecodeResponse(prefill_done=done))

    async def _remotely(self, start: decode_pb2.Start) -> lifecycle_pb2.PrefillDone:
        address = start.prefill.address
        channel = self._channels.get(address)
        if channel is None:
            channel = internal_channel(address, role="prefill", tls=self._tls)
            self._channels[address] = channel
        request = prefill_pb2.PrefillRequest(task=start.task, layout_fingerprint=bytes(32))
        stub: Any = PrefillServiceStub(channel)
        try:
            responses = [response async for response in stub.Prefill(request)]
        except grpc.aio.AioRpcError as error:
            cause = from_rpc_error(error)
            if not isinstance(cause, Unavailable):
                raise cause from error
            lost = {"worker_id": start.prefill.worker_id, "role": "prefill"}
            raise WorkerLost(f"prefill worker {lost['worker_id']}", metadata=lost) from error
        done: lifecycle_pb2.PrefillDone = responses[-1].done
        return done

    async def _generate(self, attempt: _Attempt, context: Context) -> "FinishReason.ValueType":
        """Tokens after the first, on the worker's beat, until the end."""
        task = attempt.start.task
        most = task.sampling.max_tokens - attempt.start.relayed_tokens
        beat = 0
        while attempt.generated < most:
            paid = most if attempt.funded is None else min(attempt.funded, most)
            if attempt.generated >= paid and not await _funded(attempt):
                return lifecycle_pb2.FINISH_REASON_BUDGET
            count = min(self.config.tokens_per_message, most - attempt.generated)
            if attempt.funded is not None:
                count = min(count, max(attempt.funded - attempt.generated, 1))
            beat = await self._steps(attempt, beat, count)
            if attempt.stop is not None:
                return attempt.stop.reason
            await attempt.send(self._chunk(attempt, count), context)
        return lifecycle_pb2.FINISH_REASON_LENGTH

    async def _steps(self, attempt: _Attempt, beat: int, count: int) -> int:
        """Let so many steps of all attempts' beat pass; a step that is missed is lost."""
        step_s, now = self.config.decode_step_s, time.monotonic()
        if not step_s:
            self._note_due(attempt, now, count=count)
            return 0
        beat = max(beat, math.floor(now / step_s)) + count
        self._note_due(attempt, (beat - count + 1) * step_s, step_s=step_s, count=count)
        if (delay := beat * step_s - now) > _LONG_S:
            attempt.told.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await attempt.told.wait()
        elif delay > 0:
            await asyncio.sleep(delay)
        return beat

    def _chunk(self, attempt: _Attempt, count: int) -> decode_pb2.Chunk:
        first = attempt.generated
        position = attempt.start.relayed_tokens + first
        attempt.generated += count
        self.counts.generated_tokens += count
        running = max(len(self._running), 1)
        self._decode_busy_s += count * self.config.decode_step_s / running
        return decode_pb2.Chunk(
            attempt=attempt.start.task.id.attempt,
            first_index=first,
            token_ids=[token_at(position + each) for each in range(count)],
            generated_tokens=attempt.generated,
        )

    def _note_due(
        self, attempt: _Attempt, at: float, *, step_s: float = 0.0, count: int = 1
    ) -> None:
        if self.config.keeps_times:
            times = self.times.setdefault(attempt.start.task.id.request_id, array("d"))
            times.extend(at + step_s * each for each in range(count))

    def _final(self, attempt: _Attempt, reason: "FinishReason.ValueType") -> decode_pb2.Final:
        """The attempt's last word, which is kept until it is acknowledged."""
        task = attempt.start.task
        final = self._finals[attempt.key] = decode_pb2.Final(
            id=task.id,
            reason=reason,
            generated_tokens=attempt.generated,
            busy_seconds=attempt.generated * self.config.decode_step_s,
            prompt=attempt.prompt,
            prefill_busy_seconds=attempt.prefill_busy_s,
            prefill_worker_id=attempt.prompt.prefill_worker_id if attempt.prompt else "",
            relayed_tokens=attempt.start.relayed_tokens,
        )
        self.counts.finals += 1
        return final

    @override
    async def AckFinal(
        self, request: decode_pb2.AckFinalRequest, context: Context
    ) -> decode_pb2.AckFinalResponse:
        held = self._finals.pop(_key(request.id), None) is not None
        self.counts.acknowledged += held
        return decode_pb2.AckFinalResponse(held=held)

    @override
    async def GetFinal(
        self, request: decode_pb2.GetFinalRequest, context: Context
    ) -> decode_pb2.GetFinalResponse:
        final = self._finals.get(_key(request.id))
        if final is None:
            raise NotFound("nothing is kept of this attempt", reason="FINAL_NOT_FOUND")
        return decode_pb2.GetFinalResponse(final=final)

    @override
    async def ListFinals(
        self, request: decode_pb2.ListFinalsRequest, context: Context
    ) -> decode_pb2.ListFinalsResponse:
        kept = [self._finals[key] for key in sorted(self._finals) if key[0] == request.request_id]
        running = any(key[0] == request.request_id for key in self._running)
        return decode_pb2.ListFinalsResponse(finals=kept, running=running)

    @override
    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: Context
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        tokens = len(request.task.token_ids)
        if sum(self._queue.values()) + tokens > self.config.max_queued_tokens or self.draining:
            self.counts.refused += 1
            raise PrefillFull("no room", retry_after_s=_RETRY_S)
        yield prefill_pb2.PrefillResponse(
            offer=prefill_pb2.HandoverOffer(
                handover_id=secrets.token_bytes(16), epoch=self._epoch, lease_ms=_LEASE_MS
            )
        )
        site = usage_pb2.PREFILL_SITE_PREFILL_WORKER
        yield prefill_pb2.PrefillResponse(done=await self._prefilled(request.task, site))

    @override
    async def PullKv(
        self, request: prefill_pb2.PullKvRequest, context: Context
    ) -> AsyncIterator[prefill_pb2.PullKvResponse]:
        return
        yield  # there is no KV to be pulled

    @override
    async def RenewHandover(
        self, request: prefill_pb2.RenewHandoverRequest, context: Context
    ) -> prefill_pb2.RenewHandoverResponse:
        return prefill_pb2.RenewHandoverResponse(lease_ms=_LEASE_MS)

    @override
    async def ReleaseHandover(
        self, request: prefill_pb2.ReleaseHandoverRequest, context: Context
    ) -> prefill_pb2.ReleaseHandoverResponse:
        return prefill_pb2.ReleaseHandoverResponse(released=True)

    @override
    async def StopPrefill(
        self, request: prefill_pb2.StopPrefillRequest, context: Context
    ) -> prefill_pb2.StopPrefillResponse:
        return prefill_pb2.StopPrefillResponse()

    async def _prefilled(
        self, task: lifecycle_pb2.WorkerTask, site: usage_pb2.PrefillSite.ValueType
    ) -> lifecycle_pb2.PrefillDone:
        """When the prompt's turn has come and its time has passed."""
        tokens, ticket = len(task.token_ids), next(self._tickets)
        self._queue[ticket] = tokens
        try:
            async with self._prefilling:
                rate = self.config.prefill_tokens_per_s
                seconds = tokens / rate if rate else 0.0
                if seconds:
                    self._begun[ticket] = time.monotonic()
                    await asyncio.sleep(seconds)
        finally:
            del self._queue[ticket]
            self._begun.pop(ticket, None)
        self._prefill_busy_s += seconds
        self.counts.computed_tokens += tokens
        return lifecycle_pb2.PrefillDone(
            first_token_id=token_at(task.relayed_tokens),
            usage=usage_pb2.PromptUsage(
                prompt_tokens=tokens,
                computed_tokens=tokens,
                prefill_site=site,
                prefill_worker_id=self.config.worker_id,
            ),
            prefill_us=round(seconds * 1e6),
            busy_seconds=seconds,
        )

    @override
    async def DescribeWorker(
        self, request: worker_pb2.DescribeWorkerRequest, context: Context
    ) -> worker_pb2.DescribeWorkerResponse:
        config = self.config
        return worker_pb2.DescribeWorkerResponse(
            worker_id=config.worker_id,
            epoch=self._epoch,
            role=_ROLES[config.role],
            model=config.model,
            layout=kv_pb2.KvLayout(
                dtype="float32",
                block_tokens=BLOCK_TOKENS,
                num_layers=3,
                latent_dim=48,
                model_digest=config.digest,
            ),
            max_context_tokens=config.context_tokens,
            kv_transports=["grpc"],
            vocab_size=config.vocab_size,
            accelerators=1,
        )

    @override
    async def WatchLoad(
        self, request: worker_pb2.WatchLoadRequest, context: Context
    ) -> AsyncIterator[worker_pb2.WatchLoadResponse]:
        interval_s = (request.min_interval_ms or 100) / 1000
        for sequence in itertools.count(1):
            yield self._load(sequence)
            if self.draining:
                return
            await asyncio.sleep(interval_s)

    @override
    async def WatchKv(
        self, request: worker_pb2.WatchKvRequest, context: Context
    ) -> AsyncIterator[worker_pb2.WatchKvResponse]:
        yield worker_pb2.WatchKvResponse(epoch=self._epoch, sequence=1, resets=True)  # and no block
        while True:
            if self.draining:
                return
            await asyncio.sleep(1.0)

    def _load(self, sequence: int) -> worker_pb2.WatchLoadResponse:
        config, queued = self.config, [self._num_uncomputed(ticket) for ticket in self._queue]
        return worker_pb2.WatchLoadResponse(
            epoch=self._epoch,
            sequence=sequence,
            queued_uncached_tokens=sum(queued),
            queued_attention_pairs=sum(tokens * (tokens + 1) // 2 for tokens in queued),
            prefilling=len(queued),
            running=len(self._running) - self._waiting,
            waiting=self._waiting,
            tiers=[
                worker_pb2.KvTierLoad(
                    tier=worker_pb2.KV_TIER_DEVICE,
                    total_blocks=config.num_blocks,
                    free_blocks=max(self._free_blocks, 0),
                )
            ],
            draining=self.draining,
            prefill_busy_us=round(self._prefill_busy_s * 1e6),
            decode_busy_us=round(self._decode_busy_s * 1e6),
            uptime_us=round((time.monotonic() - self._began) * 1e6),
            prefill_tokens_per_s=round(config.prefill_tokens_per_s),
            decode_step_us=round(config.decode_step_s * 1e6),
        )

    def _num_uncomputed(self, ticket: int) -> int:
        tokens = self._queue[ticket]
        if (begun := self._begun.get(ticket)) is None:
            return tokens
        done = (time.monotonic() - begun) * self.config.prefill_tokens_per_s
        return max(tokens - round(done), 0)

    @property
    def num_running(self) -> int:
        """Attempts in its decode pool."""
        return len(self._running)

    @property
    def _free_blocks(self) -> int:
        return self.config.num_blocks - sum(each.num_blocks for each in self._running.values())

    @contextmanager
    def _waits(self) -> Iterator[None]:
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1


async def _follow(requests: AsyncIterator[decode_pb2.DecodeRequest], attempt: _Attempt) -> None:
    """Take Fund and Stop in until the router falls silent."""
    async for request in requests:
        if request.HasField("fund"):
            attempt.funded = request.fund.total_tokens - attempt.start.relayed_tokens
        else:
            attempt.stop = request.stop
        attempt.told.set()


async def _funded(attempt: _Attempt) -> bool:
    """Whether a further token was paid for, or a Stop came, within the patience of a real one."""
    while attempt.stop is None and attempt.generated >= (attempt.funded or 0):
        attempt.told.clear()
        try:
            async with asyncio.timeout(_FUNDS_PATIENCE_S):
                await attempt.told.wait()
        except TimeoutError:
            return False
    return True
