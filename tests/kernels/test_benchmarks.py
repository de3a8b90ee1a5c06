"""What benchmarks/kernels does without a GPU: who may be timed, and what a row says."""

import importlib
from pathlib import Path

import pytest

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
