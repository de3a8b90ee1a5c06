import pytest
import torch

from tidemill.kernels.act_quant import act_quant, dequantize, swiglu_quant


def test_each_group_of_128_has_the_scale_of_its_largest_value() -> None:
    x = torch.zeros(2, 256)
    x[0, 5], x[0, 200], x[1, 128] = -896.0, 7.0, 0.5
    quantized = act_quant(x)
    expected = torch.tensor([[2.0, 7 / 448], [1e-4 / 448, 0.5 / 448]])
    assert torch.equal(quantized.scales, expected)
    assert quantized.values.dtype == torch.float8_e4m3fn
    assert quantized.values[0, 5].item() == -448
    assert quantized.values[0, 200].item() == 448
    assert quantized.values[1, 128].item() == 448
    assert quantized.values.float().count_nonzero() == 3


def test_values_round_to_the_nearest_e4m3() -> None:
    x = torch.zeros(1, 128)
    # Neighbours in e4m3 around 17 are 16 and 18, around 127.7 they are 120 and 128.
    x[0, :5] = torch.tensor([448.0, 17.1, 127.7, 0.3, -16.9])
    assert act_quant(x).values[0, :5].tolist() == [448.0, 18.0, 128.0, 0.3125, -16.0]


def test_scales_of_one_group_lie_together() -> None:
    scales = act_quant(torch.randn(5, 384)).scales
    assert scales.shape == (5, 3)
    assert scales.stride() == (1, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_rows_are_within_half_a_step_of_e4m3(dtype: torch.dtype) -> None:
    x = torch.randn(7, 256, generator=torch.manual_seed(1)).to(dtype)
    back = dequantize(act_quant(x), dtype)
    assert back.dtype == dtype
    # Three bits of mantissa: 2**-4 of the value; below 2**-6 of the scale the steps are 2**-9.
    step = act_quant(x).scales.repeat_interleave(128, dim=1) * 2**-10
    assert ((back - x).float().abs() <= x.float().abs() * 2**-4 * 1.07 + step).all()


def test_swiglu_quant_quantises_the_rounded_product() -> None:
    gate_up = torch.randn(3, 512, generator=torch.manual_seed(2)).to(torch.bfloat16)
    gate, up = gate_up.float().chunk(2, dim=1)
    product = (gate / (1 + (-gate).exp()) * up).to(torch.bfloat16)
    found, expected = swiglu_quant(gate_up), act_quant(product)
    torch.testing.assert_close(found.scales, expected.scales, rtol=2**-7, atol=0)
    torch.testing.assert_close(
        dequantize(found, torch.float32), dequantize(expected, torch.float32), rtol=0.13, atol=1e-2
    )
