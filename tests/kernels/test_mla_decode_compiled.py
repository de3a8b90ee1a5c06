"""What only the compiled form of decode attention shows: work done once, loads asked for early."""

import json
from typing import Any

import pytest

from tests.kernels.compiling import HERE, ON_GPUS, ROOT, output_of

# Rows of a tile -> wgmma a warpgroup and block of 64 tokens. Scores: a step of 16 for each of the
# 576 columns, once. Result: 4 steps of 16 tokens for each tile of 64 rows, or of 64 values.
PRODUCTS = {16: 36 + 4 * 8, 32: 36 + 4 * 4, 64: 36 + 4}

_TELL = """
import json
from tidemill.kernels import aot
found = []
for variant in aot.variants_of("mla_decode"):
    if variant.matrix:
        made = aot.compile_variant(variant)
        lines = made.ttgir.splitlines()
        found.append({
            "rows": variant.constants["BLOCK_R"],
            "products": made.ptx.count("wgmma.mma_async"),
            "load": max(n for n, line in enumerate(lines) if "async_tma_copy_global" in line),
            "last": max(n for n, line in enumerate(lines) if "warp_group_dot " in line),
        })
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=[HERE, ON_GPUS], ids=["here", "3.6"])
def compiled(request: pytest.FixtureRequest) -> Any:
    """A row a tile and number of query tokens."""
    environment = {"TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": str(ROOT / "src")}
    return json.loads(output_of(request.param, "-c", _TELL, **environment))


@pytest.mark.timeout(120)
def test_warpgroups_share_out_the_scores(compiled: list[dict[str, int]]) -> None:
    assert {row["rows"]: row["products"] for row in compiled} == PRODUCTS


@pytest.mark.timeout(120)
def test_next_block_is_asked_for_before_the_second_product(compiled: list[dict[str, int]]) -> None:
    assert compiled
    assert all(row["load"] < row["last"] for row in compiled)
