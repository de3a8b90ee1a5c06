"""A small random model of the served architecture, for a stack that has no trained one.

    python -m services.stack.random_checkpoint DIRECTORY

Its answers are noise: it shows how the services work together, and what they count and bill.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from services.stack.prompt import documentation_prompt

SEED = 20250226
VOCABULARY = 1024
BOS, EOS = "<|begin|>", "<|end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "float32",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def write_random_checkpoint(directory: Path) -> None:
    """Write weights, tokeniser and configuration under Hugging Face's names; always the same."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for name, shape in _shapes():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape)
        else:
            tensors[name] = torch.randn(shape, generator=generator) * 0.05
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _tokenizer().save(str(directory / "tokenizer.json"))
    for name, content in (
        ("tokenizer_config.json", _tokenizer_config()),
        ("generation_config.json", {"temperature": 0.8, "top_p": 0.95, "eos_token_id": 1}),
        ("config.json", CONFIG),  # last: a folder with this file is complete
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = CONFIG["hidden_size"]
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    yield "lm_head.weight", (VOCABULARY, hidden)
    yield "model.norm.weight", (hidden,)
    for index in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield from _attention_shapes(f"{prefix}.self_attn")
        if index < CONFIG["first_k_dense_replace"]:
            yield from _mlp_shapes(f"{prefix}.mlp", CONFIG["intermediate_size"])
            continue
        width, num_experts = CONFIG["moe_intermediate_size"], CONFIG["n_routed_experts"]
        yield f"{prefix}.mlp.gate.weight", (num_experts, hidden)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", (num_experts,)
        yield from _mlp_shapes(f"{prefix}.mlp.shared_experts", width)
        for expert in range(num_experts):
            yield from _mlp_shapes(f"{prefix}.mlp.experts.{expert}", width)


def _attention_shapes(prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads = CONFIG["hidden_size"], CONFIG["num_attention_heads"]
    q_rank, kv_rank = CONFIG["q_lora_rank"], CONFIG["kv_lora_rank"]
    nope, rope, value = (
        CONFIG[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    yield f"{prefix}.q_a_proj.weight", (q_rank, hidden)
    yield f"{prefix}.q_a_layernorm.weight", (q_rank,)
    yield f"{prefix}.q_b_proj.weight", (heads * (nope + rope), q_rank)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (kv_rank,)
    yield f"{prefix}.kv_b_proj.weight", (heads * (nope + value), kv_rank)
    yield f"{prefix}.o_proj.weight", (hidden, heads * value)


def _mlp_shapes(prefix: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = CONFIG["hidden_size"]
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([documentation_prompt()], trainer)
    return tokenizer


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": CONFIG["max_position_embeddings"],
    }


if __name__ == "__main__":
    write_random_checkpoint(Path(sys.argv[1]))
