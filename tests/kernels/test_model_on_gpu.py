"""Whole models on their kernels, on a GPU."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.model_probe import Probe
from tests.random_v3 import launches, random_v3
from tidemill.models.deepseek import Batch, DecodeRows

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


def test_a_decode_step_launches_at_most_twenty_kernels_a_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # poisoning fresh memory is a launch too
    model = random_v3(num_layers=1, max_context=512)
    layer = model.layers[0]
    latents = torch.zeros(1, 64, 64, model.config.latent_dim, device="cuda").bfloat16()
    rows = torch.arange(32, device="cuda")
    tables = (2 * rows.unsqueeze(1) + torch.arange(2, device="cuda")).int()
    batch = Batch(rows + 70, tables[:, 1] * 64 + 6 + rows, DecodeRows(tables, rows + 71))

    def run(layers: int) -> None:
        model.layers = [layer] * layers
        model.forward(rows, batch, latents.expand(layers, -1, -1, -1))

    with torch.inference_mode():
        one, two = (launches(partial(run, count)) for count in (1, 2))
    assert two - one <= 20
