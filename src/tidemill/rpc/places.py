"""How many calls a server handles at once, and that nobody takes all of its places.

gRPC's own cap (`maximum_concurrent_rpcs`) refuses without saying why or when to come again. A place
is held until gRPC has done with the call: a client that does not take in how its call has ended
still costs memory.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tidemill.errors import Overloaded
from tidemill.rpc.interceptors import Call

_RETRY_S = 1.0


class Places:
    """Guard: `most` calls at a time, of them at most `most_health` that ask for health.

    Whoever may come in without credentials must not be able to take the places of all others.
    Raises Overloaded.
    """

    def __init__(self, most: int, *, most_health: int) -> None:
        self._most = most
        self._most_health = most_health
        self._taken = self._health = 0

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        """Take a place for the call."""
        if self._taken >= self._most:
            raise Overloaded(f"{self._most} calls are being handled", retry_after_s=_RETRY_S)
        if call.is_health and self._health >= self._most_health:
            raise Overloaded("too many ask for health", retry_after_s=_RETRY_S)
        self._taken += 1
        self._health += call.is_health
        call.when_over(lambda: self._leave(call))
        yield

    def _leave(self, call: Call) -> None:
        self._taken -= 1
        self._health -= call.is_health


class Shares:
    """Guard: who holds some of the `most` places may take one more while more are free than that.

    Alone one gets half of them, beside that one the next a quarter, so that there is room for
    those who have none. `holder` names who calls; None is not counted. Raises Overloaded.
    """

    def __init__(self, most: int, holder: Callable[[Call], str | None]) -> None:
        self._holder = holder
        self._free = most
        self._taken: Counter[str] = Counter()

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        """Take one of the caller's places for the call."""
        holder = self._holder(call)
        if holder is not None:
            own, free = self._taken[holder], self._free
            if own >= free:
                raise Overloaded(
                    f"{own} calls of {holder} are being handled, {free} places are free",
                    retry_after_s=_RETRY_S,
                )
            self._taken[holder] += 1
            self._free -= 1
            call.when_over(lambda: self._leave(holder))
        yield

    def _leave(self, holder: str) -> None:
        self._free += 1
        self._taken[holder] -= 1
        if not self._taken[holder]:
            del self._taken[holder]
