"""Drawing in one launch: a program a row, nothing sorted and nothing written but the token.

B rows, V tokens, R adjusted rows; values are fp64, as in the reference. Top-k and top-p each ask
for the greatest value such that the tokens from it upwards are enough, in number or in mass: a
bisection between the values themselves finds it exactly, in about log2(V) passes over a row that
the L2 cache holds. A pass takes the exponentials of tiles with undecided tokens only, which are
soon few.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidemill.kernels.aot import Variant
from tidemill.kernels.check import Arguments
from tidemill.kernels.sample import noise
from tidemill.kernels.sample.reference import GREEDY_BELOW, NONE_ALLOWED, Draws

BLOCK = 2048  # untimed: eight values a thread
NUM_WARPS = 8

_GOLDEN = tl.constexpr(noise.GOLDEN)
_MIX_A = tl.constexpr(noise.MIX_A)
_MIX_B = tl.constexpr(noise.MIX_B)
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_NONE_ALLOWED = tl.constexpr(NONE_ALLOWED)


@triton.jit
def _mix(value):
    """`noise._mix_in_place`: uint64 to uint64."""
    value = (value ^ (value >> 30)) * _MIX_A
    value = (value ^ (value >> 27)) * _MIX_B
    return value ^ (value >> 31)


@triton.jit
def _gumbel(ids, key):
    """`noise.gumbel_noise` of int64 ids."""
    bits = _mix((ids + 1).to(tl.uint64) * _GOLDEN + key)
    uniform = ((bits >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2**-52
    return -tl.log(-tl.log(uniform))


@triton.jit
def _scaled(
    logits_ptr, ids, V, temperature, at, repetition, presence, frequency, seen_ptr, bias_ptr,
    ADJUSTED: tl.constexpr,
):  # fmt: skip
    """The row's values at `ids`: adjusted, over the temperature; -inf past its end."""
    value = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    value = value.to(tl.float64)
    if ADJUSTED:
        if at >= 0:
            seen = tl.load(seen_ptr + at * V + ids, mask=ids < V, other=0)
            times = seen >> 1
            punished = tl.where(value > 0, value / repetition, value * repetition)
            value = tl.where(seen > 0, punished, value)
            value = tl.where(times > 0, value - presence, value)
            value -= frequency * times.to(tl.float64)
            value += tl.load(bias_ptr + at * V + ids, mask=ids < V, other=0.0)
    return value / temperature


@triton.jit
def _bound(
    lowest, highest, wanted, top,
    logits_ptr, V, temperature, at, repetition, presence, frequency, seen_ptr, bias_ptr,
    ADJUSTED: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The greatest of the row's values from which upwards there is enough; `lowest` if never is.

    Both ends are values of the row. Enough is `wanted` tokens or, with MASS, as much of
    exp(value - top).
    """
    above = tl.zeros((), tl.float64)  # what lies above `highest`
    while lowest < highest:
        middle = lowest + (highest - lowest) * 0.5
        middle = tl.where(middle > lowest, middle, highest)
        found = tl.zeros((BLOCK,), tl.float64)
        upper = tl.full((BLOCK,), float("inf"), tl.float64)
        lower = tl.full((BLOCK,), float("-inf"), tl.float64)
        for start in range(0, V, BLOCK):
            ids = start + tl.arange(0, BLOCK).to(tl.int64)
            value = _scaled(
                logits_ptr, ids, V, temperature, at, repetition, presence, frequency,
                seen_ptr, bias_ptr, ADJUSTED,
            )  # fmt: skip
            inside = (value >= middle) & (value <= highest)
            upper = tl.minimum(upper, tl.where(inside, value, float("inf")))
            below = (value < middle) & (value >= lowest)
            lower = tl.maximum(lower, tl.where(below, value, float("-inf")))
            if MASS:
                if tl.max(inside.to(tl.int32), 0) > 0:
                    found += tl.where(inside, tl.exp(value - top), 0.0)
            else:
                found += inside.to(tl.float64)
        reached = above + tl.sum(found, 0)
        if reached >= wanted:
            lowest = tl.min(upper, 0)
        else:
            above = reached
            highest = tl.max(lower, 0)
    return lowest


@triton.jit
def _sample_kernel(
    logits_ptr, stride_row, V,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, positions_ptr,
    rows_ptr, repetition_ptr, presence_ptr, frequency_ptr, seen_ptr, bias_ptr,
    token_ids_ptr,
    ADJUSTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    temperature = tl.load(temperature_ptr + row)
    drawn = temperature >= _GREEDY_BELOW
    temperature = tl.where(drawn, temperature, 1.0)
    at = row * 0 - 1
    repetition = temperature * 0 + 1
    presence = temperature * 0
    frequency = temperature * 0
    if ADJUSTED:
        at = tl.load(rows_ptr + row).to(tl.int64)
        if at >= 0:
            repetition = tl.load(repetition_ptr + at)
            presence = tl.load(presence_ptr + at)
            frequency = tl.load(frequency_ptr + at)

    greatest = tl.full((BLOCK,), float("-inf"), tl.float64)
    smallest = tl.full((BLOCK,), float("inf"), tl.float64)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK).to(tl.int64)
        value = _scaled(
            logits_ptr, ids, V, temperature, at, repetition, presence, frequency,
            seen_ptr, bias_ptr, ADJUSTED,
        )  # fmt: skip
        greatest = tl.maximum(greatest, value)
        smallest = tl.minimum(smallest, tl.where(value > float("-inf"), value, float("inf")))
    top = tl.max(greatest, 0)
    least = tl.min(smallest, 0)  # of what is drawn from, in the end

    if drawn & (top > float("-inf")):
        top_k = tl.load(top_k_ptr + row)
        if (top_k > 0) & (top_k < V):
            least = _bound(
                least, top, top_k.to(tl.float64), top,
                logits_ptr, V, temperature, at, repetition, presence, frequency,
                seen_ptr, bias_ptr, ADJUSTED, False, BLOCK,
            )  # fmt: skip
        top_p = tl.load(top_p_ptr + row)
        if top_p < 1:
            mass = tl.zeros((BLOCK,), tl.float64)
            for start in range(0, V, BLOCK):
                ids = start + tl.arange(0, BLOCK).to(tl.int64)
                value = _scaled(
                    logits_ptr, ids, V, temperature, at, repetition, presence, frequency,
                    seen_ptr, bias_ptr, ADJUSTED,
                )  # fmt: skip
                mass += tl.where(value >= least, tl.exp(value - top), 0.0)
            least = _bound(
                least, top, top_p * tl.sum(mass, 0), top,
                logits_ptr, V, temperature, at, repetition, presence, frequency,
                seen_ptr, bias_ptr, ADJUSTED, True, BLOCK,
            )  # fmt: skip
        min_p = tl.load(min_p_ptr + row)
        if min_p > 0:
            least = tl.maximum(least, top + tl.log(min_p))

    key = tl.load(seeds_ptr + row).to(tl.uint64) + _GOLDEN
    key = _mix(key) ^ tl.load(positions_ptr + row).to(tl.uint64)
    key = _mix(key + _GOLDEN)
    best = tl.full((), float("-inf"), tl.float64)
    best_id = row * 0 + _NONE_ALLOWED
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK).to(tl.int64)
        score = _scaled(
            logits_ptr, ids, V, temperature, at, repetition, presence, frequency,
            seen_ptr, bias_ptr, ADJUSTED,
        )  # fmt: skip
        kept = score >= least
        if tl.max(kept.to(tl.int32), 0) > 0:
            if drawn:
                score += _gumbel(ids, key)
            score = tl.where(kept, score, float("-inf"))
            tile_best = tl.max(score, 0)
            tile_id = tl.min(tl.where(score == tile_best, ids, V), 0)
            best_id = tl.where(tile_best > best, tile_id, best_id)
            best = tl.maximum(best, tile_best)
    tl.store(token_ids_ptr + row, best_id)


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """As `reference.sample`; ValueError for arguments of other shapes, dtypes or devices."""
    args = Arguments("sample")
    args.take("logits", logits, "B V", torch.float32, torch.bfloat16, torch.float16)
    args.take("temperature", draws.temperature, "B", torch.float64)
    args.take("top_k", draws.top_k, "B", torch.int32)
    args.take("top_p", draws.top_p, "B", torch.float64)
    args.take("min_p", draws.min_p, "B", torch.float64)
    args.take("seeds", draws.seeds, "B", torch.int64)
    args.take("positions", draws.positions, "B", torch.int64)
    tables: list[Tensor | None] = [None] * 6
    adjust = draws.adjustments
    if adjust is not None:
        args.take("rows", adjust.rows, "B", torch.int32)
        args.take("repetition", adjust.repetition, "R", torch.float64)
        args.take("presence", adjust.presence, "R", torch.float64)
        args.take("frequency", adjust.frequency, "R", torch.float64)
        args.take("seen", adjust.seen, "R V", torch.int32)
        args.take("bias", adjust.bias, "R V", torch.float64)
        both = adjust.seen.is_contiguous() and adjust.bias.is_contiguous()
        args.require(both, "seen and bias must be contiguous")
        tables = [
            adjust.rows,
            adjust.repetition,
            adjust.presence,
            adjust.frequency,
            adjust.seen,
            adjust.bias,
        ]
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(logits):
        _sample_kernel[(len(logits),)](
            logits,
            logits.stride(0),
            logits.shape[1],
            draws.temperature,
            draws.top_k,
            draws.top_p,
            draws.min_p,
            draws.seeds,
            draws.positions,
            *tables,
            token_ids,
            ADJUSTED=adjust is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return token_ids


def variants() -> list[Variant]:
    """Logits as the model's head gives them, with and without adjustments."""
    row = {"temperature_ptr": "*fp64", "top_k_ptr": "*i32", "top_p_ptr": "*fp64"}
    row |= {"min_p_ptr": "*fp64", "seeds_ptr": "*i64", "positions_ptr": "*i64"}
    tables = {"rows_ptr": "*i32", "repetition_ptr": "*fp64", "presence_ptr": "*fp64"}
    tables |= {"frequency_ptr": "*fp64", "seen_ptr": "*i32", "bias_ptr": "*fp64"}
    made = []
    for logits in ("*fp32", "*bf16"):
        for adjusted in (False, True):
            signature = {"logits_ptr": logits, "stride_row": "i32", "V": "i32", **row}
            signature |= tables if adjusted else dict.fromkeys(tables, "constexpr")
            signature |= {"token_ids_ptr": "*i64", "ADJUSTED": "constexpr", "BLOCK": "constexpr"}
            constants: dict[str, object] = {} if adjusted else dict.fromkeys(tables)
            constants |= {"ADJUSTED": adjusted, "BLOCK": BLOCK}
            made.append(Variant(_sample_kernel, signature, constants, num_warps=NUM_WARPS))
    return made
