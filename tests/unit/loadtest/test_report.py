from pathlib import Path
from typing import Any

import pytest

from loadtest.records import Asked, Behaviour, End, Objectives, Records, quantiles, table
from loadtest.report import distribution, open_over_time, write_report
from loadtest.slopes import Slope
from loadtest.soak_report import write_soak
from loadtest.watch import Watch

SOURCE = {
    "command": "python -m loadtest.local chat",
    "commit": "abc1234",
    "device": {"cpu": "a processor", "cores": 2, "load": 0.5},
    "model": "demo",
    "stack": "a prefill and a decode worker",
}
OPTIONS = {"ttft_objective": 2.0, "tpot_objective": 0.1, "scale": 0.1, "run_time": 10}


def asked(ttft_s: float, *, gap_s: float = 0.05, behaviour: Behaviour = Behaviour.READS) -> Asked:
    found = Asked(
        "r", behaviour, due_s=1.0, sent_s=1.0, end=End.WHOLE, ttft_s=ttft_s, received_tokens=5
    )
    found.gaps_s = [gap_s] * 4
    found.ended_s = 1.0 + ttft_s + 4 * gap_s
    return found


def records() -> Records:
    found = Records(Objectives(ttft_s=1.0, tpot_s=0.1))
    late, stuttering = asked(1.5), asked(0.5, gap_s=0.2)
    slow = asked(9.0, behaviour=Behaviour.READS_SLOWLY)
    found.asked = [asked(0.5), asked(0.7), late, stuttering, slow]
    return found


def run_of(found: Records) -> dict[str, Any]:
    rows = [
        {
            "sent_s": each.sent_s,
            "ended_s": each.ended_s,
            "behaviour": each.behaviour.value,
            "end": each.end.value,
            "good": found.objectives.met(each),
            "ttft_s": each.ttft_s,
            "tpot_s": each.tpot_s,
            "gaps_ms": [gap * 1e3 for gap in each.gaps_s],
        }
        for each in found.asked
    ]
    summary = found.summary(10.0) | {
        "reconciled": {"sides": {"ledger": {"requests": 5}}, "differences": ["r2 is missing"]}
    }
    whole = {"scenario": "chat", "rate": 0.5, "trace": "", "options": OPTIONS}
    return {**whole, "summary": summary, "requests": rows}


def test_goodput_counts_answers_that_met_both_objectives() -> None:
    summary = records().summary(10.0)
    assert summary["goodput_per_s"] == pytest.approx(0.2)  # two of five in ten seconds
    assert summary["good_share"] == pytest.approx(0.5)  # of the four that were read plainly
    assert "goodput 0.20 of 0.50 requests/s" in table(summary)


def test_who_reads_slowly_on_purpose_is_in_no_percentile() -> None:
    summary = records().summary(10.0)
    assert summary["ttft_ms"]["p99"] == 1500
    assert summary["tpot_ms"]["p50"] == pytest.approx(50)
    assert summary["itl_ms"]["p99"] == pytest.approx(200)


def test_percentiles_are_nearest_rank() -> None:
    found = quantiles(index / 1000 for index in range(1, 101))
    assert (found["p50"], found["p90"], found["p99"], found["mean"]) == (50, 90, 99, 50.5)
    assert quantiles([])["p50"] == 0


def test_a_page_holds_its_command_percentiles_plots_and_books(tmp_path: Path) -> None:
    page = write_report(run_of(records()), SOURCE, tmp_path)
    text = page.read_text(encoding="utf-8")
    for part in (
        "    python -m loadtest.local chat\n",
        "Commit abc1234, 2 cores of a processor",
        "| TTFT | 500.0 |",
        "| requests | 5 |",
        "- r2 is missing",
    ):
        assert part in text
    for name in ("latency.svg", "course.svg"):
        assert f"({name})" in text
        assert (page.parent / name).read_text(encoding="utf-8").count("<path") > 3


def test_the_same_run_gives_the_same_plots(tmp_path: Path) -> None:
    pages = [write_report(run_of(records()), SOURCE, tmp_path / name) for name in "ab"]
    first, second = ((page.parent / "course.svg").read_bytes() for page in pages)
    assert first == second


def test_distributions_keep_their_extremes_and_few_points() -> None:
    xs, ys = distribution(float(index) for index in range(10_000))
    assert (xs[0], xs[-1], ys[-1]) == (0, 9999, 1)
    assert len(xs) == len(ys) <= 200
    assert distribution([]) == ([], [])


def test_open_requests_are_counted_between_sending_and_end() -> None:
    rows = [{"sent_s": 1.0, "ended_s": 4.0}, {"sent_s": 2.0, "ended_s": 3.0}]
    assert open_over_time(rows) == ([0, 1, 2, 3, 4], [0, 1, 2, 1, 0])


def test_a_soak_s_page_names_what_grew(tmp_path: Path) -> None:
    watch = Watch({}, {})
    watch.times_s = [0.0, 60.0]
    watch.series = {("router", "RSS"): [1e8, 1.1e8], ("router", "holds"): [1.0, 2.0]}
    slopes = {
        ("router", "RSS"): Slope(
            1e8, per_hour=10240, low=5120, high=15360, rise=4096, late_rise=2048, step=0
        ),
        ("router", "holds"): Slope(1.5, per_hour=0.5, low=-1, high=2, rise=1, late_rise=0, step=1),
    }
    found = {
        "capacity": 3.0,
        "rate": 2.1,
        "minutes": 1,
        "problems": ["router RSS grows"],
        "slopes": slopes,
    }
    text = write_soak(found, watch, run_of(records()), SOURCE, tmp_path).read_text(encoding="utf-8")
    assert "- **router RSS grows**" in text
    assert "| router | RSS | 97,656.2 | 10.0 | 5.0 | 15.0 | 4.0 | 2.0 | yes |" in text
    assert "| router | holds | 1.5 | 0.5 | -1.0 | 2.0 | 1.0 | 0.0 | no |" in text
