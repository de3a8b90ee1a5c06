"""What stands between attention's projections and attention itself: norm, RoPE, the cache write."""

from torch import Tensor

from tidemill.kernels.choice import takes_triton
from tidemill.kernels.rope_kv_write import reference

__all__ = ["rope_kv_write"]


def rope_kv_write(
    query: Tensor,
    kv_a: Tensor,
    norm_weight: Tensor,
    eps: float,
    rotation: Tensor,
    latents: Tensor,
    slots: Tensor,
    written: Tensor | None = None,
    decoding: Tensor | None = None,
) -> None:
    """Rotate the queries' RoPE part in place; norm, rotate and store the rows of the cache.

    query [T, H, nope + rope]; kv_a [T, kv_lora + rope], the latent not yet normed and the key that
    the heads share; norm_weight [kv_lora]; rotation [T, rope / 2] complex64; latents
    [blocks, 64, kv_lora + rope], one layer's pool; slots [W] int64, block * 64 + offset, each once;
    written [W] int64, the rows that are stored there, all T if None; decoding [B, H, rope] gets the
    rotated part of the first B rows, which then stays as it is in query. (DeepSeek-V2 report 2.1.)
    """
    if takes_triton(query):
        from tidemill.kernels.rope_kv_write import kernel

        run = kernel.rope_kv_write
    else:
        run = reference.rope_kv_write
    run(query, kv_a, norm_weight, eps, rotation, latents, slots, written, decoding)
