"""What work cost and what it earned: accelerator time, its price, and who they belong to.

Everything is booked in cells: tenant, model, UTC hour, phase and tier. Each hour's time is priced
with one rounding that its cells share, so rows agree to the nano-unit however cells are added up.
Prompts' compute belongs to the tokens that were computed; reused tiers earn and cost none.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Self

from tidemill.apportion import apportion, round_together
from tidemill.billing.integers import require_int

PREFILL = "prefill"
DECODE = "decode"
UNATTRIBUTED = "unattributed"  # busy, and told of by no request
IDLE = "idle"

COMPUTED = "computed"
REUSED = ("device", "host", "cache_ram", "cache_disk", "peer")
OUTPUT = "output"

HOUR_MS = 3_600_000
_HOUR_US = 3_600_000_000
_MISS = (PREFILL, COMPUTED)
_COMPLETION = (DECODE, OUTPUT)
_TIERS = {PREFILL: COMPUTED, DECODE: OUTPUT}


@dataclass(frozen=True, slots=True)
class BusyPart:
    """Microseconds of one worker's compute that one attempt used, prompt and output apart.

    The worker's owner pays for `accelerators` of them by the hour. Raises ValueError for another
    phase or a figure below its least, TypeError for what is no int.
    """

    worker_id: str
    phase: str  # "prefill" or "decode"
    busy_us: int
    accelerators: int = 1

    def __post_init__(self) -> None:
        if self.phase not in (PREFILL, DECODE):
            raise ValueError(f"phase is {self.phase!r}, not {PREFILL} or {DECODE}")
        if require_int(self.busy_us, "busy_us") < 0:
            raise ValueError(f"busy_us is negative: {self.busy_us}")
        if require_int(self.accelerators, "accelerators") < 1:
            raise ValueError(f"accelerators is {self.accelerators}, at least 1 computed it")

    @property
    def accelerator_us(self) -> int:
        """Time of all its accelerators together."""
        return self.busy_us * self.accelerators

    def to_json(self) -> dict[str, str | int]:
        """For the journal."""
        return {
            "worker_id": self.worker_id,
            "phase": self.phase,
            "busy_us": self.busy_us,
            "accelerators": self.accelerators,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """As `to_json` wrote it."""
        return cls(
            found["worker_id"], found["phase"], int(found["busy_us"]), int(found["accelerators"])
        )


class Dimension(StrEnum):
    """By what rows are told apart; the values are the fields of a cell."""

    TENANT = "tenant_id"
    MODEL = "model"
    HOUR = "hour_ms"
    PHASE = "phase"
    TIER = "tier"


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Cell:
    """Whose work it is, and what; what is empty or 0 is not told apart, or belongs to nobody."""

    tenant_id: str = ""
    model: str = ""
    hour_ms: int = 0
    phase: str = ""
    tier: str = ""

    def only(self, by: Sequence[Dimension]) -> "Cell":
        """Told apart by these alone, and what is nobody's work always."""
        found = {dimension.value: getattr(self, dimension) for dimension in by}
        if self.phase in (UNATTRIBUTED, IDLE):
            found["phase"] = self.phase
        return Cell(**found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Tokens billed, microseconds of accelerators, nano-units."""

    tokens: int = 0
    accelerator_us: int = 0
    cost_nano: int = 0
    revenue_nano: int = 0

    @property
    def margin_nano(self) -> int:
        """What is left."""
        return self.revenue_nano - self.cost_nano

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(
            tokens=self.tokens + other.tokens,
            accelerator_us=self.accelerator_us + other.accelerator_us,
            cost_nano=self.cost_nano + other.cost_nano,
            revenue_nano=self.revenue_nano + other.revenue_nano,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHour:
    """What one worker's counters grew by within an hour, microseconds."""

    worker_id: str
    model: str
    hour_ms: int
    prefill_us: int
    decode_us: int
    uptime_us: int
    accelerators: int


def hour_of(at_ms: int) -> int:
    """First instant of the UTC hour."""
    return at_ms - at_ms % HOUR_MS


class Margin:
    """Books work, charges, refunds and workers' hours; `rows` adds them up."""

    def __init__(self) -> None:
        self._cells: dict[Cell, Figures] = {}
        self._told_us: Counter[tuple[str, int]] = Counter()  # by worker and hour
        self._hours: list[WorkerHour] = []

    def work(self, tenant_id: str, record: Mapping[str, Any], *, of_currency: bool = True) -> None:
        """Book the compute of a settled or released request: its `model`, `decided_at_ms`, `busy`.

        Of another currency's account it only counts as told of.
        """
        hour_ms, model = hour_of(record["decided_at_ms"]), record["model"]
        for part in map(BusyPart.from_json, record["busy"]):
            self._told_us[part.worker_id, hour_ms] += part.accelerator_us
            if of_currency:
                cell = Cell(
                    tenant_id=tenant_id,
                    model=model,
                    hour_ms=hour_ms,
                    phase=part.phase,
                    tier=_TIERS[part.phase],
                )
                self._add(cell, Figures(accelerator_us=part.accelerator_us))

    def charge(self, tenant_id: str, record: Mapping[str, Any]) -> None:
        """Book the tokens and the revenue of a settled request, by its receipt's content."""
        tokens = {_MISS: record["cache_miss_tokens"], _COMPLETION: record["completion_tokens"]}
        hits = apportion(record["cache_hit_tokens"], _reused(record))
        tokens |= {(PREFILL, tier): count for tier, count in zip(REUSED, hits, strict=True)}
        revenue = _revenue(record, record["amount_nano"])
        for (phase, tier), count in tokens.items():
            nano = revenue[phase, tier]
            if count or nano:
                cell = _cell(tenant_id, record, hour_of(record["decided_at_ms"]), phase, tier)
                self._add(cell, Figures(tokens=count, revenue_nano=nano))

    def refund(
        self, tenant_id: str, record: Mapping[str, Any], *, at_ms: int, amount_nano: int
    ) -> None:
        """Book what was given back of a charge: in its own hour, split as the charge was."""
        for (phase, tier), nano in _revenue(record, amount_nano).items():
            if nano:
                cell = _cell(tenant_id, record, hour_of(at_ms), phase, tier)
                self._add(cell, Figures(revenue_nano=-nano))

    def worker_hour(self, hour: WorkerHour) -> None:
        """Book an hour of a worker, of which requests tell the larger part."""
        self._hours.append(hour)

    def rows(self, by: Sequence[Dimension], *, hour_nano: int) -> list[tuple[Cell, Figures]]:
        """Sums told apart `by`, in order; an accelerator-hour costs `hour_nano`."""
        sums: dict[Cell, Figures] = {}
        for cell, figures in self._priced(hour_nano):
            key = cell.only(by)
            sums[key] = sums.get(key, Figures()) + figures
        return [(key, sums[key]) for key in sorted(sums) if sums[key] != Figures()]

    def _priced(self, hour_nano: int) -> Iterable[tuple[Cell, Figures]]:
        cells = self._cells | self._nobodys()
        of_hour: dict[int, list[Cell]] = {}
        for cell in sorted(cells):
            of_hour.setdefault(cell.hour_ms, []).append(cell)
        for keys in of_hour.values():
            exact = [cells[cell].accelerator_us * hour_nano for cell in keys]
            for cell, cost_nano in zip(keys, round_together(exact, _HOUR_US), strict=True):
                yield cell, replace(cells[cell], cost_nano=cost_nano)

    def _nobodys(self) -> dict[Cell, Figures]:
        """Time that no request has told of; negative where it ran in the hour before it was told.

        Nothing is made of what was told of a worker in an hour of which it did not report itself.
        """
        busy_us: Counter[tuple[str, int]] = Counter()
        idle_us: Counter[tuple[str, int]] = Counter()
        known = {(each.worker_id, each.hour_ms): each.model for each in self._hours}
        for each in self._hours:
            busy = each.prefill_us + each.decode_us
            busy_us[each.model, each.hour_ms] += busy * each.accelerators
            idle_us[each.model, each.hour_ms] += (each.uptime_us - busy) * each.accelerators
        for (worker_id, hour_ms), model in known.items():
            busy_us[model, hour_ms] -= self._told_us[worker_id, hour_ms]
        return {
            Cell(model=model, hour_ms=hour_ms, phase=phase): Figures(accelerator_us=microseconds)
            for phase, found in ((UNATTRIBUTED, busy_us), (IDLE, idle_us))
            for (model, hour_ms), microseconds in found.items()
        }

    def _add(self, cell: Cell, figures: Figures) -> None:
        self._cells[cell] = self._cells.get(cell, Figures()) + figures


def _cell(tenant_id: str, record: Mapping[str, Any], hour_ms: int, phase: str, tier: str) -> Cell:
    return Cell(tenant_id=tenant_id, model=record["model"], hour_ms=hour_ms, phase=phase, tier=tier)


def _reused(record: Mapping[str, Any]) -> list[int]:
    return [record[f"reused_{tier}_tokens"] for tier in REUSED]


def _revenue(record: Mapping[str, Any], amount_nano: int) -> dict[tuple[str, str], int]:
    """An amount by phase and tier, as the record's exact costs are; prompts' is prefill's."""
    classes = ("hit_cost_pico", "miss_cost_pico", "output_cost_pico")
    hit, miss, output = apportion(amount_nano, [record[name] for name in classes])
    by_tier = zip(REUSED, apportion(hit, _reused(record)), strict=True)
    return {
        **{(PREFILL, tier): nano for tier, nano in by_tier},
        _MISS: miss,
        _COMPLETION: output,
    }
