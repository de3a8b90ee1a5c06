"""What benchmarks/kernels does without a GPU: who may be timed, and what a row says."""

import importlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.kernels import harness, run
from benchmarks.kernels.harness import Ceilings, Work
from benchmarks.provenance import ROOT

H100 = Ceilings(copy=3000.0, bf16=800.0, fp8=1600.0)
NEED_A_GPU = {"v3_slice"}  # its floor is counted on the model itself
REPORT = "<testsuites><testsuite>{}</testsuite></testsuites>"
PASSED = "<testcase name='a'/>"
FAILED = "<testcase name='b'><failure/></testcase>"
SKIPPED = "<testcase name='c'><skipped/></testcase>"


@pytest.mark.parametrize(
    ("cases", "green"),
    [
        (PASSED, True),
        (PASSED + SKIPPED, True),
        (PASSED + FAILED, False),
        ("<testcase name='b'><error/></testcase>" + PASSED, False),
        (SKIPPED, False),
        ("", False),
    ],
)
def test_only_what_passed_and_failed_nowhere_is_green(
    tmp_path: Path, cases: str, green: bool
) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT.format(cases))
    assert run.verdict_of(report).is_green == green


def test_tests_that_left_no_report_are_not_green(tmp_path: Path) -> None:
    assert not run.verdict_of(tmp_path / "none.xml").is_green


def test_op_with_red_tests_or_none_is_not_timed() -> None:
    verdicts = {"a.py": run.Verdict(3, 0), "b.py": run.Verdict(2, 1)}
    assert run.red_among(["a.py"], verdicts) == []
    assert run.red_among(["a.py", "b.py"], verdicts) == ["b.py: 2 passed, 1 failed"]
    assert run.red_among(["c.py"], verdicts) == ["c.py: no gpu tests"]


def test_row_is_measured_against_the_ceiling_that_binds() -> None:
    memory_bound = Work("small", lambda _: list, num_bytes=3_000_000, flops=1_600_000)
    row = harness.figures(memory_bound, 2.0, 1.9, H100, "NVIDIA H100 80GB HBM3")
    assert (row["gb_s"], row["of_copy"], row["of_floor"]) == (1500.0, 0.5, 0.5)
    assert row["of_datasheet_bandwidth"] == round(1500 / 3350, 3)
    compute_bound = Work("large", lambda _: list, 3_000_000, 16_000_000_000, "fp8")
    row = harness.figures(compute_bound, 20.0, 19.0, H100, "a device nobody knows")
    assert (row["tflops"], row["of_matmul"], row["of_floor"]) == (800.0, 0.5, 0.5)
    assert "of_datasheet_flops" not in row


def test_inputs_rotate_past_the_cache() -> None:
    l2 = 50_000_000
    assert harness.num_sets(11_000_000_000, l2) == 2
    assert harness.num_sets(20_000_000, l2) == 8
    assert harness.num_sets(1000, l2) == harness.MAX_SETS


def test_line_tells_a_peer_that_computed_something_else() -> None:
    row = harness.figures(Work("T=1", lambda _: list, 3000), 2.0, 1.9, H100, "NVIDIA H100")
    row["peers"] = {
        "one": {"us": 3.0, "ratio": 1.5, "difference": 0.002},
        "other": {"us": 1.0, "ratio": 0.5, "difference": 0.9},
        "third": {"absent": "ImportError: no module"},
    }
    line = harness.line("op", row)
    assert "one 3.00 us, 1.50x |" in line
    assert "other 1.00 us, 0.50x DIFFERS" in line
    assert "third: none" in line


@pytest.mark.parametrize("name", sorted({*run.benchmarks_here([])} - NEED_A_GPU))
def test_works_are_told_without_a_gpu_each_under_its_own_name(name: str) -> None:
    works = list(importlib.import_module(f"benchmarks.kernels.{name}").works())
    cases = [work.case for work in works]
    assert works
    assert len(set(cases)) == len(cases)
    assert min(work.num_bytes for work in works) > 0


def test_every_benchmark_of_an_op_names_tests_that_exist() -> None:
    for name in run.benchmarks_here([]):
        for file in run.tests_of(name):
            assert (ROOT / file).exists(), file


class Bench:
    """Stands for a GPU: works are timed, or do to their process what their name says."""

    def __init__(self, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.works = [Work(name, lambda _: list, 1, peers={name: lambda _: list}) for name in names]
        self.timed: list[str] = []
        self.num_processes = 0
        self._is_broken = False
        module = SimpleNamespace(works=lambda: iter(self.works))
        monkeypatch.setattr(importlib, "import_module", lambda _: module)
        monkeypatch.setattr(harness, "time_ours", self._time_ours)
        monkeypatch.setattr(harness, "against", self._against)
        monkeypatch.setattr(run, "in_a_process", self._in_a_process)
        monkeypatch.setattr(torch.cuda, "synchronize", self._synchronize)

    def _time_ours(self, work: Work, _: Ceilings) -> dict[str, Any]:
        self.timed.append(work.case)
        if work.case == "kills":
            raise SystemExit(139)
        if work.case in {"breaks", "fails"}:
            self._is_broken = work.case == "breaks"
            raise RuntimeError(work.case)
        return {"case": work.case, "us": 2.0, "peers": {}}

    def _against(self, work: Work, _: object, our_us: float) -> dict[str, Any]:
        self.timed.append(f"peer {work.case}")
        self._is_broken = work.case == "peer breaks"
        return {"us": our_us}

    def _in_a_process(self, name: str, ceilings: Ceilings, out: Path, _: float) -> str:
        self.num_processes += 1
        self._is_broken = False
        try:
            run.time_one(name, ceilings, out / f"{name}.rows.json")
        except (RuntimeError, SystemExit) as error:
            return f"failed: {error}"
        return ""

    def _synchronize(self) -> None:
        if self._is_broken:
            raise RuntimeError("illegal memory access")


def test_a_process_that_dies_is_followed_by_one_that_goes_on_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(["one", "breaks", "peer breaks", "kills", "fails", "two"], monkeypatch)
    rows = run.time_op("some", H100, tmp_path, seconds=60)
    assert bench.num_processes == 4
    assert [row["case"] for row in rows] == [work.case for work in bench.works]
    theirs = {"us": 2.0}
    assert [row.get("peers", row.get("refused")) for row in rows] == [
        {"one": theirs},
        "failed: RuntimeError('breaks')",
        {"peer breaks": theirs},
        "its process died",
        "failed: RuntimeError('fails')",
        {"two": theirs},
    ]
    assert list(tmp_path.iterdir()) == []


def test_no_peer_takes_time_before_all_of_ours_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(["one", "two"], monkeypatch)
    run.time_op("some", H100, tmp_path, seconds=60)
    assert bench.timed == ["one", "two", "peer one", "peer two"]


def test_an_op_whose_processes_get_nowhere_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = iter(["failed: no module", "never asked"])
    monkeypatch.setattr(run, "in_a_process", lambda *_: next(reasons))
    assert run.time_op("some", H100, tmp_path, seconds=60) == [
        {"case": "the rest", "refused": "failed: no module"}
    ]


def test_what_a_file_of_tests_found_is_written_before_the_next_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "tests.log"
    log.write_text("output of quick.py the last time")

    def run_test_file(
        file: str, report: Path, ends: float, seconds: float
    ) -> tuple[run.Verdict, str]:
        while file == "slow.py" and time.monotonic() < ends:
            if log.exists() and "output of quick.py now" in log.read_text():
                return run.Verdict(1), ""
            time.sleep(0.01)
        return run.Verdict(0, 1), f"output of {file} now"

    monkeypatch.setattr(run, "run_test_file", run_test_file)
    verdicts = run.run_tests(["slow.py", "quick.py"], tmp_path, 10)
    assert verdicts == {"slow.py": run.Verdict(1), "quick.py": run.Verdict(0, 1)}
    assert "the last time" not in log.read_text()


def test_ceilings_that_torch_cannot_measure_are_the_datasheets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> Ceilings:
        raise RuntimeError("no FP8 product")

    monkeypatch.setattr(harness, "measure_ceilings", fails)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    ceilings, whose = run.ceilings_here()
    assert (ceilings.copy, ceilings.fp8) == (4800.0, 1979.0)
    assert whose == "datasheet: no FP8 product"
