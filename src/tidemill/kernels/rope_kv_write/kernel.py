"""Norm, RoPE and cache write on a GPU, in one launch.

T rows, H heads, L = kv_lora, R = rope, W rows stored. A row has one program for its part of the
cache and one for every few heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidemill.kernels.aot import Variant
from tidemill.kernels.check import Arguments

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_MOST_HEADS = 32  # of a program: 16 values a thread at R = 64. Untimed.


@triton.jit
def _rotate(x, rotation, N: tl.constexpr, R: tl.constexpr):
    """fp32 [N, R] -> its adjacent pairs times rotation [R], cosines and sines in turns."""
    cosine, sine = tl.split(tl.reshape(rotation, (1, R // 2, 2)))
    even, odd = tl.split(tl.reshape(x, (N, R // 2, 2)))
    turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    return tl.reshape(turned, (N, R))


@triton.jit(do_not_specialize=["num_written", "num_decoding"])
def _rope_kv_write_kernel(
    q_rope_ptr,  # [T, H, R]
    decoding_ptr,  # [B, H, R]: where the first B rows go
    kv_a_ptr,  # [T, L + R]
    weight_ptr,  # [L]
    rotation_ptr,  # [T, R], cosines and sines in turns
    latents_ptr,  # [slots of the pool, L + R]
    slots_ptr,  # [W]
    written_ptr,  # [W] where SOME
    num_written,
    num_decoding,
    stride_qt,
    stride_qh,
    stride_dt,
    stride_dh,
    stride_kt,
    stride_ls,
    eps,
    H: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SOME: tl.constexpr,
):
    turns = tl.arange(0, R)
    if tl.program_id(1) == 0:
        nth = tl.program_id(0)
        if nth < num_written:
            row = nth.to(tl.int64)
            if SOME:
                row = tl.load(written_ptr + nth).to(tl.int64)
            slot = tl.load(slots_ptr + nth).to(tl.int64)
            columns = tl.arange(0, BLOCK_L)
            inside = columns < L
            from_ptr, to_ptr = kv_a_ptr + row * stride_kt, latents_ptr + slot * stride_ls
            latent = tl.load(from_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            normed = latent * tl.rsqrt(tl.sum(latent * latent) / L + eps) * weight
            key = tl.load(from_ptr + L + turns).to(tl.float32)
            rotation = tl.load(rotation_ptr + row * R + turns)
            key = tl.reshape(_rotate(tl.reshape(key, (1, R)), rotation, 1, R), (R,))
            if slot >= 0:  # the padding of a captured batch has none
                tl.store(to_ptr + columns, normed.to(latents_ptr.dtype.element_ty), mask=inside)
                tl.store(to_ptr + L + turns, key.to(latents_ptr.dtype.element_ty))
    else:
        row = tl.program_id(0).to(tl.int64)
        heads = (tl.program_id(1) - 1) * BLOCK_H + tl.arange(0, BLOCK_H)
        at = q_rope_ptr + row * stride_qt + heads[:, None] * stride_qh + turns[None, :]
        inside = (heads < H)[:, None]
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        rotation = tl.load(rotation_ptr + row * R + turns)
        turned = _rotate(x, rotation, BLOCK_H, R).to(q_rope_ptr.dtype.element_ty)
        if row < num_decoding:
            at = decoding_ptr + row * stride_dt + heads[:, None] * stride_dh + turns[None, :]
        tl.store(at, turned, mask=inside)


def rope_kv_write(
    query: Tensor,
    kv_a: Tensor,
    norm_weight: Tensor,
    eps: float,
    rotation: Tensor,
    latents: Tensor,
    slots: Tensor,
    written: Tensor | None,
    decoding: Tensor | None,
) -> None:
    """As the op; besides, a row whose slot is -1 is not stored."""
    arguments = Arguments("rope_kv_write")
    arguments.take("query", query, "T H Q", *FLOATS)
    arguments.take("kv_a", kv_a, "T D", query.dtype)
    arguments.take("norm_weight", norm_weight, "L", query.dtype)
    arguments.take("rotation", rotation, "T _", torch.complex64)
    arguments.take("latents", latents, "_ _ D", query.dtype)
    arguments.take("slots", slots, "W", torch.int64, torch.int32)
    if written is not None:
        arguments.take("written", written, "W", torch.int64, torch.int32)
    num_rows, num_heads, _ = query.shape
    rope = 2 * rotation.shape[1]
    lora = kv_a.shape[1] - rope
    arguments.require(
        norm_weight.shape[0] == lora and rope == triton.next_power_of_2(rope),
        f"D must be L and a power of two that is twice rotation's width, {rope}",
    )
    arguments.require(
        latents.is_contiguous() and rotation.is_contiguous(), "latents and rotation must be dense"
    )
    arguments.require(written is not None or len(slots) == num_rows, "W must be T without written")
    arguments.sizes["R"] = rope
    if decoding is not None:
        arguments.take("decoding", decoding, "B H R", query.dtype)
        arguments.require(len(decoding) <= num_rows, "B must be at most T")
    if num_rows == 0:
        return
    q_rope = query[..., -rope:]
    apart = q_rope if decoding is None else decoding
    block = head_block(num_heads)
    _rope_kv_write_kernel[(num_rows, 1 + triton.cdiv(num_heads, block))](
        q_rope,
        apart,
        kv_a,
        norm_weight,
        torch.view_as_real(rotation),
        latents,
        slots,
        slots if written is None else written,
        len(slots),
        0 if decoding is None else len(decoding),
        q_rope.stride(0),
        q_rope.stride(1),
        apart.stride(0),
        apart.stride(1),
        kv_a.stride(0),
        latents.stride(1),
        eps,
        H=num_heads,
        L=lora,
        R=rope,
        BLOCK_H=block,
        BLOCK_L=triton.next_power_of_2(lora),
        SOME=written is not None,
        num_warps=4,
    )


def head_block(num_heads: int) -> int:
    """How many heads a program turns."""
    block: int = min(_MOST_HEADS, triton.next_power_of_2(num_heads))
    return block


def variants() -> list[Variant]:
    """DeepSeek-V3's widths, all heads and those of one of eight GPUs, decode and prefill."""
    queries = ("q_rope_ptr", "decoding_ptr")
    pointers = (*queries, "kv_a_ptr", "weight_ptr", "rotation_ptr", "latents_ptr")
    strides = ("stride_qt", "stride_qh", "stride_dt", "stride_dh", "stride_kt", "stride_ls")
    return [
        Variant(
            _rope_kv_write_kernel,
            signature={
                **dict.fromkeys(pointers, "*bf16"),
                "rotation_ptr": "*fp32",
                "slots_ptr": "*i64",
                "written_ptr": "*i64",
                "num_written": "i32",
                "num_decoding": "i32",
                **dict.fromkeys(strides, "i32"),
                "eps": "fp32",
                **dict.fromkeys(("H", "L", "R", "BLOCK_H", "BLOCK_L", "SOME"), "constexpr"),
            },
            constants={
                "H": num_heads,
                "L": 512,
                "R": 64,
                "BLOCK_H": head_block(num_heads),
                "BLOCK_L": 512,
                "SOME": some,
            },
            aligned=(*pointers, "slots_ptr", "written_ptr", *strides),
        )
        for num_heads in (16, 128)
        for some in (False, True)
    ]
