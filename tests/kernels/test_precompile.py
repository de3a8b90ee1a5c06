"""What is compiled ahead is what a call then finds, on a GPU that is not there."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from benchmarks.kernels import fp8_gemm
from benchmarks.kernels.precompile import Compiler, Launch, Usage, compile_launch
from tests.kernels.compiling import HERE, output_of
from tests.kernels.dry_gpu import DryGpu
from tidemill.kernels.aot import HOPPER
from tidemill.kernels.cases import GemmCase
from tidemill.kernels.fp8_gemm.configs import Tile

GOOD = Tile(16, 64, 128, swap=True, tma=True)
SHARED_BYTES = 50_000  # three stages of it, and not six


def compile_and_call() -> None:
    """Tells what was refused of the two tiles, and what calls then found in Triton's cache."""
    from tidemill.kernels.fp8_gemm import kernel  # noqa: PLC0415 - as triton.jit makes it here

    found: list[tuple[str, bool]] = []
    with DryGpu() as gpu:
        operands = fp8_gemm.operands(0, GemmCase(16, 2112, 7168))
        gpu.launches.clear()
        settings: dict[str, Any] = {"out_dtype": torch.bfloat16, "residual": None, "bias": None}
        calls = {
            "good": lambda: kernel.fp8_gemm(*operands, **settings, tile=GOOD),
            "too large": lambda: kernel.fp8_gemm(
                *operands, **settings, tile=replace(GOOD, stages=6)
            ),
            "wrong": lambda: kernel.fp8_gemm(*operands, **settings, tile=replace(GOOD, rows=24)),
        }
        compiler = Compiler(HOPPER, processes=1)
        refused = compiler.refusals(
            [(name, [call]) for name, call in calls.items()], shared_limit=SHARED_BYTES
        )
        compiler.close()
        launched = len(gpu.launches)
        triton.knobs.compilation.listener = lambda **told: found.append(
            (told["src"].name, told["cache_hit"])
        )
        calls["good"]()
    sys.stdout.write(json.dumps({"refused": refused, "launched": launched, "found": found}))


@pytest.mark.timeout(120)  # cold; seconds when Triton's cache knows the kernels
def test_call_finds_in_the_cache_what_was_compiled_ahead(tmp_path: Path) -> None:
    found = output_of(
        HERE,
        "-m",
        "tests.kernels.test_precompile",
        TRITON_DEFAULT_FP_FUSION="1",
        TRITON_CACHE_DIR=str(tmp_path),
    )
    told = json.loads(found)
    assert told["launched"] == 0
    assert told["found"]
    assert all(hit for _, hit in told["found"])
    assert {*told["refused"]} == {"too large", "wrong"}
    assert told["refused"]["too large"].endswith("bytes of shared memory")
    assert told["refused"]["wrong"].startswith("does not compile: ")


def test_kernel_that_cannot_be_imported_is_told_not_raised() -> None:
    launch = Launch("tidemill.kernels.nowhere", "_kernel", {}, {}, {}, {})
    assert compile_launch(launch, HOPPER).refused.startswith("does not compile: ModuleNotFound")


@pytest.mark.parametrize(
    ("usage", "why"),
    [
        (Usage(100, 0), ""),
        (Usage(101, 0), "101 bytes of shared memory"),
        (Usage(100, 16), "spills 16 bytes a thread"),
        (Usage(refused="does not compile"), "does not compile"),
    ],
)
def test_what_spills_or_does_not_fit_is_not_worth_a_launch(usage: Usage, why: str) -> None:
    assert usage.why_not(shared_limit=100) == why


if __name__ == "__main__":
    compile_and_call()
