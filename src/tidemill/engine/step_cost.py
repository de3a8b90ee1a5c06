"""What each sequence's part of a step costs, by a model of the work in it.

A step's time is split in proportion (docs/adr/0017). Costs are in FLOPs; bytes that must be read
count as the FLOPs that the device computes meanwhile. Each phase is weighed as if it had the step
to itself: one pass over the weights for the sequences that decode, another for the prompts'
chunks, so that both share what a joint step saves.
"""

from dataclasses import dataclass

from tidemill.engine.scheduler import PrefillChunk, Step
from tidemill.models.config import ModelConfig
from tidemill.models.parameters import num_active_parameters

# FLOPs in the time of reading one byte, as fits the CPU worker's steps best (docs/adr/0017).
CPU_FLOPS_PER_BYTE = 16
# A GPU's are the datasheet's for bf16, 989 TFLOPS over 3.35 TB/s: no step has been measured there.
H100_FLOPS_PER_BYTE = 295


@dataclass(frozen=True)
class BusyTime:
    """Nanoseconds of steps that computed something, by what they computed; they only grow."""

    prefill_ns: int = 0
    decode_ns: int = 0

    @property
    def total_ns(self) -> int:
        """Of both phases."""
        return self.prefill_ns + self.decode_ns


class StepCost:
    """The cost of each part of a step, of one model with `value_bytes` a weight and a latent."""

    def __init__(
        self, config: ModelConfig, *, value_bytes: int, flops_per_byte: int = CPU_FLOPS_PER_BYTE
    ) -> None:
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        width = config.qk_nope_head_dim + config.v_head_dim
        with_experts = sum(config.has_experts(layer) for layer in range(layers))
        head = config.hidden_size * config.vocab_size
        kv_b = layers * config.kv_lora_rank * heads * width
        active = num_active_parameters(config)
        self._head = 2 * head
        self._expand = 2 * kv_b  # a latent to keys and values; absorbed, to and from a query
        self._token = 2 * (active - head - kv_b)
        self._pair_expanded = 2 * layers * heads * (config.qk_head_dim + config.v_head_dim)
        self._pair_absorbed = 2 * layers * heads * (config.latent_dim + config.kv_lora_rank)
        self._latent = layers * config.latent_dim * value_bytes * flops_per_byte
        self._num_experts = config.n_routed_experts
        self._expert = with_experts * 3 * config.hidden_size * config.moe_intermediate_size
        self._expert *= value_bytes * flops_per_byte
        self._chosen = config.num_experts_per_tok
        self._dense = active * value_bytes * flops_per_byte - self._chosen * self._expert

    def __call__(self, step: Step) -> list[int]:
        """Cost of each decoding sequence, then of each chunk."""
        num_decodes = len(step.decodes)
        num_chunked = step.num_tokens - num_decodes
        each_decode = self._weights(num_decodes) // num_decodes if num_decodes else 0
        each_chunked = self._weights(num_chunked) // num_chunked if num_chunked else 0
        fixed = self._token + self._expand + self._head + each_decode
        per_position = self._pair_absorbed + self._latent
        return [
            *(fixed + per_position * len(seq.token_ids) for seq in step.decodes),
            *(self._chunk(chunk) + each_chunked * chunk.num_tokens for chunk in step.chunks),
        ]

    def _chunk(self, chunk: PrefillChunk) -> int:
        pairs = (chunk.start + 1 + chunk.end) * chunk.num_tokens // 2
        if chunk.seq.sampling.prompt_logprobs is not None:
            num_scored = chunk.num_tokens
        else:
            num_scored = int(chunk.completes_prompt)
        return (
            self._token * chunk.num_tokens
            + self._pair_expanded * pairs
            + (self._expand + self._latent) * chunk.end
            + self._head * num_scored
        )

    def _weights(self, num_tokens: int) -> int:
        """Reading all weights that so many tokens are multiplied with, each of them once.

        Of the routed experts as many as different ones are chosen if all are equally likely.
        """
        if not self._num_experts:
            return self._dense
        chosen = 1 - (1 - self._chosen / self._num_experts) ** num_tokens
        return self._dense + int(chosen * self._num_experts * self._expert)
