"""Prefill on another worker, as decode sees it: ask, pull while it computes, verify, release."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, cast

import grpc

from tidemill.api.common.v1.lifecycle_pb2 import PrefillDone
from tidemill.api.decode.v1.decode_service_pb2 import PrefillTarget
from tidemill.api.prefill.v1 import prefill_service_pb2 as pb
from tidemill.api.prefill.v1.prefill_service_pb2_grpc import PrefillServiceStub
from tidemill.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidRequest,
    TidemillError,
    TransferError,
    Unavailable,
    WorkerLost,
)
from tidemill.kv.segments import Landing
from tidemill.kv.shm import ShmArena, ShmArenas
from tidemill.kv.threads import in_thread, one_ahead
from tidemill.kv.transport import GrpcKvTransport, KvTransport
from tidemill.rpc.status import from_rpc_error
from tidemill.rpc.tracing import outgoing
from tidemill.worker.config import HandoverConfig
from tidemill.worker.metrics import WorkerMetrics

if TYPE_CHECKING:  # a name that only the stubs have
    from tidemill.api.prefill.v1.prefill_service_pb2_grpc import PrefillServiceAsyncStub

PULL_ATTEMPTS = 2
CLEANUP_S = 1.0  # for telling the other side, which has a lease anyway
SETTLE_S = 0.2
LINGER_S = 600.0

Connect = Callable[[str], grpc.aio.Channel]
MakeTransport = Callable[["PrefillServiceAsyncStub"], KvTransport]

logger = logging.getLogger(__name__)


class PrefillPeers:
    """Channels to prefill workers by address, opened when first needed.

    `connect` opens one for control, `connect_bulk` another for latents, so that a first token never
    waits behind megabytes; unset: one for both. `arenas` is the shared memory to pull through, None
    where none is configured.
    """

    def __init__(
        self,
        connect: Connect,
        config: HandoverConfig,
        *,
        metrics: WorkerMetrics,
        connect_bulk: Connect | None = None,
        arenas: ShmArenas | None = None,
        make_transport: MakeTransport | None = None,
    ) -> None:
        self._connect = connect
        self._connect_bulk = connect_bulk
        self._arenas = arenas
        self._make_transport = make_transport or self._grpc_transport
        self._channels: dict[str, tuple[grpc.aio.Channel, grpc.aio.Channel]] = {}
        self._later: set[asyncio.Task[None]] = set()
        self.config = config
        self.metrics = metrics

    def at(self, target: PrefillTarget) -> "PrefillPeer":
        """The worker to prefill on."""
        channels = self._channels.get(target.address)
        if channels is None:
            control = self._connect(target.address)
            bulk = control if self._connect_bulk is None else self._connect_bulk(target.address)
            channels = self._channels[target.address] = (control, bulk)
        stub, bulk_stub = (
            cast("PrefillServiceAsyncStub", PrefillServiceStub(each)) for each in channels
        )
        return PrefillPeer(self, target, stub, self._make_transport(bulk_stub))

    def lost(self, target: PrefillTarget) -> None:
        """Forget a dead worker's channels: the next call dials anew and waits for no back-off."""
        for channel in set(self._channels.pop(target.address, ())):
            self.later(channel.close(grace=LINGER_S))

    async def lend(self, offer: pb.HandoverOffer, num_bytes: int) -> ShmArena | None:
        """Shared memory for a hand-over of that size; None, and counted, if gRPC must do."""
        arenas = self._arenas
        if arenas is None or num_bytes == 0:
            return None
        if offer.shm_id != arenas.folder.id:
            self.not_shared("other_folder")
            return None
        lending = asyncio.ensure_future(asyncio.to_thread(arenas.lend, num_bytes))
        try:
            return await asyncio.shield(lending)
        except OSError as error:
            logger.warning("no shared memory for a hand-over", extra={"why": str(error)})
            self.not_shared("no_room")
            return None
        except asyncio.CancelledError:
            lending.add_done_callback(self._lent_for_nothing)
            raise

    def give_back(self, arena: ShmArena, *, reusable: bool) -> None:
        """`reusable` if the source has said that it is done."""
        assert self._arenas is not None
        self._arenas.give_back(arena, reusable=reusable)

    def not_shared(self, cause: str) -> None:
        """Count a pull that cannot use the shared memory that is configured."""
        self.metrics.shm_fallbacks.labels(cause).inc()

    def _lent_for_nothing(self, lending: "asyncio.Task[ShmArena]") -> None:
        if not lending.cancelled() and lending.exception() is None:
            self.give_back(lending.result(), reusable=True)

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what nobody has to wait for."""
        task = asyncio.create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def close(self) -> None:
        """Close all channels, once what was left for later had a moment."""
        if self._later:
            await asyncio.wait(self._later, timeout=CLEANUP_S)
        for task in self._later:
            task.cancel()
        for channel in {each for pair in self._channels.values() for each in pair}:
            await channel.close()
        self._channels.clear()

    def _grpc_transport(self, stub: "PrefillServiceAsyncStub") -> KvTransport:
        return GrpcKvTransport(stub, max_message_bytes=self.config.max_message_bytes)


class PrefillPeer:
    """One prefill worker; raises WorkerLost for whatever says that it is gone."""

    def __init__(
        self,
        peers: PrefillPeers,
        target: PrefillTarget,
        stub: "PrefillServiceAsyncStub",
        transport: KvTransport,
    ) -> None:
        self._peers = peers
        self._target = target
        self._stub = stub
        self._transport = transport

    async def prefill(
        self,
        request: pb.PrefillRequest,
        landing: Callable[[], Landing],
        *,
        timeout_s: float,
        on_offer: Callable[[], None],
        on_done: Callable[[PrefillDone], None],
        on_stopped: Callable[[float], None],
    ) -> PrefillDone:
        """Have `request` prefilled and its latents in the landing's blocks, verified and released.

        `on_done` is called as soon as the first token is known, usually before all has landed.
        Raises the far side's refusal as it is; once it has offered, WorkerLost for whatever fails
        there, or DeadlineExceeded. Cancelling stops the prefill; `on_stopped` gets the seconds of
        compute that it had used, if the far side says so within CLEANUP_S.
        """
        deadline = time.monotonic() + timeout_s
        call = self._stub.Prefill(request, timeout=timeout_s, metadata=outgoing())
        offer: pb.HandoverOffer | None = None
        try:
            offer = await self._offer(call)
            on_offer()
            done = asyncio.create_task(self._done(call, on_done))
            await _all_or_first_error(
                done, asyncio.create_task(self._pull(call, offer, landing, deadline))
            )
            return done.result()
        except grpc.RpcError as error:
            cause = from_rpc_error(error)
            if isinstance(cause, Unavailable | Cancelled):
                self._peers.lost(self._target)
                offer = None
                raise self._lost(cause) from error
            asked_badly = isinstance(cause, InvalidRequest | FailedPrecondition)
            if offer is None or asked_badly or isinstance(cause, DeadlineExceeded):
                raise cause from error
            raise self._lost(cause) from error
        except (TransferError, TimeoutError) as error:
            raise self._lost(error) from error
        except asyncio.CancelledError:
            on_stopped(await self._stop(request))
            raise
        finally:
            call.cancel()
            if offer is not None:
                self._peers.later(self._release(offer))

    async def _stop(self, request: pb.PrefillRequest) -> float:
        """Tell it to stop; a worker that does not answer will see the broken stream."""
        with suppress(grpc.RpcError):
            stopped = await self._stub.StopPrefill(
                pb.StopPrefillRequest(id=request.task.id), timeout=CLEANUP_S
            )
            return stopped.busy_seconds
        return 0.0

    async def _offer(self, call: "PrefillCall") -> pb.HandoverOffer:
        async with asyncio.timeout(self._peers.config.offer_timeout_s):
            first = await call.read()
        if not isinstance(first, pb.PrefillResponse):
            raise TransferError("the prefill ended without an offer")
        return first.offer

    async def _done(
        self, call: "PrefillCall", on_done: Callable[[PrefillDone], None]
    ) -> PrefillDone:
        last = await call.read()
        if not isinstance(last, pb.PrefillResponse):
            raise TransferError("the prefill ended without a result")
        on_done(last.done)
        await call.read()  # the end of the stream: nothing is left to be cancelled
        return last.done

    async def _pull(
        self,
        call: "PrefillCall",
        offer: pb.HandoverOffer,
        landing: Callable[[], Landing],
        deadline: float,
    ) -> None:
        """Pull all; once more from the start if a segment is bad or the stream breaks.

        Through shared memory where both sides have the same, else in messages. If the prefill
        itself has failed, returns: that call says why.
        """
        ref = pb.HandoverRef(handover_id=offer.handover_id, epoch=offer.epoch)
        metrics = self._peers.metrics
        attempt = 1
        shared = True
        while True:
            target = landing()
            arena = await self._peers.lend(offer, target.shared.num_bytes) if shared else None
            try:
                await self._pull_once(ref, target, deadline, arena)
            except (TransferError, grpc.RpcError) as error:
                if await _has_failed(call):
                    return
                if arena is not None and _is_refusal_of_shm(error):
                    self._peers.not_shared("refused")
                    shared = False
                    continue
                if attempt == PULL_ATTEMPTS or time.monotonic() >= deadline:
                    raise
                attempt += 1
                logger.warning("pull repeated", extra={"why": str(error)})
                metrics.pull_retries.inc()
            else:
                metrics.pulls.labels("grpc" if arena is None else "shm").inc()
                metrics.handover_bytes.labels("received").inc(target.num_bytes)
                return

    async def _pull_once(
        self, ref: pb.HandoverRef, target: Landing, deadline: float, arena: ShmArena | None
    ) -> None:
        shm, window = None, None
        if arena is not None:
            shm, window = pb.ShmTarget(name=arena.name, num_bytes=arena.num_bytes), arena.memory
        timeout_s = max(deadline - time.monotonic(), 0.001)
        ended = False
        try:
            messages = self._transport.pull(ref, timeout_s=timeout_s, shm=shm)
            async with aclosing(one_ahead(messages)) as arrived:
                async for segments in arrived:
                    await in_thread(target.write, segments, window)
            ended = True
        finally:
            if arena is not None:
                self._peers.give_back(arena, reusable=ended)
        target.check_complete()

    async def _release(self, offer: pb.HandoverOffer) -> None:
        ref = pb.HandoverRef(handover_id=offer.handover_id, epoch=offer.epoch)
        with suppress(grpc.RpcError):  # its lease will end it
            await self._stub.ReleaseHandover(
                pb.ReleaseHandoverRequest(handover=ref), timeout=CLEANUP_S
            )

    def _lost(self, cause: Exception) -> WorkerLost:
        metadata = dict(cause.metadata) if isinstance(cause, TidemillError) else {}
        metadata |= {"worker_id": self._target.worker_id, "role": "prefill"}
        why = str(cause) or "no answer in time"
        return WorkerLost(f"prefill worker {self._target.worker_id}: {why}", metadata=metadata)


PrefillCall = grpc.aio.UnaryStreamCall[pb.PrefillRequest, pb.PrefillResponse]


def _is_refusal_of_shm(error: Exception) -> bool:
    return isinstance(error, grpc.RpcError) and from_rpc_error(error).reason == "SHM_UNAVAILABLE"


async def _has_failed(call: PrefillCall) -> bool:
    """Whether the call has ended badly, or does so within a moment."""
    with suppress(TimeoutError):
        async with asyncio.timeout(SETTLE_S):
            return await call.code() is not grpc.StatusCode.OK
    return False


async def _all_or_first_error(*tasks: "asyncio.Task[object]") -> None:
    """Wait for all; at the first error, or when cancelled, cancel the rest and see them end."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
