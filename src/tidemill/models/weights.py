"""Turns a checkpoint's tensors into a `DeepseekModel`: fused, permuted, packed, one at a time."""

import torch
from torch import Tensor

from tidemill.kernels.expert_mlp import Expert
from tidemill.kernels.linear import BlockScaledLinear, Linear, make_head_linear, make_linear
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
from tidemill.models.fp8 import BLOCK, Fp8Matrix
from tidemill.models.rope import rope_table, softmax_scale
from tidemill.models.source import Progress, WeightSource
from tidemill.models.stacked import StackedDense, StackedExperts, StackedMoe

Matrix = Tensor | Fp8Matrix
CPU = torch.device("cpu")


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    max_context: int,
    on_progress: Progress | None = None,
    *,
    device: torch.device = CPU,
    stacked: bool = False,
) -> DeepseekModel:
    """Build the model in `dtype`; CheckpointError names the tensor at fault and both shapes.

    `stacked` is the form for kernels that take all of a layer's experts at once: FP8 weights in
    blocks of 128 by 128 stay as they are stored. Otherwise each expert is a product of its own.
    Beside what is kept, memory holds a few tensors at a time. Multi-token-prediction layers are
    left on disk. `on_progress` gets bytes read and bytes to read, after each tensor.
    """
    source = WeightSource(checkpoint, config, dtype, on_progress, device=device, keep_fp8=stacked)
    embedding = source.table("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    model = DeepseekModel(
        config=config,
        embedding=embedding,
        layers=[
            _layer(source, config, index, stacked=stacked)
            for index in range(config.num_hidden_layers)
        ],
        norm=_norm(source, "model.norm", config),
        head=_head(source, config, embedding),
        rotations=rope_table(config, max_context).to(device),
    )
    source.finish()
    return model


def _head(source: WeightSource, config: ModelConfig, embedding: Tensor) -> Linear:
    if config.tie_word_embeddings:
        return make_linear(embedding)
    return make_linear(source.table("lm_head.weight", config.vocab_size, config.hidden_size))


def _layer(source: WeightSource, config: ModelConfig, index: int, *, stacked: bool) -> Layer:
    prefix = f"model.layers.{index}"
    norm = _norm(source, f"{prefix}.post_attention_layernorm", config)
    name, width = f"{prefix}.mlp", config.intermediate_size
    mlp: MlpStage
    if config.has_experts(index):
        mlp = (_stacked_moe if stacked else _moe)(source, name, config, norm)
    elif stacked:
        mlp = StackedDense(norm, _stack(source, [name], config, width))
    else:
        mlp = DenseMlp(norm, _expert(source, name, config, width))
    return Layer(attention=_attention(source, prefix, config), mlp=mlp)


def _norm(source: WeightSource, name: str, config: ModelConfig) -> Norm:
    return Norm(source.vector(f"{name}.weight", config.hidden_size), config.rms_norm_eps)


def _attention(source: WeightSource, layer: str, config: ModelConfig) -> Attention:
    prefix = f"{layer}.self_attn"
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    kv_b = source.stored(
        f"{prefix}.kv_b_proj.weight", heads * (nope + config.v_head_dim), config.kv_lora_rank
    )
    w_uk, w_uv = (
        _plain(kv_b, source.dtype).view(heads, -1, config.kv_lora_rank).tensor_split([nope], dim=1)
    )
    qkv_a, q_a_norm, q_b = _query(source, prefix, config)
    out = source.stored(f"{prefix}.o_proj.weight", config.hidden_size, heads * config.v_head_dim)
    out_bias = None
    if config.attention_bias:
        out_bias = source.vector(f"{prefix}.o_proj.bias", config.hidden_size)
    return Attention(
        norm=_norm(source, f"{layer}.input_layernorm", config),
        qkv_a=qkv_a,
        q_a_norm=q_a_norm,
        q_b=q_b,
        kv_a_norm=source.vector(f"{prefix}.kv_a_layernorm.weight", config.kv_lora_rank),
        kv_b=_product(kv_b),
        w_uk=make_head_linear(w_uk.transpose(1, 2)),
        w_uv=make_head_linear(w_uv),
        out=_product(out, out_bias),
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
        rows = heads * config.qk_head_dim
        q = source.stored(f"{prefix}.q_proj.weight", rows, config.hidden_size)
        q_bias = None
        if kv_bias is not None:  # the published code and transformers give q_proj none
            q_bias = kv_bias.new_zeros(rows)
        q = _by_pairs(q, heads, config, source.dtype)
        return _fused(q, q_bias, kv_a, kv_bias, source.dtype), None, None
    q_a = source.stored(f"{prefix}.q_a_proj.weight", rank, config.hidden_size)
    q_b = source.stored(f"{prefix}.q_b_proj.weight", heads * config.qk_head_dim, rank)
    norm = source.vector(f"{prefix}.q_a_layernorm.weight", rank)
    a_bias = None
    if config.attention_bias:
        a_bias = source.vector(f"{prefix}.q_a_proj.bias", rank)
    q_b = _by_pairs(q_b, heads, config, source.dtype)
    return _fused(q_a, a_bias, kv_a, kv_bias, source.dtype), norm, _product(q_b)


def _shared_key(
    source: WeightSource, name: str, config: ModelConfig
) -> tuple[Matrix, Tensor | None]:
    weight = source.stored(f"{name}.weight", config.latent_dim, config.hidden_size)
    bias = None
    if config.attention_bias:
        bias = source.vector(f"{name}.bias", config.latent_dim)
        bias = bias[_pair_order(len(bias), 1, config).to(bias.device)]
    return _by_pairs(weight, 1, config, source.dtype), bias


def _fused(
    first: Matrix, bias: Tensor | None, second: Matrix, other: Tensor | None, dtype: torch.dtype
) -> Linear:
    both = None
    if isinstance(first, Fp8Matrix) and isinstance(second, Fp8Matrix):
        both = first.above(second)
    weight = both or torch.cat((_plain(first, dtype), _plain(second, dtype)))
    if bias is None or other is None:
        return _product(weight)
    return _product(weight, torch.cat((bias, other)))


def _product(weight: Matrix, bias: Tensor | None = None) -> Linear:
    if isinstance(weight, Fp8Matrix):
        return BlockScaledLinear(weight.values, weight.scales, bias)
    return make_linear(weight, bias)


def _plain(weight: Matrix, dtype: torch.dtype) -> Tensor:
    return weight.dequantized(dtype) if isinstance(weight, Fp8Matrix) else weight


def _by_pairs(weight: Matrix, heads: int, config: ModelConfig, dtype: torch.dtype) -> Matrix:
    """Rows [heads * N, K], each head's last `rope` ones rotating as neighbours (2i, 2i + 1).

    Checkpoints without `rope_interleave` pair halves, (i, i + rope / 2).
    """
    if config.rope_interleave:
        return weight
    if isinstance(weight, Fp8Matrix):
        order = _pair_order(len(weight.values), heads, config)
        return weight.reordered(order) or weight.dequantized(dtype)[order.to(weight.values.device)]
    return weight[_pair_order(len(weight), heads, config).to(weight.device)]


def _pair_order(num_rows: int, heads: int, config: ModelConfig) -> Tensor:
    """[num_rows] int64: which row of the file each row is."""
    if config.rope_interleave:
        return torch.arange(num_rows)
    rope = config.qk_rope_head_dim
    rows = torch.arange(num_rows).view(heads, -1)
    plain, first, second = rows.tensor_split([-rope, -rope // 2], dim=1)
    return torch.cat((plain, torch.stack((first, second), dim=2).flatten(1)), dim=1).flatten()


def _expert(source: WeightSource, prefix: str, config: ModelConfig, width: int) -> Expert:
    gate = source.matrix(f"{prefix}.gate_proj.weight", width, config.hidden_size)
    up = source.matrix(f"{prefix}.up_proj.weight", width, config.hidden_size)
    return Expert(
        gate_up=make_linear(torch.cat((gate, up))),
        down=make_linear(source.matrix(f"{prefix}.down_proj.weight", config.hidden_size, width)),
    )


def _moe(source: WeightSource, prefix: str, config: ModelConfig, norm: Norm) -> MoeMlp:
    width, num_experts = config.moe_intermediate_size, config.n_routed_experts
    gate, bias = _gate(source, prefix, config)
    shared = None
    if config.n_shared_experts:
        # One product for all of them: their sum is one wide expert.
        shared = _expert(
            source, f"{prefix}.shared_experts", config, width * config.n_shared_experts
        )
    return MoeMlp(
        norm=norm,
        gate=gate,
        gate_bias=bias,
        routed=[
            _expert(source, f"{prefix}.experts.{index}", config, width)
            for index in range(num_experts)
        ],
        shared=shared,
        config=config,
    )


def _gate(source: WeightSource, prefix: str, config: ModelConfig) -> tuple[Tensor, Tensor | None]:
    num_experts, bias = config.n_routed_experts, None
    if config.topk_method == "noaux_tc":
        bias = source.exact(f"{prefix}.gate.e_score_correction_bias", num_experts)
    return source.exact(f"{prefix}.gate.weight", num_experts, config.hidden_size), bias


def _stacked_moe(source: WeightSource, prefix: str, config: ModelConfig, norm: Norm) -> StackedMoe:
    width, num_experts = config.moe_intermediate_size, config.n_routed_experts
    gate, bias = _gate(source, prefix, config)
    narrow = gate.to(source.dtype)
    if torch.equal(narrow.float(), gate):
        gate = narrow
    shared = None
    if config.n_shared_experts:
        shared = _stack(
            source, [f"{prefix}.shared_experts"], config, width * config.n_shared_experts
        )
    names = [f"{prefix}.experts.{index}" for index in range(num_experts)]
    return StackedMoe(
        norm=norm,
        gate=gate,
        gate_bias=bias,
        routed=_stack(source, names, config, width),
        shared=shared,
        config=config,
    )


def _stack(
    source: WeightSource, names: list[str], config: ModelConfig, width: int
) -> StackedExperts:
    """The experts of these names; in FP8 if all of them are and a block is not cut in two."""
    hidden = config.hidden_size
    shapes = {
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }
    in_fp8 = width % BLOCK == 0 and all(
        source.keeps_fp8(f"{name}.{part}.weight", columns)
        for name in names
        for part, (_, columns) in shapes.items()
    )
    dtype = torch.float8_e4m3fn if in_fp8 else source.dtype

    def empty(rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        weights = torch.empty(len(names), rows, columns, dtype=dtype, device=source.device)
        if not in_fp8:
            return weights, None
        return weights, weights.new_empty(
            len(names), rows // BLOCK, columns // BLOCK, dtype=torch.float32
        )

    gate_up, gate_up_scale = empty(2 * width, hidden)
    down, down_scale = empty(hidden, width)
    places = {
        "gate_proj": (gate_up[:, :width], gate_up_scale, 0),
        "up_proj": (gate_up[:, width:], gate_up_scale, width // BLOCK),
        "down_proj": (down, down_scale, 0),
    }
    for index, name in enumerate(names):
        for part, (weights, scales, first) in places.items():
            full_name, shape = f"{name}.{part}.weight", shapes[part]
            if scales is None:
                weights[index] = source.matrix(full_name, *shape)
                continue
            matrix = source.stored(full_name, *shape)
            assert isinstance(matrix, Fp8Matrix)  # `in_fp8` asked for all of them
            weights[index] = matrix.values
            scales[index, first : first + len(matrix.scales)] = matrix.scales
    return StackedExperts(gate_up, down, gate_up_scale, down_scale)
