"""PrefillService: proto in front of Prefiller and the hand-overs."""

from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
import grpc.aio

from tidemill.api.prefill.v1 import prefill_service_pb2 as pb
from tidemill.api.prefill.v1.prefill_service_pb2_grpc import (
    PrefillServiceServicer,
    add_PrefillServiceServicer_to_server,
)
from tidemill.errors import InvalidRequest
from tidemill.kv.handover import Handover
from tidemill.kv.threads import one_ahead
from tidemill.kv.transport import KvSource
from tidemill.kv.wire import Wire, override, serialize
from tidemill.rpc.interceptors import Context
from tidemill.rpc.validation import validate
from tidemill.worker.prefiller import Prefiller, PrefillTask
from tidemill.worker.worker import Worker

SERVICE = pb.DESCRIPTOR.services_by_name["PrefillService"].full_name


class PrefillService(PrefillServiceServicer):
    """Serves prefills and their hand-overs for one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._prefiller = Prefiller(worker)
        self._source = KvSource(
            worker.engine.pool,
            worker.engine.layout,
            worker.handovers,
            windows=None if worker.shared is None else worker.shared.windows,
        )

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Serve; PullKv's messages as they are."""
        add_PrefillServiceServicer_to_server(self, server)
        pull = grpc.unary_stream_rpc_method_handler(
            self.PullKv,
            request_deserializer=pb.PullKvRequest.FromString,
            response_serializer=serialize,
        )
        override(server, SERVICE, "PullKv", pull)

    async def Prefill(
        self, request: pb.PrefillRequest, context: Context
    ) -> AsyncIterator[pb.PrefillResponse]:
        """The offer at once, PrefillDone when all is computed; a caller that leaves stops it."""
        validate(request)
        self._check_transport(request)
        wanted = PrefillTask(request.task, request.held_tokens)
        job = await self._prefiller.admit(wanted, request.layout_fingerprint)
        delivered = False
        try:
            yield pb.PrefillResponse(offer=self._offer(job.handover))
            yield pb.PrefillResponse(done=await job.result())
            delivered = True
        finally:
            if not delivered:
                job.abandon()

    async def PullKv(  # type: ignore[override]  # serialized already: add_to_server
        self, request: pb.PullKvRequest, context: Context
    ) -> AsyncIterator[Wire]:
        """The hand-over's latents from its start on."""
        validate(request)
        max_message_bytes = self._worker.config.handover.max_message_bytes
        if request.HasField("max_message_bytes"):
            max_message_bytes = request.max_message_bytes
        messages = self._source.stream(
            self._find(request.handover),
            max_message_bytes=max_message_bytes,
            shm=request.shm if request.HasField("shm") else None,
        )
        async with aclosing(one_ahead(messages)) as packed:
            async for message, num_bytes in packed:
                self._worker.metrics.handover_bytes.labels("sent").inc(num_bytes)
                yield message

    async def RenewHandover(
        self, request: pb.RenewHandoverRequest, context: Context
    ) -> pb.RenewHandoverResponse:
        """The lease begins again."""
        validate(request)
        self._worker.handovers.renew(self._find(request.handover))
        return pb.RenewHandoverResponse(lease_ms=self._lease_ms())

    async def ReleaseHandover(
        self, request: pb.ReleaseHandoverRequest, context: Context
    ) -> pb.ReleaseHandoverResponse:
        """The puller has all it wants."""
        validate(request)
        released = self._worker.handovers.release(
            request.handover.handover_id, request.handover.epoch
        )
        return pb.ReleaseHandoverResponse(released=released)

    async def StopPrefill(
        self, request: pb.StopPrefillRequest, context: Context
    ) -> pb.StopPrefillResponse:
        """Stop between chunks."""
        validate(request)
        job = await self._prefiller.stop(request.id)
        if job is None:
            return pb.StopPrefillResponse()
        return pb.StopPrefillResponse(
            stopped=True, computed_tokens=job.num_computed_tokens, busy_seconds=job.busy_seconds
        )

    def _find(self, ref: pb.HandoverRef) -> Handover:
        return self._worker.handovers.get(ref.handover_id, ref.epoch)

    def _lease_ms(self) -> int:
        return round(self._worker.handovers.lease_s * 1000)

    def _offer(self, handover: Handover) -> pb.HandoverOffer:
        return pb.HandoverOffer(
            handover_id=handover.handover_id,
            epoch=self._worker.epoch,
            lease_ms=self._lease_ms(),
            first_token=handover.first_token,
            num_tokens=handover.num_tokens,
            shm_id=b"" if self._worker.shared is None else self._worker.shared.folder.id,
        )

    def _check_transport(self, request: pb.PrefillRequest) -> None:
        asked = request.kv_transport
        if request.HasField("kv_transport") and asked not in self._worker.kv_transports:
            problem = f"{asked!r} is not spoken here"
            raise InvalidRequest(f"kv_transport {problem}", violations=[("kv_transport", problem)])
