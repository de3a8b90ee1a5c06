"""How many parameters a config stands for, by the shapes of its tensors."""

from tidemill.models.config import ModelConfig


def num_parameters(config: ModelConfig) -> int:
    """All of them but the multi-token-prediction layers' (as models are named by their size)."""
    embeddings = config.vocab_size * config.hidden_size
    total = embeddings if config.tie_word_embeddings else 2 * embeddings
    total += config.hidden_size  # the last norm
    for layer in range(config.num_hidden_layers):
        total += _attention(config) + 2 * config.hidden_size + _mlp(config, layer)
    return total


def num_active_parameters(config: ModelConfig) -> int:
    """Those that one token is multiplied with: the chosen experts', and no embedding table."""
    embeddings = config.vocab_size * config.hidden_size
    total = num_parameters(config) - (0 if config.tie_word_embeddings else embeddings)
    idle = config.n_routed_experts - config.num_experts_per_tok
    routed = sum(config.has_experts(layer) for layer in range(config.num_hidden_layers))
    return total - routed * idle * _swiglu(config, config.moe_intermediate_size)


def _attention(config: ModelConfig) -> int:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    query, rank = heads * config.qk_head_dim, config.q_lora_rank
    total = hidden * query if rank is None else hidden * rank + rank + rank * query
    total += hidden * config.latent_dim + latent
    total += latent * heads * (config.qk_nope_head_dim + config.v_head_dim)
    total += heads * config.v_head_dim * hidden
    if config.attention_bias:
        total += (rank or 0) + config.latent_dim + hidden
    return total


def _mlp(config: ModelConfig, layer: int) -> int:
    if not config.has_experts(layer):
        return _swiglu(config, config.intermediate_size)
    experts = config.n_routed_experts + config.n_shared_experts
    router = config.n_routed_experts * config.hidden_size
    if config.topk_method == "noaux_tc":
        router += config.n_routed_experts
    return experts * _swiglu(config, config.moe_intermediate_size) + router


def _swiglu(config: ModelConfig, width: int) -> int:
    return 3 * config.hidden_size * width
