"""Layers of DeepSeek-V3's full width with random FP8 weights, made on the GPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from tidemill.kernels.linear import BlockScaledLinear, make_head_linear, make_linear
from tidemill.models.config import ModelConfig
from tidemill.models.deepseek import Attention, DeepseekModel, Layer, Norm
from tidemill.models.presets import load_preset
from tidemill.models.rope import rope_table, softmax_scale
from tidemill.models.stacked import StackedExperts, StackedMoe

BLOCK = 128
SMALL_VOCABULARY = 512  # a slice of layers is not about its head


def random_v3(num_layers: int, max_context: int, seed: int = 0) -> DeepseekModel:
    """Routed layers, some 12 GB each, between a small embedding and a small head."""
    config, make = load_preset("deepseek-v3"), RandomWeights(seed)
    return DeepseekModel(
        config=config,
        embedding=make.plain(SMALL_VOCABULARY, config.hidden_size).bfloat16(),
        layers=[random_layer(config, make) for _ in range(num_layers)],
        norm=make.norm(config.hidden_size),
        head=make_linear(make.matrix(SMALL_VOCABULARY, config.hidden_size)),
        rotations=rope_table(config, max_context).cuda(),
    )


def random_layer(config: ModelConfig, make: "RandomWeights") -> Layer:
    """Attention and routed experts."""
    return Layer(attention=random_attention(config, make), mlp=random_moe(config, make))


def random_attention(config: ModelConfig, make: "RandomWeights") -> Attention:
    """Latent attention: FP8 products, the absorbed halves in bf16."""
    heads, latent, rank = config.num_attention_heads, config.kv_lora_rank, config.q_lora_rank
    assert rank is not None
    return Attention(
        norm=make.norm(config.hidden_size),
        qkv_a=make.product(rank + config.latent_dim, config.hidden_size),
        q_a_norm=make.norm(rank).weight,
        q_b=make.product(heads * config.qk_head_dim, rank),
        kv_a_norm=make.norm(latent).weight,
        kv_b=make.product(heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        w_uk=make_head_linear(make.heads(heads, latent, config.qk_nope_head_dim)),
        w_uv=make_head_linear(make.heads(heads, config.v_head_dim, latent)),
        out=make.product(config.hidden_size, heads * config.v_head_dim),
        config=config,
        scale=softmax_scale(config),
    )


def random_moe(config: ModelConfig, make: "RandomWeights") -> StackedMoe:
    """256 routed experts and a shared one."""
    width, hidden = config.moe_intermediate_size, config.hidden_size
    return StackedMoe(
        norm=make.norm(hidden),
        gate=make.matrix(config.n_routed_experts, hidden),
        gate_bias=make.plain(config.n_routed_experts).mul_(0.1),
        routed=make.experts(config.n_routed_experts, width, hidden),
        shared=make.experts(1, width, hidden),
        config=config,
    )


class RandomWeights:
    """Weights that keep the scale of what they multiply, from one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cuda").manual_seed(seed)

    def plain(self, *shape: int) -> Tensor:
        """Standard normal, fp32."""
        return torch.randn(*shape, device="cuda", generator=self._generator)

    def norm(self, size: int) -> Norm:
        """About 1."""
        return Norm(self.plain(size).mul_(0.1).add_(1).bfloat16(), 1e-6)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] bf16."""
        return self.plain(rows, columns).mul_(columns**-0.5).bfloat16()

    def heads(self, heads: int, rows: int, columns: int) -> Tensor:
        """[heads, rows, columns] bf16."""
        return self.plain(heads, rows, columns).mul_(columns**-0.5).bfloat16()

    def product(self, rows: int, columns: int) -> BlockScaledLinear:
        """An FP8 product."""
        values, scales = self._fp8(1, rows, columns)
        return BlockScaledLinear(values[0], scales[0])

    def experts(self, count: int, width: int, hidden: int) -> StackedExperts:
        """A stack in FP8."""
        gate_up, gate_up_scale = self._fp8(count, 2 * width, hidden)
        down, down_scale = self._fp8(count, hidden, width)
        return StackedExperts(gate_up, down, gate_up_scale, down_scale)

    def _fp8(self, count: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        values = torch.empty(count, rows, columns, device="cuda", dtype=torch.float8_e4m3fn)
        for index in range(count):
            values[index] = self.plain(rows, columns).mul_(64).to(torch.float8_e4m3fn)
        scales = self.plain(count, -(-rows // BLOCK), -(-columns // BLOCK)).mul_(0.1).add_(1)
        return values, scales.mul_(columns**-0.5 / 64)


def launches(run: Callable[[], object]) -> int:
    """Kernels, copies and fills that `run` starts on the GPU."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())
