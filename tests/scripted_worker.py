"""A worker that speaks the real protocol over real gRPC and computes nothing: it plays scripts."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from typing_extensions import override

from tidemill.api.common.v1 import kv_pb2, lifecycle_pb2, usage_pb2
from tidemill.api.common.v1.logprobs_pb2 import TokenLogprobs
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2
from tidemill.api.decode.v1.decode_service_pb2_grpc import (
    DecodeServiceServicer,
    add_DecodeServiceServicer_to_server,
)
from tidemill.api.worker.v1 import worker_service_pb2 as worker_pb2
from tidemill.api.worker.v1.worker_service_pb2_grpc import (
    WorkerServiceServicer,
    add_WorkerServiceServicer_to_server,
)
from tidemill.errors import NotFound
from tidemill.rpc.server import RpcServer, ServerConfig
from tidemill.rpc.tls import TlsFiles

_ROLES = {
    "prefill": worker_pb2.WORKER_ROLE_PREFILL,
    "decode": worker_pb2.WORKER_ROLE_DECODE,
    "both": worker_pb2.WORKER_ROLE_BOTH,
}
_REPORT_EVERY_S = 0.05

Context = grpc.aio.ServicerContext[Any, Any]
Script = Callable[["Talk"], Awaitable[None]]


class Talk:
    """One attempt from the worker's side.

    `stopped` gets the Stop of the whole attempt, `stops[choice]` that of one choice. `funded` are
    the tokens that are paid for, None: all. Where the task asks for log-probabilities they are
    those of `likelihood`.
    """

    def __init__(self, worker: "ScriptedWorker", start: decode_pb2.Start, context: Context) -> None:
        loop = asyncio.get_running_loop()
        self.worker = worker
        self.start = start
        self.sampling = start.task.sampling
        self.stopped: asyncio.Future[decode_pb2.Stop] = loop.create_future()
        self.stops: list[asyncio.Future[decode_pb2.Stop]] = [
            loop.create_future() for _ in range(self.sampling.n or 1)
        ]
        self.funded = start.funded_tokens if start.HasField("funded_tokens") else None
        self.hung_up = asyncio.Event()
        self.counts = [0] * len(self.stops)
        self._context = context

    @property
    def generated(self) -> int:
        """Tokens sent so far, of all choices."""
        return sum(self.counts)

    async def prefill_done(self, *token_ids: int, **reused: int) -> None:
        """Each choice's first token; `reused` are tokens by tier, the rest was computed."""
        prompt = self.start.task.token_ids
        usage = usage_pb2.PromptUsage(
            prompt_tokens=len(prompt),
            computed_tokens=len(prompt) - sum(reused.values()),
            prefill_site=usage_pb2.PREFILL_SITE_PREFILL_WORKER,
            prefill_worker_id=self.start.prefill.worker_id,
        )
        for tier, tokens in reused.items():
            setattr(usage, f"reused_{tier}_tokens", tokens)
        done = lifecycle_pb2.PrefillDone(
            first_token_id=token_ids[0],
            first_token_ids=token_ids if len(token_ids) > 1 else (),
            first_logprobs=self._logprobs(token_ids),
            usage=usage,
            prefill_us=7,
        )
        if self.sampling.HasField("prompt_logprobs"):
            done.prompt_logprobs.extend(
                likelihood(token_id, self.sampling.prompt_logprobs) for token_id in prompt[1:]
            )
        self.counts = [1] * len(self.counts)
        await self._context.write(decode_pb2.DecodeResponse(prefill_done=done))

    async def tokens(self, token_ids: Sequence[int], *, choice: int = 0) -> None:
        """Tokens of a choice after its first, in one chunk."""
        first_index = self.counts[choice]
        self.counts[choice] += len(token_ids)
        chunk = decode_pb2.Chunk(
            attempt=self.start.task.id.attempt,
            choice=choice,
            first_index=first_index,
            token_ids=token_ids,
            generated_tokens=self.generated,
            logprobs=self._logprobs(token_ids),
        )
        if self.worker.routes and self.start.HasField("route"):
            self.worker.route(self.start.route.number, chunk)
        else:
            await self._context.write(decode_pb2.DecodeResponse(chunk=chunk))

    async def choice_ended(self, choice: int, reason: str) -> None:
        """The end of one of several choices."""
        ended = decode_pb2.ChoiceEnded(
            choice=choice,
            reason=lifecycle_pb2.FinishReason.Value(f"FINISH_REASON_{reason}"),
            generated_tokens=self.counts[choice],
        )
        await self._context.write(decode_pb2.DecodeResponse(choice_ended=ended))

    async def final(self, reason: str, *, generated: int | None = None) -> None:
        """The end; `generated` unset: what was sent."""
        final = self.last_word(reason, generated=generated)
        await self._context.write(decode_pb2.DecodeResponse(final=final))

    def last_word(self, reason: str, *, generated: int | None = None) -> decode_pb2.Final:
        """What `final` sends."""
        return decode_pb2.Final(
            id=self.start.task.id,
            reason=lifecycle_pb2.FinishReason.Value(f"FINISH_REASON_{reason}"),
            generated_tokens=self.generated if generated is None else generated,
            busy_seconds=0.25,
        )

    async def send(self, response: decode_pb2.DecodeResponse) -> None:
        """Anything at all."""
        await self._context.write(response)

    def _logprobs(self, token_ids: Sequence[int]) -> list[TokenLogprobs]:
        if not self.sampling.HasField("logprobs"):
            return []
        return [likelihood(token_id, self.sampling.logprobs) for token_id in token_ids]


def likelihood(token_id: int, alternatives: int) -> TokenLogprobs:
    """What a scripted worker says of a token: made up, and its own for each."""
    return TokenLogprobs(
        logprob=-token_id / 64,
        top_token_ids=range(alternatives),
        top_logprobs=[-(each + token_id) / 64 for each in range(alternatives)],
    )


def answer(token_ids: Sequence[int], *, pause_s: float = 0.0, **reused: int) -> Script:
    """Generates `token_ids` one by one until stopped; the end is LENGTH or what Stop says."""

    async def play(talk: Talk) -> None:
        await talk.prefill_done(token_ids[0], **reused)
        for token_id in token_ids[1 : talk.start.task.sampling.max_tokens]:
            await asyncio.sleep(pause_s)
            if talk.stopped.done():
                reason = lifecycle_pb2.FinishReason.Name(talk.stopped.result().reason)
                await talk.final(reason.removeprefix("FINISH_REASON_"))
                return
            await talk.tokens([token_id])
        await talk.final("LENGTH")

    return play


class ScriptedWorker(DecodeServiceServicer, WorkerServiceServicer):
    """Plays `scripts` in turn, the last one for ever, and remembers what it was told.

    `finals`, by attempt, are those that GetFinal finds. If it `routes`, chunks leave through the
    router's channel while that is `flowing`.
    """

    def __init__(
        self,
        worker_id: str,
        role: str,
        *scripts: Script,
        model: str = "tiny",
        digest: bytes = hashlib.sha256(b"weights").digest(),
        vocab_size: int = 512,
        context_tokens: int = 1024,
        routes: bool = False,
    ) -> None:
        self.worker_id = worker_id
        self.role = role
        self.scripts = list(scripts)
        self.epoch = 1
        self.model = model
        self.digest = digest
        self.vocab_size = vocab_size
        self.context_tokens = context_tokens
        self.free_blocks = 100
        self.draining = False
        self.reporting = True
        self.starts: list[decode_pb2.Start] = []
        self.closed_before_start = 0
        self.stops: list[decode_pb2.Stop] = []
        self.finals: dict[int, decode_pb2.Final] = {}
        self.acknowledged: list[lifecycle_pb2.AttemptId] = []
        self.running = 0
        self.routes = routes
        self.breaks = False
        self.channels: list[bytes] = []
        self.flowing = asyncio.Event()
        self.flowing.set()
        self._routed: asyncio.Queue[decode_pb2.WatchChunksResponse | None] = asyncio.Queue()
        self.held: list[int] = []  # names of blocks on the device, as WatchKv tells at first
        self._server: RpcServer | None = None

    @property
    def endpoint(self) -> str:
        """role@host:port, as the router's configuration wants it."""
        assert self._server is not None
        return f"{self.role}@{self._server.address}"

    async def start(self, tls: TlsFiles, *, address: str = "127.0.0.1:0") -> None:
        """Listen."""
        config = ServerConfig(address=address, tls=tls, drain_s=0.0)
        self._server = RpcServer(config, public=False, readiness=lambda: None)
        add_DecodeServiceServicer_to_server(self, self._server.server)
        add_WorkerServiceServicer_to_server(self, self._server.server)
        await self._server.start()

    async def vanish(self) -> None:
        """Cut every call and stop listening, without a word."""
        assert self._server is not None
        await self._server.server.stop(None)
        await self._server.drain()

    @override
    async def Decode(  # type: ignore[override]  # writes to the context
        self, request_iterator: AsyncIterator[decode_pb2.DecodeRequest], context: Context
    ) -> None:
        first = await anext(request_iterator, None)
        if first is None:
            self.closed_before_start += 1
            return
        self.starts.append(first.start)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        talk = Talk(self, first.start, context)
        listening = asyncio.create_task(self._listen(request_iterator, talk))
        self.running += 1
        try:
            await script(talk)
        finally:
            self.running -= 1
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _listen(self, requests: AsyncIterator[decode_pb2.DecodeRequest], talk: Talk) -> None:
        async for request in requests:
            if request.HasField("fund"):
                talk.funded = request.fund.total_tokens
                continue
            self.stops.append(request.stop)
            whole = not request.stop.HasField("choice")
            told = talk.stopped if whole else talk.stops[request.stop.choice]
            told.set_result(request.stop)
        talk.hung_up.set()

    @override
    async def WatchChunks(
        self, request: decode_pb2.WatchChunksRequest, context: Context
    ) -> AsyncIterator[decode_pb2.WatchChunksResponse]:
        if not self.routes:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no channels here")
        self.channels.append(request.channel_id)
        self._routed = asyncio.Queue()
        yield decode_pb2.WatchChunksResponse()
        while (message := await self._routed.get()) is not None:
            await self.flowing.wait()
            yield message
        if self.breaks:
            await context.abort(grpc.StatusCode.INTERNAL, "the channel broke")

    def route(self, number: int, *chunks: decode_pb2.Chunk) -> None:
        """Send chunks through the channel."""
        routed = [decode_pb2.RoutedChunk(number=number, chunk=chunk) for chunk in chunks]
        self._routed.put_nowait(decode_pb2.WatchChunksResponse(chunks=routed))

    def end_channel(self, *, breaks: bool) -> None:
        """End it after what was sent until now, well or by an error."""
        self.breaks = breaks
        self._routed.put_nowait(None)

    @override
    async def AckFinal(
        self, request: decode_pb2.AckFinalRequest, context: Context
    ) -> decode_pb2.AckFinalResponse:
        self.acknowledged.append(request.id)
        return decode_pb2.AckFinalResponse(held=True)

    @override
    async def GetFinal(
        self, request: decode_pb2.GetFinalRequest, context: Context
    ) -> decode_pb2.GetFinalResponse:
        if request.id.attempt not in self.finals:
            raise NotFound("nothing is kept of this attempt", reason="FINAL_NOT_FOUND")
        return decode_pb2.GetFinalResponse(final=self.finals[request.id.attempt])

    @override
    async def ListFinals(
        self, request: decode_pb2.ListFinalsRequest, context: Context
    ) -> decode_pb2.ListFinalsResponse:
        return decode_pb2.ListFinalsResponse()

    @override
    async def DescribeWorker(
        self, request: worker_pb2.DescribeWorkerRequest, context: Context
    ) -> worker_pb2.DescribeWorkerResponse:
        return worker_pb2.DescribeWorkerResponse(
            worker_id=self.worker_id,
            epoch=self.epoch,
            role=_ROLES[self.role],
            model=self.model,
            layout=kv_pb2.KvLayout(
                dtype="float32",
                block_tokens=64,
                num_layers=3,
                latent_dim=48,
                model_digest=self.digest,
            ),
            max_context_tokens=self.context_tokens,
            kv_transports=["grpc"],
            vocab_size=self.vocab_size,
        )

    @override
    async def WatchLoad(
        self, request: worker_pb2.WatchLoadRequest, context: Context
    ) -> AsyncIterator[worker_pb2.WatchLoadResponse]:
        sequence = 0
        while True:
            sequence += 1
            if self.reporting:
                yield worker_pb2.WatchLoadResponse(
                    epoch=self.epoch,
                    sequence=sequence,
                    running=self.running,
                    draining=self.draining,
                    tiers=[
                        worker_pb2.KvTierLoad(
                            tier=worker_pb2.KV_TIER_DEVICE,
                            total_blocks=100,
                            free_blocks=self.free_blocks,
                        )
                    ],
                )
            await asyncio.sleep(_REPORT_EVERY_S)

    @override
    async def WatchKv(
        self, request: worker_pb2.WatchKvRequest, context: Context
    ) -> AsyncIterator[worker_pb2.WatchKvResponse]:
        device = worker_pb2.KV_TIER_DEVICE
        changes = [worker_pb2.KvChange(tier=device, blocks=self.held)] if self.held else []
        yield worker_pb2.WatchKvResponse(epoch=self.epoch, sequence=1, resets=True, changes=changes)
        await asyncio.Event().wait()
