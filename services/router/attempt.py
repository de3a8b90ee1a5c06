"""One attempt at one request: a Decode call, in domain terms."""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import grpc

from services.router.answers import Answers, Take
from services.router.finish import Finish
from services.router.fleet import Worker
from services.router.reports import ReportReader, read_final
from services.router.response_format import SCHEMA_FIELD
from services.router.tally import Ended
from tidemill.api.common.v1 import lifecycle_pb2
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2
from tidemill.errors import (
    FailedPrecondition,
    Internal,
    InvalidRequest,
    Overloaded,
    TidemillError,
    Unavailable,
    WorkerLost,
)
from tidemill.rpc.interceptors import REQUEST_ID_KEY
from tidemill.rpc.status import from_rpc_error
from tidemill.rpc.tracing import outgoing

_ACK_TIMEOUT_S = 30.0  # nobody waits for it, and what hangs up all at once is settled late
_GET_TIMEOUT_S = 2.0
_STILL_RUNNING_S = 0.1
_DROP_S = 2.0
_RUNNING = decode_pb2.Final()
_GRAMMAR_INVALID = "GRAMMAR_INVALID"
# No worker here follows formats; the format with the rest of the sampling leaves no token to draw;
# the choices together need more blocks than the worker has.
_PASSED_ON = frozenset({"GRAMMAR_UNAVAILABLE", "GRAMMAR_DEAD_END", "KV_POOL_TOO_SMALL"})
_MAX_WHY = 500
_GONE = frozenset({grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED})
_FAILED = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})

logger = logging.getLogger(__name__)


class OpenCall:
    """A Decode call to a worker, in which nothing begins before Start; `drop` it if none comes.

    `wire_id` is the request's name among workers.
    """

    def __init__(self, worker: Worker, wire_id: str) -> None:
        self.worker = worker
        metadata = ((REQUEST_ID_KEY, wire_id), *outgoing())
        self.stream: Any = worker.decode.Decode(metadata=metadata)

    async def drop(self) -> None:
        """Close it: to the worker it was nothing."""
        try:
            async with asyncio.timeout(_DROP_S):
                await self.stream.done_writing()
                await self.stream.code()
        except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            logger.info("a call to %s was not closed well: %r", self.worker.id, error)
        finally:
            self.stream.cancel()


class Attempt:
    """Talks to one decode worker about one attempt, in `call`.

    `close` it in any case, and `acknowledge` it once its Ended has been settled, or `leave` it.
    """

    def __init__(self, call: OpenCall, start: decode_pb2.Start, *, final_wait_s: float) -> None:
        self.worker = worker = call.worker
        self._start = start
        self._final_wait_s = final_wait_s
        self._id = start.task.id
        self._call = call.stream
        worker.open_attempts.count += 1
        self._writing = asyncio.Lock()
        self._started = asyncio.Event()
        self._ended = False
        self._stopped = False
        self._stopped_choices: set[int] = set()
        self._reading: asyncio.Future[Any] | None = None
        self._route: decode_pb2.ChunkRoute | None = None
        self._answers: Answers | None = None  # while it is followed
        self._failure: Exception | None = None  # of its chunks
        self._failed = asyncio.get_running_loop().create_future()
        self._no_more_chunks = False
        self._progress = asyncio.Event()

    async def follow(self, take: Take) -> None:
        """Send Start and hand over what the worker answers, in order, Ended last.

        `take` is also called from the task that reads the worker's chunks for all attempts.
        Raises what the worker refused with (DecodeFull, PrefillFull, InvalidRequest for a schema
        that cannot be compiled), WorkerLost when it or the prefill worker vanished, failed or gave
        the attempt up, and Internal when it broke the contract. When that was after it had begun,
        and it could still say so, Ended comes first.
        """
        chunks = self.worker.chunks
        self._route = None if chunks is None else chunks.attach(self)
        reader = ReportReader(self._start.task)
        answers = self._answers = Answers(reader, take, routed=self._route is not None)
        try:
            await self._begin()
            await self._listen(answers)
        except TidemillError:
            await self._catch_up(answers)
            raise
        else:
            await self._catch_up(answers)
        finally:
            self._answers = None
            if chunks is not None and self._route is not None:
                chunks.detach(self._route)
            incomplete = answers.give_up()
        if self._failure is not None:
            raise self._failure
        if answers.ended is None:
            raise WorkerLost(f"decode worker {self.worker.id} closed its stream without Final")
        if incomplete:
            raise WorkerLost(f"decode worker {self.worker.id} did not bring all its tokens")
        if answers.ended.finish is Finish.SERVER_FAULT and not self._stopped:
            raise WorkerLost(f"decode worker {self.worker.id} gave the attempt up")

    def arrived(self, chunk: decode_pb2.Chunk) -> None:
        """From the worker's channel, in that one's task: what goes wrong is raised in our own."""
        if self._answers is None or self._failure is not None:
            return
        try:
            self._answers.chunk(chunk)
        except Exception as error:
            self._fail(error)
        if self._ended:
            self._progress.set()

    def no_more(self, *, broken: bool) -> None:
        """The worker's channel is over."""
        self._no_more_chunks = True
        self._progress.set()
        over = self._answers is None or self._answers.ended is not None
        if broken and not over and self._failure is None:
            self._fail(WorkerLost(f"the chunks of decode worker {self.worker.id} broke off"))

    async def stop(
        self, finish: Finish, keep_tokens: int | None = None, *, choice: int | None = None
    ) -> None:
        """Ask the worker to end the attempt, or one of its choices; its end follows.

        Of each only the first call counts.
        """
        if self._stopped or self._ended or choice in self._stopped_choices:
            return
        if choice is None:
            self._stopped = True
        else:
            self._stopped_choices.add(choice)
        stop = decode_pb2.Stop(
            reason=lifecycle_pb2.FinishReason.ValueType(finish.value),
            keep_tokens=keep_tokens,
            choice=choice,
        )
        await self._started.wait()
        try:
            await self._write(decode_pb2.DecodeRequest(stop=stop))
        except TidemillError as error:
            logger.info("Stop did not reach %s: %s", self.worker.id, error)

    async def fund(self, total_tokens: int) -> None:
        """More completion tokens are paid for: so many of this attempt's choices in all."""
        if self._stopped or self._ended:
            return
        fund = decode_pb2.Fund(total_tokens=total_tokens)
        await self._started.wait()
        try:
            await self._write(decode_pb2.DecodeRequest(fund=fund))
        except TidemillError as error:
            logger.info("Fund did not reach %s: %s", self.worker.id, error)

    async def acknowledge(self) -> None:
        """Let the worker forget its Final, which has been settled."""
        request = decode_pb2.AckFinalRequest(id=self._id)
        try:
            await self.worker.decode.AckFinal(request, timeout=_ACK_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            logger.info("AckFinal did not reach %s: %s", self.worker.id, error.details())
        finally:
            self.worker.open_attempts.count -= 1

    def leave(self) -> None:
        """Its Final is not settled by this router: the worker keeps it for whoever does."""
        self.worker.open_attempts.count -= 1

    def recover(self) -> Coroutine[Any, Any, Ended | None]:
        """The Final of an attempt whose call broke, if its worker lives on and still has it.

        To be acknowledged like one that was read.
        """
        self.worker.open_attempts.count += 1
        return self._recover()

    async def close(self) -> None:
        """Leave nothing running at the worker: stop what has not ended, then hang up."""
        self._route = None
        if not self._ended and not self._call.done():
            try:
                async with asyncio.timeout(self._final_wait_s):
                    await self.stop(Finish.SERVER_FAULT)
                    while (response := await self._read()) and not response.HasField("final"):
                        pass
            except (TimeoutError, TidemillError) as error:
                logger.info("attempt at %s ended without Final: %r", self.worker.id, error)
        self._call.cancel()
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)
        if not self._ended:
            self.worker.open_attempts.count -= 1

    async def _recover(self) -> Ended | None:
        request = decode_pb2.GetFinalRequest(id=self._id)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._final_wait_s):
                while (final := await self._get_final(request)) is _RUNNING:  # noqa: ASYNC110 - there is no event
                    await asyncio.sleep(_STILL_RUNNING_S)
                if final is not None:
                    return read_final(final)
        self.worker.open_attempts.count -= 1
        return None

    async def _get_final(self, request: decode_pb2.GetFinalRequest) -> decode_pb2.Final | None:
        """None if there is none and never will be, _RUNNING while the worker still stops."""
        try:
            return (await self.worker.decode.GetFinal(request, timeout=_GET_TIMEOUT_S)).final
        except grpc.aio.AioRpcError as error:
            return _RUNNING if from_rpc_error(error).reason == "ATTEMPT_RUNNING" else None

    async def _hang_up(self) -> None:
        """Close our side, after a Stop that is under way: the worker waits for that."""
        async with self._writing:
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await self._call.done_writing()

    async def _write(self, request: decode_pb2.DecodeRequest) -> None:
        async with self._writing:
            if self._ended:
                return
            try:
                await self._call.write(request)
            except grpc.aio.AioRpcError as error:
                raise self._as_ours(error) from error
            except asyncio.InvalidStateError as error:
                raise WorkerLost(f"the call to {self.worker.id} is over") from error

    async def _begin(self) -> None:
        if self._route is not None:
            self._start.route.CopyFrom(self._route)
        try:
            await self._write(decode_pb2.DecodeRequest(start=self._start))
        finally:
            self._started.set()

    async def _listen(self, answers: Answers) -> None:
        """To the call, until it ends."""
        while (response := await self._read()) is not None:
            if not response.HasField("chunk") and response.HasField("final"):
                self._ended = True
                await self._hang_up()
            answers.word(response)

    async def _catch_up(self, answers: Answers) -> None:
        """After Final: until the tokens have come that it counts, or none has for a while."""
        with suppress(TimeoutError):
            while self._ended and answers.ended is None and self._failure is None:
                if self._no_more_chunks:
                    return
                self._progress.clear()
                async with asyncio.timeout(self._final_wait_s):
                    await self._progress.wait()

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._progress.set()
        if not self._failed.done():
            self._failed.set_result(None)

    async def _read(self) -> decode_pb2.DecodeResponse | None:
        """The call's next word; None at its end. Raises what went wrong with the chunks too."""
        try:
            response = await (self._call.read() if self._reads_alone else self._next())
        except grpc.aio.AioRpcError as error:
            raise self._as_ours(error) from error
        return response if isinstance(response, decode_pb2.DecodeResponse) else None

    @property
    def _reads_alone(self) -> bool:
        """Whether nothing but the call can say something new."""
        return self._route is None and self._reading is None

    async def _next(self) -> Any:
        """What `read` returns; if the chunks fail first that read goes on, for `close`."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
        if self._route is not None:
            try:
                await asyncio.wait(
                    (self._reading, self._failed), return_when=asyncio.FIRST_COMPLETED
                )
            except asyncio.CancelledError:
                self._call.cancel()
                raise
            if self._failure is not None:
                raise self._failure
        reading, self._reading = self._reading, None
        return await reading

    def _as_ours(self, error: grpc.aio.AioRpcError) -> TidemillError:
        """A worker's status as what it means to this request.

        Its client did nothing wrong, but for what only a worker can judge.
        """
        found = from_rpc_error(error)
        if isinstance(found, Overloaded | WorkerLost):
            return found
        if isinstance(found, InvalidRequest) and found.reason == _GRAMMAR_INVALID:
            why = found.message[:_MAX_WHY]
            return InvalidRequest(why, reason=_GRAMMAR_INVALID, violations=[(SCHEMA_FIELD, why)])
        if isinstance(found, FailedPrecondition) and found.reason in _PASSED_ON:
            return FailedPrecondition(found.message[:_MAX_WHY], reason=found.reason)
        if isinstance(found, Unavailable) or found.code in _GONE:
            return WorkerLost(f"decode worker {self.worker.id} was lost", retry_after_s=0.5)
        if found.code in _FAILED:
            logger.error("worker %s failed: %s", self.worker.id, found)
            return WorkerLost(f"decode worker {self.worker.id} failed", retry_after_s=0.5)
        logger.error("worker %s failed: %s", self.worker.id, found, extra={"reason": found.reason})
        return Internal("a worker failed", reason="WORKER_FAULT")
