"""How latents travel between workers: in gRPC messages, which always works, or beside them.

On one host the messages may only say where in shared memory the latents lie (tidemill.kv.shm).
"""

from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tidemill.api.common.v1.kv_pb2 import KvSegment
from tidemill.api.prefill.v1 import prefill_service_pb2 as pb
from tidemill.engine import BlockPool, KvLayout
from tidemill.errors import FailedPrecondition
from tidemill.kv.handover import Handover, HandoverState, HandoverTable
from tidemill.kv.segments import LatentMemory, LatentRange, SharedLayout, pack, pack_shared
from tidemill.kv.shm import ShmWindows
from tidemill.kv.threads import in_thread
from tidemill.kv.wire import Wire

if TYPE_CHECKING:  # a name that only the stubs have
    from tidemill.api.prefill.v1.prefill_service_pb2_grpc import PrefillServiceAsyncStub

MAX_SEGMENTS = 4096  # a message's bound in the proto
SHARED_MESSAGE_BYTES = 8 << 20  # written into shared memory between two messages


class KvTransport(Protocol):
    """The puller's half. Yields segments in the order computed and ends when all were sent.

    Errors of the far side and of the connection are raised as they are; what a segment holds is
    for the caller to verify.
    """

    def pull(
        self, handover: pb.HandoverRef, *, timeout_s: float, shm: pb.ShmTarget | None = None
    ) -> AsyncGenerator[Sequence[KvSegment], None]:
        """Segments of an offered hand-over. With `shm` their data comes in that shared file."""
        ...


class GrpcKvTransport:
    """Pulls through PrefillService.PullKv. Raises grpc.RpcError."""

    def __init__(self, stub: "PrefillServiceAsyncStub", *, max_message_bytes: int) -> None:
        self._stub = stub
        self._max_message_bytes = max_message_bytes

    async def pull(
        self, handover: pb.HandoverRef, *, timeout_s: float, shm: pb.ShmTarget | None = None
    ) -> AsyncGenerator[Sequence[KvSegment], None]:
        """Segments of an offered hand-over. With `shm` their data comes in that shared file."""
        request = pb.PullKvRequest(
            handover=handover, max_message_bytes=self._max_message_bytes, shm=shm
        )
        call = self._stub.PullKv(request, timeout=timeout_s)
        try:
            async for message in call:
                yield message.segments
        finally:
            call.cancel()


class Packed(NamedTuple):
    """A PullKvResponse in wire format, and how many bytes of latents it moves."""

    message: Wire
    num_bytes: int


class KvSource:
    """The source's half: an offered hand-over as a stream of messages of bounded size.

    `windows` opens the shared memory that pullers name; None where none is configured.
    """

    def __init__(
        self,
        pool: BlockPool,
        layout: KvLayout,
        handovers: HandoverTable,
        *,
        windows: ShmWindows | None = None,
    ) -> None:
        self._memory = LatentMemory(pool)
        self._layout = layout
        self._handovers = handovers
        self._windows = windows

    async def stream(
        self,
        handover: Handover,
        *,
        max_message_bytes: int,
        shm: pb.ShmTarget | None = None,
    ) -> AsyncGenerator[Packed, None]:
        """All of the hand-over from its start on, as it becomes ready.

        With `shm` the latents are written there and the messages only say where. Raises
        FailedPrecondition (HANDOVER_CLOSED) if the hand-over ends first, (SHM_UNAVAILABLE) if the
        shared file cannot be used.
        """
        pack_some = partial(pack, self._memory, handover.block_table)
        if shm is not None:
            pack_some = await self._shared(handover, shm)
            max_message_bytes = SHARED_MESSAGE_BYTES
        token_bytes = self._memory.token_bytes
        max_tokens = max(max_message_bytes // token_bytes, 1)
        handover.pulls += 1
        try:
            handover.state = HandoverState.PULLING
            index = 0
            while ranges := await handover.ranges_from(index):
                index += len(ranges)
                for batch in _batches(ranges, max_tokens):
                    message = await in_thread(pack_some, batch)
                    handover.check_open()
                    yield Packed(message, sum(part.num_tokens for part in batch) * token_bytes)
            handover.state = HandoverState.SENT
        finally:
            handover.pulls -= 1
            if not handover.state.closed:
                self._handovers.renew(handover)

    async def _shared(self, handover: Handover, shm: pb.ShmTarget) -> "partial[Wire]":
        """`pack_shared` for this hand-over and the file that the puller named."""
        if self._windows is None:
            raise FailedPrecondition("no shared memory is configured", reason="SHM_UNAVAILABLE")
        places = SharedLayout(
            self._layout, first_token=handover.first_token, num_tokens=handover.num_tokens
        )
        window = await in_thread(self._windows.look, shm.name, shm.num_bytes, need=places.num_bytes)
        return partial(
            pack_shared, self._memory, handover.block_table, window=window, places=places
        )


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
