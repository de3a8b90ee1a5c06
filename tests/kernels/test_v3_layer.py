"""A layer of DeepSeek-V3's experts at full width on its kernels, on a GPU, against plain torch."""

import pytest
import torch

from tests.random_v3 import RandomWeights, random_moe
from tidemill.engine.decode_graphs import record_graph
from tidemill.kernels import choice
from tidemill.models.presets import load_preset
from tidemill.models.stacked import StackedMoe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_tokens", [1, 16, 100])
def test_a_full_width_v3_layer_in_fp8_is_that_of_plain_torch(num_tokens: int) -> None:
    """256 experts, 7168 wide: the kernels and plain torch on the same device and the same bytes."""
    moe = v3_moe()
    hidden = torch.randn(num_tokens, 7168, device="cuda").bfloat16()
    ours = moe(hidden) - hidden
    with choice.forced("reference"):
        expected = moe(hidden) - hidden
    differences = (ours - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    # Sums of another order round otherwise, to e4m3 within and to bf16 after; a choice may turn.
    assert differences.median().item() < 0.05


def test_a_recorded_layer_gives_what_it_gives_eagerly() -> None:
    moe = v3_moe()
    hidden = torch.randn(8, 7168, device="cuda").bfloat16()
    place = hidden.clone()
    with torch.inference_mode():
        recording = record_graph(lambda: moe(place))
        for _ in range(2):
            place.copy_(torch.randn_like(hidden))
            recording.replay()
            assert torch.equal(recording.output, moe(place))


def v3_moe() -> StackedMoe:
    return random_moe(load_preset("deepseek-v3"), RandomWeights(0))
