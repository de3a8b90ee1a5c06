import pytest
import torch
from torch import Tensor

from tidemill.kernels.act_quant.reference import dequantize, scale_groups
from tidemill.kernels.cases import NORM_CASES, QUANT_CASES, QUANT_GPU_CASES, RowsCase
from tidemill.kernels.choice import forced
from tidemill.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_quant,
    reference,
    rms_norm,
    rms_norm_quant,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


def random_rows(case: RowsCase, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x and residual [T, D], of which the rows do not lie together, and weight [D]."""
    generator = torch.manual_seed(case.num_rows + case.dim)
    both = torch.randn(case.num_rows, 2 * case.dim, generator=generator) * 3
    weight = torch.randn(case.dim, generator=generator)
    x, residual = both.to(dtype).to(DEVICE).chunk(2, dim=1)
    return x, residual, weight.to(dtype).to(DEVICE)


def test_the_sum_is_rounded_before_it_is_normed_and_quantised() -> None:
    x, residual = torch.randn(2, 4, 256, generator=torch.manual_seed(1)).to(torch.bfloat16)
    weight = torch.ones(256, dtype=torch.bfloat16)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total, weight, EPS))
    quantized, again = add_rms_norm_quant(x, residual, weight, EPS)
    assert torch.equal(again, total)
    kept, alone = rms_norm_quant(total, weight, EPS, keep=True)
    assert torch.equal(kept, normed)
    assert torch.equal(dequantize(quantized, x.dtype), dequantize(alone, x.dtype))


@pytest.mark.parametrize("case", NORM_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_norms_as_the_reference(case: RowsCase, dtype: torch.dtype) -> None:
    x, residual, weight = random_rows(case, dtype)
    with forced("triton"):
        normed = rms_norm(x, weight, EPS)
        of_sum, total = add_rms_norm(x, residual, weight, EPS)
    step = 2**-10 if dtype == torch.float16 else 2e-6
    torch.testing.assert_close(normed, reference.rms_norm(x, weight, EPS), rtol=step, atol=step)
    assert torch.equal(total, x + residual)
    expected = reference.rms_norm(x + residual, weight, EPS)
    torch.testing.assert_close(of_sum, expected, rtol=step, atol=step)


@pytest.mark.parametrize("case", [*QUANT_CASES[:3], NORM_CASES[3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_scales_what_it_normed(case: RowsCase, dtype: torch.dtype) -> None:
    """The last cast, to e4m3, is left out: Triton's interpreter gets it wrong."""
    from tidemill.kernels.rms_norm import kernel  # noqa: PLC0415 - triton is heavy

    x, residual, weight = random_rows(case, dtype)
    normed, quantized = kernel.rms_norm_quant(x, weight, EPS, values_dtype=torch.float32)
    assert normed is not None
    step = 2**-10 if dtype == torch.float16 else 2e-6
    torch.testing.assert_close(normed, reference.rms_norm(x, weight, EPS), rtol=step, atol=step)
    scaled, scales = scale_groups(normed)
    assert torch.equal(quantized.values, scaled)
    assert torch.equal(quantized.scales, scales)

    of_sum, total = kernel.add_rms_norm_quant(x, residual, weight, EPS, torch.float32)
    assert torch.equal(total, x + residual)
    normed, alone = kernel.rms_norm_quant(
        total, weight, EPS, keep=False, values_dtype=torch.float32
    )
    assert normed is None
    assert torch.equal(of_sum.values, alone.values)
    assert torch.equal(of_sum.scales, alone.scales)


def test_leading_dimensions_are_rows() -> None:
    x, weight = torch.randn(2, 3, 64, device=DEVICE), torch.rand(64, device=DEVICE)
    with forced("triton"):
        found = rms_norm(x, weight, EPS)
        assert rms_norm(x[:0], weight, EPS).shape == (0, 3, 64)
    torch.testing.assert_close(found, reference.rms_norm(x, weight, EPS))


def test_the_kernel_refuses_a_weight_of_another_width() -> None:
    x, weight = torch.zeros(2, 64, device=DEVICE), torch.zeros(32, device=DEVICE)
    with forced("triton"), pytest.raises(ValueError, match=r"weight is \[32\].*expected \[D=64\]"):
        rms_norm(x, weight, EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("case", QUANT_GPU_CASES, ids=str)
def test_bf16_rows_are_normed_and_quantised_as_the_reference_does(case: RowsCase) -> None:
    x, residual, weight = random_rows(case, torch.bfloat16)
    normed, quantized = rms_norm_quant(x, weight, EPS, keep=True)
    expected = reference.rms_norm(x, weight, EPS)
    torch.testing.assert_close(normed, expected, rtol=2**-7, atol=2**-9)
    scaled, scales = scale_groups(normed)
    assert torch.equal(quantized.scales, scales)
    values = scaled.to(torch.float8_e4m3fn)
    assert torch.equal(quantized.values.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(rms_norm(x, weight, EPS), normed)

    of_sum, total = add_rms_norm_quant(x, residual, weight, EPS)
    again, _ = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(again, rms_norm(total, weight, EPS))
    scaled, scales = scale_groups(again)
    assert torch.equal(of_sum.scales, scales)
