"""Choice of experts for each token."""

from typing import Unpack

from torch import Tensor

from tidemill.kernels.choice import takes_triton
from tidemill.kernels.moe_route import reference
from tidemill.kernels.moe_route.reference import Routed, Rule

__all__ = ["Routed", "Rule", "moe_route", "route_and_sort"]


def moe_route(logits: Tensor, bias: Tensor | None, **rule: Unpack[Rule]) -> tuple[Tensor, Tensor]:
    """fp32 logits [T, E], bias [E] -> weights [T, K] fp32 and expert ids [T, K] int64.

    What the rule means is told in `reference.py`. Which of equal scores is chosen is open.
    """
    if takes_triton(logits):
        from tidemill.kernels.moe_route import kernel

        return kernel.moe_route(logits, bias, **rule)
    return reference.moe_route(logits, bias, **rule)


def route_and_sort(logits: Tensor, bias: Tensor | None, **rule: Unpack[Rule]) -> Routed:
    """`moe_route`, and the choices in the order of their experts, which no host has to know."""
    if takes_triton(logits):
        from tidemill.kernels.moe_route import kernel

        return kernel.route_and_sort(logits, bias, **rule)
    return reference.route_and_sort(logits, bias, **rule)
