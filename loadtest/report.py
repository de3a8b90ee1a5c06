"""A run as a page with plots: docs/reports/NAME/README.md and its SVGs.

The page holds the command, commit and device it came from, what was asked for, the percentiles,
and the books side by side.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.records import COLUMNS

Run = Mapping[str, Any]
Source = Mapping[str, Any]

_TIMES = (
    ("TTFT", "ttft_ms"),
    ("TPOT", "tpot_ms"),
    ("ITL", "itl_ms"),
    ("whole answer", "total_ms"),
    ("sent late", "late_ms"),
)
_MOST_POINTS = 200  # of one curve: an SVG is read by people, and kept in git
_SLOTS = 30

# Without dates and random ids the same run gives the same file.
mpl.rcParams["svg.hashsalt"] = "tidemill"
mpl.rcParams["svg.fonttype"] = "none"  # text stays text: a third of the size
_METADATA = {"Date": None, "Creator": None}


def write_report(run: Run, source: Source, folder: Path) -> Path:
    """Write the page of one run, and return it."""
    into = folder / str(run["scenario"])
    into.mkdir(parents=True, exist_ok=True)
    plot(into / "latency.svg", partial(_latency, run), num=3, xlabel="ms")
    plot(into / "course.svg", partial(_course, run), num=3, xlabel="seconds")
    page = into / "README.md"
    page.write_text("\n".join(_page(run, source)) + "\n", encoding="utf-8")
    return page


def plot(path: Path, draw: Callable[[Sequence[Axes]], None], *, num: int, xlabel: str) -> None:
    """`num` panels side by side, as `draw` fills them in."""
    figure = Figure(figsize=(4 * num, 3.2), layout="constrained")
    panels = [figure.add_subplot(1, num, index + 1) for index in range(num)]
    for panel in panels:
        panel.set_xlabel(xlabel)
        panel.grid(alpha=0.3)
    draw(panels)
    figure.savefig(path, format="svg", metadata=_METADATA)


def _latency(run: Run, panels: Sequence[Axes]) -> None:
    rows = [row for row in run["requests"] if _timed(row)]
    objectives = run["options"]
    columns = (
        ("TTFT, ms", [row["ttft_s"] * 1e3 for row in rows if row["ttft_s"] is not None]),
        ("TPOT, ms", [row["tpot_s"] * 1e3 for row in rows if row["tpot_s"] is not None]),
        ("ITL, ms", [gap for row in rows for gap in row["gaps_ms"]]),
    )
    limits = (objectives["ttft_objective"] * 1e3, objectives["tpot_objective"] * 1e3, None)
    for panel, (name, values), limit in zip(panels, columns, limits, strict=True):
        xs, ys = distribution(values)
        panel.step(xs, ys, where="post")
        panel.set_xlabel(name)
        panel.set_ylabel("share")
        panel.set_ylim(0, 1.02)
        if limit is not None:
            panel.axvline(limit, color="tab:red", linestyle="--", linewidth=1, label="objective")
            panel.legend(loc="lower right")


def _course(run: Run, panels: Sequence[Axes]) -> None:
    rows = run["requests"]
    end_s = max((row["ended_s"] for row in rows), default=1.0)
    slot_s = end_s / _SLOTS
    sent, good = [0] * (_SLOTS + 1), [0] * (_SLOTS + 1)
    for row in rows:
        sent[int(row["sent_s"] / slot_s)] += 1
        good[int(row["ended_s"] / slot_s)] += row["good"]
    at = [index * slot_s for index in range(_SLOTS + 1)]
    panels[0].step(at, [count / slot_s for count in sent], where="post", label="sent")
    panels[0].step(at, [count / slot_s for count in good], where="post", label="good answers")
    panels[0].set_ylabel("requests/s")
    panels[0].legend()
    xs, ys = open_over_time(rows)
    panels[1].step(xs, ys, where="post")
    panels[1].set_ylabel("requests open")
    timed = [row for row in rows if _timed(row) and row["ttft_s"] is not None]
    panels[2].plot([row["sent_s"] for row in timed], [row["ttft_s"] for row in timed], ".")
    panels[2].set_ylabel("TTFT, s")
    panels[2].set_ylim(bottom=0)


def distribution(values: Iterable[float]) -> tuple[list[float], list[float]]:
    """Points of the empirical distribution, thinned evenly by rank; the extremes stay."""
    ordered = sorted(values)
    if not ordered:
        return [], []
    count = len(ordered)
    step = max((count - 1) / (_MOST_POINTS - 1), 1.0)
    ranks = sorted({min(round(index * step), count - 1) for index in range(_MOST_POINTS)})
    return [ordered[rank] for rank in ranks], [(rank + 1) / count for rank in ranks]


def open_over_time(rows: Iterable[Mapping[str, Any]]) -> tuple[list[float], list[int]]:
    """How many requests are open from each instant on."""
    steps = [(row["sent_s"], 1) for row in rows] + [(row["ended_s"], -1) for row in rows]
    xs, ys, number = [0.0], [0], 0
    for at_s, step in sorted(steps):
        number += step
        xs.append(at_s)
        ys.append(number)
    return xs, ys


def _timed(row: Mapping[str, Any]) -> bool:
    return bool(row["behaviour"] == "reads" and row["end"] == "whole")


def _page(run: Run, source: Source) -> list[str]:
    summary, options = run["summary"], run["options"]
    return [
        f"# Load: {run['scenario']}",
        "",
        *origin(source),
        "",
        f"Open loop, {run['rate']:g} requests/s on average for {options['run_time']} s, "
        f"{_of_trace(run)}. "
        + ", ".join(f"{count} {end}" for end, count in summary["ends"].items() if count)
        + f"; {summary['held_back']} held back. What customers did: "
        + ", ".join(f"{count} {name}" for name, count in summary["behaviours"].items() if count)
        + ".",
        "",
        f"Goodput {summary['goodput_per_s']:.2f} of {summary['requests_per_s']:.2f} requests/s "
        f"(TTFT at most {options['ttft_objective']:g} s and TPOT at most "
        f"{options['tpot_objective'] * 1e3:g} ms): {summary['good_share']:.1%} of those that were "
        f"read plainly. {summary['prompt_tokens']} prompt tokens, "
        f"{summary['cache_hit_share']:.1%} billed as hits; {summary['completion_tokens']} "
        f"completion tokens, {summary['output_tokens_per_s']:g} a second.",
        "",
        *columns(
            ["ms", *COLUMNS],
            [[name, *(f"{summary[key][each]:.1f}" for each in COLUMNS)] for name, key in _TIMES],
        ),
        "",
        "Times are of answers read plainly and to their end, on the customers' clock; ITL is the "
        "gap between messages.",
        "",
        "![latency](latency.svg)",
        "",
        "![course](course.svg)",
        "",
        *books_of(summary),
    ]


def _of_trace(run: Run) -> str:
    options = run["options"]
    if run["trace"]:
        return f"lengths of {run['trace']} times {options['scale']:g}"
    return f"look-alike lengths times {options['scale']:g}"


def books_of(summary: Mapping[str, Any]) -> list[str]:
    """The section that tells how the books came out."""
    books = summary.get("reconciled")
    if books is None:
        return ["The books were not reconciled: no operator's key was given."]
    names = list(dict.fromkeys(name for side in books["sides"].values() for name in side))
    rows = [
        [name, *(str(side.get(name, "")) for side in books["sides"].values())] for name in names
    ]
    found = books["differences"]
    return [
        "## The books",
        "",
        *columns(["", *books["sides"]], rows),
        "",
        f"{len(found) or 'No'} difference{'' if len(found) == 1 else 's'}, request by request "
        "and in all. Customers' totals are of those whose end they saw; receipts and ledger hold "
        "those who hung up too.",
        *(f"- {each}" for each in found),
    ]


def origin(source: Source) -> list[str]:
    """Command, commit and device, as every report begins."""
    machine = source["device"]
    return [
        f"    {source['command']}",
        "",
        f"Commit {source['commit']}, {machine['cores']} cores of {machine['cpu']} "
        f"(load average {machine['load']} at the end), model {source['model']}, "
        f"{source['stack']}.",
    ]


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, numbers to the right."""
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]
