"""A soak as a page with plots: docs/reports/soak/README.md."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from loadtest.report import Run, books_of, columns, origin, plot
from loadtest.watch import SLOTS, Watch

_MIB = 1 << 20
_HEADS = ["process", "what", "mean", "slope", "from", "to", "rose", "late", "grows"]


def write_soak(
    found: Mapping[str, Any],
    watch: Watch,
    run: Run | None,
    source: Mapping[str, Any],
    folder: Path,
) -> Path:
    """Write the page, and return it. `found` is what `loadtest.soak` came to."""
    into = folder / "soak"
    into.mkdir(parents=True, exist_ok=True)
    plot(into / "held.svg", partial(_held, watch), num=3, xlabel="minutes")
    page = into / "README.md"
    page.write_text("\n".join(_page(found, run, source)) + "\n", encoding="utf-8")
    return page


def _held(watch: Watch, panels: Sequence[Axes]) -> None:
    minutes = [at_s / 60 for at_s in watch.times_s]
    for panel, title in zip(panels, ("RSS, MiB", "descriptors", "KV blocks held"), strict=True):
        panel.set_ylabel(title)
    for (name, what), values in watch.series.items():
        if what == "RSS":
            panels[0].plot(minutes, [value / _MIB for value in values], label=name)
        elif what == "descriptors":
            panels[1].plot(minutes, values, label=name)
        elif what == "blocks":
            panels[2].plot(minutes, values, label=name)
    for panel in panels:
        panel.set_ylim(bottom=0)
        if panel.lines:
            panel.legend(fontsize="x-small")


def _page(found: Mapping[str, Any], run: Run | None, source: Mapping[str, Any]) -> list[str]:
    problems = found["problems"]
    verdict = "Nothing grew, nothing was left held, the books agree."
    return [
        "# Soak",
        "",
        *origin(source),
        "",
        f"The stack ended {found['capacity']:.2f} requests/s when it always had more to do; then "
        f"{found['minutes']:g} minutes at {found['rate']:.2f}, 70 % of it, customers cancelling, "
        "hanging up, reading slowly and asking again.",
        "",
        *([f"- **{each}**" for each in problems] or [f"**{verdict}**"]),
        "",
        "![what is held](held.svg)",
        "",
        "Slopes after the warm-up, an hour, with intervals that hold together at 95 % "
        "(RSS in KiB); a series grows if its interval lies above zero and it rose by more than two "
        "steps: of 256 KiB, of one. The ledger's Redis keeps every receipt and is not judged. What "
        "rose late did so in the second half: half of it all where something leaks, next to "
        "nothing where it levels off.",
        "",
        *columns(_HEADS, _rows(found)),
        "",
        *(_of_run(run) if run else []),
    ]


def _rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    order = ["RSS", "descriptors", "threads", *SLOTS]
    for (name, what), slope in sorted(
        found["slopes"].items(), key=lambda item: (order.index(item[0][1]), item[0][0])
    ):
        unit = 1024 if what == "RSS" else 1
        figures = [slope.mean, slope.per_hour, slope.low, slope.high, slope.rise, slope.late_rise]
        cells = [f"{figure / unit:,.1f}" for figure in figures]
        rows.append([name, what, *cells, "yes" if slope.grows else "no"])
    return rows


def _of_run(run: Run) -> list[str]:
    summary = run["summary"]
    ends = ", ".join(f"{count} {end}" for end, count in summary["ends"].items() if count)
    return [
        f"{summary['requests']} requests: {ends}. TTFT p50 {summary['ttft_ms']['p50']:.0f} ms, "
        f"p99 {summary['ttft_ms']['p99']:.0f} ms; {summary['completion_tokens']} completion "
        f"tokens, {summary['output_tokens_per_s']:g} a second.",
        "",
        *books_of(summary),
    ]
