"""X1(b): how close two fp32 paths may come before their greedy tokens are allowed to differ.

| constant | value | largest difference measured between two paths, tiny models |
|---|---|---|
| E_LOGIT | 1e-4 | 1.9e-6, of any logit |
| E_ROUTE | 1e-5 | 3.0e-7, of any biased expert score |

Measured by `test_paths_differ_by_far_less_than_the_gaps_we_excuse`, which fails when a path's
difference exceeds a tenth of its constant.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

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
    model = DeepseekV3ForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.inference_mode():
        out = model(torch.tensor([token_ids]), output_router_logits=True)
        biases = [
            layer.mlp.gate.e_score_correction_bias
            for layer in model.model.layers[model.config.first_k_dense_replace :]
        ]
        choices = [
            logits.sigmoid() + bias for logits, bias in zip(out.router_logits, biases, strict=True)
        ]
        gaps = [_selection_gap(choice, ModelConfig.load(model_dir)) for choice in choices]
    logits = out.logits[0]
    top2 = logits.topk(2, dim=-1).values
    return Gaps(logits, top2[:, 0] - top2[:, 1], torch.stack(gaps).min(0).values)


def _selection_gap(choice: Tensor, config: ModelConfig) -> Tensor:
    """choice [T, E], biased scores -> [T], how far the nearest loser was from being chosen."""
    grouped = choice.view(len(choice), config.n_group, -1)
    group_scores = grouped.topk(2, dim=-1).values.sum(-1)
    gap = torch.full((len(choice),), float("inf"))
    if config.topk_group < config.n_group:
        ranked, kept = group_scores.topk(config.topk_group + 1, dim=-1)
        gap = ranked[:, -2] - ranked[:, -1]
        mask = torch.zeros_like(group_scores).scatter_(-1, kept[:, : config.topk_group], 1.0).bool()
        choice = grouped.masked_fill(~mask.unsqueeze(-1), float("-inf")).flatten(1)
    best = choice.topk(config.num_experts_per_tok + 1, dim=-1).values
    return torch.minimum(gap, best[:, -2] - best[:, -1])
