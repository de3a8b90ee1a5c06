"""How latents travel between workers: a protocol, and gRPC, the transport that always works."""

from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Protocol

from tidemill.api.common.v1.kv_pb2 import KvSegment
from tidemill.api.prefill.v1 import prefill_service_pb2 as pb
from tidemill.engine import BlockPool, KvLayout
from tidemill.kv.handover import Handover, HandoverState, HandoverTable
from tidemill.kv.segments import LatentRange, bytes_per_token, pack
from tidemill.kv.threads import in_thread

if TYPE_CHECKING:  # a name that only the stubs have
    from tidemill.api.prefill.v1.prefill_service_pb2_grpc import PrefillServiceAsyncStub

MAX_SEGMENTS = 4096  # a message's bound in the proto


class KvTransport(Protocol):
    """The puller's half. Yields segments in the order computed and ends when all were sent.

    Errors of the far side and of the connection are raised as they are; what a segment holds is
    for the caller to verify.
    """

    name: str

    def pull(
        self, handover: pb.HandoverRef, *, timeout_s: float
    ) -> AsyncGenerator[Sequence[KvSegment], None]:
        """Segments of an offered hand-over."""
        ...


class GrpcKvTransport:
    """Pulls through PrefillService.PullKv. Raises grpc.RpcError."""

    name = "grpc"

    def __init__(self, stub: "PrefillServiceAsyncStub", *, max_message_bytes: int) -> None:
        self._stub = stub
        self._max_message_bytes = max_message_bytes

    async def pull(
        self, handover: pb.HandoverRef, *, timeout_s: float
    ) -> AsyncGenerator[Sequence[KvSegment], None]:
        """Segments of an offered hand-over."""
        request = pb.PullKvRequest(handover=handover, max_message_bytes=self._max_message_bytes)
        call = self._stub.PullKv(request, timeout=timeout_s)
        try:
            async for message in call:
                yield message.segments
        finally:
            call.cancel()


class GrpcKvSource:
    """The source's half: an offered hand-over as a stream of messages of bounded size."""

    def __init__(self, pool: BlockPool, layout: KvLayout, handovers: HandoverTable) -> None:
        self._pool = pool
        self._token_bytes = bytes_per_token(layout)
        self._handovers = handovers

    async def stream(
        self, handover: Handover, *, max_message_bytes: int
    ) -> AsyncGenerator[pb.PullKvResponse, None]:
        """All of the hand-over from its start on, as it becomes ready.

        Raises FailedPrecondition (HANDOVER_CLOSED) if the hand-over ends first.
        """
        max_tokens = max(max_message_bytes // self._token_bytes, 1)
        handover.pulls += 1
        try:
            handover.state = HandoverState.PULLING
            index = 0
            while ranges := await handover.ranges_from(index):
                index += len(ranges)
                for batch in _batches(ranges, max_tokens):
                    message = await in_thread(pack, self._pool, handover.block_table, batch)
                    handover.check_open()
                    yield message
            handover.state = HandoverState.SENT
        finally:
            handover.pulls -= 1
            if not handover.state.closed:
                self._handovers.renew(handover)


def _batches(ranges: Sequence[LatentRange], max_tokens: int) -> list[list[LatentRange]]:
    """The ranges in order, cut and grouped so that no group exceeds `max_tokens`."""
    batches: list[list[LatentRange]] = [[]]
    room = max_tokens
    for part in ranges:
        start = part.start
        while start < part.end:
            if room == 0 or len(batches[-1]) == MAX_SEGMENTS:
                batches.append([])
                room = max_tokens
            end = min(part.end, start + room)
            batches[-1].append(LatentRange(part.layer, start, end))
            room -= end - start
            start = end
    return batches
