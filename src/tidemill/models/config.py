"""The shape of a model, read from a checkpoint's `config.json` under Hugging Face's names."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from tidemill.errors import CheckpointError

ARCHITECTURES = ("DeepseekV3ForCausalLM",)

# Keys of which this engine computes one value, which is also what an absent key stands for.
_ONLY_SUPPORTED: Mapping[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (arXiv 2309.00071), as transformers' `_compute_yarn_parameters`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """One DeepSeek-V3-architecture model; every field is named as in Hugging Face's config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    max_position_embeddings: int
    routed_scaling_factor: float
    norm_topk_prob: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    rope_scaling: YarnScaling | None = None
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head and of an expanded key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer: the normalised latent, then the rotated shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @classmethod
    def load(cls, model_dir: Path) -> "ModelConfig":
        """Read `model_dir/config.json`; CheckpointError names the file, key and value at fault."""
        path = model_dir / "config.json"
        return cls.from_hf(read_json(path), str(path))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], source: str = "config.json") -> "ModelConfig":
        """Build from the parsed `config.json`; `source` is what errors call it."""
        _check_variant(raw, source)
        values: dict[str, Any] = {
            "dtype": raw.get("dtype") or raw.get("torch_dtype") or "bfloat16",
            **_rope_fields(raw, source),
        }
        for field in fields(cls):
            if field.name in values:
                continue
            if raw.get(field.name) is not None:
                values[field.name] = _typed(raw[field.name], field.name, field.type, source)
            elif field.default is MISSING:
                raise CheckpointError(f"{source}: key {field.name!r} is missing")
        config = cls(**values)
        _check_shape(config, source)
        return config


def read_json(path: Path) -> dict[str, Any]:
    """Parse one JSON object of a checkpoint folder; CheckpointError if absent or malformed."""
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: unreadable: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def load_eos_token_ids(model_dir: Path) -> frozenset[int]:
    """End-of-sequence ids from `generation_config.json`, or from `config.json` without one."""
    path = model_dir / "generation_config.json"
    raw = read_json(path) if path.exists() else {}
    if raw.get("eos_token_id") is None:
        path = model_dir / "config.json"
        raw = read_json(path)
    value = raw.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(f"{path}: eos_token_id is {value!r}, expected ids")
    return frozenset(ids)


def _check_variant(raw: Mapping[str, Any], source: str) -> None:
    architectures = raw.get("architectures") or []
    if not any(name in ARCHITECTURES for name in architectures):
        raise CheckpointError(
            f"{source}: architectures is {architectures!r}, expected one of {list(ARCHITECTURES)}"
        )
    for key, expected in _ONLY_SUPPORTED.items():
        value = raw.get(key)
        if value is not None and value != expected:
            raise CheckpointError(f"{source}: {key} is {value!r}, only {expected!r} is supported")
    if raw.get("quantization_config") is not None:
        raise CheckpointError(
            f"{source}: quantization_config is {raw['quantization_config']!r}, "
            "only unquantised weights are supported"
        )
    heads, kv_heads = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        raise CheckpointError(
            f"{source}: num_key_value_heads is {kv_heads!r}, expected {heads!r} as of the queries"
        )


def _rope_fields(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`; older ones `rope_theta` and `rope_scaling`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}
    if kind != "yarn":
        raise CheckpointError(
            f"{source}: rope_type is {kind!r}, only 'default' and 'yarn' are supported"
        )
    for key in ("attention_factor", "truncate"):
        if rope.get(key) is not None:
            raise CheckpointError(f"{source}: rope_parameters.{key} is {rope[key]!r}, unsupported")
    scaling: dict[str, Any] = {}
    for field in fields(YarnScaling):
        if rope.get(field.name) is not None:
            scaling[field.name] = _typed(rope[field.name], field.name, field.type, source)
    for key in ("factor", "original_max_position_embeddings"):
        if key not in scaling:
            raise CheckpointError(
                f"{source}: rope_parameters.{key} is missing for rope_type 'yarn'"
            )
    return {"rope_theta": float(theta), "rope_scaling": YarnScaling(**scaling)}


def _typed(value: Any, name: str, expected: Any, source: str) -> Any:
    if expected is float and type(value) in (int, float):
        return float(value)
    if type(value) is not expected or (expected is int and value < 0):
        raise CheckpointError(f"{source}: {name} is {value!r}, expected {expected.__name__}")
    return value


def _check_shape(config: ModelConfig, source: str) -> None:
    """Relations that the layers assume, each named by the key at fault."""
    must = {
        "qk_rope_head_dim": config.qk_rope_head_dim % 2 == 0,
        "n_group": config.n_group > 0 and config.n_routed_experts % config.n_group == 0,
        "topk_group": 0 < config.topk_group <= config.n_group,
        "num_hidden_layers": config.num_hidden_layers > 0,
        "vocab_size": config.vocab_size > 0,
    }
    if config.n_group > 0 and config.n_routed_experts % config.n_group == 0:
        per_group = config.n_routed_experts // config.n_group
        must["n_routed_experts"] = per_group >= 2
        reachable = per_group * config.topk_group
        must["num_experts_per_tok"] = 0 < config.num_experts_per_tok <= reachable
    for key, holds in must.items():
        if not holds:
            raise CheckpointError(
                f"{source}: {key} is {getattr(config, key)!r}, which fits no model"
            )
