"""Angles of the rotary embedding, plain or extended by YaRN, and its softmax correction."""

import math

import torch
from torch import Tensor

from tidemill.models.config import ModelConfig, YarnScaling


def rope_table(config: ModelConfig, max_positions: int) -> Tensor:
    """Rotation of each pair at each position, [max_positions, qk_rope_head_dim / 2] complex64.

    YaRN's amplitude is the length of these numbers, 1 without it.
    """
    amplitude = 1.0
    if config.rope_scaling is not None:
        amplitude = attention_amplitude(config.rope_scaling)
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config))
    return torch.polar(torch.full_like(angles, amplitude), angles)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each rotated pair, [qk_rope_head_dim / 2] fp32.

    YaRN (arXiv 2309.00071 3.2; transformers' `_compute_yarn_parameters`): fast pairs keep their
    frequency, slow ones are divided by `factor`, those between are blended linearly.
    """
    dim = config.qk_rope_head_dim
    plain = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    yarn = config.rope_scaling
    if yarn is None:
        return plain
    low = max(math.floor(_pair_turning(yarn.beta_fast, config, yarn)), 0)
    high = min(math.ceil(_pair_turning(yarn.beta_slow, config, yarn)), dim - 1)
    width = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / yarn.factor * ramp + plain * (1 - ramp)


def attention_amplitude(yarn: YarnScaling) -> float:
    """Factor on cos and sin: mscale over mscale_all_dim, 1 for DeepSeek-V3's own values."""
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def softmax_scale(config: ModelConfig) -> float:
    """qk_head_dim ** -0.5, times the square of YaRN's mscale over all dimensions."""
    scale: float = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= _mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _pair_turning(rotations: float, config: ModelConfig, yarn: YarnScaling) -> float:
    """Index (fractional) of the pair that turns `rotations` times in the original context."""
    ratio = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
    return config.qk_rope_head_dim * math.log(ratio) / (2 * math.log(config.rope_theta))
