"""Grouped expert MLP: rows are sorted by expert once, then each expert is one dense product."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from tidemill.kernels.linear import Linear

_TILE_TOKENS = 128  # summed at once: their rows in fp32 stay in the cache


@dataclass(frozen=True)
class Expert:
    """W_down(silu(W_gate x) * W_up x): gate over up [2 * I, D], down [D, I].

    One product for gate and up: small experts are bound by the cost of a call.
    """

    gate_up: Linear
    down: Linear

    def __call__(self, rows: Tensor) -> Tensor:
        """rows [T, D] -> [T, D]."""
        filled = self.gate_up.filled(rows)
        gate, up = self.gate_up(filled).chunk(2, dim=-1)
        out = self.down(silu(gate).mul_(up))
        return out if filled is rows else out[: rows.shape[0]]


@dataclass(frozen=True)
class SortedRows:
    """Tokens' rows, one for each chosen expert, so that an expert's rows lie together."""

    rows: Tensor  # [T * K, D]; for one token its only row, [1, D], which all K experts read
    runs: Sequence[tuple[int, int]]  # expert and how many rows it has, in their order
    order: Tensor | None  # [T * K], which (token, choice) each row is; None where each is its own


def gather_rows(x: Tensor, ids: Tensor, num_experts: int) -> SortedRows:
    """Sort the tokens of x [T, D] by their chosen experts (ids [T, K])."""
    num_tokens, top_k = ids.shape
    if num_tokens == 1:
        return SortedRows(x, [(expert, 1) for expert in ids[0].tolist()], None)
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    counts: list[int] = torch.bincount(flat, minlength=num_experts).tolist()
    runs = [(expert, count) for expert, count in enumerate(counts) if count]
    return SortedRows(x.index_select(0, order // top_k), runs, order)


def expert_mlp(tokens: SortedRows, experts: Sequence[Expert]) -> Tensor:
    """Each expert's output on its rows, [T * K, D] in the order of `tokens.runs`.

    Sorted rows are overwritten by it: their memory is at hand, and new memory costs page faults.
    """
    if tokens.order is None:
        row = experts[0].gate_up.filled(tokens.rows)  # once for all of them
        return torch.cat([experts[expert](row)[:1] for expert, _ in tokens.runs])
    rows, num_rows, start = tokens.rows, tokens.rows.shape[0], 0
    for expert, count in tokens.runs:
        # Neighbours' rows fill up a product that likes to have more: nobody looks at their output.
        width = min(experts[expert].gate_up.enough(count), num_rows)
        first = min(start, num_rows - width)
        out = experts[expert](rows[first : first + width])
        rows[start : start + count] = out[start - first : start - first + count]
        start += count
    return rows


def scatter_rows(rows: Tensor, order: Tensor | None, weights: Tensor) -> Tensor:
    """The experts' output in `SortedRows.order` -> sum of each token's K rows by weights [T, K].

    The sum runs in fp32 and in the order of the router's choices: the batch does not change it.
    """
    if order is None:
        return torch.mm(weights, rows.float()).to(rows.dtype)
    num_tokens, top_k = weights.shape
    where = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=order.device)
    )
    out = rows.new_empty(num_tokens, rows.shape[-1])
    num_tiles = -(-num_tokens // _TILE_TOKENS)
    tiles = (each.chunk(num_tiles) for each in (where.view(-1, top_k), weights, out))
    for sources, shares, sums in zip(*tiles, strict=True):
        choices = rows.index_select(0, sources.flatten()).view(*sources.shape, -1)
        sums.copy_(torch.bmm(shares.unsqueeze(1), choices.float()).squeeze(1))
    return out
