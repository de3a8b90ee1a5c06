"""Multi-head latent attention for chunks of prompts, in multi-head form."""

from functools import lru_cache

import torch
from torch import Tensor

from tidemill.kernels import choice
from tidemill.kernels.linear import Linear
from tidemill.kernels.mla_prefill import reference

__all__ = ["mla_prefill", "mla_prefill_ragged"]


def mla_prefill(
    query: Tensor, latents: Tensor, kv_b: Linear, *, kv_lora_rank: int, start: int, scale: float
) -> Tensor:
    """One prompt: see `reference.mla_prefill`."""
    if not choice.takes_triton(query):
        return reference.mla_prefill(
            query, latents, kv_b, kv_lora_rank=kv_lora_rank, start=start, scale=scale
        )
    latent, k_rope = latents.tensor_split([kv_lora_rank], dim=-1)
    expanded = kv_b(latent.contiguous()).view(len(latents), query.shape[1], -1)
    starts = _bounds(len(query), query.device), _bounds(len(latents), query.device)
    return mla_prefill_ragged(query, expanded, k_rope, *starts, longest=len(query), scale=scale)


@lru_cache(maxsize=64)
def _bounds(count: int, device: torch.device) -> Tensor:
    """[0, count] on the device: copied there once for all layers, since each copy waits."""
    with torch.inference_mode(False):
        return torch.tensor([0, count], dtype=torch.int32, device=device)


def mla_prefill_ragged(
    query: Tensor,
    expanded: Tensor,
    k_rope: Tensor,
    query_starts: Tensor,
    context_starts: Tensor,
    *,
    longest: int,
    scale: float,
) -> Tensor:
    """Several prompts: see `reference.mla_prefill_ragged`.

    ValueError for arguments that the Triton kernel does not take.
    """
    if choice.takes_triton(query):
        from tidemill.kernels.mla_prefill import kernel

        return kernel.mla_prefill_ragged(
            query, expanded, k_rope, query_starts, context_starts, longest=longest, scale=scale
        )
    return reference.mla_prefill_ragged(
        query, expanded, k_rope, query_starts, context_starts, longest=longest, scale=scale
    )
