"""Every kernel at every configuration, compiled for sm_90 without a GPU.

    python -m benchmarks.kernels.aot [--op OP ...] [--out FILE]

Tells what each takes of a multiprocessor: registers a thread, shared memory a block, bytes spilled,
and whether it uses the tensor cores. Run with each Triton that the kernels must work with, the
results of one leave those of the others alone; sources that Triton's cache knows are not compiled
again. No figure of speed: nothing is run.
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.provenance import commit

RESULT = Path(__file__).with_name("results") / "aot.json"
PROCESSES = 2  # as many as CI has cores


@dataclass(frozen=True)
class Row:
    """One variant. `matrix`: it must use wgmma."""

    op: str
    variant: str
    registers: int
    shared_bytes: int
    spilled_bytes: int
    wgmma: bool
    matrix: bool


def settle_environment() -> None:
    """Before triton is imported: no interpreter, and the rounding that every version had so far."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def compile_one(op: str, index: int) -> Row:
    from tidemill.kernels import aot  # noqa: PLC0415 - after settle_environment

    variant = aot.variants_of(op)[index]
    try:
        made = aot.compile_variant(variant)
    except Exception as error:
        # The compiler's own errors do not survive the way between processes.
        raise RuntimeError(f"{op}: {variant.name}: {error!r}") from None
    return Row(
        op=op,
        variant=variant.name,
        registers=made.registers,
        shared_bytes=made.shared_bytes,
        spilled_bytes=made.spilled_bytes,
        wgmma=made.has_wgmma,
        matrix=variant.matrix,
    )


def compile_all(ops: list[str]) -> list[Row]:
    """All variants of `ops`, or of every op, in the order of their definition."""
    from tidemill.kernels import aot  # noqa: PLC0415 - after settle_environment

    counts = {op: len(aot.variants_of(op)) for op in ops or aot.operators()}
    with ProcessPoolExecutor(
        PROCESSES, mp_context=get_context("spawn"), initializer=settle_environment
    ) as pool:
        made = [
            pool.submit(compile_one, op, index)
            for op, count in counts.items()
            for index in range(count)
        ]
        return [future.result() for future in made]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    args = parser.parse_args()
    settle_environment()
    import triton  # noqa: PLC0415 - after settle_environment

    began = time.perf_counter()
    rows = compile_all(args.op)
    seconds = time.perf_counter() - began
    for row in rows:
        print(
            f"{row.op:16} {row.registers:4} registers {row.shared_bytes:7} B shared "
            f"{row.spilled_bytes:4} B spilled {'wgmma' if row.wgmma else '     '} {row.variant}"
        )
    print(f"{len(rows)} variants by Triton {triton.__version__} in {seconds:.1f} s")
    others = json.loads(args.out.read_text("utf-8"))["triton"] if args.out.exists() else {}
    found = {"seconds": round(seconds, 1), "rows": [asdict(row) for row in rows]}
    result = {
        "benchmark": "kernels/aot",
        "command": "python -m benchmarks.kernels.aot",
        "commit": commit(),
        "target": "sm_90",
        "processes": PROCESSES,
        "triton": {**others, triton.__version__: found},
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
