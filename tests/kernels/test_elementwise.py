import math
import os
import subprocess
import sys

import pytest
import torch

from tidemill.kernels.linear import make_head_linear, make_linear
from tidemill.kernels.linear.onednn import PackedHeads, PackedLinear, can_pack
from tidemill.kernels.linear.reference import PlainHeads, PlainLinear
from tidemill.kernels.rms_norm import rms_norm
from tidemill.kernels.rope import apply_rope


def test_rms_norm_scales_rows_to_unit_mean_square() -> None:
    x = torch.randn(5, 64) * 3
    weight = torch.rand(64)
    out = rms_norm(x, weight, 1e-6)
    for row in range(5):
        root = math.sqrt(sum(value * value for value in x[row].tolist()) / 64 + 1e-6)
        torch.testing.assert_close(out[row], x[row] / root * weight)


@pytest.mark.parametrize("rows", [1, 3, 1024])  # each takes another way on a CPU
def test_rms_norm_computes_in_fp32_whatever_the_dtype(rows: int) -> None:
    x = torch.randn(rows, 64, generator=torch.manual_seed(rows)).to(torch.bfloat16) * 1000
    exact = rms_norm(x.float(), torch.ones(64), 1e-6)
    found = rms_norm(x, torch.ones(64, dtype=torch.bfloat16), 1e-6)
    torch.testing.assert_close(found, exact.to(torch.bfloat16), atol=0, rtol=2**-7)
    assert (found != exact.to(torch.bfloat16)).float().mean() < 1e-3  # ties of the last rounding


def test_rope_turns_adjacent_pairs() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    angles = torch.tensor([[math.pi / 2, math.pi]])
    rotation = torch.polar(torch.ones(1, 2), angles)
    torch.testing.assert_close(apply_rope(x, rotation), torch.tensor([[0.0, 1.0, 0.0, -2.0]]))


def test_rope_keeps_the_dot_product_of_equal_distances() -> None:
    query, key = torch.randn(1, 8), torch.randn(1, 8)
    frequencies = 10000.0 ** -(torch.arange(4) / 4)

    def dot(query_at: int, key_at: int) -> float:
        turned = [
            apply_rope(x, torch.polar(torch.ones(1, 4), position * frequencies.unsqueeze(0)))
            for x, position in ((query, query_at), (key, key_at))
        ]
        return float((turned[0] * turned[1]).sum())

    assert dot(7, 3) == pytest.approx(dot(104, 100), abs=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 64, 300])
def test_packed_and_plain_products_agree(rows: int) -> None:
    generator = torch.manual_seed(rows)
    weight = (torch.randn(48, 96, generator=generator) * 0.1).to(torch.bfloat16)
    if not can_pack(weight):
        pytest.skip("this build or CPU has no bf16 products to pack for")
    x = torch.randn(rows, 96, generator=generator).to(torch.bfloat16)
    other = torch.randn(rows, 48, generator=generator).to(torch.bfloat16)
    packed, plain = PackedLinear(weight), PlainLinear(weight.float())
    wide = x.float()
    pairs = [
        (packed(x), plain(wide)),
        (packed.plus(x, other), plain.plus(wide, other.float())),
    ]
    for found, expected in pairs:
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("shape", [(16, 64, 32), (3, 24, 40), (2, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_head_takes_its_own_matrix(
    rows: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    generator = torch.manual_seed(rows)
    weight = (torch.randn(shape, generator=generator) * 0.1).to(dtype)
    wide = torch.randn(rows, shape[0], shape[2] + 3, generator=generator).to(dtype)
    x = wide[..., : shape[2]]  # rows that do not lie together, as in a query beside its RoPE part
    found = make_head_linear(weight)(x)
    expected = torch.einsum("thk,hnk->thn", x.float(), weight.float())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)
    apart = torch.full((rows, shape[0], shape[1] + 3), 9.0, dtype=dtype)
    make_head_linear(weight).into(x, apart[..., : shape[1]])
    assert torch.equal(apart[..., : shape[1]], found)
    assert (apart[..., shape[1] :] == 9).all()


GROWTH = """
import ctypes, pathlib, torch
from tidemill.kernels.linear.onednn import PackedLinear

def resident() -> int:
    ctypes.CDLL(None).malloc_trim(0)
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

torch.set_num_threads(1)
product, x = PackedLinear(torch.zeros(256, 256).bfloat16()), torch.zeros(800, 256).bfloat16()
product(x[:8])
before = resident()
for rows in range(4, 800):
    product(x[:rows])
print(resident() - before)
"""


def test_products_of_many_sizes_hold_bounded_memory() -> None:
    """Without a limit on what oneDNN keeps these are 380 MB."""
    if not can_pack(torch.zeros(8, 8, dtype=torch.bfloat16)):
        pytest.skip("this build or CPU has no bf16 products to pack for")
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environ = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", GROWTH]
    out = subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout
    assert int(out) < 200e6


def test_fp32_weights_stay_plain() -> None:
    assert isinstance(make_linear(torch.zeros(4, 4)), PlainLinear)
    assert isinstance(make_head_linear(torch.zeros(2, 4, 4)), PlainHeads)


def test_bf16_weights_are_packed_where_the_cpu_multiplies_them() -> None:
    weight = torch.zeros(2, 4, 4, dtype=torch.bfloat16)
    packs = can_pack(weight)
    assert isinstance(make_linear(weight[0]), PackedLinear) == packs
    assert isinstance(make_head_linear(weight), PackedHeads) == packs
