"""The switches of the DeepSeek-V2/V3 family: named variants, and every pair of switches at once."""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fp8_checkpoint import make_fp8_checkpoint
from tests.tiny_model import YARN, make_tiny_checkpoint, make_tiny_v2_checkpoint

TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
# YaRN's form in V2 files: mscale and mscale_all_dim alike, and neither is 1.
YARN_V2 = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
YARN_BARE = {key: value for key, value in YARN.items() if not key.startswith("mscale")}

# Sizes that 128x128 blocks do not divide, larger than one block.
RAGGED = {
    "hidden_size": 192,
    "initializer_range": 0.06,
    "intermediate_size": 260,
    "moe_intermediate_size": 136,
    "kv_lora_rank": 144,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}


@dataclass(frozen=True)
class Variant:
    """One checkpoint: its architecture, its config's fields, and what its weights are stored as."""

    model_type: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    weights: str = "float32"

    def make(self, path: Path, twin: Path, seed: int = 0) -> Path:
        """Write it to `path`; returns the folder for transformers: `path`, or `twin` for FP8."""
        make_plain = make_tiny_checkpoint if self.model_type == "v3" else make_tiny_v2_checkpoint
        if not self.weights.startswith("fp8"):
            return make_plain(path, seed=seed, dtype=self.weights, **self.fields)
        plain = make_plain(twin / "plain", seed=seed, **self.fields)
        power_of_two = self.weights != "fp8"
        make_fp8_checkpoint(
            plain,
            path,
            twin / "exact",
            power_of_two=power_of_two,
            e8m0=self.weights == "fp8_e8m0",
        )
        return twin / "exact"


VARIANTS: dict[str, Variant] = {
    "v3": Variant("v3"),
    "v3_yarn": Variant("v3", {"rope_parameters": YARN}),
    "v3_yarn_with_amplitude": Variant("v3", {"rope_parameters": {**YARN, "mscale": 0.7}}),
    "v3_yarn_without_mscales": Variant("v3", {"rope_parameters": YARN_BARE}),
    "v3_rope_in_halves_biased": Variant("v3", {"rope_interleave": False, "attention_bias": True}),
    "v3_direct_query_biased": Variant("v3", {"q_lora_rank": None, "attention_bias": True}),
    "v3_direct_query_in_halves": Variant("v3", {"q_lora_rank": None, "rope_interleave": False}),
    "v3_tied_embeddings_fp16": Variant("v3", {"tie_word_embeddings": True}, "float16"),
    "v3_one_group_unnormalised": Variant(
        "v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rms_norm_eps": 1e-3}
    ),
    "v3_384_experts_two_shared": Variant(
        "v3",
        {
            "n_routed_experts": 384,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 8,
            "n_shared_experts": 2,
            "num_hidden_layers": 2,
        },
        "bfloat16",
    ),
    "v3_one_expert": Variant(
        "v3", {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    ),
    "v3_all_experts_none_shared": Variant(
        "v3", {"num_experts_per_tok": 16, "topk_group": 4, "n_shared_experts": 0}
    ),
    "v3_every_second_layer_routed": Variant(
        "v3", {"moe_layer_freq": 2, "first_k_dense_replace": 0, "rope_parameters": YARN}
    ),
    "v3_all_layers_dense": Variant("v3", {"first_k_dense_replace": 3}),
    "v3_fp8": Variant("v3", {**RAGGED, "rope_parameters": YARN}, "fp8"),
    "v3_fp8_powers_of_two": Variant("v3", RAGGED, "fp8_ue8m0"),
    "v2_greedy": Variant("v2", {"rope_parameters": YARN_V2}),
    "v2_group_limited": Variant(
        "v2",
        {
            "topk_method": "group_limited_greedy",
            "q_lora_rank": 24,
            "routed_scaling_factor": 16.0,
            "rope_parameters": YARN_V2,
        },
        "bfloat16",
    ),
    "v2_normalised": Variant("v2", {"norm_topk_prob": True, "routed_scaling_factor": 3.0}),
    "v2_one_expert_none_shared": Variant(
        "v2", {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_shared_experts": 0}
    ),
    "v2_biased_tied_from_the_first_layer": Variant(
        "v2", {"attention_bias": True, "tie_word_embeddings": True, "first_k_dense_replace": 0}
    ),
    "v2_fp8_e8m0_scales": Variant("v2", RAGGED, "fp8_e8m0"),
}


def _experts(routed: int, chosen: int, groups: int, kept: int) -> dict[str, int]:
    return {
        "n_routed_experts": routed,
        "num_experts_per_tok": chosen,
        "n_group": groups,
        "topk_group": kept,
    }


SWITCHES: dict[str, list[dict[str, Any]]] = {
    "form": [
        {"model_type": "v2", "topk_method": "greedy"},
        {"model_type": "v2", "topk_method": "group_limited_greedy"},
        {"model_type": "v3", "rope_interleave": True},
        {"model_type": "v3", "rope_interleave": False},
    ],
    "query": [{"q_lora_rank": rank} for rank in (None, 24)],
    "experts": [
        _experts(16, 4, 4, 2),
        _experts(24, 5, 8, 3),
        _experts(8, 8, 1, 1),
        _experts(1, 1, 1, 1),
        _experts(384, 8, 1, 1),
    ],
    "normalised": [{"norm_topk_prob": value} for value in (False, True)],
    "scale": [{"routed_scaling_factor": value} for value in (1.0, 2.5)],
    "shared": [{"n_shared_experts": count} for count in (0, 1, 2)],
    "dense": [{"first_k_dense_replace": count} for count in (0, 1, 3)],
    "frequency": [{"moe_layer_freq": every} for every in (1, 2)],
    "rope": [
        {"rope_parameters": rope}
        for rope in (PLAIN, YARN, YARN_V2, {**YARN, "mscale": 0.7}, YARN_BARE)
    ],
    "bias": [{"attention_bias": value} for value in (False, True)],
    "tied": [{"tie_word_embeddings": value} for value in (False, True)],
    "heads": [{}, {"qk_nope_head_dim": 24, "v_head_dim": 8, **TWO_HEADS}],
    "eps": [{"rms_norm_eps": eps} for eps in (1e-6, 1e-3)],
    "weights": [
        {"weights": kind}
        for kind in ("float32", "bfloat16", "float16", "fp8", "fp8_ue8m0", "fp8_e8m0")
    ],
}
Row = tuple[int, ...]
Pair = tuple[tuple[int, int], tuple[int, int]]


def pairwise_variants(count: int, seed: int) -> list[Variant]:
    """`count` variants in which every pair of settings of two switches occurs; ValueError if not.

    Greedy: each row is the best of random candidates that start from a pair not seen yet.
    """
    sizes = [len(settings) for settings in SWITCHES.values()]
    rng = random.Random(seed)
    left = _all_pairs(sizes)
    rows: list[Row] = []
    while len(rows) < count:
        candidates = [_candidate(sizes, left, rng) for _ in range(40)]
        best = max(candidates, key=lambda row: len(left & _pairs(row)))
        left -= _pairs(best)
        rows.append(best)
    if left:
        raise ValueError(f"{len(left)} pairs of settings do not fit {count} variants")
    return [_variant(row) for row in rows]


def _candidate(sizes: Sequence[int], left: set[Pair], rng: random.Random) -> Row:
    row = [rng.randrange(size) for size in sizes]
    if left:
        for switch, setting in rng.choice(sorted(left)):
            row[switch] = setting
    return tuple(row)


def _all_pairs(sizes: Sequence[int]) -> set[Pair]:
    return {
        ((first, a), (second, b))
        for first, second in itertools.combinations(range(len(sizes)), 2)
        for a in range(sizes[first])
        for b in range(sizes[second])
    }


def _pairs(row: Row) -> set[Pair]:
    return set(itertools.combinations(enumerate(row), 2))


def _variant(row: Row) -> Variant:
    chosen: dict[str, Any] = {"moe_intermediate_size": 16}
    for settings, index in zip(SWITCHES.values(), row, strict=True):
        chosen |= settings[index]
    return Variant(chosen.pop("model_type"), chosen, chosen.pop("weights"))
