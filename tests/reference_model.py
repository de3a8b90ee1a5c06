"""transformers' DeepseekV2 and DeepseekV3, which the engine is held against.

Where those classes leave out a switch that the family's configs have, the published modelling code
is the truth, and the class is completed here, by its own modules:
- `moe_layer_freq` (both): the layers between get a dense MLP;
- `n_routed_experts` 0 (both): every layer gets one;
- `norm_topk_prob` (V2): weights sum to 1 and are then not scaled, unless one expert is chosen;
- one routed expert (V3): its router asks for the two best of a group, of which there is one.
"""

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2MLP,
    DeepseekV2TopkRouter,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3MLP,
    DeepseekV3TopkRouter,
)

RouterOutput = tuple[Tensor, Tensor, Tensor]


class _NormalisingV2Router(DeepseekV2TopkRouter):  # type: ignore[misc]  # no types there
    def forward(self, hidden_states: Tensor) -> RouterOutput:
        logits, weights, ids = super().forward(hidden_states)
        return logits, weights / weights.sum(-1, keepdim=True), ids


class _OneExpertV3Router(DeepseekV3TopkRouter):  # type: ignore[misc]  # no types there
    def forward(self, hidden_states: Tensor) -> RouterOutput:
        logits = torch.nn.functional.linear(hidden_states.view(-1, self.hidden_dim), self.weight)
        weights = torch.ones_like(logits) if self.norm_topk_prob else logits.sigmoid()
        return logits, weights * self.routed_scaling_factor, torch.zeros_like(logits).long()


class ReferenceV2(DeepseekV2ForCausalLM):  # type: ignore[misc]  # no types there
    """DeepseekV2ForCausalLM with the switches above."""

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__(config)
        _make_dense(self, config, DeepseekV2MLP)
        if config.norm_topk_prob and config.num_experts_per_tok > 1:
            for router in _routers(self, DeepseekV2TopkRouter):
                router.__class__ = _NormalisingV2Router


class ReferenceV3(DeepseekV3ForCausalLM):  # type: ignore[misc]  # no types there
    """DeepseekV3ForCausalLM with the switches above."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        _make_dense(self, config, DeepseekV3MLP)
        if config.n_routed_experts == 1:
            for router in _routers(self, DeepseekV3TopkRouter):
                router.__class__ = _OneExpertV3Router


REFERENCES: dict[str, tuple[Any, type[ReferenceV2 | ReferenceV3]]] = {
    "deepseek_v2": (DeepseekV2Config, ReferenceV2),
    "deepseek_v3": (DeepseekV3Config, ReferenceV3),
}


def build_reference(model_type: str, fields: dict[str, Any]) -> ReferenceV2 | ReferenceV3:
    """A model with random weights."""
    make_config, make_model = REFERENCES[model_type]
    with warnings.catch_warnings():
        # No shared experts: transformers makes matrices of no rows and says so.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
        return make_model(make_config(**fields))


@lru_cache(maxsize=2)
def load_reference(model_dir: Path) -> ReferenceV2 | ReferenceV3:
    """The model of a folder in fp32."""
    model_type = AutoConfig.from_pretrained(model_dir).model_type
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
        model: ReferenceV2 | ReferenceV3
        model = REFERENCES[model_type][1].from_pretrained(model_dir, dtype=torch.float32)
    return model


def _make_dense(model: Any, config: Any, make_mlp: type[DeepseekV2MLP | DeepseekV3MLP]) -> None:
    every = getattr(config, "moe_layer_freq", 1)
    for index in range(config.first_k_dense_replace, config.num_hidden_layers):
        if index % every or not config.n_routed_experts:
            model.model.layers[index].mlp = make_mlp(config)


def _routers(model: Any, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]
