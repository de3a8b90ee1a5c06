"""What the processes of a stack hold, sampled from outside: memory, descriptors, threads, slots."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

_PAGE_TIMEOUT_S = 10.0

# Name in a report: gauges whose sum it is, less those with a minus.
SLOTS = {
    "blocks": ("tidemill_worker_blocks", "-tidemill_worker_blocks_free"),
    "sequences": ("tidemill_worker_running",),
    "hand-overs": ("tidemill_worker_open_handovers",),
    "finals": ("tidemill_worker_finals_kept",),
    "requests": ("tidemill_router_queued_requests", "tidemill_router_running_requests"),
    "holds": ("tidemill_router_holds",),
    "spool": ("tidemill_router_spool_depth",),
}


@dataclass
class Watch:
    """Samples by (process, what): "RSS" in bytes, "descriptors", "threads", and SLOTS.

    `pids` are the processes by name, `pages` the metrics pages of those that have one.
    """

    pids: Mapping[str, int]
    pages: Mapping[str, str]
    times_s: list[float] = field(default_factory=list)
    series: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    started_at: float = field(default_factory=time.monotonic)

    def sample(self) -> None:
        """Take one. FileNotFoundError if a process is gone."""
        self.times_s.append(time.monotonic() - self.started_at)
        for name, pid in self.pids.items():
            for what, value in _process(pid).items():
                self.series.setdefault((name, what), []).append(value)
        for name, page in self.pages.items():
            for what, value in slots(page).items():
                self.series.setdefault((name, what), []).append(value)

    def last(self, what: str) -> dict[str, float]:
        """The newest sample of `what`, by process."""
        return {name: values[-1] for (name, each), values in self.series.items() if each == what}


def read_pids(path: Path) -> dict[str, int]:
    """The file in which a stack notes who is running."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: int(pid) for pid, name in (line.split() for line in lines)}


def slots(page: str) -> dict[str, float]:
    """SLOTS of one process, as many as its page shows."""
    with urlopen(page, timeout=_PAGE_TIMEOUT_S) as answer:  # noqa: S310 - our own loopback port
        text = answer.read().decode()
    gauges: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        if family.type == "gauge":
            gauges[family.name] = sum(sample.value for sample in family.samples)
    found = {}
    for what, parts in SLOTS.items():
        if all(part.removeprefix("-") in gauges for part in parts):
            signed = ((-1 if part[0] == "-" else 1, part.removeprefix("-")) for part in parts)
            found[what] = sum(sign * gauges[part] for sign, part in signed)
    return found


def _process(pid: int) -> dict[str, float]:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in status)
    return {
        "RSS": int(fields["VmRSS"].split()[0]) * 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208 - names alone
        "threads": int(fields["Threads"]),
    }
