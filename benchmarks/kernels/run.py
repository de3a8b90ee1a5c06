"""Everything that needs a GPU, in one go: the gpu tests, then the benchmarks, with their peers.

    benchmarks/kernels/gpu.sh                       # all of it, in less than nine minutes
    python -m benchmarks.kernels.run --only mla_decode

An op whose gpu tests are red, or that has none, is not timed. Tests run file by file and benchmarks
op by op in processes of their own, so that one that breaks its device context breaks no other.
A process that dies in the midst of a benchmark is started again after what killed it.
What was found is written as it is found: a run that is cut off leaves all that it had.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import harness
from benchmarks.provenance import ROOT, commit

HERE = Path(__file__).resolve().parent
NO_BENCHMARKS = {
    *("aot", "arms", "harness", "peers", "precompile", "run"),
    *("sglang_config", "tile_lines", "tune", "tuning"),
}
TEST_PROCESSES = 3  # they share one GPU's memory
TESTS_SHARE = 0.5  # of the whole time, at the most
FILE_SHARE = 0.3  # one file's of the whole time: what hangs takes no more
DIED = "its process died"
OP_SHARE = 2.0  # of an even share of what is left, at the most: what one leaves is for the next


@dataclass(frozen=True)
class Verdict:
    """What one file of tests came to."""

    passed: int = 0
    failed: int = 0
    unfinished: bool = False

    @property
    def is_green(self) -> bool:
        return self.passed > 0 and self.failed == 0 and not self.unfinished

    def __str__(self) -> str:
        if self.unfinished:
            return "did not finish"
        return f"{self.passed} passed, {self.failed} failed"


def gpu_test_files(root: Path = ROOT) -> list[str]:
    """Every file with a gpu-marked test, from the root of the repository."""
    files = sorted((root / "tests").rglob("test_*.py"))
    marked = [path for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]
    return [str(path.relative_to(root)) for path in marked]


def verdict_of(report: Path) -> Verdict:
    """A JUnit report's; unfinished if there is none."""
    if not report.exists():
        return Verdict(unfinished=True)
    passed = failed = 0
    for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314 - pytest wrote it just now
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        elif case.find("skipped") is None:
            passed += 1
    return Verdict(passed, failed)


def run_tests(files: Sequence[str], out: Path, seconds: float) -> dict[str, Verdict]:
    """The gpu-marked tests of each file; the end of what is red is printed, all is in tests.log."""
    ends = time.monotonic() + seconds * TESTS_SHARE
    found = {}
    log_file = out / "tests.log"
    log_file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(TEST_PROCESSES) as pool:
        runs = {
            pool.submit(
                run_test_file, file, Path(folder, f"{at}.xml"), ends, seconds * FILE_SHARE
            ): file
            for at, file in enumerate(files)
        }
        for run in as_completed(runs):
            file, (verdict, output) = runs[run], run.result()
            found[file] = verdict
            with log_file.open("a", encoding="utf-8") as log:
                log.write(f"== {file}\n{output}\n")
            print(f"{'green' if verdict.is_green else 'RED  '} {file}: {verdict}", flush=True)
            if not verdict.is_green:
                print(output[-1500:], flush=True)
    return found


def run_test_file(file: str, report: Path, ends: float, seconds: float) -> tuple[Verdict, str]:
    """One file's gpu-marked tests, in `seconds` and by `ends` of the monotonic clock."""
    flags = ["-c", str(HERE / "pytest.ini"), "--rootdir", str(ROOT), "-m", "gpu"]
    flags += ["--confcutdir", str(Path(file).parent), f"--junit-xml={report}"]
    with report.with_suffix(".log").open("w+", encoding="utf-8") as log:
        try:
            subprocess.run(
                [sys.executable, "-m", "pytest", *flags, file],
                cwd=ROOT,
                # Columns for a summary that says why a test failed.
                env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "240"},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=max(1.0, min(seconds, ends - time.monotonic())),
            )
        except subprocess.TimeoutExpired:
            report.unlink(missing_ok=True)
        log.seek(0)
        return verdict_of(report), log.read()


def benchmarks_here(only: Sequence[str]) -> list[str]:
    """Names of the files with `works`, or of those of `only`."""
    found = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NO_BENCHMARKS)
    return [name for name in found if not only or name in only]


def tests_of(name: str) -> Sequence[str]:
    """Files whose tests must be green before `name` is timed: its TESTS, or those of that name."""
    module = importlib.import_module(f"benchmarks.kernels.{name}")
    tests: Sequence[str] = getattr(module, "TESTS", (f"tests/kernels/test_{name}.py",))
    return tests


def red_among(tests: Sequence[str], verdicts: Mapping[str, Verdict]) -> list[str]:
    """Why an op may not be timed; empty if it may."""
    return [
        f"{file}: {verdicts.get(file, 'no gpu tests')}"
        for file in tests
        if file not in verdicts or not verdicts[file].is_green
    ]


def time_one(name: str, ceilings: harness.Ceilings, file: Path) -> None:
    """In a process of its own: `name`'s works, then their peers, written as they are timed.

    What `file` tells already is not timed again. RuntimeError where a call has broken the device's
    context: what it was is written, and what follows needs another process.
    """
    works = list(importlib.import_module(f"benchmarks.kernels.{name}").works())
    rows = rows_of(file)

    def write() -> None:
        file.write_text(json.dumps(rows), encoding="utf-8")

    for work in works[len(rows) :]:
        rows.append({"case": work.case, "refused": DIED})
        write()
        try:
            rows[-1] = harness.time_ours(work, ceilings)
        except Exception as error:  # a finding of this work; the next ones may do better
            rows[-1]["refused"] = f"failed: {error!r}"[:300]
        write()
        torch.cuda.synchronize()
    for work, row in zip(works, rows, strict=True):
        peers = row.get("peers", {})
        for peer, build in work.peers.items() if "us" in row else ():
            if peer not in peers:
                peers[peer] = {"absent": DIED}
                write()
                peers[peer] = harness.against(work, build, row["us"])
                write()
                torch.cuda.synchronize()


def rows_of(file: Path) -> list[dict[str, Any]]:
    """What `time_one` has written there; nothing if it has not begun."""
    rows: list[dict[str, Any]] = []
    if file.exists():
        rows = json.loads(file.read_text(encoding="utf-8"))
    return rows


def time_op(
    name: str, ceilings: harness.Ceilings, out: Path, seconds: float
) -> list[dict[str, Any]]:
    """`time_one` in processes, each going on after what killed the last one; the rows.

    One more row says so where they did not come to their end.
    """
    ends = time.monotonic() + seconds
    file = out / f"{name}.rows.json"
    file.unlink(missing_ok=True)
    while True:
        before = rows_of(file)
        why = in_a_process(name, ceilings, out, ends - time.monotonic())
        rows = rows_of(file)
        if not why or rows == before or time.monotonic() > ends:
            break
    file.unlink(missing_ok=True)
    return [*rows, {"case": "the rest", "refused": why}] if why else rows


def in_a_process(name: str, ceilings: harness.Ceilings, out: Path, seconds: float) -> str:
    """`time_one` in a process; why it did not come to its end, if so."""
    command = [sys.executable, "-m", "benchmarks.kernels.run", "--one", name, "--out", str(out)]
    command += ["--ceilings", json.dumps(asdict(ceilings))]
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=seconds, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return "cut off: no time left"
    if done.returncode == 0:
        return ""
    with (out / "benchmarks.log").open("a", encoding="utf-8") as log:
        log.write(f"== {name}\n{done.stderr}\n")
    return f"failed: {done.stderr.strip()[-300:] or f'exit code {done.returncode}'}"


def run_all(only: Sequence[str], out: Path, seconds: float, commit_id: str) -> int:
    """Ceilings, tests, benchmarks; the table last. 1 if anything was red or cut off."""
    ends = time.monotonic() + seconds
    names = benchmarks_here(only)
    needed = {file for name in names for file in tests_of(name)}
    files = [file for file in gpu_test_files() if not only or file in needed]
    ceilings, whose = ceilings_here()
    result: dict[str, Any] = {
        "benchmark": "kernels/run",
        "command": "benchmarks/kernels/gpu.sh",
        "commit": commit_id,
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "ceilings": {name: round(value, 1) for name, value in asdict(ceilings).items()},
        "ceilings_from": whose,
        "tests": {},
        "ops": {},
    }

    def write() -> None:
        (out / "gpu.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    write()
    verdicts = run_tests(files, out, seconds)
    result["tests"] = {file: str(verdict) for file, verdict in sorted(verdicts.items())}
    write()
    for at, name in enumerate(names):
        red = red_among(tests_of(name), verdicts)
        left = ends - time.monotonic()
        if red:
            rows = [{"case": "", "refused": f"not timed: {'; '.join(red)}"}]
        elif left < 10:
            rows = [{"case": "", "refused": "not timed: no time left"}]
        else:
            seconds_for_it = min(left, OP_SHARE * left / (len(names) - at))
            rows = time_op(name, ceilings, out, seconds_for_it)
        result["ops"][name] = rows
        write()
        print(f"{name}: {len(rows)} rows, {ends - time.monotonic():.0f} s left", flush=True)
    return report(result, verdicts)


def ceilings_here() -> tuple[harness.Ceilings, str]:
    """What this device reaches, before anything else runs on it; else the datasheet's, and why."""
    try:
        return harness.measure_ceilings(), "measured"
    except RuntimeError as error:  # torch cannot measure something; our own kernels may run
        print(f"ceilings are the datasheet's: {error}", flush=True)
        return harness.datasheet(torch.cuda.get_device_name()), f"datasheet: {error}"[:300]
    finally:
        torch.cuda.empty_cache()


def report(result: Mapping[str, Any], verdicts: Mapping[str, Verdict]) -> int:
    """The table; 1 if anything was red or cut off."""
    ceilings = result["ceilings"]
    print(
        f"\n{result['device']}: copies {ceilings['copy']:.0f} GB/s, multiplies "
        f"{ceilings['bf16']:.0f} TFLOPS in bf16, {ceilings['fp8']:.0f} in fp8"
    )
    rows = [(op, row) for op, found in result["ops"].items() for row in found]
    for op, row in rows:
        print(harness.line(op, row))
    red = [file for file, verdict in verdicts.items() if not verdict.is_green]
    refused = sum("refused" in row for _, row in rows)
    print(f"{len(verdicts) - len(red)} files of tests green, {len(red)} red; {refused} not timed")
    return 1 if red or refused else 0


def versions() -> dict[str, str]:
    import triton  # noqa: PLC0415 - only where there is a GPU

    python = sys.version.split()[0]
    return {"python": python, "torch": torch.__version__, "triton": triton.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", default=[], help="this op; may be repeated")
    parser.add_argument("--seconds", type=float, default=510.0, help="for everything together")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--commit", default="", help="where there is no git to ask")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        ceilings = harness.Ceilings(**json.loads(args.ceilings))
        time_one(args.one, ceilings, args.out / f"{args.one}.rows.json")
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to time")
        return 0
    os.environ.pop("TRITON_INTERPRET", None)
    args.out.mkdir(parents=True, exist_ok=True)
    return run_all(args.only, args.out, args.seconds, args.commit or commit())


if __name__ == "__main__":
    sys.exit(main())
