"""Every kernel compiles for sm_90, by both Tritons: this machine's, and the one on the GPUs."""

import ast
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kernels.compiling import HERE, ON_GPUS, ROOT, output_of

KERNELS = ROOT / "src/tidemill/kernels"
SHARED_BYTES = 232_448  # that a block may have on sm_90


@pytest.fixture(scope="module", params=[HERE, ON_GPUS], ids=["here", "3.6"])
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What benchmarks.kernels.aot found, a row a variant."""
    out = tmp_path_factory.mktemp("aot") / "aot.json"
    output_of(request.param, "-m", "benchmarks.kernels.aot", "--out", out)
    ((version, found),) = json.loads(out.read_text("utf-8"))["triton"].items()
    assert request.param != ON_GPUS or version.startswith("3.6.")
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
