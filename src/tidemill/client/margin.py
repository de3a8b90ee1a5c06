"""What the SDK hands out about margin, and the call that asks for it.

Amounts are nano-units, 10^-9 of the currency's unit; instants milliseconds since the Unix epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from tidemill.api.router.v1 import admin_service_pb2 as admin_pb
from tidemill.client.calls import Call


class MarginBy(StrEnum):
    """By what margin is told apart."""

    TENANT = "tenant"
    MODEL = "model"
    HOUR = "hour"
    PHASE = "phase"
    TIER = "tier"


@dataclass(frozen=True, kw_only=True, slots=True)
class MarginRow:
    """Cost and revenue of some work; what was not asked for is "", `hour_ms` 0.

    Time that is nobody's has `phase` "idle", or "unattributed" if no request has told of it.
    """

    tenant_id: str
    model: str
    hour_ms: int
    phase: str
    tier: str
    tokens: int
    accelerator_us: int
    cost_nano: int
    revenue_nano: int

    @property
    def margin_nano(self) -> int:
        """What is left."""
        return self.revenue_nano - self.cost_nano

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `tidemill --json` prints them."""
        return {**asdict(self), "margin_nano": self.margin_nano}


@dataclass(frozen=True, kw_only=True, slots=True)
class MarginReport:
    """Rows, in order, and the price of an accelerator-hour that their cost is by."""

    rows: tuple[MarginRow, ...]
    currency: str
    accelerator_hour_nano: int

    @property
    def total(self) -> MarginRow:
        """All rows together."""
        return MarginRow(
            tenant_id="",
            model="",
            hour_ms=0,
            phase="",
            tier="",
            tokens=sum(row.tokens for row in self.rows),
            accelerator_us=sum(row.accelerator_us for row in self.rows),
            cost_nano=sum(row.cost_nano for row in self.rows),
            revenue_nano=sum(row.revenue_nano for row in self.rows),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `tidemill --json` prints them."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "total": self.total.to_dict(),
            "currency": self.currency,
            "accelerator_hour_nano": self.accelerator_hour_nano,
        }


def get_margin(
    from_ms: int,
    to_ms: int,
    *,
    by: Sequence[MarginBy | str],
    currency: str,
    accelerator_hour_nano: int | None,
) -> Call[MarginReport]:
    """Cost, revenue and margin of whole hours. ValueError for what is no dimension."""
    names = [f"MARGIN_DIMENSION_{MarginBy(each).name}" for each in by]
    return Call(
        lambda stubs: stubs.admin.GetMargin,
        admin_pb.GetMarginRequest(
            from_ms=from_ms,
            to_ms=to_ms,
            by=[admin_pb.MarginDimension.Value(name) for name in names],
            currency=currency,
            accelerator_hour_nano=accelerator_hour_nano,
        ),
        _report,
    )


def _report(message: admin_pb.GetMarginResponse) -> MarginReport:
    return MarginReport(
        rows=tuple(
            MarginRow(
                tenant_id=row.tenant_id,
                model=row.model,
                hour_ms=row.hour_ms,
                phase=row.phase,
                tier=row.tier,
                tokens=row.tokens,
                accelerator_us=row.accelerator_us,
                cost_nano=row.cost_nano,
                revenue_nano=row.revenue_nano,
            )
            for row in message.rows
        ),
        currency=message.currency,
        accelerator_hour_nano=message.accelerator_hour_nano,
    )
