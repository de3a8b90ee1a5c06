"""What was measured, and the table at the end.

TTFT is from sending to the first token, TPOT is (end - first token) / (tokens - 1), both on this
side's clock. Percentiles are exact over all complete answers; cancelled ones count in the totals
only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tidemill.client import Receipt, Usage


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer that came to its end. Seconds."""

    ttft_s: float | None
    total_s: float
    num_tokens: int
    usage: Usage
    receipt: Receipt | None
    cancelled: bool

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None below two tokens."""
        if self.ttft_s is None or self.num_tokens < 2:
            return None
        return (self.total_s - self.ttft_s) / (self.num_tokens - 1)


@dataclass(slots=True)
class Records:
    """All that one run saw."""

    answers: list[Answer] = field(default_factory=list)
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    @property
    def receipts(self) -> list[Receipt]:
        """Of all answers."""
        return [answer.receipt for answer in self.answers if answer.receipt is not None]

    def summary(self, elapsed_s: float) -> dict[str, Any]:
        """Plain values for JSON; times in milliseconds."""
        whole = [answer for answer in self.answers if not answer.cancelled]
        prompt = sum(answer.usage.prompt_tokens for answer in self.answers)
        hits = sum(answer.usage.cache_hit_tokens for answer in self.answers)
        output = sum(answer.usage.completion_tokens for answer in self.answers)
        return {
            "elapsed_s": round(elapsed_s, 3),
            "answers": len(whole),
            "cancelled": len(self.answers) - len(whole),
            "refused": self.refused,
            "failures": self.failures,
            "violations": self.violations,
            "prompt_tokens": prompt,
            "cache_hit_share": round(hits / prompt, 4) if prompt else 0.0,
            "completion_tokens": output,
            "output_tokens_per_s": round(output / elapsed_s, 1),
            "amount_nano": sum(receipt.amount_nano for receipt in self.receipts),
            "ttft_ms": _quantiles([a.ttft_s for a in whole if a.ttft_s is not None]),
            "tpot_ms": _quantiles([a.tpot_s for a in whole if a.tpot_s is not None]),
            "total_ms": _quantiles([a.total_s for a in whole]),
        }


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""
    lines = [
        f"{'':10}{'p50':>10}{'p90':>10}{'p99':>10}{'mean':>10}  ms",
        *(
            f"{title:10}" + "".join(f"{summary[key][name]:>10.1f}" for name in _COLUMNS)
            for title, key in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("E2E", "total_ms"))
        ),
        f"{summary['answers']} answers, {summary['cancelled']} cancelled, "
        f"{summary['refused']} refused, {len(summary['failures'])} failed, "
        f"{len(summary['violations'])} usage violations in {summary['elapsed_s']:.1f} s",
        f"{summary['prompt_tokens']} prompt tokens, {summary['cache_hit_share']:.1%} hits; "
        f"{summary['completion_tokens']} completion tokens, "
        f"{summary['output_tokens_per_s']:.1f} tokens/s",
    ]
    lines += [f"violation: {text}" for text in summary["violations"][:20]]
    lines += [f"failure: {text}" for text in summary["failures"][:20]]
    return "\n".join(lines)


_COLUMNS = ("p50", "p90", "p99", "mean")


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return dict.fromkeys(_COLUMNS, math.nan)
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return round(ordered[math.ceil(share * len(ordered)) - 1] * 1000, 3)

    mean = round(sum(ordered) / len(ordered) * 1000, 3)
    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "mean": mean}
