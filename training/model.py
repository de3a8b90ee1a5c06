"""The demo model: its configuration, its construction, its files, the balance of its experts."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from training.tokenizer import MAX_POSITIONS, VOCAB_SIZE

# config.json in the form of the published DeepSeek-V3 checkpoints.
CONFIG: dict[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 640,
    "kv_lora_rank": 128,
    "max_position_embeddings": MAX_POSITIONS,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 2,
    "q_lora_rank": 192,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 4,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 1024,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.0,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": VOCAB_SIZE,
}
GENERATION_CONFIG: dict[str, object] = {
    "bos_token_id": 0,
    "do_sample": True,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "temperature": 0.6,
    "top_p": 0.95,
}
ROUTER_BIAS = "e_score_correction_bias"


def new_model(seed: int) -> DeepseekV3ForCausalLM:
    """Random weights in fp32."""
    torch.manual_seed(seed)
    # transformers rewrites the dictionaries that it is given.
    config = DeepseekV3Config.from_dict(json.loads(json.dumps(CONFIG)))
    return DeepseekV3ForCausalLM(config)


def published_tensors(model: DeepseekV3ForCausalLM) -> dict[str, torch.Tensor]:
    """The tensors under DeepSeek-V3's names, bf16 but for the router bias; one pair per expert."""
    tensors: dict[str, torch.Tensor] = {}
    for name, trained in model.state_dict().items():
        value = trained.to(torch.float32 if name.endswith(ROUTER_BIAS) else torch.bfloat16)
        if name.endswith("experts.gate_up_proj"):  # [experts, 2 x moe_intermediate, hidden]
            stem = name.removesuffix("gate_up_proj")
            for expert, (gate, up) in enumerate(pair.chunk(2) for pair in value):
                tensors[f"{stem}{expert}.gate_proj.weight"] = gate.clone()
                tensors[f"{stem}{expert}.up_proj.weight"] = up.clone()
        elif name.endswith("experts.down_proj"):  # [experts, hidden, moe_intermediate]
            stem = name.removesuffix("down_proj")
            for expert, down in enumerate(value):
                tensors[f"{stem}{expert}.down_proj.weight"] = down.clone()
        else:
            tensors[name] = value.clone()
    return tensors


def write_model(model: DeepseekV3ForCausalLM, folder: Path) -> None:
    """Everything but the tokeniser."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(published_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config", CONFIG), ("generation_config", GENERATION_CONFIG)):
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


class ExpertBalancer:
    """Auxiliary-loss-free balancing (DeepSeek-V3 report, section 2.1.2).

    Counts, between two updates, how many tokens each expert was chosen for; an update raises the
    bias of every underloaded expert by `speed` and lowers that of every overloaded one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = [m for m in model.modules() if isinstance(m, DeepseekV3TopkRouter)]
        self.loads = [torch.zeros(router.num_experts) for router in self._routers]
        for router, load in zip(self._routers, self.loads, strict=True):
            router.register_forward_hook(_counting_hook(load))

    def update(self, speed: float) -> float:
        """Returns the worst layer's busiest expert's load over the mean load, and starts anew."""
        worst = 0.0
        for router, load in zip(self._routers, self.loads, strict=True):
            mean = load.mean()
            router.e_score_correction_bias.add_(torch.sign(mean - load), alpha=speed)
            worst = max(worst, float(load.max() / mean))
        self.forget()
        return worst

    def forget(self) -> None:
        for load in self.loads:
            load.zero_()


def _counting_hook(load: torch.Tensor):  # type: ignore[no-untyped-def]  # torch's hook signature
    def count(_module: nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        load.add_(torch.bincount(output[2].reshape(-1), minlength=load.numel()))

    return count
