"""GetMargin: cost, revenue and margin, from the journals of all accounts and the fleet's hours."""

import json
from collections.abc import AsyncIterator, Mapping

from services.router.fleet_hours import FleetHours
from services.router.keys import KeyStore
from services.router.money.accounts import Accounts
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb2
from tidemill.billing.ledger import JournalEntry
from tidemill.billing.margin import HOUR_MS, Cell, Dimension, Figures, Margin
from tidemill.errors import FailedPrecondition, InvalidRequest

DIMENSIONS = {
    admin_pb2.MARGIN_DIMENSION_TENANT: Dimension.TENANT,
    admin_pb2.MARGIN_DIMENSION_MODEL: Dimension.MODEL,
    admin_pb2.MARGIN_DIMENSION_HOUR: Dimension.HOUR,
    admin_pb2.MARGIN_DIMENSION_PHASE: Dimension.PHASE,
    admin_pb2.MARGIN_DIMENSION_TIER: Dimension.TIER,
}
MOST_ROWS = 10_000  # however long their names: what one message holds
_PAGE = 1000
_MOST_HOURS = 400 * 24


class MarginReports:
    """Reports on whole hours, up to what was settled just now.

    `hour_nano` is the price of an accelerator-hour by currency, nano-units.
    """

    def __init__(
        self,
        *,
        accounts: Accounts,
        store: KeyStore,
        hours: FleetHours,
        hour_nano: Mapping[str, int],
    ) -> None:
        self._accounts = accounts
        self._store = store
        self._hours = hours
        self._hour_nano = hour_nano

    async def report(self, request: admin_pb2.GetMarginRequest) -> admin_pb2.GetMarginResponse:
        """Answer a valid request.

        Raises InvalidRequest for instants that are not of whole hours in order, or too many, or
        for more than MOST_ROWS rows (TOO_MANY_ROWS), and FailedPrecondition (NO_ACCELERATOR_PRICE)
        where none is given or configured.
        """
        _check_span(request.from_ms, request.to_ms)
        hour_nano = self._price(request)
        margin = Margin()
        for tenant_id in await self._accounts.tenants():
            tenant = await self._store.tenant(tenant_id)
            of_currency = tenant.currency == request.currency
            await self._book(margin, tenant_id, request, of_currency=of_currency)
        await self._hours.write()
        for hour in await self._hours.read(request.from_ms, request.to_ms):
            margin.worker_hour(hour)
        rows = margin.rows([DIMENSIONS[by] for by in request.by], hour_nano=hour_nano)
        if len(rows) > MOST_ROWS:
            problem = f"makes {len(rows)} rows of these hours, at most {MOST_ROWS} are answered"
            raise InvalidRequest(
                f"by {problem}", reason="TOO_MANY_ROWS", violations=[("by", problem)]
            )
        return admin_pb2.GetMarginResponse(
            rows=[_row(cell, figures) for cell, figures in rows],
            currency=request.currency,
            accelerator_hour_nano=hour_nano,
        )

    def _price(self, request: admin_pb2.GetMarginRequest) -> int:
        if request.HasField("accelerator_hour_nano"):
            return request.accelerator_hour_nano
        if request.currency not in self._hour_nano:
            raise FailedPrecondition(
                f"no price of an accelerator-hour in {request.currency} is known: give one "
                "(--accelerator-hour-price, accelerator_hour_nano), or configure "
                "[router.money] accelerator_hour_nano",
                reason="NO_ACCELERATOR_PRICE",
            )
        return self._hour_nano[request.currency]

    async def _book(
        self,
        margin: Margin,
        tenant_id: str,
        request: admin_pb2.GetMarginRequest,
        *,
        of_currency: bool,
    ) -> None:
        span = range(request.from_ms, request.to_ms)
        async for entry in self._entries(tenant_id, request.from_ms):
            detail = json.loads(entry.detail) if entry.detail else {}
            if entry.kind == "settle" and detail["decided_at_ms"] in span:
                margin.work(tenant_id, detail, of_currency=of_currency)
                if of_currency:
                    margin.charge(tenant_id, detail)
            elif entry.kind == "release" and detail["unbilled"]["decided_at_ms"] in span:
                margin.work(tenant_id, detail["unbilled"], of_currency=of_currency)
            elif entry.kind == "refund" and entry.at_ms in span and of_currency:
                original = await self._accounts.request(tenant_id, detail["request_id"])
                assert original is not None
                assert original.posted is not None
                margin.refund(
                    tenant_id,
                    json.loads(original.posted.record),
                    at_ms=entry.at_ms,
                    amount_nano=-entry.postings["revenue"],
                )

    async def _entries(self, tenant_id: str, from_ms: int) -> AsyncIterator[JournalEntry]:
        """All since `from_ms`: what was decided then was posted then, or much later."""
        after = f"{from_ms - 1}-0" if from_ms else ""
        while page := await self._accounts.journal(tenant_id, after=after, limit=_PAGE):
            for _, entry in page:
                yield entry
            after = page[-1][0]


def _check_span(from_ms: int, to_ms: int) -> None:
    violations = [
        (name, "must be the first instant of an hour (UTC)")
        for name, instant in (("from_ms", from_ms), ("to_ms", to_ms))
        if instant % HOUR_MS
    ]
    if not from_ms < to_ms <= from_ms + _MOST_HOURS * HOUR_MS:
        violations.append(("to_ms", f"must follow from_ms, by at most {_MOST_HOURS} hours"))
    if violations:
        raise InvalidRequest(f"{violations[0][0]} {violations[0][1]}", violations=violations)


def _row(cell: Cell, figures: Figures) -> admin_pb2.MarginRow:
    return admin_pb2.MarginRow(
        tenant_id=cell.tenant_id,
        model=cell.model,
        hour_ms=cell.hour_ms,
        phase=cell.phase,
        tier=cell.tier,
        tokens=figures.tokens,
        accelerator_us=figures.accelerator_us,
        cost_nano=figures.cost_nano,
        revenue_nano=figures.revenue_nano,
        margin_nano=figures.margin_nano,
    )
