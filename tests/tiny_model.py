"""A tiny random checkpoint of the served architecture, tokenizer and chat template included."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.reference_model import build_reference

# Small products: threads would only fight with the other processes of a test run.
torch.set_num_threads(1)

BOS, EOS, USER, ASSISTANT, THINK, END_THINK = (
    "<bos>",
    "<eos>",
    "<user>",
    "<assistant>",
    "<think>",
    "</think>",
)
SPECIAL_TOKENS = [BOS, EOS, USER, ASSISTANT, THINK, END_THINK]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)

YARN = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

_SENTENCES = [
    "The mill grinds by the tide: the pools swell by day and shrink by night.",
    "A context cache keeps what was computed, and every token is billed once.",
    "Prefill computes the prompt, decode generates the answer, the router relays it.",
    "def release(self, block_ids): return [block for block in block_ids if block >= 0]",
    "Sixty-four tokens make one block; blocks form chains, and chains are named by their hashes.",
    "Workers lease memory, heartbeat every second, and vanish without saying goodbye.",
    "Question: how many experts answer? Choose eight among two hundred and fifty-six candidates.",
    "0123456789 times out of 10, a naïve café owner counts — then counts again.",
]


def make_tiny_checkpoint(
    path: Path, *, seed: int = 0, dtype: str = "float32", **overrides: Any
) -> Path:
    """Save a 3-layer DeepSeek-V3 model into `path` and return it; under 3 s, the same every time.

    `overrides` are DeepseekV3Config fields, e.g. `rope_parameters=YARN`. Gate biases are random,
    so that they matter to the choice of experts; weights are wide enough for clear logits.
    """
    return _save(path, "deepseek_v3", seed, dtype, overrides)


def make_tiny_v2_checkpoint(
    path: Path, *, seed: int = 0, dtype: str = "float32", **overrides: Any
) -> Path:
    """As `make_tiny_checkpoint` of the older form: softmax routing, queries in one product."""
    older = {"q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 2}
    return _save(path, "deepseek_v2", seed, dtype, older | overrides)


def _save(path: Path, model_type: str, seed: int, dtype: str, overrides: dict[str, Any]) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Copied: transformers writes into the rope dictionary that it is given.
        model = build_reference(model_type, {**_tiny_config(), **copy.deepcopy(overrides)})
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.05)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    _name_architecture(path, type(model).__bases__[0].__name__)
    _save_tokenizer(path)
    return path


def _name_architecture(path: Path, name: str) -> None:
    """The class that users know in the place of the tests' own."""
    config = json.loads((path / "config.json").read_text())
    config["architectures"] = [name]
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _tiny_config() -> dict[str, Any]:
    return {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "num_nextn_predict_layers": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def _save_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 1024,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
