"""Keeps this router's holds: their leases are renewed until they end, or until they are lost."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

from services.router.money.accounts import Accounts
from tidemill.billing import ledger as rules
from tidemill.errors import LedgerUnavailable

_BATCH = 500

logger = logging.getLogger(__name__)


class Leased(Protocol):
    """A hold as its lease sees it."""

    tenant_id: str
    request_id: str
    fence: int

    def lose(self) -> None:
        """Another router has it."""


class Leases:
    """The open holds of one router; each is renewed every third of `lease_ms`."""

    def __init__(
        self, accounts: Accounts, *, owner: str, lease_ms: int, now_ms: Callable[[], int]
    ) -> None:
        self._accounts = accounts
        self._owner = owner
        self._lease_ms = lease_ms
        self._now_ms = now_ms
        self._holds: dict[tuple[str, str], Leased] = {}

    def __len__(self) -> int:
        return len(self._holds)

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether the hold of (tenant id, request id) is kept."""
        return key in self._holds

    def add(self, hold: Leased) -> None:
        """Keep it from now on."""
        self._holds[hold.tenant_id, hold.request_id] = hold

    def discard(self, hold: Leased) -> None:
        """It has ended."""
        if self._holds.get((hold.tenant_id, hold.request_id)) is hold:
            del self._holds[hold.tenant_id, hold.request_id]

    async def run(self) -> None:
        """Renew until cancelled."""
        while True:
            await asyncio.sleep(self._lease_ms / 3000)
            try:
                await self.renew()
            except LedgerUnavailable as error:
                logger.warning("leases are not renewed: %s", error)

    async def renew(self) -> None:
        """Renew all once, and tell those that are lost."""
        by_account: defaultdict[str, list[Leased]] = defaultdict(list)
        for hold in self._holds.values():
            by_account[hold.tenant_id].append(hold)
        for tenant_id, holds in by_account.items():
            for first in range(0, len(holds), _BATCH):
                await self._renew(tenant_id, holds[first : first + _BATCH])

    async def _renew(self, tenant_id: str, holds: list[Leased]) -> None:
        command = rules.Renew(
            owner=self._owner,
            now_ms=self._now_ms(),
            lease_ms=self._lease_ms,
            holds=tuple((hold.request_id, hold.fence) for hold in holds),
        )
        lost = set((await self._accounts.renew(tenant_id, command)).lost)
        for hold in holds:
            if hold.request_id in lost and hold is self._holds.get((tenant_id, hold.request_id)):
                logger.error("another router has %s", hold.request_id)
                self.discard(hold)
                hold.lose()
