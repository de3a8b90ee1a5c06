"""Logits against transformers' DeepseekV3ForCausalLM, both in fp32, on random checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_model import YARN, make_tiny_checkpoint
from tests.x1 import reference_gaps
from tidemill.engine import Engine, EngineConfig
from tidemill.models.deepseek import Batch, DecodeRows, PromptSpan

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
    return _forward(engine, tokens[start:], Batch(positions, positions + 64, spans=[span]))


def _absorbed_logits(engine: Engine, tokens: Tensor, blocks: Tensor, start: int) -> Tensor:
    """As `_prefill_logits` by decode attention: every position is a row of one batch."""
    positions = torch.arange(start, len(tokens))
    tables = blocks.expand(len(positions), -1)
    batch = Batch(positions, positions + 64, DecodeRows(tables, positions + 1))
    return _forward(engine, tokens[start:], batch)


@torch.inference_mode()
def _forward(engine: Engine, tokens: Tensor, batch: Batch) -> Tensor:
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
    engine = Engine.load(path, EngineConfig(num_blocks=8, num_threads=1))
    # The sequence lies in blocks 1, 2, ...: position p at row p + 64.
    blocks = torch.arange(1, -(-length // 64) + 1)
    _assert_close(_prefill_logits(engine, tokens, blocks, 0), reference)
    _assert_close(_absorbed_logits(engine, tokens, blocks, 0), reference)
    middle = length // 2
    _assert_close(_prefill_logits(engine, tokens, blocks, middle), reference[middle:])
    _assert_close(_absorbed_logits(engine, tokens, blocks, middle), reference[middle:])


def test_x1c_bf16_decode_errs_no_more_than_half_again_bf16_prefill(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path, rope_parameters=YARN, dtype="bfloat16")
    engine = Engine.load(path, EngineConfig(num_blocks=8, num_threads=1))
    blocks = torch.arange(1, 6)
    whole, absorbed = [], []
    for seed in range(5):
        tokens = torch.randint(0, 512, (300,), generator=torch.manual_seed(seed))
        exact = reference_gaps(path, tokens.tolist()).logits
        whole.append(_prefill_logits(engine, tokens, blocks, 0).float() - exact)
        absorbed.append(_absorbed_logits(engine, tokens, blocks, 0).float() - exact)
    assert _p999(absorbed) <= 1.5 * _p999(whole)


def _p999(errors: list[Tensor]) -> float:
    flat = torch.cat(errors).abs().flatten()
    return flat.kthvalue(int(0.999 * flat.numel())).values.item()
