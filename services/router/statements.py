"""What an account's holder may read of its receipts: pages, usage, one receipt."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from zoneinfo import ZoneInfo

from services.router.finish import Completed
from services.router.money import record
from services.router.money.accounts import Accounts
from services.router.money.reads import Cursor
from services.router.money.signing import Signer
from services.router.usage_report import Dimension, Key, Totals, UsageReport
from tidemill.billing.ledger import Refunded, Request
from tidemill.errors import LedgerUnavailable, NotFound

_SCAN_PAGE = 50  # streams wait while one is decoded
_MOST_SCANNED = 5_000  # for one page of receipts: a rare key's page may come back short

PendingLookup = Callable[[str, str], Completed | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Receipts with from_ms <= decided_at_ms < to_ms; None: of every key, of every model."""

    from_ms: int
    to_ms: int
    key_id: str | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A moment of the account: receipts chained up to `position`, refunds made by `at_ms`.

    A receipt may be settled late into a span that was asked for before; pages of one answer do
    not see it.
    """

    position: int
    at_ms: int


@dataclass(frozen=True, kw_only=True)
class Statements:
    """Reads one tenant's receipts from the ledger. Raises LedgerUnavailable.

    `pending(tenant id, request id)` is what this router has priced, signed and not yet settled.
    """

    accounts: Accounts
    signer: Signer
    pending: PendingLookup
    now_ms: Callable[[], int]

    async def snapshot(self, tenant_id: str) -> Snapshot:
        """As of now."""
        return Snapshot(position=await self.accounts.position(tenant_id), at_ms=self.now_ms())

    async def receipts(
        self,
        tenant_id: str,
        span: Span,
        snapshot: Snapshot,
        *,
        after: Cursor | None,
        limit: int,
    ) -> tuple[list[Completed], Cursor | None]:
        """Up to `limit` signed receipts that follow `after`, and where to go on; None: no more."""
        found: list[Completed] = []
        num_scanned = 0
        async for request, cursor in self._settled(tenant_id, span, snapshot, after):
            if len(found) == limit or num_scanned == _MOST_SCANNED:
                return found, after
            after = cursor
            num_scanned += 1
            assert request.posted is not None
            completed = record.settled(request.posted).completed
            if _matches(completed, span):
                found.append(self.signer.signed(completed))
        return found, None

    async def usage(
        self,
        tenant_id: str,
        span: Span,
        snapshot: Snapshot,
        *,
        by: Sequence[Dimension],
        zone: ZoneInfo,
    ) -> list[tuple[Key, Totals]]:
        """All of the span, added up."""
        report = UsageReport(by, zone, key_id=span.key_id, model=span.model)
        async for request, _ in self._settled(tenant_id, span, snapshot, None):
            report.add(request, refunded_by_ms=snapshot.at_ms)
        return report.rows()

    async def receipt(
        self, tenant_id: str, request_id: str
    ) -> tuple[Completed, Sequence[Refunded]]:
        """The receipt, PENDING if this router still carries it, and its refunds. NotFound."""
        pending = self.pending(tenant_id, request_id)
        try:
            request = await self.accounts.request(tenant_id, request_id)
        except LedgerUnavailable:
            if pending is None:
                raise
            request = None
        if request is not None and request.posted is not None:
            completed = record.settled(request.posted).completed
            return self.signer.signed(completed), request.refunds
        if pending is None:
            raise NotFound(
                f"nothing was settled under {request_id}",
                reason="RECEIPT_NOT_FOUND",
                metadata={} if request is None else {"state": request.state.value},
            )
        return pending, ()

    async def _settled(
        self, tenant_id: str, span: Span, snapshot: Snapshot, after: Cursor | None
    ) -> AsyncIterator[tuple[Request, Cursor]]:
        while True:
            page, after = await self.accounts.receipts(
                tenant_id,
                from_ms=span.from_ms,
                to_ms=span.to_ms,
                after=after,
                limit=_SCAN_PAGE,
            )
            for request in page:
                assert request.posted is not None
                if request.posted.position <= snapshot.position:
                    yield request, (request.decided_at_ms, request.request_id)
            if after is None:
                return


def _matches(completed: Completed, span: Span) -> bool:
    receipt = completed.receipt
    return span.key_id in {None, receipt.key_id} and span.model in {None, receipt.model}
