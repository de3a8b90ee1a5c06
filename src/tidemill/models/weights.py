"""Turns a checkpoint's tensors into a `DeepseekModel`: fused, permuted, packed, one at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from tidemill.kernels.expert_mlp import Expert
from tidemill.kernels.linear import make_linear
from tidemill.models.checkpoint import Checkpoint
from tidemill.models.config import ModelConfig
from tidemill.models.deepseek import Attention, DeepseekModel, DenseMlp, Layer, MoeMlp
from tidemill.models.rope import rope_table, softmax_scale

Take = Callable[..., Tensor]


def load_model(
    checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, max_context: int
) -> DeepseekModel:
    """Build the model in `dtype`; CheckpointError names the tensor at fault and both shapes.

    Tensors beyond the architecture (multi-token-prediction layers) are left on disk.
    """

    def take(name: str, *shape: int) -> Tensor:
        return checkpoint.tensor(name, shape).to(dtype)

    embedding = take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    head = embedding
    if not config.tie_word_embeddings:
        head = take("lm_head.weight", config.vocab_size, config.hidden_size)
    return DeepseekModel(
        config=config,
        embedding=embedding,
        layers=[_layer(take, checkpoint, config, i) for i in range(config.num_hidden_layers)],
        norm=take("model.norm.weight", config.hidden_size),
        head=make_linear(head),
        rotations=rope_table(config, max_context),
    )


def _layer(take: Take, checkpoint: Checkpoint, config: ModelConfig, index: int) -> Layer:
    prefix = f"model.layers.{index}"
    mlp: DenseMlp | MoeMlp
    if index < config.first_k_dense_replace:
        mlp = DenseMlp(_expert(take, f"{prefix}.mlp", config, config.intermediate_size))
    else:
        mlp = _moe(take, checkpoint, f"{prefix}.mlp", config)
    return Layer(
        input_norm=take(f"{prefix}.input_layernorm.weight", config.hidden_size),
        attention=_attention(take, f"{prefix}.self_attn", config),
        post_norm=take(f"{prefix}.post_attention_layernorm.weight", config.hidden_size),
        mlp=mlp,
    )


def _attention(take: Take, prefix: str, config: ModelConfig) -> Attention:
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    q_a = take(f"{prefix}.q_a_proj.weight", config.q_lora_rank, config.hidden_size)
    q_b = take(f"{prefix}.q_b_proj.weight", heads * config.qk_head_dim, config.q_lora_rank)
    kv_a = take(f"{prefix}.kv_a_proj_with_mqa.weight", config.latent_dim, config.hidden_size)
    kv_b = take(
        f"{prefix}.kv_b_proj.weight", heads * (nope + config.v_head_dim), config.kv_lora_rank
    )
    if not config.rope_interleave:
        kv_a = _interleave(kv_a.unsqueeze(0), rope).squeeze(0)
        q_b = _interleave(q_b.view(heads, -1, config.q_lora_rank), rope).flatten(0, 1)
    w_uk, w_uv = kv_b.view(heads, -1, config.kv_lora_rank).tensor_split([nope], dim=1)
    return Attention(
        qkv_a=make_linear(torch.cat((q_a, kv_a))),
        q_a_norm=take(f"{prefix}.q_a_layernorm.weight", config.q_lora_rank),
        q_b=make_linear(q_b),
        kv_a_norm=take(f"{prefix}.kv_a_layernorm.weight", config.kv_lora_rank),
        kv_b=make_linear(kv_b),
        w_uk=w_uk.contiguous(),
        w_uv=w_uv.transpose(1, 2).contiguous(),
        out=make_linear(
            take(f"{prefix}.o_proj.weight", config.hidden_size, heads * config.v_head_dim)
        ),
        config=config,
        scale=softmax_scale(config),
    )


def _interleave(weight: Tensor, rope: int) -> Tensor:
    """[H, N, K] whose last `rope` rows pair as halves, (i, i + rope / 2) -> as neighbours."""
    plain, first, second = weight.tensor_split([-rope, -rope // 2], dim=1)
    pairs = torch.stack((first, second), dim=2).flatten(1, 2)
    return torch.cat((plain, pairs), dim=1)


def _expert(take: Take, prefix: str, config: ModelConfig, width: int) -> Expert:
    gate = take(f"{prefix}.gate_proj.weight", width, config.hidden_size)
    up = take(f"{prefix}.up_proj.weight", width, config.hidden_size)
    return Expert(
        gate_up=make_linear(torch.cat((gate, up))),
        down=make_linear(take(f"{prefix}.down_proj.weight", config.hidden_size, width)),
    )


def _moe(take: Take, checkpoint: Checkpoint, prefix: str, config: ModelConfig) -> MoeMlp:
    width = config.moe_intermediate_size
    num_experts = config.n_routed_experts
    gate = checkpoint.tensor(f"{prefix}.gate.weight", (num_experts, config.hidden_size))
    bias = checkpoint.tensor(f"{prefix}.gate.e_score_correction_bias", (num_experts,))
    shared_width = width * config.n_shared_experts
    return MoeMlp(
        gate=gate.float(),
        gate_bias=bias.float(),
        routed=[_expert(take, f"{prefix}.experts.{i}", config, width) for i in range(num_experts)],
        shared=_expert(take, f"{prefix}.shared_experts", config, shared_width),
        config=config,
    )
