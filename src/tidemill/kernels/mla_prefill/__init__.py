"""Multi-head latent attention for chunks of prompts, in multi-head form."""

from torch import Tensor

from tidemill.kernels import choice
from tidemill.kernels.linear import Linear
from tidemill.kernels.mla_prefill import reference

__all__ = ["mla_prefill", "mla_prefill_ragged"]


def mla_prefill(
    query: Tensor,
    latents: Tensor,
    kv_b: Linear,
    query_starts: Tensor,
    context_starts: Tensor,
    *,
    kv_lora_rank: int,
    scale: float,
) -> Tensor:
    """`mla_prefill_ragged` of latents [C, kv_lora + rope], which kv_b expands: [T, H, v].

    kv_b maps kv_lora -> H * (nope + v), for all prompts at once. (DeepSeek-V2 report 2.1.)
    """
    latent, k_rope = latents.tensor_split([kv_lora_rank], dim=-1)
    expanded = kv_b(latent).view(len(latents), query.shape[1], -1)
    return mla_prefill_ragged(query, expanded, k_rope, query_starts, context_starts, scale=scale)


def mla_prefill_ragged(
    query: Tensor,
    expanded: Tensor,
    k_rope: Tensor,
    query_starts: Tensor,
    context_starts: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Several prompts: see `reference.mla_prefill_ragged`.

    ValueError for arguments that the Triton kernel does not take.
    """
    if choice.takes_triton(query):
        from tidemill.kernels.mla_prefill import kernel

        return kernel.mla_prefill_ragged(
            query, expanded, k_rope, query_starts, context_starts, scale=scale
        )
    return reference.mla_prefill_ragged(
        query, expanded, k_rope, query_starts, context_starts, scale=scale
    )
