"""Experts' products in plain torch, one expert after another, in fp32."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu

from tidemill.kernels.act_quant.reference import Quantized, act_quant, dequantize
from tidemill.kernels.fp8_gemm.reference import widen_weight


def gate_up(
    x: Tensor | Quantized,
    weight: Tensor,
    scale_inv: Tensor | None,
    *,
    starts: Tensor,
    counts: Tensor,
    rows: Tensor | None,
    top_k: int,
) -> Tensor | Quantized:
    """`tidemill.kernels.grouped_gemm.gate_up`; places outside every expert's are zero."""
    tokens = _widen(x)
    if rows is not None:
        tokens = tokens[rows.long() // top_k]
    out = tokens.new_zeros(len(tokens), weight.shape[1] // 2)
    for expert, places in _runs(starts, counts):
        product = tokens[places] @ _expert_weight(weight, scale_inv, expert).T
        gate, up = product.chunk(2, dim=-1)
        out[places] = silu(gate) * up
    return act_quant(out) if isinstance(x, Quantized) else out.to(x.dtype)


def down(
    hidden: Tensor | Quantized,
    weight: Tensor,
    scale_inv: Tensor | None,
    *,
    starts: Tensor,
    counts: Tensor,
    rows: Tensor | None,
    weights: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`tidemill.kernels.grouped_gemm.down`; rows that no place goes to are zero."""
    values = _widen(hidden)
    out = values.new_zeros(len(values), weight.shape[1])
    for expert, places in _runs(starts, counts):
        product = values[places] @ _expert_weight(weight, scale_inv, expert).T
        choices = places if rows is None else rows[places].long()
        out[choices] = product if weights is None else product * weights.view(-1, 1)[choices]
    return out.to(out_dtype)


def combine(routed: Tensor, residual: Tensor, shared: Tensor | None) -> Tensor:
    """`tidemill.kernels.grouped_gemm.combine`."""
    num_tokens, width = residual.shape
    choices = routed.view(num_tokens, -1, width)
    out = choices[:, 0].float()
    for choice in range(1, choices.shape[1]):
        out = out + choices[:, choice]
    if shared is not None:
        out = out + shared
    return (out + residual).to(residual.dtype)


def _runs(starts: Tensor, counts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each expert that has rows, and its places."""
    for expert, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        if count:
            yield expert, torch.arange(start, start + count, device=starts.device)


def _widen(x: Tensor | Quantized) -> Tensor:
    return dequantize(x, torch.float32) if isinstance(x, Quantized) else x.float()


def _expert_weight(weight: Tensor, scale_inv: Tensor | None, expert: int) -> Tensor:
    if scale_inv is None:
        return weight[expert].float()
    return widen_weight(weight[expert], scale_inv[expert])
