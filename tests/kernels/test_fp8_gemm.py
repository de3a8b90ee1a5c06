from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tidemill.kernels.act_quant.reference import Quantized, act_quant
from tidemill.kernels.cases import GEMM_CASES, GEMM_GPU_CASES, GemmCase
from tidemill.kernels.choice import forced
from tidemill.kernels.device import H100, tile_counters
from tidemill.kernels.fp8_gemm import fp8_gemm, reference
from tidemill.kernels.fp8_gemm.configs import TILES, Tile, count_splits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL_TILES = [tile for _, tile in TILES[H100]]
Operands = tuple[Quantized, Tensor, Tensor]


def operands(case: GemmCase, device: str = DEVICE) -> Operands:
    """Left side, weight and scales whose product is of order one; every scale is another."""
    generator = torch.Generator(device).manual_seed(case.num_rows)
    x = torch.randn(case.num_rows, case.depth, generator=generator, device=device)
    weight = torch.randn(case.num_columns, case.depth, generator=generator, device=device)
    blocks = -(-case.num_columns // 128), case.depth // 128
    scales = torch.rand(blocks, generator=generator, device=device) + 0.5
    return act_quant(x), weight.to(torch.float8_e4m3fn), scales / case.depth**0.5


def by_hand(a: Quantized, weight: Tensor, scales: Tensor, row: int, column: int) -> float:
    """One element, group by group, in Python."""
    total = 0.0
    for group in range(weight.shape[1] // 128):
        part = slice(128 * group, 128 * (group + 1))
        product = a.values[row, part].double() @ weight[column, part].double()
        total += product.item() * a.scales[row, group].item() * scales[column // 128, group].item()
    return total


def test_the_reference_scales_each_block_of_128_by_its_own() -> None:
    a, weight, scales = operands(GemmCase(3, 300, 384), "cpu")
    out = reference.fp8_gemm(a, weight, scales, out_dtype=torch.float32, residual=None, bias=None)
    for row, column in ((0, 0), (1, 127), (2, 128), (0, 299)):
        assert out[row, column].item() == pytest.approx(
            by_hand(a, weight, scales, row, column), rel=1e-5, abs=1e-5
        )


@pytest.mark.parametrize("case", GEMM_CASES, ids=str)
def test_the_kernel_matches_the_reference(case: GemmCase) -> None:
    a, weight, scales = operands(case)
    found, expected = both(a, weight, scales, out_dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", ALL_TILES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_every_tile_gives_the_same(tile: Tile, splits: int) -> None:
    from tidemill.kernels.fp8_gemm import kernel  # noqa: PLC0415 - triton is heavy

    a, weight, scales = operands(GemmCase(20, 200, 384))
    residual = torch.randn(20, 200, device=DEVICE)
    options: dict[str, Any] = {"out_dtype": torch.float32, "residual": residual, "bias": None}
    found = kernel.fp8_gemm(a, weight, scales, tile=replace(tile, splits=splits), **options)
    expected = reference.fp8_gemm(a, weight, scales, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2])
def test_bias_and_residual_are_added_before_the_one_rounding(splits: int) -> None:
    from tidemill.kernels.fp8_gemm import kernel  # noqa: PLC0415 - triton is heavy

    a, weight, scales = operands(GemmCase(5, 200, 256))
    residual = torch.randn(5, 300, device=DEVICE).half()[:, :200]  # rows that do not lie together
    bias = torch.randn(200, device=DEVICE).half()
    tile = replace(ALL_TILES[0], splits=splits)
    options: dict[str, Any] = {"out_dtype": torch.float16, "residual": residual, "bias": bias}
    found = kernel.fp8_gemm(a, weight, scales, tile=tile, **options)
    expected = reference.fp8_gemm(a, weight, scales, **options)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, expected, rtol=2**-10, atol=2**-12)


def test_few_rows_split_the_depth_and_many_do_not() -> None:
    tile = Tile(16, 64, 128, splits=0)
    assert count_splits(tile, num_tiles=33, num_steps=56, sms=132) == 8
    assert count_splits(tile, num_tiles=33, num_steps=4, sms=132) == 1
    assert count_splits(tile, num_tiles=500, num_steps=56, sms=132) == 1
    assert count_splits(replace(tile, splits=1), num_tiles=1, num_steps=56, sms=132) == 1
    assert count_splits(Tile(16, 64, 128, splits=2), 65_537, num_steps=56, sms=132) == 1


@pytest.mark.usefixtures("either_order")
def test_parts_are_added_in_their_order_whoever_comes_last() -> None:
    from tidemill.kernels.fp8_gemm import kernel  # noqa: PLC0415 - triton is heavy

    a, weight, scales = operands(GemmCase(20, 200, 512))
    options: dict[str, Any] = {"out_dtype": torch.float32, "bias": None}
    tile = replace(ALL_TILES[0], splits=1)
    expected = torch.zeros(20, 200, device=DEVICE)
    for part in range(4):
        k = slice(128 * part, 128 * (part + 1))
        values = a.values[:, k].contiguous()
        group = Quantized(values, a.scales[:, part : part + 1].contiguous())
        block = scales[:, part : part + 1].contiguous()
        expected += kernel.fp8_gemm(
            group, weight[:, k].contiguous(), block, tile=tile, residual=None, **options
        )
    residual = torch.randn(20, 200, device=DEVICE)
    expected += residual
    found = kernel.fp8_gemm(
        a, weight, scales, tile=replace(tile, splits=4), residual=residual, **options
    )
    assert torch.equal(found, expected)


def test_counters_are_zero_for_the_next_call_of_another_size() -> None:
    from tidemill.kernels.fp8_gemm import kernel  # noqa: PLC0415 - triton is heavy

    for case, splits in ((GemmCase(20, 200, 384), 3), (GemmCase(40, 330, 256), 2)):
        a, weight, scales = operands(case)
        options: dict[str, Any] = {"out_dtype": torch.float32, "residual": None, "bias": None}
        tile = replace(ALL_TILES[0], splits=splits)
        found = kernel.fp8_gemm(a, weight, scales, tile=tile, **options)
        expected = reference.fp8_gemm(a, weight, scales, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not tile_counters(weight.device).any()


def test_no_rows_give_no_rows() -> None:
    a, weight, scales = operands(GemmCase(2, 128, 128))
    none = Quantized(a.values[:0], a.scales[:0])
    with forced("triton"):
        assert fp8_gemm(none, weight, scales).shape == (0, 128)


def test_what_does_not_fit_together_is_refused() -> None:
    a, weight, scales = operands(GemmCase(2, 200, 256))
    with pytest.raises(ValueError, match=r"weight is \[200, 128\].*expected \[N=200, K=256\]"):
        fp8_gemm(a, weight[:, :128], scales)
    with pytest.raises(ValueError, match=r"scale_inv is \[1, 2\].*expected \[N/128=2, K/128=2\]"):
        fp8_gemm(a, weight, scales[:1])
    with pytest.raises(ValueError, match=r"weight is \[200, 256\] float32.*float8_e4m3fn"):
        fp8_gemm(a, weight.float(), scales)
    with pytest.raises(ValueError, match=r"residual is \[2, 100\].*expected \[T=2, N=200\]"):
        fp8_gemm(a, weight, scales, residual=torch.zeros(2, 100, device=DEVICE))
    with pytest.raises(ValueError, match="weight must be contiguous"):
        fp8_gemm(a, torch.cat((weight, weight), dim=1)[:, :256], scales)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GEMM_GPU_CASES, ids=str)
def test_full_shapes_match_the_reference(case: GemmCase) -> None:
    a, weight, scales = operands(case)
    residual = torch.randn(case.num_rows, case.num_columns, device=DEVICE).bfloat16()
    found, expected = both(a, weight, scales, residual=residual)
    # The tensor cores keep about 14 bits of a sum of 128 products.
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=5e-3)


@pytest.mark.gpu
def test_a_graph_of_split_products_gives_the_same_bits_at_every_replay() -> None:
    from tidemill.kernels.fp8_gemm import kernel  # noqa: PLC0415 - triton is heavy

    a, weight, scales = operands(GemmCase(8, 2112, 7168))
    options: dict[str, Any] = {"out_dtype": torch.bfloat16, "residual": None, "bias": None}
    tile = replace(TILES[H100][0][1], splits=8)
    expected = kernel.fp8_gemm(a, weight, scales, tile=tile, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernel.fp8_gemm(a, weight, scales, tile=tile, **options)
    for _ in range(100):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
    assert not tile_counters(weight.device).any()


def both(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    with forced("triton"):
        found = fp8_gemm(*args, **kwargs)
    with forced("reference"):
        return found, fp8_gemm(*args, **kwargs)
