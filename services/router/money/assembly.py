"""All that handles money in one router, built from its configuration."""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from services.router.config import MoneyConfig
from services.router.metrics import RouterMetrics
from services.router.money.accounts import Accounts
from services.router.money.bank import Bank, Books
from services.router.money.cashier import Cashier
from services.router.money.clock import LedgerWatch
from services.router.money.leases import Leases
from services.router.money.ledger import Ledger
from services.router.money.metrics import MoneyMetrics
from services.router.money.resolver import Resolver
from services.router.money.retained import Workers
from services.router.money.signing import Signer
from services.router.money.spool import Spool
from services.router.money.treasury import Treasury
from services.router.tasks import OwnedTasks
from tidemill.billing import PriceBook
from tidemill.rpc import tasks

logger = logging.getLogger(__name__)


class Money:
    """The treasury and what keeps its promises; `start` before use, `stop` after everything."""

    def __init__(
        self,
        config: MoneyConfig,
        *,
        ledger: Ledger,
        book: PriceBook,
        signer: Signer,
        workers: Workers,
        owned: OwnedTasks,
        requests: RouterMetrics,
        registry: CollectorRegistry,
        now_ms: Callable[[], int],
    ) -> None:
        self.router_id = router_id = config.router_id or _own_id()
        lease_ms = round(config.lease_s * 1000)
        self.accounts = Accounts(ledger)
        self._watch = LedgerWatch(ledger, now_ms=now_ms)
        metrics = MoneyMetrics(registry)
        self._cashier = Cashier(
            self.accounts,
            lambda: Spool(config.spool_dir, router_id),
            metrics=metrics,
            now_ms=now_ms,
            ledger_answers=lambda: self._watch.answers,
            adopt_every_s=config.lease_s,
        )
        self.leases = Leases(self.accounts, owner=router_id, lease_ms=lease_ms, now_ms=now_ms)
        metrics.watch_holds("open", lambda: len(self.leases))
        bank = Bank(
            accounts=self.accounts,
            cashier=self._cashier,
            leases=self.leases,
            tasks=owned,
            signed=signer.signed,
            workers=workers,
            metrics=metrics,
            requests=requests,
            router_id=router_id,
            lease_ms=lease_ms,
            now_ms=now_ms,
        )
        self._books = Books(self.accounts, book)
        self.treasury = Treasury(bank, self._books, self._watch)
        self._resolver = Resolver(bank, self._books, self._watch)
        self.background: list[asyncio.Task[None]] = []
        self._failed: list[str] = []

    @property
    def readiness(self) -> str | None:
        """Why no request may be let in; None if money can be held and settled."""
        if self._failed:
            return f"{self._failed[0]} has failed"
        return self._watch.readiness or self._cashier.readiness

    async def start(self) -> None:
        """Open the spool and publish the price book; ConfigError, LedgerUnavailable."""
        await self._cashier.start()
        await self._watch.look()
        await self._books.publish()
        for name, part in (
            ("the ledger's watch", self._watch.run()),
            ("the cashier", self._cashier.run()),
            ("lease renewal", self.leases.run()),
            ("the resolver", self._resolver.run()),
        ):
            task = asyncio.create_task(part, name=name)
            task.add_done_callback(self._ended)
            self.background.append(task)

    async def stop(self) -> None:
        """Leave what is unsettled in the spool, for this router's return or another's."""
        await tasks.end(*self.background)
        await self._cashier.close()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """None of them ends by itself: health must tell of one that did."""
        if not task.cancelled():
            logger.error("%s ended", task.get_name(), exc_info=task.exception())
            self._failed.append(task.get_name())


def _own_id() -> str:
    """A name that no other router has."""
    host = "".join(char if char.isalnum() or char in "-." else "-" for char in socket.gethostname())
    return f"r-{host[:32]}-{os.getpid()}-{secrets.token_hex(4)}"
