"""The shape of a model, read from a checkpoint's `config.json` under Hugging Face's names."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from tidemill.errors import CheckpointError

# What each architecture computes: the values a key may have, the first of which an absent key
# stands for. (The published modelling code of each and transformers' classes of the same names.)
_FAMILIES: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "DeepseekV2ForCausalLM": {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False, True),
        "rope_interleave": (True,),
    },
    "DeepseekV3ForCausalLM": {
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "norm_topk_prob": (True, False),
        "rope_interleave": (True, False),
    },
}
_ALL_FAMILIES: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "mlp_bias": (False,)}

# The one form of quantised weights that is read: e4m3 in blocks, activations scaled on the fly.
_FP8: Mapping[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": (None, "e4m3"),
    "activation_scheme": (None, "dynamic"),
    "scale_fmt": (None, "ue8m0"),
}

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
    "moe_layer_freq",
    "rms_norm_eps",
)


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
    """One model of the DeepSeek-V2/V3 family; every field is named as in Hugging Face's config.

    Absent or null expert counts are 0: `n_routed_experts` 0 makes every layer dense. `n_group` and
    `topk_group` are 1 where experts are not grouped. `q_lora_rank` None projects queries directly.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    first_k_dense_replace: int
    max_position_embeddings: int
    scoring_func: str
    topk_method: str
    norm_topk_prob: bool
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    moe_layer_freq: int = 1
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    rope_scaling: YarnScaling | None = None
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0  # multi-token-prediction layers after the last
    weight_block_size: tuple[int, int] | None = None  # of FP8 weights; None: none are quantised
    dtype: str = "bfloat16"

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head and of an expanded key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer: the normalised latent, then the rotated shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def has_experts(self, layer: int) -> bool:
        """Whether layer number `layer` routes to experts; else its MLP is dense.

        transformers' classes leave `moe_layer_freq` out; this is the rule of the published code.
        """
        sparse = layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0
        return self.n_routed_experts > 0 and sparse

    @classmethod
    def load(cls, model_dir: Path) -> "ModelConfig":
        """Read `model_dir/config.json`; CheckpointError names the file, key and value at fault."""
        path = model_dir / "config.json"
        return cls.from_hf(read_json(path), str(path))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], source: str = "config.json") -> "ModelConfig":
        """Build from the parsed `config.json`; `source` is what errors call it."""
        values: dict[str, Any] = {
            "dtype": _dtype(raw, source),
            "weight_block_size": _weight_block_size(raw, source),
            "q_lora_rank": _q_lora_rank(raw, source),
            **_family_fields(raw, source),
            **_rope_fields(raw, source),
        }
        if values["topk_method"] == "greedy":
            values |= {"n_group": 1, "topk_group": 1}
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


def _family_fields(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields whose values the architecture limits, absent ones with its own default."""
    architectures = raw.get("architectures")
    if not isinstance(architectures, list):
        architectures = []
    known = [family for name, family in _FAMILIES.items() if name in architectures]
    if not known:
        raise CheckpointError(
            f"{source}: architectures is {raw.get('architectures')!r}, "
            f"expected one of {list(_FAMILIES)}"
        )
    heads, kv_heads = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        raise CheckpointError(
            f"{source}: num_key_value_heads is {kv_heads!r}, expected {heads!r} as of the queries"
        )
    _limited(raw, _ALL_FAMILIES, source)
    return _limited(raw, known[0], source)


def _limited(
    raw: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], source: str
) -> dict[str, Any]:
    """The values of `allowed`'s keys, the first allowed one for a key absent or null."""
    values = {}
    for key, choices in allowed.items():
        value = raw.get(key)
        if value is None:
            value = choices[0]
        if not any(value is choice or value == choice for choice in choices):
            raise CheckpointError(
                f"{source}: {key} is {value!r}, only "
                f"{' and '.join(repr(choice) for choice in choices if choice is not None)} "
                "is supported"
            )
        values[key] = value
    return values


def _weight_block_size(raw: Mapping[str, Any], source: str) -> tuple[int, int] | None:
    quantization = _object(raw, "quantization_config", source)
    if quantization is None:
        return None
    inside = f"{source}: quantization_config"
    if quantization.get("quant_method") is None:
        raise CheckpointError(f"{inside}: key 'quant_method' is missing")
    _limited(quantization, _FP8, inside)
    if quantization.get("weight_block_size") != [128, 128]:
        raise CheckpointError(
            f"{inside}: weight_block_size is {quantization.get('weight_block_size')!r}, "
            "only [128, 128] is supported"
        )
    return 128, 128


def _dtype(raw: Mapping[str, Any], source: str) -> str:
    value = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    return str(_typed(value, "dtype", str, source))


def _q_lora_rank(raw: Mapping[str, Any], source: str) -> int | None:
    if "q_lora_rank" not in raw:
        raise CheckpointError(f"{source}: key 'q_lora_rank' is missing")
    value = raw["q_lora_rank"]
    return None if value is None else int(_typed(value, "q_lora_rank", int, source))


def _rope_fields(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`; older ones `rope_theta` and `rope_scaling`."""
    rope = _object(raw, "rope_parameters", source) or _object(raw, "rope_scaling", source) or {}
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
    values = {"rope_theta": _positive(theta, "rope_theta", source), "rope_scaling": None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return values
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
            if scaling[field.name] or not field.name.startswith("mscale"):  # an mscale 0 is none
                _positive(scaling[field.name], field.name, source)
    for key in ("factor", "original_max_position_embeddings"):
        if key not in scaling:
            raise CheckpointError(
                f"{source}: rope_parameters.{key} is missing for rope_type 'yarn'"
            )
    return values | {"rope_scaling": YarnScaling(**scaling)}


def _object(raw: Mapping[str, Any], key: str, source: str) -> dict[str, Any] | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{source}: {key} is {value!r}, expected an object")
    return value


def _positive(value: Any, name: str, source: str) -> float:
    number: float = _typed(value, name, float, source)
    if not 0 < number < float("inf"):
        raise CheckpointError(f"{source}: {name} is {value!r}, expected a positive number")
    return number


def _typed(value: Any, name: str, expected: Any, source: str) -> Any:
    if expected is float and type(value) in (int, float):
        return float(value)
    if type(value) is not expected or (expected is int and value < 0):
        raise CheckpointError(f"{source}: {name} is {value!r}, expected {expected.__name__}")
    return value


def _check_shape(config: ModelConfig, source: str) -> None:
    """Relations that the layers assume, each named by the key at fault."""
    must = {key: getattr(config, key) > 0 for key in _POSITIVE}
    must |= {
        "qk_rope_head_dim": config.qk_rope_head_dim > 0 and config.qk_rope_head_dim % 2 == 0,
        "q_lora_rank": config.q_lora_rank is None or config.q_lora_rank > 0,
        "rope_theta": config.rope_theta > 1,
    }
    if config.n_routed_experts:
        must |= _expert_relations(config)
    for key, holds in must.items():
        if not holds:
            raise CheckpointError(
                f"{source}: {key} is {getattr(config, key)!r}, which fits no model"
            )


def _expert_relations(config: ModelConfig) -> dict[str, bool]:
    even = config.n_group > 0 and config.n_routed_experts % config.n_group == 0
    per_group = config.n_routed_experts // config.n_group if even else 0
    must = {
        "n_group": even,
        "topk_group": 0 < config.topk_group <= config.n_group,
        "moe_intermediate_size": config.moe_intermediate_size > 0,
        "num_experts_per_tok": 0 < config.num_experts_per_tok <= per_group * config.topk_group,
    }
    if even and config.topk_method == "noaux_tc" and config.topk_group < config.n_group:
        must["n_routed_experts"] = per_group >= 2  # a group is ranked by its two best
    return must
