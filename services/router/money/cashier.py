"""Carries intents to the ledger, by way of the spool while the ledger is away."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from services.router.crash_points import crash_point
from services.router.money.accounts import Accounts
from services.router.money.intent import Intent
from services.router.money.metrics import MoneyMetrics
from services.router.money.spool import Spool
from tidemill.billing import ledger as rules
from tidemill.errors import LedgerUnavailable, Unavailable

_RETRY_S = 0.25
_STORE_PATIENCE_S = 10.0

T = TypeVar("T")
Answer = rules.SettleReply | rules.ReleaseReply

logger = logging.getLogger(__name__)


class Cashier:
    """Every intent handed in is settled once, whatever becomes of the ledger and this process.

    `start`, then `run` in a task, then `close`.
    """

    def __init__(
        self,
        accounts: Accounts,
        spool: Callable[[], Spool],
        *,
        metrics: MoneyMetrics,
        now_ms: Callable[[], int],
        ledger_answers: Callable[[], bool],
        adopt_every_s: float,
    ) -> None:
        self._accounts = accounts
        self._open_spool = spool
        self._metrics = metrics
        self._now_ms = now_ms
        self._ledger_answers = ledger_answers
        self._adopt_every_s = adopt_every_s
        self._thread = ThreadPoolExecutor(1, "spool")
        self._spool: Spool | None = None
        self._spooled: dict[tuple[str, str], Intent] = {}
        self._unstored: dict[tuple[str, str], tuple[Intent, asyncio.Future[None]]] = {}
        self._replayed = False
        metrics.watch_spool(depth=lambda: len(self._spooled) + len(self._unstored))

    @property
    def readiness(self) -> str | None:
        """Why no request may be let in; None if every intent can be kept."""
        if self._unstored:
            return f"{len(self._unstored)} settlements can be written neither to ledger nor spool"
        if not self._replayed:
            return "the spool is being settled"
        return None

    def pending(self, tenant_id: str, request_id: str) -> Intent | None:
        """The request's intent, if it waits for the ledger here."""
        key = (tenant_id, request_id)
        if key in self._unstored:
            return self._unstored[key][0]
        return self._spooled.get(key)

    async def start(self) -> None:
        """Open the spool; ConfigError if that cannot be."""
        self._spool = await self._block(self._open_spool)

    async def submit(self, intent: Intent) -> Answer | None:
        """Settle or release now; None: the ledger is away and the intent is in the spool.

        Raises Unavailable SETTLEMENT_UNSTORED if it can be put nowhere; it is tried on.
        """
        try:
            return await self._post(intent)
        except LedgerUnavailable as error:
            logger.warning("spooling %s: %s", intent.command.request_id, error)
        except asyncio.CancelledError:
            self._store_now(intent)
            raise
        await self._store(intent)
        return None

    async def run(self) -> None:
        """Bring home what waits, until cancelled."""
        adopt_at = 0.0
        loop = asyncio.get_running_loop()
        while True:
            spool = self._opened()
            await self._retry_unstored()
            try:
                if loop.time() >= adopt_at:
                    await self._block(spool.adopt)
                    adopt_at = loop.time() + self._adopt_every_s
                if self._ledger_answers():
                    await self._replay(spool)
                    self._replayed = True
            except (LedgerUnavailable, OSError) as error:
                logger.warning("the spool waits: %s", error)
            await asyncio.sleep(_RETRY_S)

    async def close(self) -> None:
        """Give the spool back; its intents are settled by whoever takes it next."""
        for intent, _ in list(self._unstored.values()):
            self._store_now(intent)
        if self._spool is not None:
            await self._block(self._spool.close)
        self._thread.shutdown()

    async def _post(self, intent: Intent) -> Answer:
        command = replace(intent.command, now_ms=self._now_ms())
        crash_point("settle.before")
        if isinstance(command, rules.Settle):
            answer: Answer = await self._accounts.settle(intent.tenant_id, command)
        else:
            answer = await self._accounts.release(intent.tenant_id, command)
        crash_point("settle.after")
        self._metrics.answered(answer)
        self._metrics.lagged((self._now_ms() - intent.command.now_ms) / 1000)
        if isinstance(answer, rules.Stale | rules.AboveHold):
            logger.error(
                "the ledger refused a settlement: %s",
                answer,
                extra={"tenant_id": intent.tenant_id, "request_id": intent.command.request_id},
            )
        return answer

    async def _store(self, intent: Intent) -> None:
        """Into the spool; while that cannot be written, keep it here and have patience."""
        try:
            await self._append(intent)
        except OSError as error:
            logger.error("the spool cannot be written: %s", error)
            stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._unstored[intent.key] = (intent, stored)
            done, _ = await asyncio.wait([stored], timeout=_STORE_PATIENCE_S)
            if not done:
                raise Unavailable(
                    "the bill could be stored nowhere yet; ask for the receipt later",
                    reason="SETTLEMENT_UNSTORED",
                ) from error

    async def _append(self, intent: Intent) -> None:
        # Not to be torn by a cancelled caller: whether the record was written must be known.
        await asyncio.shield(self._block(lambda: self._opened().append(intent.encode())))
        self._spooled[intent.key] = intent
        self._metrics.spooled()

    def _store_now(self, intent: Intent) -> None:
        """Without waiting, for a task that is being ended; twice does no harm."""
        try:
            self._thread.submit(self._opened().append, intent.encode()).result()
        except OSError as error:
            logger.error("a settlement was lost to this router: %s", error)

    async def _retry_unstored(self) -> None:
        for key, (intent, stored) in list(self._unstored.items()):
            try:
                await self._append(intent)
            except OSError:
                try:
                    await self._post(intent)
                except LedgerUnavailable:
                    return
            del self._unstored[key]
            if not stored.done():
                stored.set_result(None)

    async def _replay(self, spool: Spool) -> None:
        for segment in await self._block(spool.closed_segments):
            await self._replay_segment(spool, segment)
        await self._block(spool.release_adopted)

    async def _replay_segment(self, spool: Spool, segment: Path) -> None:
        intents = [Intent.decode(each) for each in await self._block(lambda: spool.read(segment))]
        for intent in intents:
            self._spooled.setdefault(intent.key, intent)
        for intent in intents:
            crash_point("replay.before")
            await self._post(intent)
            crash_point("replay.after")
        await self._block(lambda: spool.remove(segment))
        for intent in intents:
            self._spooled.pop(intent.key, None)

    def _opened(self) -> Spool:
        assert self._spool is not None, "start() comes first"
        return self._spool

    async def _block(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
