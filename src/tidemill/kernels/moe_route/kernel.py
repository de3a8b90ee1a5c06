"""Routing on a GPU, and the order by expert.

T tokens, E experts in groups of S, K choices of each token. A token is one warp: its row of scores
stays in registers, each choice is a maximum over them and the least index that has it. Floats are
compared as integers that order alike, since Hopper reduces integers over a warp in one instruction
and NaN then has its place too (above all, as in torch): ids are valid whatever the logits are.

The order by expert is a second launch, in which every program finds the rows of its two experts
among all choices: no atomics, no histogram to clear, nothing that the host must know. A single
token, whose order is a comparison of K numbers, is done in the first.
"""

from typing import Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidemill.kernels.aot import Variant
from tidemill.kernels.check import Arguments
from tidemill.kernels.moe_route.reference import Routed, Rule

# Choices that the second launch looks at at once, and warps, for few and for many. Untimed.
_FEW, _MANY = (1024, 4), (4096, 8)
_LEAST = tl.constexpr(-(2**31))  # padding, and what was chosen already
_DROPPED = tl.constexpr(-(2**31) + 0x7FFFFF)  # what -inf becomes in `_ordered`


@triton.jit
def _ordered(x):
    """fp32 -> int32 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _kept_groups(choice, inside, groups, TOPK_GROUP: tl.constexpr, TWO_BEST: tl.constexpr):
    """Which of the groups (rows of choice) are among the best: by their two best or their best."""
    choice = tl.where(inside, choice, float("-inf"))
    score = tl.max(choice, axis=1)
    if TWO_BEST:
        lanes = tl.arange(0, choice.shape[1])[None, :]
        first = tl.min(tl.where(choice == score[:, None], lanes, choice.shape[1]), axis=1)
        score += tl.max(tl.where(lanes == first[:, None], float("-inf"), choice), axis=1)
    keys = tl.where(tl.max(inside.to(tl.int32), axis=1) > 0, _ordered(score), _LEAST)
    kept = groups < 0
    for _ in tl.static_range(TOPK_GROUP):
        chosen = tl.min(tl.where(keys == tl.max(keys), groups, choice.shape[0]))
        kept = kept | (groups == chosen)
        keys = tl.where(groups == chosen, _LEAST, keys)
    return kept


@triton.jit
def _moe_route_kernel(
    logits_ptr,  # [T, E]
    bias_ptr,  # [E] where BIASED
    weights_ptr,  # [T, K]
    ids_ptr,  # [T, K]
    rows_ptr,  # [K] where SORTS, as the next two: T is 1
    starts_ptr,  # [E]
    counts_ptr,  # [E]
    stride_lt,
    scale,
    N_GROUP: tl.constexpr,
    S: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SORTS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * stride_lt
    groups = tl.arange(0, BLOCK_G)
    lanes = tl.arange(0, BLOCK_S)
    experts = groups[:, None] * S + lanes[None, :]
    inside = (groups < N_GROUP)[:, None] & (lanes < S)[None, :]

    logits = tl.load(row_ptr + experts, mask=inside, other=float("-inf"))
    highest, total = 0.0, 1.0
    if SIGMOID:
        choice = tl.sigmoid(logits)
    else:
        highest = tl.max(logits)
        choice = tl.exp(logits - highest)
        total = tl.sum(choice)
        choice = choice / total
    if BIASED:
        choice += tl.load(bias_ptr + experts, mask=inside, other=0.0)
    keys = tl.where(inside, _ordered(choice), _LEAST)
    if TOPK_GROUP < N_GROUP:
        kept = _kept_groups(choice, inside, groups, TOPK_GROUP, SIGMOID)
        keys = tl.where(kept[:, None], keys, tl.minimum(keys, _DROPPED))

    places = tl.arange(0, BLOCK_K)
    ids = tl.full((BLOCK_K,), 0, tl.int32)
    starts = tl.full((BLOCK_G, BLOCK_S), 0, tl.int32)
    counts = tl.full((BLOCK_G, BLOCK_S), 0, tl.int32)
    for place in tl.static_range(K):
        chosen = tl.min(tl.where(keys == tl.max(keys), experts, N_GROUP * S))
        ids = tl.where(places == place, chosen, ids)
        keys = tl.where(experts == chosen, _LEAST, keys)
        if SORTS:
            starts += (chosen < experts).to(tl.int32)
            counts += (chosen == experts).to(tl.int32)

    taken = places < K
    weights = tl.load(row_ptr + ids, mask=taken, other=float("-inf"))
    if SIGMOID:
        weights = tl.sigmoid(weights)
    else:
        weights = tl.exp(weights - highest) / total
    if NORMALIZE:
        weights = weights / (tl.sum(weights) + 1e-20)
    weights = weights * scale
    tl.store(weights_ptr + token * K + places, weights, mask=taken)
    tl.store(ids_ptr + token * K + places, ids.to(ids_ptr.dtype.element_ty), mask=taken)
    if SORTS:
        tl.store(starts_ptr + experts, starts, mask=inside)
        tl.store(counts_ptr + experts, counts, mask=inside)
        before = (ids[None, :] < ids[:, None]) & taken[None, :]
        tl.store(rows_ptr + tl.sum(before.to(tl.int32), axis=1), places, mask=taken)


@triton.jit
def _moe_sort_kernel(
    ids_ptr,  # [T * K]
    rows_ptr,  # [T * K]
    starts_ptr,  # [E]
    counts_ptr,  # [E]
    num_choices,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program has two experts; a choice counts in the low half of an int32 or in the high one."""
    low = tl.program_id(0) * 2
    high = low + 1
    within = tl.arange(0, BLOCK)

    below = tl.full((BLOCK,), 0, tl.int32)
    hits = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, num_choices, BLOCK):
        ids = tl.load(ids_ptr + start + within, mask=start + within < num_choices, other=E + 1)
        below += (ids < low).to(tl.int32)
        hits += (ids == low).to(tl.int32) + ((ids == high).to(tl.int32) << 16)
    low_at = tl.sum(below)
    low_count, high_count = tl.sum(hits & 0xFFFF), tl.sum(hits >> 16)
    high_at = low_at + low_count
    tl.store(starts_ptr + low, low_at)
    tl.store(counts_ptr + low, low_count)
    tl.store(starts_ptr + high, high_at, mask=high < E)
    tl.store(counts_ptr + high, high_count, mask=high < E)

    for start in range(0, num_choices, BLOCK):
        choices = start + within
        ids = tl.load(ids_ptr + choices, mask=choices < num_choices, other=E + 1)
        hits = (ids == low).to(tl.int32) + ((ids == high).to(tl.int32) << 16)
        before = tl.cumsum(hits) - hits
        place = tl.where(ids == low, low_at + (before & 0xFFFF), high_at + (before >> 16))
        tl.store(rows_ptr + place, choices, mask=hits != 0)
        found = tl.sum(hits)
        low_at += found & 0xFFFF
        high_at += found >> 16


def moe_route(logits: Tensor, bias: Tensor | None, **rule: Unpack[Rule]) -> tuple[Tensor, Tensor]:
    """The reference's `moe_route`; of equal scores the one with the lowest index is taken."""
    shape = (logits.shape[0], rule["top_k"])
    ids = torch.empty(shape, dtype=torch.int64, device=logits.device)
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    _launch_route("moe_route", logits, bias, rule, weights, ids, None)
    return weights, ids


def route_and_sort(logits: Tensor, bias: Tensor | None, **rule: Unpack[Rule]) -> Routed:
    """The reference's `route_and_sort`; of equal scores the one with the lowest index is taken."""
    num_tokens, num_experts = logits.shape
    top_k, device = rule["top_k"], logits.device
    routed = Routed(
        weights=torch.empty((num_tokens, top_k), dtype=torch.float32, device=device),
        ids=torch.empty((num_tokens, top_k), dtype=torch.int32, device=device),
        rows=torch.empty(num_tokens * top_k, dtype=torch.int32, device=device),
        starts=torch.empty(num_experts, dtype=torch.int32, device=device),
        counts=torch.empty(num_experts, dtype=torch.int32, device=device),
    )
    single = routed if num_tokens == 1 else None
    _launch_route("route_and_sort", logits, bias, rule, routed.weights, routed.ids, single)
    if single is None:
        sort_choices(routed)
    return routed


def sort_choices(routed: Routed) -> None:
    """Fill rows, starts and counts by what ids hold."""
    num_experts, num_choices = len(routed.counts), routed.ids.numel()
    block, warps = _FEW if num_choices <= _FEW[0] else _MANY
    _moe_sort_kernel[(triton.cdiv(num_experts, 2),)](
        routed.ids,
        routed.rows,
        routed.starts,
        routed.counts,
        num_choices,
        E=num_experts,
        BLOCK=block,
        num_warps=warps,
    )


def _launch_route(
    op: str,
    logits: Tensor,
    bias: Tensor | None,
    rule: Rule,
    weights: Tensor,
    ids: Tensor,
    sorts: Routed | None,
) -> None:
    arguments = Arguments(op)
    arguments.take("logits", logits, "T E", torch.float32)
    if bias is not None:
        arguments.take("bias", bias, "E", torch.float32)
    num_tokens, num_experts = logits.shape
    n_group, top_k = rule["n_group"], rule["top_k"]
    topk_group = min(rule["topk_group"], n_group)
    size = num_experts // n_group
    limits = topk_group < n_group and rule["scoring_func"] == "sigmoid"
    arguments.require(
        num_experts % n_group == 0 and top_k <= topk_group * size and (not limits or size > 1),
        f"{top_k} of {topk_group} of {n_group} groups cannot be chosen",
    )
    if num_tokens == 0:
        return
    constants = route_constants(rule, num_experts, biased=bias is not None, sorts=sorts is not None)
    scaled = rule["scoring_func"] == "sigmoid" or not constants["NORMALIZE"]
    _moe_route_kernel[(num_tokens,)](
        logits,
        logits if bias is None else bias,
        weights,
        ids,
        ids if sorts is None else sorts.rows,
        ids if sorts is None else sorts.starts,
        ids if sorts is None else sorts.counts,
        logits.stride(0),
        rule["scale"] if scaled else 1.0,
        **constants,
        num_warps=1,
    )


def route_constants(
    rule: Rule, num_experts: int, *, biased: bool, sorts: bool
) -> dict[str, int | bool]:
    """What `_moe_route_kernel` is compiled for."""
    n_group, sigmoid = rule["n_group"], rule["scoring_func"] == "sigmoid"
    topk_group = min(rule["topk_group"], n_group)
    if topk_group == n_group:  # groups without a meaning: one fills its power of two best
        n_group = topk_group = 1
    size = num_experts // n_group
    return {
        "N_GROUP": n_group,
        "S": size,
        "TOPK_GROUP": topk_group,
        "K": rule["top_k"],
        "SIGMOID": sigmoid,
        "BIASED": biased,
        "NORMALIZE": rule["normalize"] and (sigmoid or rule["top_k"] > 1),
        "SORTS": sorts,
        "BLOCK_G": triton.next_power_of_2(n_group),
        "BLOCK_S": triton.next_power_of_2(size),
        "BLOCK_K": triton.next_power_of_2(rule["top_k"]),
    }


def variants() -> list[Variant]:
    """The routers of DeepSeek-V3, of 384 experts in one group, and of DeepSeek-V2."""
    v3 = Rule(scoring_func="sigmoid", n_group=8, topk_group=4, top_k=8, normalize=True, scale=2.5)
    free = Rule(scoring_func="sigmoid", n_group=1, topk_group=1, top_k=8, normalize=True, scale=2.5)
    v2 = Rule(scoring_func="softmax", n_group=8, topk_group=3, top_k=6, normalize=False, scale=16.0)
    routes = [(v3, 256, False), (v3, 256, True), (free, 384, False), (free, 384, True)]
    routes += [(v2, 160, False), (v2, 160, True)]
    return [
        *(_route_variant(*route) for route in routes),
        *(_sort_variant(256, *tiles) for tiles in (_FEW, _MANY)),
    ]


def _route_variant(rule: Rule, num_experts: int, sorts: bool) -> Variant:
    pointers = ("logits_ptr", "bias_ptr", "weights_ptr", "ids_ptr")
    orders = ("rows_ptr", "starts_ptr", "counts_ptr")
    constants = route_constants(
        rule, num_experts, biased=rule["scoring_func"] == "sigmoid", sorts=sorts
    )
    return Variant(
        _moe_route_kernel,
        signature={
            **dict.fromkeys(pointers, "*fp32"),
            "ids_ptr": "*i32",
            **dict.fromkeys(orders, "*i32"),
            "stride_lt": "i32",
            "scale": "fp32",
            **dict.fromkeys(constants, "constexpr"),
        },
        constants=constants,
        num_warps=1,
        aligned=(*pointers, *orders, "stride_lt"),
    )


def _sort_variant(num_experts: int, block: int, warps: int) -> Variant:
    pointers = ("ids_ptr", "rows_ptr", "starts_ptr", "counts_ptr")
    return Variant(
        _moe_sort_kernel,
        signature={
            **dict.fromkeys(pointers, "*i32"),
            "num_choices": "i32",
            **dict.fromkeys(("E", "BLOCK"), "constexpr"),
        },
        constants={"E": num_experts, "BLOCK": block},
        num_warps=warps,
        aligned=(*pointers, "num_choices"),
    )
