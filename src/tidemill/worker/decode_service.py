"""DecodeService: proto in front of attempts, and the Finals they leave."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from tidemill.api.common.v1.lifecycle_pb2 import FinishReason
from tidemill.api.decode.v1 import decode_service_pb2 as pb
from tidemill.api.decode.v1.decode_service_pb2_grpc import DecodeServiceServicer
from tidemill.blocks import BLOCK_TOKENS
from tidemill.errors import DeadlineExceeded, DecodeFull, InvalidRequest, PoolExhausted, PrefillFull
from tidemill.rpc.deadline import remaining_s
from tidemill.rpc.interceptors import Context
from tidemill.rpc.validation import validate
from tidemill.worker.attempt import Attempt, sequence_id
from tidemill.worker.attempt_table import AttemptTable
from tidemill.worker.chunk_channel import ChunkChannels
from tidemill.worker.prompt import Prompt, PromptBlocks
from tidemill.worker.remote_prefill import PrefillPeers
from tidemill.worker.task import num_choices
from tidemill.worker.worker import Worker

LONGEST_PREFILL_S = 600.0
RETRY_DECODE_S = 0.5
HANG_UP_S = 2.0  # for the router to close its side once it has read Final
CLOCK_SLACK_S = 0.05  # the caller's cancel may arrive a little before our own clock says so


class DecodeService(DecodeServiceServicer):
    """Serves attempts for one worker. `stop_all` ends those that outlast a drain."""

    def __init__(self, worker: Worker, attempts: AttemptTable, peers: PrefillPeers) -> None:
        self._worker = worker
        self._attempts = attempts
        self._peers = peers
        self._channels = ChunkChannels()
        self._tasks: dict[asyncio.Task[None], Attempt] = {}

    async def Decode(
        self, request_iterator: AsyncIterator[pb.DecodeRequest], context: Context
    ) -> AsyncIterator[pb.DecodeResponse]:
        """One attempt; a stream that breaks stops it, and its Final is kept.

        A router may open it before it knows whether there will be an attempt.
        """
        start = await _first(request_iterator)
        if start is None:
            return
        attempt = await self._begin(start, context)
        commands = asyncio.create_task(_follow(request_iterator, attempt))
        try:
            async for response in attempt.outbox.responses():
                yield response
            # A Stop that meets a closed stream breaks the router's whole call, and the Final that
            # it has not read yet is lost to it: stay until the router has nothing more to say.
            await asyncio.wait([commands], timeout=HANG_UP_S)
        finally:
            attempt.stop(_why_broken(context))
            commands.cancel()

    async def WatchChunks(
        self, request: pb.WatchChunksRequest, context: Context
    ) -> AsyncIterator[pb.WatchChunksResponse]:
        """Chunks of the attempts that name this channel; when it breaks they end."""
        validate(request)
        with self._channels.open(request.channel_id) as channel:
            async for message in channel.messages():
                yield message

    async def AckFinal(self, request: pb.AckFinalRequest, context: Context) -> pb.AckFinalResponse:
        """The Final is stored elsewhere."""
        validate(request)
        return pb.AckFinalResponse(held=self._attempts.acknowledge(request.id))

    async def GetFinal(self, request: pb.GetFinalRequest, context: Context) -> pb.GetFinalResponse:
        """A Final that nobody has acknowledged."""
        validate(request)
        return pb.GetFinalResponse(final=self._attempts.final(request.id))

    async def ListFinals(
        self, request: pb.ListFinalsRequest, context: Context
    ) -> pb.ListFinalsResponse:
        """Every Final of a request that nobody has acknowledged."""
        validate(request)
        finals = self._attempts.finals(request.request_id)
        return pb.ListFinalsResponse(
            finals=finals, running=self._attempts.is_running(request.request_id)
        )

    def drain(self) -> None:
        """No attempts come any more: let each channel end with its last."""
        self._channels.drain()

    async def stop_all(self) -> None:
        """End every attempt, and wait until all have freed what they held."""
        for attempt in self._tasks.values():
            attempt.stop(FinishReason.FINISH_REASON_SERVER_FAULT)
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _begin(self, start: pb.Start, context: Context) -> Attempt:
        """Admit, and let it run in a task that the stream does not own."""
        self._worker.check_model(start.task)
        _check_funds(start)
        self._attempts.check(start.task.id)
        timeout_s = remaining_s(context, cap_s=LONGEST_PREFILL_S)
        prompt = await self._worker.reuse.identify(start.task)
        grammar = await self._worker.grammars.of(start.task)
        self._attempts.check(start.task.id)
        channel = self._channels.route(start)
        blocks = self._take_blocks(start, prompt)
        attempt = Attempt(
            self._worker,
            start,
            blocks,
            grammar,
            None if self._in_place(start) else self._peers.at(start.prefill),
            channel=channel,
            timeout_s=timeout_s,
            on_end=self._ended,
        )
        self._attempts.begin(start.task.id, attempt)
        task = asyncio.create_task(attempt.run(), name=f"attempt {start.task.id.request_id}")
        self._tasks[task] = attempt
        task.add_done_callback(self._tasks.pop)
        return attempt

    def _in_place(self, start: pb.Start) -> bool:
        return not start.HasField("prefill") or start.prefill.worker_id == self._worker.worker_id

    def _take_blocks(self, start: pb.Start, prompt: Prompt) -> PromptBlocks:
        worker = self._worker
        if worker.draining:
            raise self._full("the worker is draining")
        if self._attempts.num_running >= worker.config.max_attempts:
            raise self._full(f"{self._attempts.num_running} attempts are running")
        new_tokens = start.task.sampling.max_tokens - start.relayed_tokens
        choices = num_choices(start.task)
        worker.check_fits(prompt.num_tokens, new_tokens, choices=choices)
        hashes = prompt.hashes
        if self._in_place(start):
            hashes = worker.reuse.reusable(prompt)
            self._check_in_place(prompt, hashes)
        seq_id = sequence_id(start.task.id)
        if not worker.engine.admit(seq_id, prompt.num_tokens, new_tokens, choices=choices):
            raise self._full("the blocks are promised to others")
        ahead = min(new_tokens - 1, BLOCK_TOKENS)
        positions = min(prompt.num_tokens + ahead, worker.engine.max_context)
        try:
            return worker.reuse.take(prompt, hashes, num_positions=positions)
        except PoolExhausted as error:
            worker.engine.dismiss(seq_id)
            raise self._full(str(error)) from error

    def _check_in_place(self, prompt: Prompt, hashes: Sequence[bytes]) -> None:
        """Refuse with PrefillFull what would keep the running sequences waiting for too long.

        The router knows from reports what lies here, and may be late: only here it is certain.
        """
        worker = self._worker
        num_held_tokens = worker.engine.pool.match(hashes) * BLOCK_TOKENS
        num_tokens = max(prompt.num_tokens - num_held_tokens, 1)
        queued = worker.backlog.num_tokens
        if worker.role.prefills:
            has_room, why = worker.backlog.has_room(num_tokens), f"{queued} tokens are queued"
        else:
            has_room = queued + num_tokens <= worker.in_place_tokens
            why = f"{queued} + {num_tokens} tokens in place exceed {worker.in_place_tokens}"
        if not has_room:
            worker.metrics.refusals.labels("PREFILL_FULL").inc()
            raise PrefillFull(why, retry_after_s=worker.backlog.retry_after_s())

    def _full(self, why: str) -> DecodeFull:
        self._worker.metrics.refusals.labels("DECODE_FULL").inc()
        return DecodeFull(why, retry_after_s=RETRY_DECODE_S)

    def _ended(self, attempt: Attempt, final: pb.Final | None) -> None:
        if final is None:
            self._attempts.refuse(attempt.start.task.id)
        else:
            self._attempts.finish(attempt.start.task.id, final)


async def _first(requests: AsyncIterator[pb.DecodeRequest]) -> pb.Start | None:
    """None where the stream was closed first."""
    request = await anext(requests, None)
    if request is None:
        return None
    validate(request)
    if request.HasField("start"):
        return request.start
    problem = "the first message must be Start"
    raise InvalidRequest(problem, violations=[("start", problem)])


async def _follow(requests: AsyncIterator[pb.DecodeRequest], attempt: Attempt) -> None:
    """Obey Fund and Stop until the router falls silent; a bad command ends the attempt."""
    try:
        async for request in requests:
            validate(request)
            if request.HasField("fund"):
                attempt.fund(request.fund.total_tokens)
            elif request.HasField("stop"):
                stop = request.stop
                keep = stop.keep_tokens if stop.HasField("keep_tokens") else None
                choice = stop.choice if stop.HasField("choice") else None
                attempt.stop(stop.reason, keep, choice=choice)
            else:
                problem = "Start may come only once"
                raise InvalidRequest(problem, violations=[("start", problem)])
    except InvalidRequest as error:
        attempt.fail(error)


def _check_funds(start: pb.Start) -> None:
    relayed, choices = start.relayed_tokens, num_choices(start.task)
    violations = []
    if start.task.relayed_tokens != relayed:
        violations.append(("task.relayed_tokens", "must equal relayed_tokens"))
    if choices > 1 and relayed:
        violations.append(("relayed_tokens", "must be 0 where there are several choices"))
    if start.HasField("funded_tokens") and start.funded_tokens < choices:
        violations.append(("funded_tokens", "must be at least one for each choice"))
    if start.task.sampling.max_tokens <= relayed:
        violations.append(("task.sampling.max_tokens", "must exceed relayed_tokens"))
    if start.HasField("funded_tokens") and start.funded_tokens <= relayed:
        violations.append(("funded_tokens", "must exceed relayed_tokens"))
    if relayed >= len(start.task.token_ids):
        violations.append(("relayed_tokens", "must be fewer than token_ids"))
    if violations:
        raise InvalidRequest(f"{violations[0][0]} {violations[0][1]}", violations=violations)


def _why_broken(context: Context) -> FinishReason.ValueType:
    try:
        remaining_s(context, cap_s=1.0, reserve_s=CLOCK_SLACK_S)
    except DeadlineExceeded:
        return FinishReason.FINISH_REASON_DEADLINE
    return FinishReason.FINISH_REASON_SERVER_FAULT
