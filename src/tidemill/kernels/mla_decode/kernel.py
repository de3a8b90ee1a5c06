"""Decode attention on Hopper: the blocks of all sequences are shared out evenly, then merged.

B sequences of S query tokens, H heads; R = S * H query rows a sequence, row s * H + h. C = kv_lora,
P = rope: a cached token is C + P wide, and its first C are key and value at once. A block holds
64 tokens. A part is what one program reads: an equal share of all blocks of the batch laid end to
end, so that ragged lengths cost nothing and the grid depends on nothing that only the device
knows. Where a part meets a sequence is a segment; a second kernel merges a sequence's segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tidemill.kernels.aot import Variant
from tidemill.kernels.check import Arguments
from tidemill.kernels.mla_decode import configs
from tidemill.kernels.tiles import all_tiles

TOKENS = tl.constexpr(64)  # of a block
NEVER = tl.constexpr(2**30)  # a position that no row sees
LOG2_E = 1.4426950408889634
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the last for the interpreter alone


@triton.jit
def _blocks_of(lens_ptr, B, BLOCK_B: tl.constexpr):
    """Every sequence's number of blocks [BLOCK_B]; at least one, so that each has a segment."""
    seqs = tl.arange(0, BLOCK_B)
    lens = tl.load(lens_ptr + seqs, mask=seqs < B, other=0).to(tl.int32)
    return tl.where(seqs < B, tl.maximum(tl.cdiv(lens, TOKENS), 1), 0)


@triton.jit
def _share(blocks, PARTS):
    """How many blocks a part has."""
    return tl.cdiv(tl.sum(blocks, axis=0), PARTS)


@triton.jit
def _attend_rows(
    q_desc, q_rope_desc, latent_desc, k_rope_desc, table_ptr, seq, row, visible, first, last, scale,
    C: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rows on the M side. Returns attended latents [BLOCK_R, C] and log2 of their weights' sum.

    A last block with `missing` tokens is read from `missing` rows before it: what lies outside a
    block arrives as zeros, and what a block holds after its sequence, perhaps NaN, stays outside.

    Both branches of the loop also tell Triton how to lay it out. Scores that may be masked it does
    not follow to the second product; of a product that another follows, it gives each warpgroup
    the whole. And what stands under a condition that it cannot decide comes after the loads of the
    next block, which otherwise are asked for last and waited for at once.
    """
    tokens = tl.arange(0, TOKENS)
    block = tl.load(table_ptr + first).to(tl.int32)
    q = q_desc.load([seq, row, 0]).reshape(BLOCK_R, C)
    q_rope = q_rope_desc.load([seq, row, C]).reshape(BLOCK_R, P)
    top = tl.full([BLOCK_R], -1e30, tl.float32)
    sums = tl.zeros([BLOCK_R, 2, TOKENS // 8], tl.float32)
    acc = tl.zeros([BLOCK_R, C], tl.float32)
    longest, shortest = tl.max(visible, axis=0), tl.min(visible, axis=0)
    for index in range(first, last):
        missing = tl.maximum((index + 1) * TOKENS - longest, 0)
        latent = latent_desc.load([block, -missing, 0]).reshape(TOKENS, C)
        k_rope = k_rope_desc.load([block, -missing, C]).reshape(TOKENS, P)
        block = tl.load(table_ptr + index + 1, mask=index + 1 < last, other=0).to(tl.int32)
        scores = tl.dot(q, latent.T) * scale + tl.dot(q_rope, k_rope.T) * scale
        if missing < TOKENS:
            if (index + 1) * TOKENS > shortest:
                position = tl.where(tokens >= missing, index * TOKENS + tokens - missing, NEVER)
                seen = position[None, :] < visible[:, None]
                scores = tl.where(seen, scores, -float("inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(top - higher)
            own = tl.sum(weights.reshape(BLOCK_R, 2, 4, TOKENS // 8), axis=2)
            sums = sums * shrink[:, None, None] + own
            acc = tl.dot(weights.to(latent.dtype), latent, acc * shrink[:, None])
            top = higher
    total = tl.sum(tl.sum(sums, axis=2), axis=1)
    total = tl.where(total == 0.0, 1.0, total)
    return acc * (1.0 / total)[:, None], top + tl.log2(total)


@triton.jit
def _attend_tokens(
    q_desc, q_rope_desc, latent_desc, k_rope_desc, table_ptr, seq, row, visible, first, last, scale,
    C: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """As `_attend_rows` with tokens and latents on the M side.

    A wgmma has 64 rows: with few heads most of them would be padding.
    """
    tokens = tl.arange(0, TOKENS)
    block = tl.load(table_ptr + first).to(tl.int32)
    q = q_desc.load([seq, row, 0]).reshape(BLOCK_R, C)
    q_rope = q_rope_desc.load([seq, row, C]).reshape(BLOCK_R, P)
    top = tl.full([BLOCK_R], -1e30, tl.float32)
    sums = tl.zeros([TOKENS // 16, 8, BLOCK_R], tl.float32)
    acc = tl.zeros([C, BLOCK_R], tl.float32)
    longest, shortest = tl.max(visible, axis=0), tl.min(visible, axis=0)
    for index in range(first, last):
        missing = tl.maximum((index + 1) * TOKENS - longest, 0)
        latent = latent_desc.load([block, -missing, 0]).reshape(TOKENS, C)
        k_rope = k_rope_desc.load([block, -missing, C]).reshape(TOKENS, P)
        block = tl.load(table_ptr + index + 1, mask=index + 1 < last, other=0).to(tl.int32)
        scores = tl.dot(latent, q.T) * scale + tl.dot(k_rope, q_rope.T) * scale
        if index < last:
            if (index + 1) * TOKENS > shortest:
                position = tl.where(tokens >= missing, index * TOKENS + tokens - missing, NEVER)
                seen = position[:, None] < visible[None, :]
                scores = tl.where(seen, scores, -float("inf"))
            higher = tl.maximum(top, tl.max(scores, axis=0))
            weights = tl.exp2(scores - higher[None, :])
            shrink = tl.exp2(top - higher)
            own = tl.sum(weights.reshape(TOKENS // 16, 2, 8, BLOCK_R), axis=1)
            sums = sums * shrink[None, None, :] + own
            acc = tl.dot(latent.T, weights.to(latent.dtype), acc * shrink[None, :])
            top = higher
    total = tl.sum(tl.sum(sums, axis=0), axis=0)
    total = tl.where(total == 0.0, 1.0, total)
    return (acc * (1.0 / total)[None, :]).T, top + tl.log2(total)


@triton.jit
def _mla_decode_kernel(
    q_desc, q_rope_desc, latent_desc, k_rope_desc, partial_ptr,
    log_sums_ptr, tables_ptr, lens_ptr, stride_table, B, H, ROWS, PARTS, scale,
    S: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """Program (row tile, part): the part's segments one after the other.

    A segment goes to partial [PARTS + B, ROWS, C] and log_sums [PARTS + B, ROWS], ROWS = R filled
    up to whole tiles, at part + sequence: going along the blocks one or the other grows from each
    segment to the next, so that no two share a place.
    """
    part = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_R
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, C)

    seqs = tl.arange(0, BLOCK_B)
    blocks = _blocks_of(lens_ptr, B, BLOCK_B)
    ends = tl.cumsum(blocks, axis=0)
    share = _share(blocks, PARTS)
    begin = part * share
    end = tl.minimum(begin + share, tl.sum(blocks, axis=0))
    first_seq = tl.sum((ends <= begin).to(tl.int32), axis=0)
    last_seq = tl.sum((ends < end).to(tl.int32), axis=0)
    for seq in range(first_seq, last_seq + 1):
        num_blocks = tl.sum(tl.where(seqs == seq, blocks, 0), axis=0)
        start = tl.sum(tl.where(seqs < seq, blocks, 0), axis=0)
        first = tl.maximum(begin - start, 0)
        last = tl.minimum(end - start, num_blocks)
        visible = tl.load(lens_ptr + seq).to(tl.int32) - tl.maximum(S - 1 - (row + r) // H, 0)
        table_ptr = tables_ptr + tl.cast(seq, tl.int64) * stride_table
        if SWAP:
            attended, log_sums = _attend_tokens(
                q_desc, q_rope_desc, latent_desc, k_rope_desc, table_ptr, seq, row, visible,
                first, last, scale, C, P, BLOCK_R,
            )  # fmt: skip
        else:
            attended, log_sums = _attend_rows(
                q_desc, q_rope_desc, latent_desc, k_rope_desc, table_ptr, seq, row, visible,
                first, last, scale, C, P, BLOCK_R,
            )  # fmt: skip
        place = tl.cast(seq + part, tl.int64) * ROWS + row
        offsets = r[:, None] * C + c[None, :]
        tl.store(partial_ptr + place * C + offsets, attended)
        tl.store(log_sums_ptr + place + r, log_sums)


@triton.jit
def _mla_decode_kernel_merge(
    lens_ptr, partial_ptr, log_sums_ptr, out_ptr, B, R, ROWS, PARTS,
    C: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (sequence, row tile, column tile): its segments, weighted by their sums, into out."""
    seq = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    seqs, segments = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_S)
    blocks = _blocks_of(lens_ptr, B, BLOCK_B)
    share = _share(blocks, PARTS)
    start = tl.sum(tl.where(seqs < seq, blocks, 0), axis=0)
    end = start + tl.sum(tl.where(seqs == seq, blocks, 0), axis=0)
    first, last = start // share, (end - 1) // share
    top = tl.full([BLOCK_R], -1e30, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for part in range(first, last + 1, BLOCK_S):
        valid = (part + segments <= last)[:, None] & (row < R)[None, :]
        place = (part + segments + seq).to(tl.int64)[:, None] * ROWS + row[None, :]
        log_sums = tl.load(log_sums_ptr + place, mask=valid, other=-float("inf"))
        attended = tl.load(
            partial_ptr + place[:, :, None] * C + c[None, None, :],
            mask=valid[:, :, None],
            other=0.0,
        )
        higher = tl.maximum(top, tl.max(log_sums, axis=0))
        weights = tl.exp2(log_sums - higher[None, :])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, axis=0)
        acc = acc * shrink[:, None] + tl.sum(attended * weights[:, :, None], axis=0)
        top = higher
    total = tl.where(total == 0.0, 1.0, total)  # rows past the last
    out = (seq.to(tl.int64) * R + row)[:, None] * C + c[None, :]
    tl.store(out_ptr + out, (acc / total[:, None]).to(out_ptr.dtype.element_ty),
             mask=(row < R)[:, None])  # fmt: skip


def mla_decode(
    query: Tensor,
    latents: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    kv_lora_rank: int,
    scale: float,
    num_parts: int | None = None,
    tile: configs.Tile | None = None,
) -> Tensor:
    """As the reference; ValueError for arguments it does not take.

    `num_parts` (default: as many as the device runs at once) is for tests, `tile` (default: the
    table's) for timing others.
    """
    shape = query.shape
    if query.ndim == 3:
        query = query.unsqueeze(1)
    _check(query, latents, block_tables, context_lens, kv_lora_rank)
    num_sequences, num_tokens, num_heads, width = query.shape
    rows = num_tokens * num_heads
    rope = width - kv_lora_rank
    if tile is None:
        tile = configs.tile_of(rows, query.device)
    num_tiles = triton.cdiv(rows, tile.rows)
    if num_parts is None:
        num_parts = configs.num_parts(query.device, num_tiles)
    block_b = configs.sequences_held(num_sequences)
    out = torch.empty((*shape[:-1], kv_lora_rank), dtype=query.dtype, device=query.device)
    segments = num_parts + num_sequences
    partial = torch.empty(
        (segments, num_tiles * tile.rows, kv_lora_rank), dtype=torch.float32, device=query.device
    )
    log_sums = torch.empty(partial.shape[:2], dtype=torch.float32, device=query.device)

    flat = query.view(num_sequences, rows, width)
    _mla_decode_kernel[(num_tiles, num_parts)](
        TensorDescriptor.from_tensor(flat, [1, tile.rows, kv_lora_rank]),
        TensorDescriptor.from_tensor(flat, [1, tile.rows, rope]),
        TensorDescriptor.from_tensor(latents, [1, TOKENS.value, kv_lora_rank]),
        TensorDescriptor.from_tensor(latents, [1, TOKENS.value, rope]),
        partial, log_sums, block_tables, context_lens, block_tables.stride(0),
        num_sequences, num_heads, partial.shape[1], num_parts, scale * LOG2_E,
        S=num_tokens, C=kv_lora_rank, P=rope, BLOCK_B=block_b, BLOCK_R=tile.rows, SWAP=tile.swap,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    merge = configs.merge_tile_of(num_parts, num_sequences, kv_lora_rank)
    grid = (
        num_sequences,
        triton.cdiv(rows, merge.rows),
        triton.cdiv(kv_lora_rank, merge.columns),
    )
    _mla_decode_kernel_merge[grid](
        context_lens, partial, log_sums, out, num_sequences, rows, partial.shape[1], num_parts,
        C=kv_lora_rank, BLOCK_B=block_b,
        BLOCK_S=merge.segments, BLOCK_R=merge.rows, BLOCK_C=merge.columns, num_warps=4,
    )  # fmt: skip
    return out


def _check(
    query: Tensor, latents: Tensor, block_tables: Tensor, context_lens: Tensor, kv_lora_rank: int
) -> None:
    args = Arguments("mla_decode", kv_lora=kv_lora_rank)
    args.take("query", query, "B S H D", *_DTYPES)
    args.take("latents", latents, f"_ {TOKENS.value} D", query.dtype)
    args.take("block_tables", block_tables, "B M", torch.int32, torch.int64)
    args.take("context_lens", context_lens, "B", torch.int32, torch.int64)
    rope = query.shape[-1] - kv_lora_rank
    args.require(query.is_contiguous(), "query must be contiguous")
    args.require(query.shape[1] in {1, 2}, "one or two query tokens a sequence")
    args.require(
        all(size >= 16 and size & (size - 1) == 0 for size in (kv_lora_rank, rope)),
        "kv_lora and D - kv_lora must be powers of two from 16 on",
    )


def variants() -> list[Variant]:
    """Every tile at DeepSeek-V3's widths in bf16, for one and two query tokens; every merge."""
    tiles = all_tiles(configs.TILES)
    attending = [_attending(tile, num_tokens) for tile in tiles for num_tokens in (1, 2)]
    return attending + [_merging(tile) for tile in configs.merge_tiles(_V3_C)]


_V3_C, _V3_P = 512, 64


def _attending(tile: configs.Tile, num_tokens: int) -> Variant:
    return Variant(
        _mla_decode_kernel,
        {
            "q_desc": f"tensordesc<bf16[1, {tile.rows}, {_V3_C}]>",
            "q_rope_desc": f"tensordesc<bf16[1, {tile.rows}, {_V3_P}]>",
            "latent_desc": f"tensordesc<bf16[1, {TOKENS.value}, {_V3_C}]>",
            "k_rope_desc": f"tensordesc<bf16[1, {TOKENS.value}, {_V3_P}]>",
            "partial_ptr": "*fp32", "log_sums_ptr": "*fp32", "tables_ptr": "*i64",
            "lens_ptr": "*i64", "stride_table": "i32",
            "B": "i32", "H": "i32", "ROWS": "i32", "PARTS": "i32", "scale": "fp32",
            "S": "constexpr", "C": "constexpr", "P": "constexpr",
            "BLOCK_B": "constexpr", "BLOCK_R": "constexpr", "SWAP": "constexpr",
        },
        {
            "S": num_tokens, "C": _V3_C, "P": _V3_P,
            "BLOCK_B": 256, "BLOCK_R": tile.rows, "SWAP": tile.swap,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        matrix=True,
    )  # fmt: skip


def _merging(tile: configs.MergeTile) -> Variant:
    return Variant(
        _mla_decode_kernel_merge,
        {
            "lens_ptr": "*i64", "partial_ptr": "*fp32", "log_sums_ptr": "*fp32",
            "out_ptr": "*bf16", "B": "i32", "R": "i32", "ROWS": "i32", "PARTS": "i32",
            "C": "constexpr", "BLOCK_B": "constexpr",
            "BLOCK_S": "constexpr", "BLOCK_R": "constexpr", "BLOCK_C": "constexpr",
        },
        {
            "C": _V3_C, "BLOCK_B": 256, "BLOCK_S": tile.segments,
            "BLOCK_R": tile.rows, "BLOCK_C": tile.columns,
        },
    )  # fmt: skip
