"""Every kernel compiles for sm_90, by both Tritons: this machine's, and the one on the GPUs."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "src/tidemill/kernels"
ON_GPUS = ROOT / ".venv-triton36/bin/python"
SHARED_BYTES = 232_448  # that a block may have on sm_90


@pytest.fixture(scope="module", params=[Path(sys.executable), ON_GPUS], ids=["here", "3.6"])
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What benchmarks.kernels.aot found, a row a variant."""
    python: Path = request.param
    if not python.exists():
        pytest.skip(f"no {python.relative_to(ROOT)}: `make test` makes it")
    out = tmp_path_factory.mktemp("aot") / "aot.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [python, "-m", "benchmarks.kernels.aot", "--out", out],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    ((version, found),) = json.loads(out.read_text("utf-8"))["triton"].items()
    assert python != ON_GPUS or version.startswith("3.6.")
    return found["rows"]


@pytest.mark.timeout(600)  # cold; a minute and seconds when Triton's cache knows the sources
def test_no_kernel_spills(rows: list[dict[str, Any]]) -> None:
    assert {row["variant"]: row["spilled_bytes"] for row in rows if row["spilled_bytes"]} == {}


@pytest.mark.timeout(600)
def test_shared_memory_is_what_a_block_may_have(rows: list[dict[str, Any]]) -> None:
    asked = {row["variant"]: row["shared_bytes"] for row in rows}
    assert {name: size for name, size in asked.items() if size > SHARED_BYTES} == {}


@pytest.mark.timeout(600)
def test_matrix_kernels_use_the_tensor_cores(rows: list[dict[str, Any]]) -> None:
    assert [row["variant"] for row in rows if row["matrix"] and not row["wgmma"]] == []


@pytest.mark.timeout(600)
def test_every_kernel_is_among_what_was_compiled(rows: list[dict[str, Any]]) -> None:
    compiled = {(row["op"], row["variant"].partition("[")[0]) for row in rows}
    written = set(launched_functions())
    assert written
    assert compiled == written


def test_every_op_with_kernels_tells_what_it_launches() -> None:
    silent = {op for op, _ in launched_functions() if not (KERNELS / op / "kernel.py").exists()}
    assert silent == set()


def launched_functions() -> Iterator[tuple[str, str]]:
    """(op, function) of each `triton.jit` function that is a kernel: its name says so."""
    for path in KERNELS.glob("*/*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "_kernel" in node.name and is_jit(node):
                yield path.parent.name, node.name


def is_jit(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(each) for each in function.decorator_list)
