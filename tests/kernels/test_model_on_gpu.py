"""The model on its kernels, on a GPU, against plain torch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.model_probe import Probe
from tidemill.engine.decode_graphs import record_graph
from tidemill.kernels import choice
from tidemill.models.deepseek import Norm
from tidemill.models.presets import load_preset
from tidemill.models.stacked import StackedExperts, StackedMoe

pytestmark = pytest.mark.gpu

DEMO = Path(__file__).parents[2] / "models/demo"
# X1(c): a path's error against fp32 over that of the same dtype's whole prompt on a CPU.
MOST_ERROR = 1.5


def test_x1c_the_demo_models_logits_err_as_little_as_on_a_cpu() -> None:
    ids = torch.randint(6, 512, (300,), generator=torch.manual_seed(1))
    truth = Probe(DEMO, torch.float32).prefill(ids)

    def error(logits: Tensor) -> float:
        return (logits.float() - truth).abs().flatten().quantile(0.999).item()

    allowed = MOST_ERROR * error(Probe(DEMO, torch.bfloat16).prefill(ids))
    probe = Probe(DEMO, torch.bfloat16, stacked=True, device="cuda")
    assert error(probe.prefill(ids)) < allowed
    assert error(probe.absorbed(ids)) < allowed


@pytest.mark.parametrize("num_tokens", [1, 16, 100])
def test_a_full_width_v3_layer_in_fp8_is_that_of_plain_torch(num_tokens: int) -> None:
    """256 experts, 7168 wide: the kernels and plain torch on the same device and the same bytes."""
    moe = v3_layer()
    hidden = torch.randn(num_tokens, 7168, device="cuda").bfloat16()
    ours = moe(hidden) - hidden
    with choice.forced("reference"):
        expected = moe(hidden) - hidden
    differences = (ours - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    assert differences.median().item() < 0.02  # rounding may turn a choice of experts


def test_a_recorded_layer_gives_what_it_gives_eagerly() -> None:
    moe = v3_layer()
    hidden = torch.randn(8, 7168, device="cuda").bfloat16()
    place = hidden.clone()
    with torch.inference_mode():
        recording = record_graph(lambda: moe(place))
        for _ in range(2):
            place.copy_(torch.randn_like(hidden))
            recording.replay()
            assert torch.equal(recording.output, moe(place))


def v3_layer() -> StackedMoe:
    """A routed layer of DeepSeek-V3 with random FP8 weights: 11 GB."""
    config = load_preset("deepseek-v3")
    width, hidden, experts = (
        config.moe_intermediate_size,
        config.hidden_size,
        config.n_routed_experts,
    )
    generator = torch.Generator("cuda").manual_seed(0)

    def plain(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    def stack(count: int) -> StackedExperts:
        def fp8(rows: int, columns: int) -> tuple[Tensor, Tensor]:
            values = torch.empty(count, rows, columns, device="cuda", dtype=torch.float8_e4m3fn)
            for index in range(count):
                values[index] = plain(rows, columns).mul_(64).to(torch.float8_e4m3fn)
            scales = plain(count, rows // 128, columns // 128).abs_().add_(0.5)
            return values, scales.mul_(1 / 64 / columns**0.5)

        (gate_up, gate_up_scale), (down, down_scale) = fp8(2 * width, hidden), fp8(hidden, width)
        return StackedExperts(gate_up, down, gate_up_scale, down_scale)

    return StackedMoe(
        norm=Norm(torch.ones(hidden, device="cuda", dtype=torch.bfloat16), 1e-6),
        gate=plain(experts, hidden).mul_(hidden**-0.5),
        gate_bias=plain(experts).mul_(0.1),
        routed=stack(experts),
        shared=stack(1),
        config=config,
    )
