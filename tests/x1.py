"""X1(b): how close two fp32 paths may come before their greedy tokens are allowed to differ.

| constant | value | largest difference measured between two paths, tiny models |
|---|---|---|
| E_LOGIT | 1e-4 | 5.6e-6, of any logit |
| E_ROUTE | 1e-5 | 7.8e-7, of any biased expert score or probability |

Measured by `test_paths_differ_by_far_less_than_the_gaps_we_excuse` and
`test_variants_differ_by_far_less_than_the_gaps_we_excuse`, which fail when a path's
difference exceeds a tenth of its constant.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.reference_model import load_reference
from tidemill.models.config import ModelConfig

E_LOGIT = 1e-4
E_ROUTE = 1e-5


@dataclass(frozen=True)
class Gaps:
    """What transformers says about a sequence, per position, in fp32."""

    logits: Tensor  # [T, V]
    top2: Tensor  # [T] highest logit minus the second
    route: Tensor  # [T] least gap at any layer's choice of groups and experts

    def excuses(self, position: int) -> bool:
        """Whether the token drawn after `position` may differ between two paths.

        A route chosen otherwise at an earlier position has left another latent behind, so earlier
        positions count too.
        """
        near_tie = self.top2[position].item() <= E_LOGIT
        return near_tie or self.route[: position + 1].min().item() <= E_ROUTE


def reference_gaps(model_dir: Path, token_ids: list[int]) -> Gaps:
    """Run transformers on the whole sequence at once."""
    logits, choices = _run(model_dir, token_ids)
    config = ModelConfig.load(model_dir)
    top2 = logits.topk(2, dim=-1).values
    route = torch.full((len(token_ids),), float("inf"))
    for choice in choices:
        route = torch.minimum(route, _selection_gap(choice, config))
    return Gaps(logits, top2[:, 0] - top2[:, 1], route)


def expert_choices(model_dir: Path, token_ids: list[int]) -> list[Tensor]:
    """What transformers ranks experts by at each layer that routes, [T, E]."""
    return _run(model_dir, token_ids)[1]


def _run(model_dir: Path, token_ids: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits [T, V] and `expert_choices`."""
    model, config = load_reference(model_dir), ModelConfig.load(model_dir)
    with torch.inference_mode():
        out = model(torch.tensor([token_ids]), output_router_logits=True)
    layers = [layer for layer in range(config.num_hidden_layers) if config.has_experts(layer)]
    choices = []
    for layer, logits in zip(layers, out.router_logits or (), strict=True):
        gate = model.model.layers[layer].mlp.gate
        if config.scoring_func == "sigmoid":
            choices.append((logits.sigmoid() + gate.e_score_correction_bias).detach())
        else:
            choices.append(logits.softmax(-1))
    return out.logits[0], choices


def _selection_gap(choice: Tensor, config: ModelConfig) -> Tensor:
    """choice [T, E] -> [T], how far the nearest loser was from being chosen."""
    gap = torch.full((len(choice),), float("inf"))
    if config.topk_group < config.n_group:
        grouped = choice.view(len(choice), config.n_group, -1)
        best = 2 if config.topk_method == "noaux_tc" else 1
        group_scores = grouped.topk(best, dim=-1).values.sum(-1)
        ranked, kept = group_scores.topk(config.topk_group + 1, dim=-1)
        gap = ranked[:, -2] - ranked[:, -1]
        mask = torch.zeros_like(group_scores).scatter_(-1, kept[:, : config.topk_group], 1.0).bool()
        choice = grouped.masked_fill(~mask.unsqueeze(-1), float("-inf")).flatten(1)
    if config.num_experts_per_tok == config.n_routed_experts:
        return gap
    ranked = choice.topk(config.num_experts_per_tok + 1, dim=-1).values
    return torch.minimum(gap, ranked[:, -2] - ranked[:, -1])
