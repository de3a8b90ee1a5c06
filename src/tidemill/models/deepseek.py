"""The DeepSeek-V2/V3 family: latent attention, mixture of experts. A layer is four stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from tidemill.kernels.expert_mlp import (
    Expert,
    SortedRows,
    expert_mlp,
    gather_rows,
    scatter_rows,
)
from tidemill.kernels.linear import HeadLinear, Linear
from tidemill.kernels.mla_decode import mla_decode
from tidemill.kernels.mla_prefill import mla_prefill
from tidemill.kernels.moe_route import Rule, moe_route
from tidemill.kernels.rms_norm import rms_norm
from tidemill.kernels.rope_kv_write import rope_kv_write
from tidemill.models.config import ModelConfig
from tidemill.models.prompt_rows import PromptRows

# The norms inside attention keep this whatever the config says (DeepSeek's `RMSNorm` default).
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True)
class DecodeRows:
    """The first B rows of a batch: one new token for each of B sequences."""

    block_tables: Tensor  # [B, M] int32 or int64, padded with the sequence's own first block
    context_lens: Tensor  # [B] int64, the new token included


@dataclass(frozen=True)
class Batch:
    """One step's T rows: first `decodes`, then the chunks of prompts that `prompts` describes.

    All but attention runs over all rows at once. Attention is absorbed over the decode rows, and
    in multi-head form over the prompts' chunks.
    """

    positions: Tensor  # [T] int64, absolute
    slots: Tensor  # [W] int64, block * 64 + offset where each written row's latent goes
    decodes: DecodeRows | None = None
    prompts: Sequence[PromptRows] = ()
    written: Tensor | None = None  # [W] int64 rows whose latents are stored; None: all T


@dataclass(frozen=True)
class Norm:
    """RMSNorm before a stage: its weight [D], and what is added to the mean square."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True)
class Query:
    """A step's queries, rotated: the B decode rows' absorbed, those of prompts in their heads."""

    heads: Tensor  # [T, H, nope + rope]; of the first B rows nothing is read any more
    absorbed: Tensor | None  # [B, H, kv_lora + rope]


@dataclass(frozen=True)
class Attention:
    """Multi-head latent attention over the paged cache (DeepSeek-V2 report 2.1)."""

    norm: Norm
    qkv_a: Linear  # hidden -> (q_lora or heads * (nope + rope)) + kv_lora + rope
    q_a_norm: Tensor | None  # None, like q_b, where qkv_a gives the query itself
    q_b: Linear | None  # q_lora -> heads * (nope + rope)
    kv_a_norm: Tensor
    kv_b: Linear  # kv_lora -> heads * (nope + v)
    w_uk: HeadLinear  # nope -> kv_lora, absorbs the query
    w_uv: HeadLinear  # kv_lora -> v, applied to attended latents
    out: Linear
    config: ModelConfig
    scale: float

    def write(self, hidden: Tensor, rotation: Tensor, batch: Batch, latents: Tensor) -> Query:
        """As AttentionStage.write."""
        config = self.config
        query, kv_a = self.qkv_a.of_norm(hidden, self.norm.weight, self.norm.eps).tensor_split(
            [-config.latent_dim], dim=-1
        )
        if self.q_b is not None and self.q_a_norm is not None:
            query = self.q_b.of_norm(query, self.q_a_norm, LATENT_NORM_EPS)
        query = query.view(len(hidden), config.num_attention_heads, config.qk_head_dim)
        absorbed, q_rope = None, None
        if batch.decodes is not None:
            num_decoding = len(batch.decodes.context_lens)
            absorbed = query.new_empty(num_decoding, query.shape[1], config.latent_dim)
            q_latent, q_rope = absorbed.tensor_split([config.kv_lora_rank], dim=-1)
            self.w_uk.into(query[:num_decoding, :, : config.qk_nope_head_dim], q_latent)
        rope_kv_write(
            query,
            kv_a,
            self.kv_a_norm,
            LATENT_NORM_EPS,
            rotation,
            latents,
            batch.slots,
            batch.written,
            decoding=q_rope,
        )
        return Query(query, absorbed)

    def attend(self, query: Query, batch: Batch, latents: Tensor) -> Tensor:
        """As AttentionStage.attend."""
        parts = [self._attend_prompts(query.heads, rows, latents) for rows in batch.prompts]
        if batch.decodes is not None and query.absorbed is not None:
            parts.insert(0, self._attend_absorbed(query.absorbed, batch.decodes, latents))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def close(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """As AttentionStage.close."""
        return self.out.plus(attended, hidden)

    def _attend_prompts(self, query: Tensor, rows: PromptRows, latents: Tensor) -> Tensor:
        attended = mla_prefill(
            query[rows.first : rows.end],
            latents.flatten(0, 1).index_select(0, rows.context),
            self.kv_b,
            rows.query_starts,
            rows.context_starts,
            kv_lora_rank=self.config.kv_lora_rank,
            scale=self.scale,
        )
        return attended.flatten(1)

    def _attend_absorbed(self, query: Tensor, rows: DecodeRows, latents: Tensor) -> Tensor:
        attended = mla_decode(
            query,
            latents,
            rows.block_tables,
            rows.context_lens,
            kv_lora_rank=self.config.kv_lora_rank,
            scale=self.scale,
        )
        return self.w_uv(attended).flatten(1)


@dataclass(frozen=True)
class Dispatched:
    """Tokens on their way through the experts, and what leads their rows back."""

    tokens: Tensor  # [T, D] normalised, for the shared expert
    sorted: SortedRows
    weights: Tensor  # [T, K] fp32


@dataclass(frozen=True)
class DenseMlp:
    """The first layers' MLP in the experts' place: nothing to route."""

    norm: Norm
    mlp: Expert

    def __call__(self, hidden: Tensor) -> Tensor:
        """As MlpStage."""
        return self.combine(hidden, self.experts(self.dispatch(hidden)))

    def dispatch(self, hidden: Tensor) -> Tensor:
        """hidden [T, D] -> normalised tokens [T, D], unmoved."""
        return self.norm(hidden)

    def experts(self, tokens: Tensor) -> Tensor:
        """tokens [T, D] -> [T, D]."""
        return self.mlp(tokens)

    def combine(self, residual: Tensor, outputs: Tensor) -> Tensor:
        """residual + outputs, both [T, D]."""
        return residual + outputs


def routing_rule(config: ModelConfig) -> Rule:
    """How the config has experts chosen and weighed."""
    return Rule(
        scoring_func=config.scoring_func,
        n_group=config.n_group,
        topk_group=config.topk_group,
        top_k=config.num_experts_per_tok,
        normalize=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )


@dataclass(frozen=True)
class MoeMlp:
    """Routed experts and perhaps a shared one (DeepSeek-V3 report 2.1.2)."""

    norm: Norm
    gate: Tensor  # [E, D] fp32
    gate_bias: Tensor | None  # [E] fp32
    routed: Sequence[Expert]
    shared: Expert | None
    config: ModelConfig

    def __call__(self, hidden: Tensor) -> Tensor:
        """As MlpStage."""
        dispatched = self.dispatch(hidden)
        return self.combine(hidden, dispatched, self.experts(dispatched))

    def dispatch(self, hidden: Tensor) -> Dispatched:
        """hidden [T, D] -> one row per chosen expert, sorted by expert."""
        tokens = self.norm(hidden)
        logits = linear(tokens.float(), self.gate)
        weights, ids = moe_route(logits, self.gate_bias, **routing_rule(self.config))
        return Dispatched(tokens, gather_rows(tokens, ids, len(self.routed)), weights)

    def experts(self, dispatched: Dispatched) -> tuple[Tensor, Tensor | None]:
        """The routed experts' rows [T * K, D] and the shared expert's output [T, D]."""
        routed = expert_mlp(dispatched.sorted, self.routed)
        return routed, None if self.shared is None else self.shared(dispatched.tokens)

    def combine(
        self, residual: Tensor, dispatched: Dispatched, outputs: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        """residual [T, D] plus each token's weighted experts plus the shared expert."""
        routed, shared = outputs
        mixed = scatter_rows(routed, dispatched.sorted.order, dispatched.weights)
        return residual + (mixed if shared is None else mixed + shared)


class AttentionStage(Protocol):
    """A layer's first stage, its norm included."""

    def write(self, hidden: Tensor, rotation: Tensor, batch: Batch, latents: Tensor) -> Query:
        """hidden [T, D], rotation [T, rope / 2] complex64 -> queries, rotated.

        The batch's latents go to their slots in one layer's pool `latents` [blocks, 64, D].
        """

    def attend(self, query: Query, batch: Batch, latents: Tensor) -> Tensor:
        """What `write` gave, one layer's pool [blocks, 64, D] -> [T, H * v]."""

    def close(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """attended [T, H * v] through the output product, plus hidden [T, D]."""


class MlpStage(Protocol):
    """A layer's other stages one after the other: norm and dispatch, experts, combine."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [T, D] -> hidden plus what the experts make of it."""


@dataclass(frozen=True)
class Layer:
    """Pre-norm attention and MLP: attention, dispatch, experts, combine."""

    attention: AttentionStage
    mlp: MlpStage


class DeepseekModel:
    """All layers on one worker; weights come from `models.weights.load_model`."""

    def __init__(
        self,
        *,
        config: ModelConfig,
        embedding: Tensor,
        layers: Sequence[Layer],
        norm: Norm,
        head: Linear,
        rotations: Tensor,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head
        self.rotations = rotations

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and latents."""
        return self.embedding.dtype

    def forward(
        self,
        token_ids: Tensor,
        batch: Batch,
        latents: Tensor,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """token_ids [T] -> hidden [T, D]; writes latents [L, blocks, 64, latent_dim] in place.

        `on_layer(i)` is called as soon as layer i's latents of this batch are in the pool.
        """
        rotation = self.rotations[batch.positions]
        hidden = self.embedding[token_ids]
        for index, layer in enumerate(self.layers):
            pool = latents[index]
            query = layer.attention.write(hidden, rotation, batch, pool)
            if on_layer is not None:
                on_layer(index)
            hidden = layer.attention.close(layer.attention.attend(query, batch, pool), hidden)
            hidden = layer.mlp(hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Last layer's hidden [T, D] -> [T, vocab] in the model's dtype."""
        return self.head(self.norm(hidden))
