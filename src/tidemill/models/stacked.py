"""MLP stages on stacked experts: a layer's weights in one tensor, few launches, FP8 as it is."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from tidemill.kernels.act_quant import Quantized
from tidemill.kernels.grouped_gemm import combine, down, gate_up
from tidemill.kernels.moe_route import Routed, route_and_sort
from tidemill.kernels.rms_norm import rms_norm_quant
from tidemill.models.config import ModelConfig
from tidemill.models.deepseek import Norm, routing_rule

Rows = Tensor | Quantized  # [T, D], as the experts' weights want them


@dataclass(frozen=True)
class StackedExperts:
    """SwiGLU experts, gate over up: one for all rows, or many with rows sorted by expert.

    The scales [.., ceil(N / 128), K / 128] fp32 of FP8 weights; None where weights are plain.
    """

    gate_up: Tensor  # [E, 2 * I, D]
    down: Tensor  # [E, D, I]
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None

    def normed(self, hidden: Tensor, norm: Norm) -> tuple[Tensor, Rows]:
        """hidden [T, D], normalised: in its own dtype, and as the weights want it."""
        if self.gate_up_scale is None:
            tokens = norm(hidden)
            return tokens, tokens
        return rms_norm_quant(hidden, norm.weight, norm.eps, keep=True)

    def by_route(self, rows: Rows, routed: Routed, dtype: torch.dtype) -> Tensor:
        """Each token's chosen experts, weighted, [T * K, D] in the order of the choices."""
        inner = gate_up(
            rows,
            self.gate_up,
            self.gate_up_scale,
            starts=routed.starts,
            counts=routed.counts,
            rows=routed.rows,
            top_k=routed.ids.shape[1],
        )
        return down(
            inner,
            self.down,
            self.down_scale,
            starts=routed.starts,
            counts=routed.counts,
            rows=routed.rows,
            weights=routed.weights,
            out_dtype=dtype,
        )

    def for_all(self, rows: Rows, hidden: Tensor) -> Tensor:
        """The only expert's output for all T rows, [T, D] in the dtype of hidden [T, D]."""
        starts, counts = _every_row(len(hidden), hidden.device)
        inner = gate_up(rows, self.gate_up, self.gate_up_scale, starts=starts, counts=counts)
        return down(
            inner, self.down, self.down_scale, starts=starts, counts=counts, out_dtype=hidden.dtype
        )


@dataclass(frozen=True)
class StackedDense:
    """As DenseMlp."""

    norm: Norm
    mlp: StackedExperts

    def __call__(self, hidden: Tensor) -> Tensor:
        """As MlpStage."""
        _, rows = self.mlp.normed(hidden, self.norm)
        return hidden + self.mlp.for_all(rows, hidden)


@dataclass(frozen=True)
class StackedDispatch:
    """Tokens on their way through stacked experts: they stay where they are, sorted by index."""

    rows: Rows
    routed: Routed


@dataclass(frozen=True)
class StackedMoe:
    """As MoeMlp."""

    norm: Norm
    gate: Tensor  # [E, D] fp32, or in the model's dtype where that is all it has
    gate_bias: Tensor | None  # [E] fp32
    routed: StackedExperts
    shared: StackedExperts | None
    config: ModelConfig

    def __call__(self, hidden: Tensor) -> Tensor:
        """As MlpStage."""
        dispatched = self.dispatch(hidden)
        return self.combine(hidden, self.experts(dispatched, hidden))

    def dispatch(self, hidden: Tensor) -> StackedDispatch:
        """hidden [T, D] -> its rows and the order in which experts read them."""
        tokens, rows = self.routed.normed(hidden, self.norm)
        routed = route_and_sort(self._logits(tokens), self.gate_bias, **routing_rule(self.config))
        return StackedDispatch(rows, routed)

    def _logits(self, tokens: Tensor) -> Tensor:
        """tokens [T, D] -> [T, E], products exact and summed in fp32."""
        if self.gate.dtype != tokens.dtype:
            return linear(tokens.float(), self.gate)
        starts, counts = _every_row(len(tokens), tokens.device)
        gate = self.gate.unsqueeze(0)
        return down(tokens, gate, starts=starts, counts=counts, out_dtype=torch.float32)

    def experts(self, dispatched: StackedDispatch, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The choices' weighted rows [T * K, D] and the shared expert's output [T, D]."""
        routed = self.routed.by_route(dispatched.rows, dispatched.routed, hidden.dtype)
        if self.shared is None:
            return routed, None
        return routed, self.shared.for_all(dispatched.rows, hidden)

    def combine(self, hidden: Tensor, outputs: tuple[Tensor, Tensor | None]) -> Tensor:
        """hidden [T, D] plus the sum of each token's rows plus the shared expert."""
        routed, shared = outputs
        return combine(routed, hidden, shared)


@cache
def _every_row(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """starts [1] = 0 and counts [1] = num_rows, int32: one run of all rows, for all layers.

    Never forgotten: recorded steps read them where they lie.
    """
    with torch.inference_mode(False):
        starts = torch.zeros(1, dtype=torch.int32, device=device)
        return starts, starts + num_rows
