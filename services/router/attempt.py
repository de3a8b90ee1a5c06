"""One attempt at one request: a Decode call, in domain terms."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress

import grpc

from services.router.finish import Finish, PrefillSite
from services.router.fleet import Worker
from services.router.tally import Ended, Generated, Prefilled
from tidemill.api.common.v1 import lifecycle_pb2, usage_pb2
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2
from tidemill.billing import Reuse
from tidemill.errors import Internal, Overloaded, TidemillError, Unavailable, WorkerLost
from tidemill.rpc.interceptors import REQUEST_ID_KEY
from tidemill.rpc.status import from_rpc_error

_ACK_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)

Report = Prefilled | Generated | Ended


class Attempt:
    """Talks to one decode worker about one attempt.

    `close` it in any case, and `acknowledge` it once its Ended has been settled.
    """

    def __init__(self, worker: Worker, start: decode_pb2.Start, *, final_wait_s: float) -> None:
        self.worker = worker
        self.prefill_worker_id = start.prefill.worker_id or worker.id
        self._start = start
        self._final_wait_s = final_wait_s
        self._id = start.task.id
        metadata = ((REQUEST_ID_KEY, self._id.request_id),)
        self._call = worker.decode.Decode(metadata=metadata)
        worker.open_attempts.count += 1
        self._writing = asyncio.Lock()
        self._started = asyncio.Event()
        self._ended = False
        self._stopped = False

    async def reports(self) -> AsyncGenerator[Report, None]:
        """Send Start and yield what the worker answers, Ended last.

        Raises what the worker refused with (DecodeFull, PrefillFull), WorkerLost when it or the
        prefill worker vanished, and Internal when it broke the contract or failed. When it failed
        after generating, Ended comes first.
        """
        await self._write(decode_pb2.DecodeRequest(start=self._start))
        self._started.set()
        expected_index = 1
        while (response := await self._read()) is not None:
            match response.WhichOneof("event"):
                case "prefill_done":
                    yield _prefilled(response.prefill_done, len(self._start.task.token_ids))
                case "chunk":
                    chunk = response.chunk
                    if chunk.first_index != expected_index:
                        raise _broken(f"chunk {chunk.first_index} in place of {expected_index}")
                    expected_index += len(chunk.token_ids)
                    yield _generated(chunk.first_index, chunk.token_ids)
                case "final":
                    self._ended = True
                    await self._hang_up()
                    yield _ended(response.final)
                case _:
                    raise _broken("an event that this router does not know")
        if not self._ended:
            raise WorkerLost(f"decode worker {self.worker.id} closed its stream without Final")

    async def stop(self, finish: Finish, keep_tokens: int | None = None) -> None:
        """Ask the worker to end the attempt; Ended follows. Only the first call counts."""
        if self._stopped or self._ended:
            return
        self._stopped = True
        stop = decode_pb2.Stop(
            reason=lifecycle_pb2.FinishReason.ValueType(finish.value), keep_tokens=keep_tokens
        )
        await self._started.wait()
        try:
            await self._write(decode_pb2.DecodeRequest(stop=stop))
        except TidemillError as error:
            logger.info("Stop did not reach %s: %s", self.worker.id, error)

    async def acknowledge(self) -> None:
        """Let the worker forget its Final, which has been settled."""
        request = decode_pb2.AckFinalRequest(id=self._id)
        try:
            await self.worker.decode.AckFinal(request, timeout=_ACK_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            logger.info("AckFinal did not reach %s: %s", self.worker.id, error.details())
        finally:
            self.worker.open_attempts.count -= 1

    async def close(self) -> None:
        """Leave nothing running at the worker: stop what has not ended, then hang up."""
        if not self._ended and not self._call.done():
            try:
                async with asyncio.timeout(self._final_wait_s):
                    await self.stop(Finish.SERVER_FAULT)
                    while (response := await self._read()) and not response.HasField("final"):
                        pass
            except (TimeoutError, TidemillError) as error:
                logger.info("attempt at %s ended without Final: %r", self.worker.id, error)
        self._call.cancel()
        if not self._ended:
            self.worker.open_attempts.count -= 1

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

    async def _read(self) -> decode_pb2.DecodeResponse | None:
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise self._as_ours(error) from error
        return response if isinstance(response, decode_pb2.DecodeResponse) else None

    def _as_ours(self, error: grpc.aio.AioRpcError) -> TidemillError:
        """A worker's status as what it means to this request: its client did nothing wrong."""
        found = from_rpc_error(error)
        if isinstance(found, Overloaded | WorkerLost):
            return found
        if isinstance(found, Unavailable) or found.code in (
            grpc.StatusCode.CANCELLED,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        ):
            return WorkerLost(f"decode worker {self.worker.id} was lost", retry_after_s=0.5)
        logger.error("worker %s failed: %s", self.worker.id, found, extra={"reason": found.reason})
        return Internal("a worker failed", reason="WORKER_FAULT")


def _prefilled(done: lifecycle_pb2.PrefillDone, num_prompt_tokens: int) -> Prefilled:
    usage = done.usage
    prefilled = Prefilled(
        token_id=done.first_token_id,
        prompt_tokens=usage.prompt_tokens,
        computed_tokens=usage.computed_tokens,
        reused=Reuse(
            device=usage.reused_device_tokens,
            host=usage.reused_host_tokens,
            cache_ram=usage.reused_cache_ram_tokens,
            cache_disk=usage.reused_cache_disk_tokens,
            peer=usage.reused_peer_tokens,
        ),
        site=PrefillSite(
            worker_id=usage.prefill_worker_id,
            in_place=usage.prefill_site == usage_pb2.PREFILL_SITE_DECODE_WORKER,
        ),
        prefill_us=done.prefill_us,
    )
    if prefilled.prompt_tokens != num_prompt_tokens:
        raise _broken(f"{prefilled.prompt_tokens} prompt tokens of {num_prompt_tokens}")
    if prefilled.prompt_tokens != prefilled.computed_tokens + prefilled.reused.total:
        raise _broken("its prompt split does not add up (U1)")
    return prefilled


def _generated(first_index: int, token_ids: Sequence[int]) -> Generated:
    return Generated(first_index=first_index, token_ids=tuple(token_ids))


def _ended(final: decode_pb2.Final) -> Ended:
    return Ended(
        finish=Finish(final.reason or Finish.SERVER_FAULT),
        generated_tokens=final.generated_tokens,
        drafted_tokens=final.drafted_tokens,
        accepted_tokens=final.accepted_tokens,
        busy_seconds=final.busy_seconds,
    )


def _broken(what: str) -> Internal:
    logger.error("a worker broke the contract: %s", what)
    return Internal("a worker broke its contract", reason="WORKER_FAULT")
