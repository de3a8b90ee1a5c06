"""Muon: momentum, orthogonalised by a Newton-Schulz iteration (Jordan et al., 2024).

torch.optim.Muon takes matrices only; routed experts are stacks of them, hence this one.
"""

from collections.abc import Iterable

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95


def orthogonalise(update: torch.Tensor) -> torch.Tensor:
    """[..., rows, columns] to the nearest semi-orthogonal matrix, roughly; computed in bf16."""
    a, b, c = COEFFICIENTS
    x: torch.Tensor = update.to(torch.bfloat16)
    is_tall = x.size(-2) > x.size(-1)
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """For weights [..., rows, columns]; a step has an RMS of 0.2 x lr, like AdamW's.

    `stacked_pairs` hold two matrices on top of each other, as gate over up: each is taken alone.
    """

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        stacked_pairs: Iterable[torch.nn.Parameter],
        weight_decay: float,
    ) -> None:
        groups = [
            {"params": list(matrices), "stacked": 1},
            {"params": list(stacked_pairs), "stacked": 2},
        ]
        super().__init__(groups, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nothing here passes a closure
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    update = self._update(param, param.grad, group["stacked"])
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(update, alpha=-group["lr"])

    def _update(self, param: torch.Tensor, grad: torch.Tensor, stacked: int) -> torch.Tensor:
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        state["momentum"].lerp_(grad, 1 - MOMENTUM)
        rows, columns = param.shape[-2] // stacked, param.shape[-1]
        update = grad.lerp(state["momentum"], MOMENTUM)
        update = orthogonalise(update.view(*param.shape[:-2], stacked, rows, columns))
        return update.reshape(param.shape).mul_(0.2 * max(rows, columns) ** 0.5)
