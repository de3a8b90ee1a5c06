"""Logits against transformers' DeepseekV3ForCausalLM, both in fp32, on random checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_model import YARN, make_tiny_checkpoint
from tests.x1 import reference_gaps
from tidemill.engine import Engine, EngineConfig
from tidemill.models.deepseek import DecodeBatch, PrefillBatch, PromptSpan

# Of the reference's logit range: maximum minus minimum over the vocabulary.
TOLERANCE = 1e-4

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "yarn": {"rope_parameters": YARN},
    "yarn_with_amplitude": {"rope_parameters": {**YARN, "mscale": 0.7}},
    "rope_in_halves": {"rope_interleave": False},
    "tied_embeddings": {"tie_word_embeddings": True},
    "one_group_unnormalised": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    "two_shared_experts_wide_eps": {"n_shared_experts": 2, "rms_norm_eps": 1e-3},
}
CASES = [(name, length) for name in ("plain", "yarn") for length in (1, 63, 64, 65, 300)]
CASES += [(name, 65) for name in VARIANTS if name not in ("plain", "yarn")]


def _prefill_logits(engine: Engine, tokens: Tensor, blocks: Tensor, start: int) -> Tensor:
    """Logits [T - start, V] of positions from `start` on, in one chunk."""
    positions = torch.arange(start, len(tokens))
    span = PromptSpan(0, len(positions), start, blocks)
    return _forward(engine, tokens[start:], PrefillBatch(positions, positions + 64, [span]))


def _decode_logits(engine: Engine, tokens: Tensor, blocks: Tensor, position: int) -> Tensor:
    positions = torch.tensor([position])
    batch = DecodeBatch(positions, positions + 64, blocks.unsqueeze(0), positions + 1)
    return _forward(engine, tokens[position : position + 1], batch)


@torch.inference_mode()
def _forward(engine: Engine, tokens: Tensor, batch: PrefillBatch | DecodeBatch) -> Tensor:
    model = engine._runner.model
    return model.logits(model.forward(tokens, batch, engine.pool.latents))


def _assert_close(ours: Tensor, reference: Tensor) -> None:
    spread = reference.max(-1).values - reference.min(-1).values
    assert ((ours - reference).abs().max(-1).values / spread).max().item() < TOLERANCE


@pytest.mark.parametrize(("variant", "length"), CASES)
def test_logits_agree_with_transformers(tmp_path: Path, variant: str, length: int) -> None:
    path = make_tiny_checkpoint(tmp_path, **VARIANTS[variant])
    tokens = torch.randint(0, 512, (length,), generator=torch.manual_seed(length))
    reference = reference_gaps(path, tokens.tolist()).logits
    engine = Engine.load(path, EngineConfig(num_blocks=8))
    # The sequence lies in blocks 1, 2, ...: position p at row p + 64.
    blocks = torch.arange(1, -(-length // 64) + 1)
    _assert_close(_prefill_logits(engine, tokens, blocks, 0), reference)
    if length > 1:
        _assert_close(
            _prefill_logits(engine, tokens, blocks, length // 2), reference[length // 2 :]
        )
        engine.pool.latents[:, blocks[-1], (length - 1) % 64] = 0
        _assert_close(_decode_logits(engine, tokens, blocks, length - 1), reference[-1:])
