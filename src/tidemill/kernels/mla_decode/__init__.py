"""Multi-head latent attention for a sequence's newest tokens, absorbed, over the paged cache."""

from torch import Tensor

from tidemill.kernels import choice
from tidemill.kernels.mla_decode import reference

__all__ = ["mla_decode"]


def mla_decode(
    query: Tensor,
    latents: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    kv_lora_rank: int,
    scale: float,
) -> Tensor:
    """See `reference.mla_decode`; ValueError for arguments that the Triton kernel does not take."""
    if choice.takes_triton(query):
        from tidemill.kernels.mla_decode import kernel

        return kernel.mla_decode(
            query, latents, block_tables, context_lens, kv_lora_rank=kv_lora_rank, scale=scale
        )
    return reference.mla_decode(
        query, latents, block_tables, context_lens, kv_lora_rank=kv_lora_rank, scale=scale
    )
