"""The source's side of a hand-over: what is ready to be pulled, and until when it is kept.

    OFFERED -> PULLING -> SENT -> RELEASED        the puller verified all and let go
        \\         \\        \\--> EXPIRED           nobody pulled, renewed or released in time
         \\---------\\-----------> ABORTED           the prefill was stopped or failed

A pull that breaks leaves the hand-over to its lease and may be repeated from the start.
"""

import asyncio
import enum
import secrets
from collections.abc import Callable, Sequence

from tidemill.errors import FailedPrecondition, NotFound
from tidemill.kv.segments import LatentRange

HANDOVER_ID_BYTES = 16


class HandoverState(enum.Enum):
    """The last three are final: the blocks are the pool's again."""

    OFFERED = "offered"
    PULLING = "pulling"
    SENT = "sent"
    RELEASED = "released"
    EXPIRED = "expired"
    ABORTED = "aborted"

    @property
    def closed(self) -> bool:
        """Whether the hand-over has ended."""
        return self in (HandoverState.RELEASED, HandoverState.EXPIRED, HandoverState.ABORTED)


class Handover:
    """One prompt's latents on offer: tokens [first_token, num_tokens) of every layer.

    `ready` and `close` are the event loop's; the engine thread posts there. `on_close` is called
    once, when the hand-over ends in whatever way.
    """

    def __init__(
        self,
        *,
        block_table: Sequence[int],
        num_layers: int,
        first_token: int,
        num_tokens: int,
        on_close: Callable[[HandoverState], None],
    ) -> None:
        self.handover_id = secrets.token_bytes(HANDOVER_ID_BYTES)
        self.block_table = block_table
        self.first_token = first_token
        self.num_tokens = num_tokens
        self.state = HandoverState.OFFERED
        self.deadline = 0.0
        self.pulls = 0
        self._on_close = on_close
        self._ranges: list[LatentRange] = []
        self._missing = (num_tokens - first_token) * num_layers
        self._changed = asyncio.Event()

    @property
    def complete(self) -> bool:
        """Whether all latents are ready."""
        return self._missing == 0

    def ready(self, layer: int, start: int, end: int) -> None:
        """Latents of positions [start, end) of one layer are final; what the asker holds is cut."""
        start = max(start, self.first_token)
        if start < end and not self.state.closed:
            self._ranges.append(LatentRange(layer, start, end))
            self._missing -= end - start
            self._wake()

    async def ranges_from(self, index: int) -> list[LatentRange]:
        """Ranges after the first `index`; waits for one; empty once complete.

        Raises FailedPrecondition (HANDOVER_CLOSED) if the hand-over ends meanwhile.
        """
        while True:
            self.check_open()
            if index < len(self._ranges) or self.complete:
                return self._ranges[index:]
            await self._changed.wait()

    def check_open(self) -> None:
        """Raise FailedPrecondition once the hand-over has ended."""
        if self.state.closed:
            raise FailedPrecondition(
                f"the hand-over is {self.state.value}", reason="HANDOVER_CLOSED"
            )

    def close(self, state: HandoverState) -> bool:
        """End it; returns False if it had ended before."""
        if self.state.closed:
            return False
        self.state = state
        self._wake()
        self._on_close(state)
        return True

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class HandoverTable:
    """The open hand-overs of one worker, each with a lease of `lease_s` on `clock`."""

    def __init__(self, *, epoch: int, lease_s: float, clock: Callable[[], float]) -> None:
        self.lease_s = lease_s
        self._epoch = epoch
        self._clock = clock
        self._open: dict[bytes, Handover] = {}

    def __len__(self) -> int:
        return len(self._open)

    def offer(self, handover: Handover) -> None:
        """Begin a lease."""
        self._open[handover.handover_id] = handover
        self.renew(handover)

    def get(self, handover_id: bytes, epoch: int) -> Handover:
        """The open hand-over; NotFound if it ended, FailedPrecondition for another epoch."""
        if epoch != self._epoch:
            raise FailedPrecondition(
                "the hand-over was offered before this worker restarted", reason="STALE_EPOCH"
            )
        handover = self._open.get(handover_id)
        if handover is None:
            raise NotFound("no such hand-over is open", reason="HANDOVER_NOT_FOUND")
        return handover

    def renew(self, handover: Handover) -> None:
        """Let the lease run its full length again from now."""
        handover.deadline = self._clock() + self.lease_s

    def close(self, handover: Handover, state: HandoverState) -> bool:
        """End a hand-over; returns False if it had ended before."""
        self._open.pop(handover.handover_id, None)
        return handover.close(state)

    def release(self, handover_id: bytes, epoch: int) -> bool:
        """The puller lets go. False, and no error, if the hand-over had ended before."""
        handover = self._open.get(handover_id) if epoch == self._epoch else None
        return handover is not None and self.close(handover, HandoverState.RELEASED)

    def sweep(self) -> int:
        """End the hand-overs whose lease has run out while nobody pulled; returns how many."""
        now = self._clock()
        late = [h for h in self._open.values() if h.deadline <= now]
        expired = 0
        for handover in late:
            if handover.pulls:
                self.renew(handover)
            else:
                expired += self.close(handover, HandoverState.EXPIRED)
        return expired
