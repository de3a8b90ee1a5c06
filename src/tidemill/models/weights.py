"""Turns a checkpoint's tensors into a `DeepseekModel`: fused, permuted, packed, one at a time."""

import torch
from torch import Tensor

from tidemill.kernels.expert_mlp import Expert
from tidemill.kernels.linear import Linear, make_head_linear, make_linear
from tidemill.models.checkpoint import Checkpoint
from tidemill.models.config import ModelConfig
from tidemill.models.deepseek import (
    Attention,
    DeepseekModel,
    DenseMlp,
    Layer,
    MlpStage,
    MoeMlp,
    Norm,
)
from tidemill.models.rope import rope_table, softmax_scale
from tidemill.models.source import Progress, WeightSource


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    max_context: int,
    on_progress: Progress | None = None,
) -> DeepseekModel:
    """Build the model in `dtype`; CheckpointError names the tensor at fault and both shapes.

    Beside what is kept, memory holds a few tensors at a time. Multi-token-prediction layers are
    left on disk. `on_progress` gets bytes read and bytes to read, after each tensor.
    """
    source = WeightSource(checkpoint, config, dtype, on_progress)
    embedding = source.table("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    model = DeepseekModel(
        config=config,
        embedding=embedding,
        layers=[_layer(source, config, index) for index in range(config.num_hidden_layers)],
        norm=_norm(source, "model.norm", config),
        head=_head(source, config, embedding),
        rotations=rope_table(config, max_context),
    )
    source.finish()
    return model


def _head(source: WeightSource, config: ModelConfig, embedding: Tensor) -> Linear:
    if config.tie_word_embeddings:
        return make_linear(embedding)
    return make_linear(source.table("lm_head.weight", config.vocab_size, config.hidden_size))


def _layer(source: WeightSource, config: ModelConfig, index: int) -> Layer:
    prefix = f"model.layers.{index}"
    norm = _norm(source, f"{prefix}.post_attention_layernorm", config)
    mlp: MlpStage
    if config.has_experts(index):
        mlp = _moe(source, f"{prefix}.mlp", config, norm)
    else:
        mlp = DenseMlp(norm, _expert(source, f"{prefix}.mlp", config, config.intermediate_size))
    return Layer(attention=_attention(source, prefix, config), mlp=mlp)


def _norm(source: WeightSource, name: str, config: ModelConfig) -> Norm:
    return Norm(source.vector(f"{name}.weight", config.hidden_size), config.rms_norm_eps)


def _attention(source: WeightSource, layer: str, config: ModelConfig) -> Attention:
    prefix = f"{layer}.self_attn"
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    kv_b = source.matrix(
        f"{prefix}.kv_b_proj.weight", heads * (nope + config.v_head_dim), config.kv_lora_rank
    )
    w_uk, w_uv = kv_b.view(heads, -1, config.kv_lora_rank).tensor_split([nope], dim=1)
    qkv_a, q_a_norm, q_b = _query(source, prefix, config)
    out = source.matrix(f"{prefix}.o_proj.weight", config.hidden_size, heads * config.v_head_dim)
    out_bias = None
    if config.attention_bias:
        out_bias = source.vector(f"{prefix}.o_proj.bias", config.hidden_size)
    return Attention(
        norm=_norm(source, f"{layer}.input_layernorm", config),
        qkv_a=qkv_a,
        q_a_norm=q_a_norm,
        q_b=q_b,
        kv_a_norm=source.vector(f"{prefix}.kv_a_layernorm.weight", config.kv_lora_rank),
        kv_b=make_linear(kv_b),
        w_uk=make_head_linear(w_uk.transpose(1, 2)),
        w_uv=make_head_linear(w_uv),
        out=make_linear(out, out_bias),
        config=config,
        scale=softmax_scale(config),
    )


def _query(
    source: WeightSource, prefix: str, config: ModelConfig
) -> tuple[Linear, Tensor | None, Linear | None]:
    """`Attention.qkv_a`, `q_a_norm` and `q_b`: the last two None where queries take one product."""
    heads, rank = config.num_attention_heads, config.q_lora_rank
    kv_a, kv_bias = _shared_key(source, f"{prefix}.kv_a_proj_with_mqa", config)
    if rank is None:
        q = source.matrix(f"{prefix}.q_proj.weight", heads * config.qk_head_dim, config.hidden_size)
        q_bias = q.new_zeros(len(q))  # the published code and transformers give q_proj none
        return _fused(_by_pairs(q, heads, config), q_bias, kv_a, kv_bias), None, None
    q_a = source.matrix(f"{prefix}.q_a_proj.weight", rank, config.hidden_size)
    q_b = source.matrix(f"{prefix}.q_b_proj.weight", heads * config.qk_head_dim, rank)
    norm = source.vector(f"{prefix}.q_a_layernorm.weight", rank)
    a_bias = None
    if config.attention_bias:
        a_bias = source.vector(f"{prefix}.q_a_proj.bias", rank)
    return _fused(q_a, a_bias, kv_a, kv_bias), norm, make_linear(_by_pairs(q_b, heads, config))


def _shared_key(
    source: WeightSource, name: str, config: ModelConfig
) -> tuple[Tensor, Tensor | None]:
    weight = source.matrix(f"{name}.weight", config.latent_dim, config.hidden_size)
    bias = None
    if config.attention_bias:
        bias = source.vector(f"{name}.bias", config.latent_dim)
        bias = _by_pairs(bias.unsqueeze(1), 1, config).squeeze(1)
    return _by_pairs(weight, 1, config), bias


def _fused(first: Tensor, bias: Tensor | None, second: Tensor, other: Tensor | None) -> Linear:
    if bias is None or other is None:
        return make_linear(torch.cat((first, second)))
    return make_linear(torch.cat((first, second)), torch.cat((bias, other)))


def _by_pairs(weight: Tensor, heads: int, config: ModelConfig) -> Tensor:
    """Rows [heads * N, K], each head's last `rope` ones rotating as neighbours (2i, 2i + 1).

    Checkpoints without `rope_interleave` pair halves, (i, i + rope / 2).
    """
    if config.rope_interleave:
        return weight
    rope = config.qk_rope_head_dim
    rows = weight.view(heads, -1, weight.shape[-1])
    plain, first, second = rows.tensor_split([-rope, -rope // 2], dim=1)
    pairs = torch.stack((first, second), dim=2).flatten(1, 2)
    return torch.cat((plain, pairs), dim=1).flatten(0, 1)


def _expert(source: WeightSource, prefix: str, config: ModelConfig, width: int) -> Expert:
    gate = source.matrix(f"{prefix}.gate_proj.weight", width, config.hidden_size)
    up = source.matrix(f"{prefix}.up_proj.weight", width, config.hidden_size)
    return Expert(
        gate_up=make_linear(torch.cat((gate, up))),
        down=make_linear(source.matrix(f"{prefix}.down_proj.weight", config.hidden_size, width)),
    )


def _moe(source: WeightSource, prefix: str, config: ModelConfig, norm: Norm) -> MoeMlp:
    width, num_experts = config.moe_intermediate_size, config.n_routed_experts
    bias = shared = None
    if config.topk_method == "noaux_tc":
        bias = source.exact(f"{prefix}.gate.e_score_correction_bias", num_experts)
    if config.n_shared_experts:
        # One product for all of them: their sum is one wide expert.
        shared = _expert(
            source, f"{prefix}.shared_experts", config, width * config.n_shared_experts
        )
    return MoeMlp(
        norm=norm,
        gate=source.exact(f"{prefix}.gate.weight", num_experts, config.hidden_size),
        gate_bias=bias,
        routed=[
            _expert(source, f"{prefix}.experts.{index}", config, width)
            for index in range(num_experts)
        ],
        shared=shared,
        config=config,
    )
