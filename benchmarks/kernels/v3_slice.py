"""A decode step of four full-width DeepSeek-V3 layers in FP8: all that stands between the kernels.

Floor: every weight, every latent and every row of the activations between layers moved once; the
products of so few rows take less time than reading their weights. What is above it is launches,
tails of kernels, and what each kernel lacks to its own floor.
"""

from collections.abc import Iterator
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.kernels.harness import Call, Work
from tests.random_v3 import random_v3
from tidemill.blocks import BLOCK_TOKENS
from tidemill.models.deepseek import Batch, DecodeRows, DeepseekModel
from tidemill.models.stacked import StackedMoe

TESTS = ("tests/kernels/test_v3_layer.py",)
LAYERS = 4
CONTEXT = 4096


def works() -> Iterator[Work]:
    for batch in (1, 32, 128):
        yield Work(
            case=f"{LAYERS} layers B={batch} KV={CONTEXT}",
            build=partial(a_step, batch=batch),
            num_bytes=LAYERS * layer_bytes(batch),
        )


@cache
def model() -> DeepseekModel:
    return random_v3(LAYERS, CONTEXT)


def a_step(seed: int, batch: int) -> Call:
    config = model().config
    generator = torch.Generator("cuda").manual_seed(seed)
    blocks = CONTEXT // BLOCK_TOKENS
    shape = (LAYERS, batch * blocks, BLOCK_TOKENS, config.latent_dim)
    latents = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    order = torch.randperm(batch * blocks, generator=generator, device="cuda").int()
    tables = order.view(batch, blocks)
    lengths = torch.full((batch,), CONTEXT, device="cuda")
    slots = tables[:, -1].long() * BLOCK_TOKENS + BLOCK_TOKENS - 1
    step = Batch(lengths - 1, slots, DecodeRows(tables, lengths))
    ids = torch.randint(0, 512, (batch,), generator=generator, device="cuda")

    def call() -> Tensor:
        with torch.inference_mode():
            return model().forward(ids, step, latents)

    return call


def layer_bytes(batch: int) -> int:
    """What one layer must read: its weights, of the experts those that uniform routing hits."""
    moe = model().layers[0].mlp
    assert isinstance(moe, StackedMoe)
    assert moe.shared is not None
    config = moe.config
    one_expert = moe.shared.gate_up.nbytes + moe.shared.down.nbytes
    chosen = config.num_experts_per_tok / config.n_routed_experts
    hit = config.n_routed_experts * (1 - (1 - chosen) ** batch)
    heads = config.num_attention_heads
    per_head = config.qk_nope_head_dim + config.v_head_dim
    rank = config.q_lora_rank or 0
    attention = config.hidden_size * (rank + config.latent_dim)
    attention += heads * (rank * config.qk_head_dim + config.v_head_dim * config.hidden_size)
    attention += 2 * heads * per_head * config.kv_lora_rank  # absorbed, bf16
    cache_bytes = 2 * batch * CONTEXT * config.latent_dim
    return round((hit + 1) * one_expert) + attention + cache_bytes + moe.gate.nbytes
