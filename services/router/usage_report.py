"""Usage added up from settled requests, by key, model, day and tariff window. Pure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from enum import Enum
from typing import Any
from zoneinfo import ZoneInfo

from tidemill.billing import Reuse, Unbilled
from tidemill.billing.ledger import Request


class Dimension(Enum):
    """By what rows are told apart; numbers are those of the proto's UsageDimension."""

    KEY = 1
    MODEL = 2
    DAY = 3
    WINDOW = 4


@dataclass(kw_only=True, slots=True)
class Totals:
    """What the receipts of one row add up to: tokens, and nano-units."""

    requests: int = 0
    cache_hit_tokens: int = 0
    cache_miss_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    computed_tokens: int = 0
    reused: dict[str, int] = field(default_factory=lambda: {tier.name: 0 for tier in fields(Reuse)})
    unbilled_tokens: int = 0
    amount_nano: int = 0
    refunded_nano: int = 0
    saved_nano: int = 0


_SUMMED = (
    "cache_hit_tokens",
    "cache_miss_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "computed_tokens",
    "amount_nano",
    "saved_nano",
)
_UNBILLED = [f"unbilled_{reason.name}_tokens" for reason in fields(Unbilled)]

Key = tuple[str, ...]


class UsageReport:
    """Rows, keyed by their values of `by` in that order; days are those of `zone`.

    Of `key_id` and `model` alone, where they are given.
    """

    def __init__(
        self,
        by: Sequence[Dimension],
        zone: ZoneInfo,
        *,
        key_id: str | None = None,
        model: str | None = None,
    ) -> None:
        self._by = by
        self._zone = zone
        self._key_id = key_id
        self._model = model
        self._rows: dict[Key, Totals] = {}

    def add(self, request: Request, *, refunded_by_ms: int) -> None:
        """Count a settled request, and its refunds up to an instant."""
        assert request.posted is not None
        record: Mapping[str, Any] = json.loads(request.posted.record)
        if self._key_id not in {None, record["key_id"]}:
            return
        if self._model not in {None, record["model"]}:
            return
        key = tuple(self._value(dimension, record) for dimension in self._by)
        row = self._rows.setdefault(key, Totals())
        row.requests += 1
        for name in _SUMMED:
            setattr(row, name, getattr(row, name) + record[name])
        for tier in row.reused:
            row.reused[tier] += record[f"reused_{tier}_tokens"]
        row.unbilled_tokens += sum(record[name] for name in _UNBILLED)
        row.refunded_nano += sum(
            refund.amount_nano for refund in request.refunds if refund.at_ms <= refunded_by_ms
        )

    def rows(self) -> list[tuple[Key, Totals]]:
        """In order of their dimensions."""
        return sorted(self._rows.items(), key=lambda row: row[0])

    def _value(self, dimension: Dimension, record: Mapping[str, Any]) -> str:
        match dimension:
            case Dimension.KEY:
                return str(record["key_id"])
            case Dimension.MODEL:
                return str(record["model"])
            case Dimension.WINDOW:
                return str(record["window"])
            case Dimension.DAY:
                seconds, _ = divmod(int(record["decided_at_ms"]), 1000)
                return (
                    datetime.fromtimestamp(seconds, UTC).astimezone(self._zone).date().isoformat()
                )
