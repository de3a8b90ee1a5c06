"""Grouped expert MLP: rows are sorted by expert once, then each expert is one dense product."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from tidemill.kernels.linear import Linear


@dataclass(frozen=True)
class Expert:
    """W_down(silu(W_gate x) * W_up x): gate over up [2 * I, D], down [D, I].

    One product for gate and up: small experts are bound by the cost of a call.
    """

    gate_up: Linear
    down: Linear

    def __call__(self, rows: Tensor) -> Tensor:
        """rows [T, D] -> [T, D]."""
        gate, up = self.gate_up(rows).chunk(2, dim=-1)
        return self.down(silu(gate).mul_(up))


def gather_rows(x: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Copy each token of x [T, D] once per chosen expert (ids [T, K]), sorted by expert.

    Returns rows [T*K, D], the sorting permutation of the flat (token, choice) pairs [T*K], and how
    many rows each of the experts got.
    """
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    counts: list[int] = torch.bincount(flat, minlength=num_experts).tolist()
    return x.index_select(0, order // ids.shape[1]), order, counts


def expert_mlp(rows: Tensor, counts: Sequence[int], experts: Sequence[Expert]) -> Tensor:
    """Run each expert on its consecutive rows of [R, D]; returns [R, D] in the same order."""
    used = [(expert, count) for expert, count in zip(experts, counts, strict=True) if count]
    parts = rows.split_with_sizes([count for _, count in used])
    return torch.cat([expert(part) for (expert, _), part in zip(used, parts, strict=True)])


def scatter_rows(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Undo `gather_rows` on the experts' output: sum of each token's K rows by weights [T, K].

    The sum runs in fp32 and in the order of the router's choices: the batch does not change it.
    """
    unsorted = torch.empty_like(rows).index_copy_(0, order, rows)
    choices = unsorted.view(*weights.shape, -1)
    return torch.bmm(weights.unsqueeze(1), choices.float()).squeeze(1).to(rows.dtype)
