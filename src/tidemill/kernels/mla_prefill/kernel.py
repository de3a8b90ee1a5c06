"""Prefill attention on Hopper: tiles of queries over the keys that they may see.

T query rows and C context rows of N prompts, H heads. A key is NOPE columns of its head's own and
ROPE columns that all heads share: two products into one score, and no key is put together in
memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidemill.kernels.aot import Variant
from tidemill.kernels.check import Arguments
from tidemill.kernels.device import device_class
from tidemill.kernels.mla_prefill.configs import TILES, Tile
from tidemill.kernels.tiles import all_tiles, choose_tile

LOG2_E = 1.4426950408889634
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the last for the interpreter alone
_SEARCH = tl.constexpr(64)  # prompts looked at in one load


@triton.jit
def _attend_keys(
    acc, top, total, q, q_rope, position, kv_ptr, rope_ptr, stride_kt, stride_rt, low, high, length,
    scale,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys from low to high: with MASKED, those past a row's position or the context are unseen."""
    d, p, v, keys = (
        tl.arange(0, NOPE), tl.arange(0, ROPE), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    )  # fmt: skip
    for begin in range(low, high, BLOCK_N):
        n = begin + keys
        first = tl.cast(begin, tl.int64)
        kv_rows = kv_ptr + first * stride_kt + keys[:, None] * stride_kt
        rope_rows = rope_ptr + first * stride_rt + keys[:, None] * stride_rt
        if MASKED:
            inside = (n < length)[:, None]
            k = tl.load(kv_rows + d[None, :], mask=inside, other=0.0)
            k_rope = tl.load(rope_rows + p[None, :], mask=inside, other=0.0)
            value = tl.load(kv_rows + NOPE + v[None, :], mask=inside & (v < V)[None, :], other=0.0)
        else:
            k = tl.load(kv_rows + d[None, :])
            k_rope = tl.load(rope_rows + p[None, :])
            if BLOCK_V == V:
                value = tl.load(kv_rows + NOPE + v[None, :])
            else:
                value = tl.load(kv_rows + NOPE + v[None, :], mask=(v < V)[None, :], other=0.0)
        scores = tl.dot(q, k.T)
        scores = tl.dot(q_rope, k_rope.T, scores) * scale
        if MASKED:
            scores = tl.where(n[None, :] <= position[:, None], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None])
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["num_prompts"])
def _mla_prefill_kernel(
    q_ptr, kv_ptr, rope_ptr, out_ptr, query_starts_ptr, context_starts_ptr, num_prompts,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_rt, stride_ot, scale,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (query tile, head); of a prompt's tiles those that see most come first.

    Prompt n's tiles begin at place query_starts[n] // BLOCK_M + n: one more than the whole tiles
    before it for each prompt before it leaves room for every prompt's last tile, and the host need
    know only how many rows and prompts there are. Places that are left over have nothing to do.

    Keys that every row of the tile sees need no mask; tiles that none sees are not touched.
    """
    place = tl.program_id(0)
    head = tl.program_id(1)
    prompt = -1
    for begin in range(0, num_prompts, _SEARCH):
        n = begin + tl.arange(0, _SEARCH)
        first = tl.load(query_starts_ptr + n, mask=n < num_prompts, other=0).to(tl.int32)
        begun = (n < num_prompts) & (first // BLOCK_M + n <= place)
        prompt += tl.sum(begun.to(tl.int32), axis=0)
    first_row = tl.load(query_starts_ptr + prompt).to(tl.int64)
    num_rows = (tl.load(query_starts_ptr + prompt + 1) - first_row).to(tl.int32)
    first_key = tl.load(context_starts_ptr + prompt).to(tl.int64)
    length = (tl.load(context_starts_ptr + prompt + 1) - first_key).to(tl.int32)
    before = first_row.to(tl.int32) // BLOCK_M + prompt
    tile = tl.cdiv(num_rows, BLOCK_M) - 1 - (place - before)
    if tile < 0:
        return

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    start = length - num_rows
    d, p, v = tl.arange(0, NOPE), tl.arange(0, ROPE), tl.arange(0, BLOCK_V)
    inside = (m < num_rows)[:, None]
    q_rows = q_ptr + head * stride_qh + (first_row + m)[:, None] * stride_qt
    q = tl.load(q_rows + d[None, :], mask=inside, other=0.0)
    q_rope = tl.load(q_rows + NOPE + p[None, :], mask=inside, other=0.0)
    head_kv_ptr = kv_ptr + first_key * stride_kt + head * stride_kh
    prompt_rope_ptr = rope_ptr + first_key * stride_rt

    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    seen_by_all = (start + tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N
    seen_by_any = tl.minimum(start + (tile + 1) * BLOCK_M, length)
    acc, top, total = _attend_keys(
        acc, top, total, q, q_rope, start + m, head_kv_ptr, prompt_rope_ptr, stride_kt, stride_rt,
        0, seen_by_all, length, scale, NOPE, ROPE, V, BLOCK_V, BLOCK_N, False,
    )  # fmt: skip
    acc, top, total = _attend_keys(
        acc, top, total, q, q_rope, start + m, head_kv_ptr, prompt_rope_ptr, stride_kt, stride_rt,
        seen_by_all, seen_by_any, length, scale, NOPE, ROPE, V, BLOCK_V, BLOCK_N, True,
    )  # fmt: skip
    out_rows = out_ptr + (first_row + m)[:, None] * stride_ot + head * V
    attended = acc * (1.0 / total)[:, None]
    tl.store(out_rows + v[None, :], attended.to(out_ptr.dtype.element_ty),
             mask=inside & (v < V)[None, :])  # fmt: skip


def mla_prefill_ragged(
    query: Tensor,
    expanded: Tensor,
    k_rope: Tensor,
    query_starts: Tensor,
    context_starts: Tensor,
    *,
    scale: float,
    tile: Tile | None = None,
) -> Tensor:
    """As the reference; ValueError for arguments it does not take.

    `tile` (default: the table's) is for timing others.
    """
    nope, rope, v_dim = _check(query, expanded, k_rope, query_starts, context_starts)
    num_rows, num_heads, _ = query.shape
    out = torch.empty(num_rows, num_heads, v_dim, dtype=query.dtype, device=query.device)
    num_prompts = len(query_starts) - 1
    if tile is None:
        tile = choose_tile(TILES, device_class(query.device), num_rows // num_prompts)
    grid = (num_rows // tile.rows + num_prompts, num_heads)
    _mla_prefill_kernel[grid](
        query, expanded, k_rope, out, query_starts, context_starts, num_prompts,
        query.stride(0), query.stride(1), expanded.stride(0), expanded.stride(1),
        k_rope.stride(0), out.stride(0), scale * LOG2_E,
        NOPE=nope, ROPE=rope, V=v_dim, BLOCK_V=max(16, triton.next_power_of_2(v_dim)),
        BLOCK_M=tile.rows, BLOCK_N=tile.keys, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def _check(
    query: Tensor, expanded: Tensor, k_rope: Tensor, query_starts: Tensor, context_starts: Tensor
) -> tuple[int, int, int]:
    """Widths of a key's own part, of the shared part and of a value."""
    args = Arguments("mla_prefill")
    args.take("query", query, "T H D", *_DTYPES)
    args.take("expanded", expanded, "C H W", query.dtype)
    args.take("k_rope", k_rope, "C rope", query.dtype)
    args.take("query_starts", query_starts, "starts", torch.int32, torch.int64)
    args.take("context_starts", context_starts, "starts", torch.int32, torch.int64)
    rope = k_rope.shape[1]
    nope = query.shape[2] - rope
    v_dim = expanded.shape[2] - nope
    args.require(
        all(size >= 16 and size & (size - 1) == 0 for size in (nope, rope)) and v_dim > 0,
        "rope and D - rope must be powers of two from 16 on, and W more than D - rope",
    )
    return nope, rope, v_dim


def variants() -> list[Variant]:
    """Every tile of the tables, at DeepSeek-V3's widths in bf16."""
    return [_variant(tile) for tile in all_tiles(TILES)]


def _variant(tile: Tile) -> Variant:
    pointers = dict.fromkeys(("q_ptr", "kv_ptr", "rope_ptr", "out_ptr"), "*bf16") | {
        "query_starts_ptr": "*i32",
        "context_starts_ptr": "*i32",
    }
    strides = ("stride_qt", "stride_qh", "stride_kt", "stride_kh", "stride_rt", "stride_ot")
    constants = {
        "NOPE": 128, "ROPE": 64, "V": 128, "BLOCK_V": 128,
        "BLOCK_M": tile.rows, "BLOCK_N": tile.keys,
    }  # fmt: skip
    types = {**pointers, "num_prompts": "i32", **dict.fromkeys(strides, "i32"), "scale": "fp32"}
    return Variant(
        _mla_prefill_kernel,
        types | dict.fromkeys(constants, "constexpr"),
        constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=(*pointers, *strides),
        matrix=True,
    )
