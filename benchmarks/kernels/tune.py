"""Times tiles on this GPU and writes the better ones into its file of tiles.

    benchmarks/kernels/gpu.sh --tune                       # every table, in 400 seconds
    benchmarks/kernels/gpu.sh --tune --op gate_up_fp8      # one table

For each line of a table the arms about its tile are compiled beside each other; one that does not
compile, spills, wants more shared memory than there is, or computes something else than the plain
reference is dropped, with the reason. The rest is timed on the cases that the line serves. An arm
replaces the line's tile if it takes over 2 % less, and again so when both are timed once more. Run
it again, and it starts from the tiles that it has written; `--resume` takes up an unfinished run by
its tune.json, and `--adopt` writes a tune.json that was made elsewhere into this tree. SGLang's
tiles for the same experts are tuned as well, into a file of its form.

A table's arms run in a process of their own: one that an arm breaks, or in which it hangs, is
started anew after that arm.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import grouped_gemm, harness, peers, sglang_config, tile_lines
from benchmarks.kernels.arms import subjects
from benchmarks.kernels.run import versions
from benchmarks.kernels.tuning import Bench, Notes, adopt, lines_of, tune_line
from benchmarks.provenance import ROOT, commit
from tidemill.kernels import tiles
from tidemill.kernels.device import H100, device_class

HERE = Path(__file__).resolve().parent
SGLANG = "sglang"  # among the tables' names
UNFINISHED = 3  # exit code of a table's process whose time was over
PATIENCE = 40.0  # seconds for one arm before it counts as hanging
TABLE_SHARE = 2.0  # of an even share of what is left, at the most: what one leaves is for the next


def tune_all(
    names: Sequence[str], out: Path, seconds: float, commit_id: str, known: Mapping[str, Any]
) -> int:
    """Table by table; what is found is written as it is found. 1 if any was left unfinished.

    `known`: tables as an unfinished run's tune.json has them.
    """
    ends = time.monotonic() + seconds
    tables = dict(known)
    left_over: dict[str, str] = {}
    for at, name in enumerate(names):
        left = ends - time.monotonic()
        share = min(left, TABLE_SHARE * left / (len(names) - at))
        if left > 10:
            tables[name], why = tune_apart(name, tables.get(name, {}), share, out / "tune.log")
        else:
            why = "no time left"
        if why:
            left_over[name] = why
        report = record(tables, left_over, commit_id)
        (out / "tune.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        write_tiles(report)
        print(f"{name}: {summary(tables.get(name, {}))} {why}", flush=True)
    return 1 if left_over else 0


def tune_apart(
    name: str, known: Mapping[str, Any], seconds: float, log: Path
) -> tuple[dict[str, Any], str]:
    """A table, in a process of its own: its lines, and why it is unfinished if it is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "notes.json")
        Notes(path, dict(known)).save()
        command = [sys.executable, "-m", "benchmarks.kernels.tune", "--table", name]
        command += ["--notes", str(path), "--ends", str(time.time() + seconds)]
        # Time is looked at between arms: one more, and the process leaves by itself.
        why = supervise(command, path, log, seconds + PATIENCE)
        return Notes.read(path).lines, why


def record(
    tables: Mapping[str, Any], left_over: Mapping[str, str], commit_id: str
) -> dict[str, Any]:
    """What tune.json says: every arm of every table, and what is unfinished."""
    return {
        "benchmark": "kernels/tune",
        "command": "benchmarks/kernels/gpu.sh --tune",
        "commit": commit_id,
        "device": torch.cuda.get_device_name(),
        "device_class": tiles.path_of(device_class(torch.device("cuda"))).stem,
        "day": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "kernels": kernels_digest(),
        "unfinished": dict(left_over),
        "tables": tables,
    }


def write_tiles(
    report: Mapping[str, Any],
    folder: Path = tiles.FOLDER,
    sglang_folder: Path = sglang_config.FOLDER,
) -> None:
    """What a tune.json has decided, into the device class's file and into SGLang's."""
    device, name = tiles.device_of(Path(f"{report['device_class']}.toml")), report["device"]
    path = tiles.path_of(device, folder)
    if path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        h100s = tiles.path_of(H100, folder).read_text(encoding="utf-8")
        text = tile_lines.for_device(h100s, device, name)
    origin = f"{name}, {report['commit'] or 'no commit'}, {report['day']}"
    known = subjects()
    for table, lines in report["tables"].items():
        if table in known:
            text = adopt(text, known[table], lines, origin)
    path.write_text(text, encoding="utf-8")
    theirs = report["tables"].get(SGLANG, {})
    if tuned := {number: line["after"] for number, line in theirs.items() if line["after"]}:
        experts, width = grouped_gemm.EXPERTS, grouped_gemm.WIDTH
        sglang_config.write(sglang_config.path_of(experts, width, name, sglang_folder), tuned)


def summary(lines: Mapping[str, Any]) -> str:
    """For people."""
    decided = [line for line in lines.values() if "after" in line]
    changed = sum(line["after"] != line["before"] for line in decided)
    return f"{len(decided)} lines decided, {changed} with another tile"


def known_from(report: Path) -> dict[str, Any]:
    """Tables of an unfinished run; ValueError if kernels or device are not that run's."""
    known = json.loads(report.read_text(encoding="utf-8"))
    here = {"kernels": kernels_digest(), "device": torch.cuda.get_device_name()}
    for what, value in here.items():
        if known[what] != value:
            raise ValueError(f"{report}: of {what} {known[what]}, and here is {value}")
    tables: dict[str, Any] = known["tables"]
    return tables


def kernels_digest() -> str:
    """Of all that kernels are made of: times of others are worth nothing here."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "src/tidemill/kernels").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def supervise(command: Sequence[str], path: Path, log: Path, seconds: float) -> str:
    """Runs a table's process, anew after each arm that broke or hung it; "" or why it was left."""
    ends = time.monotonic() + seconds
    with log.open("a", encoding="utf-8") as told:
        while True:
            with subprocess.Popen(
                command, cwd=ROOT, stdout=told, stderr=told, start_new_session=True
            ) as process:
                why = watch(process, path, ends)
            if not why:
                return ""
            notes = Notes.read(path)
            blamed = notes.trying is not None and why != "no time left"
            notes.give_up(why if blamed else "")
            if not blamed:
                return why


def watch(process: subprocess.Popen[bytes], path: Path, ends: float) -> str:
    """Waits for the process, and ends it if time is over or an arm hangs; "" or what went wrong."""
    arm, since = None, time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        now = time.monotonic()
        trying = Notes.read(path).trying
        if trying is None or trying != arm:
            arm, since = trying, now
        if now > ends or now - since > PATIENCE:
            os.killpg(process.pid, signal.SIGKILL)  # those that compile for it, too
            process.wait()
            return "no time left" if now > ends else f"hung for {PATIENCE:.0f} s"
    if process.returncode == UNFINISHED:
        return "no time left"
    return "" if process.returncode == 0 else f"its process ended with {process.returncode}"


def tune_table(table: str, notes: Notes, ends: float) -> bool:
    """In a process of its own: every line of the table; False if `ends` of the clock came first."""

    def is_over() -> bool:
        return time.time() > ends

    if table == SGLANG:
        return tune_sglang(notes, is_over)
    bench = cuda_bench()
    done = []
    for line in lines_of(subjects()[table], device_class(torch.device("cuda"))):
        done.append(tune_line(line, bench, notes, is_over))
        torch.cuda.empty_cache()
    return all(done)


def cuda_bench(prepare: Callable[[], None] | None = None) -> Bench:
    """This GPU; `prepare` is what processes that compile need before they import kernels."""
    import triton  # noqa: PLC0415 - only where there is a GPU
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415 - as above

    from benchmarks.kernels.precompile import Compiler  # noqa: PLC0415 - imports triton, too

    found = torch.cuda.get_device_properties(0)
    shared = triton.runtime.driver.active.utils.get_device_properties(0)["max_shared_mem"]
    compiler = Compiler(GPUTarget("cuda", found.major * 10 + found.minor, 32), prepare=prepare)
    return Bench(
        time_us=lambda calls: harness.time_us(calls)[0],
        refusals=partial(compiler.refusals, shared_limit=shared),
        num_sets=lambda num_bytes: harness.num_sets(num_bytes, found.L2_cache_size),
        settle=torch.cuda.synchronize,
    )


def tune_sglang(notes: Notes, is_over: Callable[[], bool]) -> bool:
    """Their tiles for DeepSeek-V3's experts, number of tokens after number of tokens."""

    def time_us(num_tokens: int, tile: sglang_config.Tile) -> float:
        calls = [grouped_gemm.sglang_layer(seed, num_tokens, tile) for seed in range(2)]
        return harness.time_us(calls)[0]

    bench = cuda_bench(peers.without_sglang)
    for number in grouped_gemm.LAYER_TOKENS:
        if str(number) not in notes.lines:
            if is_over():
                return False
            # Compiled beside each other; what they take is SGLang's business.
            bench.refusals(
                [
                    (at, [grouped_gemm.sglang_layer(0, number, tile)])
                    for at, tile in enumerate(sglang_config.TILES)
                ]
            )
            tile, arms = sglang_config.tune(number, time_us)
            notes.lines[str(number)] = {"before": None, "after": tile, "arms": arms}
            notes.save()
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", action="append", default=[], help="this table; may be repeated")
    parser.add_argument("--seconds", type=float, default=400.0, help="for everything together")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--resume", type=Path, help="the tune.json of an unfinished run")
    parser.add_argument("--adopt", type=Path, help="a tune.json, written into this tree's files")
    parser.add_argument("--commit", default="", help="where there is no git to ask")
    parser.add_argument("--table", help=argparse.SUPPRESS)
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ends", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.adopt:
        write_tiles(json.loads(args.adopt.read_text(encoding="utf-8")))
        return 0
    if args.table:
        return 0 if tune_table(args.table, Notes.read(args.notes), args.ends) else UNFINISHED
    names = table_names()
    if unknown := sorted({*args.op} - {*names}):
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(names)}")
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to tune")
        return 0
    os.environ.pop("TRITON_INTERPRET", None)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in names if not args.op or name in args.op]
    (args.out / "tune.log").unlink(missing_ok=True)
    known = known_from(args.resume) if args.resume else {}
    return tune_all(wanted, args.out, args.seconds, args.commit or commit(), known)


def table_names() -> list[str]:
    """What matters most comes first; SGLang's right after the experts that it is compared with."""
    first, second, *others = subjects()
    return [first, second, SGLANG, *others]


if __name__ == "__main__":
    sys.exit(main())
