"""Whether the ledger is there, since when, and how far this router's clock is from its (M6)."""

import asyncio
from collections.abc import Callable

from redis.asyncio import Redis

from services.router.money.ledger import Ledger
from tidemill.errors import LedgerUnavailable

MAX_OFFSET_MS = 500


class LedgerWatch:
    """Asks the ledger every `period_s` seconds.

    `offset_ms` is by how much this router's clock is ahead of the ledger's, as of the last answer,
    as little as the answer's time on the way leaves open; `up_since_ms` is since when the ledger's
    present process can be reached, here without a break: where it hung or was cut off, the owners
    of holds could not renew them either.
    """

    def __init__(self, ledger: Ledger, *, now_ms: Callable[[], int], period_s: float = 0.5) -> None:
        self._ledger = ledger
        self._now_ms = now_ms
        self._period_s = period_s
        self.answers = True
        self.offset_ms = 0
        self.up_since_ms = 0
        self._back_since_ms = 0

    @property
    def readiness(self) -> str | None:
        """Why no request may be let in; None if the ledger is there and the clocks agree."""
        if not self.answers:
            return "the ledger does not answer"
        if abs(self.offset_ms) > MAX_OFFSET_MS:
            return f"this router's clock is {self.offset_ms} ms off the ledger's"
        return None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._period_s)

    async def look(self) -> None:
        """Ask once."""
        asked_ms = self._now_ms()
        try:
            ledger_ms = await self._ledger.run(_time_ms)
            answered_ms = self._now_ms()
            up_since_ms = await self._ledger.up_since_ms(answered_ms)
        except LedgerUnavailable:
            self.answers = False
            return
        if not self.answers:
            self._back_since_ms = answered_ms
        self.up_since_ms = max(up_since_ms, self._back_since_ms)
        self.offset_ms = offset_ms(asked_ms, ledger_ms, answered_ms)
        self.answers = True


def offset_ms(asked_ms: int, ledger_ms: int, answered_ms: int) -> int:
    """By how much the asker's clock is ahead at least, negative if behind; 0 if it may be right."""
    if asked_ms > ledger_ms:
        return asked_ms - ledger_ms
    if answered_ms < ledger_ms:
        return answered_ms - ledger_ms
    return 0


async def _time_ms(redis: Redis) -> int:
    seconds, microseconds = await redis.time()
    return int(seconds) * 1000 + int(microseconds) // 1000
