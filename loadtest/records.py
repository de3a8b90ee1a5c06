"""What was measured, and the table at the end.

All times are this side's clock. TTFT is from sending to the first token; TPOT is (end - first
token) / (tokens - 1); ITL is each gap between two messages that carry tokens, so it is not TPOT
where a message carries several; goodput is the rate of answers that met both objectives.
Percentiles are exact, over the answers that were read as they came and to their end; those
cancelled, abandoned or read slowly on purpose count in the totals and in the books.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tidemill.client import Receipt, Usage


class Behaviour(StrEnum):
    """What a customer does about its answer."""

    READS = "reads"
    CANCELS = "cancels"  # by CancelGeneration, at some token, and reads on to the bill
    HANGS_UP = "hangs up"  # and never asks again
    READS_SLOWLY = "reads slowly"
    ASKS_AGAIN = "asks again"  # under the same id: after the end, or after hanging up
    SAMPLE = "sample"  # the run's first request, which has a text counted


class End(StrEnum):
    """What became of a request."""

    WHOLE = "whole"
    HUNG_UP = "hung up"
    REFUSED = "refused"  # for lack of room, before it was let in
    FAILED = "failed"


@dataclass(slots=True)
class Asked:
    """One request. Seconds; instants since the run's start."""

    request_id: str
    behaviour: Behaviour
    due_s: float
    sent_s: float
    end: End = End.FAILED
    ended_s: float = math.nan
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0  # as Accepted told
    times_accepted: int = 0
    received_tokens: int = 0  # most of any one call
    usage: Usage | None = None
    receipts: list[Receipt] = field(default_factory=list)

    @property
    def total_s(self) -> float:
        """From sending to the last message."""
        return self.ended_s - self.sent_s

    @property
    def timed(self) -> bool:
        """Whether its times are the service's and not the customer's doing."""
        return self.behaviour is Behaviour.READS and self.end is End.WHOLE

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None below two tokens."""
        if self.ttft_s is None or self.received_tokens < 2:
            return None
        return (self.total_s - self.ttft_s) / (self.received_tokens - 1)


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a customer calls good, in seconds."""

    ttft_s: float
    tpot_s: float

    def met(self, asked: Asked) -> bool:
        """Whether both are met; an answer of one token has no TPOT to miss."""
        return (
            asked.timed
            and asked.ttft_s is not None
            and asked.ttft_s <= self.ttft_s
            and (asked.tpot_s or 0.0) <= self.tpot_s
        )


@dataclass(slots=True)
class Records:
    """All that one run saw. `held_back` were due while the most that may be open were open."""

    objectives: Objectives
    asked: list[Asked] = field(default_factory=list)
    held_back: int = 0
    failures: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    @property
    def timed(self) -> list[Asked]:
        """Those that percentiles are over."""
        return [asked for asked in self.asked if asked.timed]

    def num(self, end: End) -> int:
        """Requests that ended so."""
        return sum(asked.end is end for asked in self.asked)

    def summary(self, elapsed_s: float) -> dict[str, Any]:
        """Plain values for JSON; times in milliseconds."""
        timed = self.timed
        usages = [asked.usage for asked in self.asked if asked.usage is not None]
        prompt = sum(usage.prompt_tokens for usage in usages)
        hits = sum(usage.cache_hit_tokens for usage in usages)
        output = sum(usage.completion_tokens for usage in usages)
        good = sum(map(self.objectives.met, self.asked))
        judged = [asked for asked in self.asked if asked.behaviour is Behaviour.READS]
        return {
            "elapsed_s": round(elapsed_s, 3),
            "requests": len(self.asked),
            "ends": {end.value: self.num(end) for end in End},
            "behaviours": {
                each.value: sum(asked.behaviour is each for asked in self.asked)
                for each in Behaviour
            },
            "held_back": self.held_back,
            "failures": self.failures,
            "violations": self.violations,
            "requests_per_s": round(len(self.asked) / elapsed_s, 3),
            "goodput_per_s": round(good / elapsed_s, 3),
            "good_share": round(good / len(judged), 4) if judged else 0.0,
            "prompt_tokens": prompt,
            "cache_hit_share": round(hits / prompt, 4) if prompt else 0.0,
            "completion_tokens": output,
            "output_tokens_per_s": round(output / elapsed_s, 1),
            "late_ms": quantiles(asked.sent_s - asked.due_s for asked in self.asked),
            "ttft_ms": quantiles(a.ttft_s for a in timed if a.ttft_s is not None),
            "tpot_ms": quantiles(a.tpot_s for a in timed if a.tpot_s is not None),
            "itl_ms": quantiles(gap for asked in timed for gap in asked.gaps_s),
            "total_ms": quantiles(asked.total_s for asked in timed),
        }


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""
    rows = (
        ("TTFT", "ttft_ms"),
        ("TPOT", "tpot_ms"),
        ("ITL", "itl_ms"),
        ("E2E", "total_ms"),
        ("sent late", "late_ms"),
    )
    ends = ", ".join(f"{count} {end}" for end, count in summary["ends"].items() if count)
    lines = [
        f"{'':10}" + "".join(f"{name:>10}" for name in COLUMNS) + "  ms",
        *(
            f"{title:10}" + "".join(f"{summary[key][name]:>10.1f}" for name in COLUMNS)
            for title, key in rows
        ),
        f"{summary['requests']} requests: {ends}; {summary['held_back']} held back, "
        f"{len(summary['violations'])} usage violations, in {summary['elapsed_s']:.1f} s",
        f"goodput {summary['goodput_per_s']:.2f} of {summary['requests_per_s']:.2f} requests/s; "
        f"of those read plainly {summary['good_share']:.1%} were good",
        f"{summary['prompt_tokens']} prompt tokens, {summary['cache_hit_share']:.1%} hits; "
        f"{summary['completion_tokens']} completion tokens, "
        f"{summary['output_tokens_per_s']:.1f} tokens/s",
    ]
    lines += [f"violation: {text}" for text in summary["violations"][:20]]
    lines += [f"failure: {text}" for text in summary["failures"][:20]]
    return "\n".join(lines)


COLUMNS = ("p50", "p90", "p95", "p99", "mean")


def quantiles(seconds: Iterable[float]) -> dict[str, float]:
    """Milliseconds: the percentiles of COLUMNS, nearest rank, and the mean; zeros of nothing."""
    ordered: Sequence[float] = sorted(seconds)
    if not ordered:
        return dict.fromkeys(COLUMNS, 0.0)

    def at(percent: int) -> float:
        return round(ordered[math.ceil(percent / 100 * len(ordered)) - 1] * 1000, 3)

    mean = round(sum(ordered) / len(ordered) * 1000, 3)
    return {"p50": at(50), "p90": at(90), "p95": at(95), "p99": at(99), "mean": mean}
