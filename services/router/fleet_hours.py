"""What the fleet's time went into, hour by hour, in the ledger for good.

Workers report counters that only grow. Of each UTC hour the ledger keeps the first and the last
report that any router saw of each start of a worker:

tm:fleet:<YYYY-MM-DDTHH>   hash: <worker id>:<epoch>:first, ...:last -> JSON of a `Report`

Writing is idempotent, in any order and by several routers. An hour's growth is counted from the
last report of the hour before, so hours add up whatever was seen when. A worker takes some 400
bytes an hour.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from services.router.fleet import Description
from services.router.money.ledger import Ledger
from tidemill.billing.margin import HOUR_MS, WorkerHour, hour_of
from tidemill.errors import LedgerUnavailable

WRITE_S = 10.0
_SCRIPT = Path(__file__).with_name("fleet_hour.lua")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A worker's counters, microseconds since its start, as seen at `at_ms`."""

    model: str
    accelerators: int
    at_ms: int
    uptime_us: int
    prefill_us: int
    decode_us: int


Start = tuple[str, int]  # worker id, epoch
Seen = tuple[Report, Report]  # the first and the last of an hour


class FleetHours:
    """Takes every report, writes each hour's first and last ones, and reads all routers' back."""

    def __init__(self, ledger: Ledger, now_ms: Callable[[], int]) -> None:
        self._ledger = ledger
        self._now_ms = now_ms
        self._script = ledger.script(_SCRIPT)
        self._unwritten: dict[int, dict[Start, Seen]] = {}

    def saw(self, worker: Description, *, uptime_us: int, prefill_us: int, decode_us: int) -> None:
        """What a worker reports just now. One that reports no uptime does not count its time."""
        if not uptime_us:
            return
        report = Report(
            model=worker.model,
            accelerators=worker.accelerators,
            at_ms=self._now_ms(),
            uptime_us=uptime_us,
            prefill_us=prefill_us,
            decode_us=decode_us,
        )
        starts = self._unwritten.setdefault(hour_of(report.at_ms), {})
        start = worker.worker_id, worker.epoch
        starts[start] = starts.get(start, (report, report))[0], report

    async def run(self) -> None:
        """Write every `WRITE_S` seconds, and once more when cancelled."""
        try:
            while True:
                await asyncio.sleep(WRITE_S)
                await self._try()
        finally:
            await self._try()

    async def write(self) -> None:
        """Write what was seen since the last time; LedgerUnavailable leaves it for the next."""
        unwritten, self._unwritten = self._unwritten, {}
        while unwritten:
            hour_ms, starts = unwritten.popitem()
            try:
                await self._write(hour_ms, starts)
            except LedgerUnavailable:
                self._keep({**unwritten, hour_ms: starts})
                raise

    async def read(self, from_ms: int, to_ms: int) -> list[WorkerHour]:
        """What each worker did in each hour that begins in [from_ms, to_ms)."""
        hours = range(hour_of(from_ms) - HOUR_MS, to_ms, HOUR_MS)
        found = await self._ledger.run(lambda redis: _read(redis, hours))
        return list(growth({hour_ms: _parse(each) for hour_ms, each in found.items()}, from_ms))

    async def _try(self) -> None:
        try:
            await self.write()
        except LedgerUnavailable:
            logger.warning("the fleet's hours wait for the ledger")

    async def _write(self, hour_ms: int, starts: Mapping[Start, Seen]) -> None:
        arguments: list[str] = []
        for (worker_id, epoch), seen in starts.items():
            arguments += [f"{worker_id}:{epoch}", *(json.dumps(asdict(each)) for each in seen)]
        await self._ledger.run(lambda _: self._script(keys=[_name(hour_ms)], args=arguments))

    def _keep(self, earlier: Mapping[int, Mapping[Start, Seen]]) -> None:
        """What could not be written, with what was seen meanwhile."""
        for hour_ms, starts in earlier.items():
            later = self._unwritten.setdefault(hour_ms, {})
            for start, seen in starts.items():
                later[start] = seen[0], later.get(start, seen)[1]


def growth(seen: Mapping[int, Mapping[Start, Seen]], from_ms: int) -> Iterable[WorkerHour]:
    """What counters grew by in each hour from `from_ms` on, of what was seen in each.

    From the last report of the hour before. Without one from nothing, if the worker started in this
    hour, else from the first report: nobody knows what went before.
    """
    for hour_ms, starts in seen.items():
        if hour_ms < from_ms:
            continue
        for start, (first, last) in starts.items():
            before = seen.get(hour_ms - HOUR_MS, {}).get(start)
            began_ms = first.at_ms - first.uptime_us // 1000
            if before is not None:
                base = before[1]
            elif began_ms >= hour_ms:
                base = None
            else:
                base = first
            yield _grown(start[0], hour_ms, base, last)


def _grown(worker_id: str, hour_ms: int, base: Report | None, last: Report) -> WorkerHour:
    return WorkerHour(
        worker_id=worker_id,
        model=last.model,
        hour_ms=hour_ms,
        prefill_us=last.prefill_us - (base.prefill_us if base else 0),
        decode_us=last.decode_us - (base.decode_us if base else 0),
        uptime_us=last.uptime_us - (base.uptime_us if base else 0),
        accelerators=last.accelerators,
    )


def _name(hour_ms: int) -> str:
    return f"tm:fleet:{datetime.fromtimestamp(hour_ms / 1000, UTC):%Y-%m-%dT%H}"


async def _read(redis: Redis, hours: Iterable[int]) -> dict[int, dict[bytes, bytes]]:
    commands: Any = redis.pipeline(transaction=False)
    asked = list(hours)
    for hour_ms in asked:
        commands.hgetall(_name(hour_ms))
    return dict(zip(asked, await commands.execute(), strict=True))


def _parse(fields: Mapping[bytes, bytes]) -> dict[Start, Seen]:
    reports: dict[Start, dict[str, Report]] = {}
    for name, text in fields.items():
        worker_id, epoch, which = name.decode().rsplit(":", 2)
        reports.setdefault((worker_id, int(epoch)), {})[which] = Report(**json.loads(text))
    return {start: (each["first"], each["last"]) for start, each in reports.items()}
