import math

import pytest
import torch
from torch import Tensor

from tidemill.kernels.cases import MLA_CASES, MlaCase
from tidemill.kernels.linear import make_linear
from tidemill.kernels.mla_decode import mla_decode
from tidemill.kernels.mla_prefill import mla_prefill


def attend_by_hand(query: Tensor, latents: Tensor, kv_b: Tensor, case: MlaCase) -> Tensor:
    """One position: query [H, nope + rope], latents [n, D], kv_b [H, nope + v, K] -> [H, v]."""
    latent, k_rope = latents[:, : case.kv_lora_rank], latents[:, case.kv_lora_rank :]
    out = []
    for head in range(case.num_heads):
        expanded = latent @ kv_b[head].T
        key = torch.cat((expanded[:, : case.nope_dim], k_rope), dim=1)
        scores = (key @ query[head]) * SCALE
        out.append(scores.softmax(0) @ expanded[:, case.nope_dim :])
    return torch.stack(out)


SCALE = 0.2


def random_inputs(case: MlaCase) -> tuple[Tensor, Tensor, list[Tensor]]:
    """kv_b [H, nope + v, kv_lora], queries [B, H, nope + rope], each sequence's latents."""
    generator = torch.manual_seed(sum(case.context_lens))
    kv_b = torch.randn(
        case.num_heads, case.nope_dim + case.v_head_dim, case.kv_lora_rank, generator=generator
    )
    kv_b *= case.kv_lora_rank**-0.5
    width = case.nope_dim + case.rope_dim
    query = torch.randn(len(case.context_lens), case.num_heads, width, generator=generator)
    latent_dim = case.kv_lora_rank + case.rope_dim
    latents = [torch.randn(n, latent_dim, generator=generator) for n in case.context_lens]
    return kv_b, query, latents


@pytest.mark.parametrize("case", MLA_CASES, ids=str)
@pytest.mark.parametrize("neighbours", [True, False])
def test_absorbed_decode_over_any_blocks_equals_plain_attention(
    case: MlaCase, neighbours: bool
) -> None:
    kv_b, query, contexts = random_inputs(case)
    counts = [-(-len(context) // 64) for context in contexts]
    # Block 0 belongs to nobody and is NaN: padding must not reach it.
    in_order = range(1, sum(counts) + 1)
    numbers = iter(in_order if neighbours else reversed(in_order))
    tables = [[next(numbers) for _ in range(count)] for count in counts]
    pool = torch.zeros(sum(counts) + 1, 64, contexts[0].shape[1])
    pool[0] = float("nan")
    for table, context in zip(tables, contexts, strict=True):
        for position, value in enumerate(context):
            pool[table[position // 64], position % 64] = value
    padded = torch.tensor([table + table[:1] * (max(counts) - len(table)) for table in tables])

    q_nope, q_rope = query.tensor_split([case.nope_dim], dim=-1)
    absorbed = torch.einsum("bhn,hnk->bhk", q_nope, kv_b[:, : case.nope_dim])
    attended = mla_decode(
        torch.cat((absorbed, q_rope), dim=-1),
        pool,
        padded,
        torch.tensor(case.context_lens),
        kv_lora_rank=case.kv_lora_rank,
        scale=SCALE,
    )
    out = torch.einsum("bhk,hvk->bhv", attended, kv_b[:, case.nope_dim :])

    for row, context in enumerate(contexts):
        expected = attend_by_hand(query[row], context, kv_b, case)
        torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", MLA_CASES, ids=str)
@pytest.mark.parametrize("share_cached", [0.0, 0.5, 1.0])
def test_prefill_attends_causally_to_prefix_and_chunk(case: MlaCase, share_cached: float) -> None:
    kv_b, _, contexts = random_inputs(case)
    context = contexts[0]
    start = min(int(len(context) * share_cached), len(context) - 1)
    generator = torch.manual_seed(1)
    query = torch.randn(
        len(context) - start, case.num_heads, case.nope_dim + case.rope_dim, generator=generator
    )
    out = mla_prefill(
        query,
        context,
        make_linear(kv_b.flatten(0, 1)),
        torch.tensor([0, len(query)]),
        torch.tensor([0, len(context)]),
        kv_lora_rank=case.kv_lora_rank,
        scale=SCALE,
    )
    assert out.shape == (len(query), case.num_heads, case.v_head_dim)
    for row in {0, len(query) // 2, len(query) - 1}:
        expected = attend_by_hand(query[row], context[: start + row + 1], kv_b, case)
        torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=1e-4)


# Two keys whose scores, 128.25 and 128, would be one number in bf16.
NEAR_QUERY = [16.0, 1.0, 0.0]
NEAR_LATENTS = [[8.0, 0.25, 0.0], [8.0, 0.0, 0.0]]
NEAR_WEIGHT = 1 / (1 + math.exp(-0.25))


def test_decode_tells_near_scores_apart_in_bf16() -> None:
    pool = torch.zeros(1, 64, 3, dtype=torch.bfloat16)
    pool[0, :2] = torch.tensor(NEAR_LATENTS)
    attended = mla_decode(
        torch.tensor([[NEAR_QUERY]], dtype=torch.bfloat16),
        pool,
        torch.tensor([[0]]),
        torch.tensor([2]),
        kv_lora_rank=2,
        scale=1.0,
    )
    assert attended[0, 0, 1].item() == pytest.approx(0.25 * NEAR_WEIGHT, rel=2**-7)


def test_prefill_tells_near_scores_apart_in_bf16() -> None:
    keys_then_values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.bfloat16)
    attended = mla_prefill(
        torch.tensor([[NEAR_QUERY]], dtype=torch.bfloat16),
        torch.tensor(NEAR_LATENTS[::-1], dtype=torch.bfloat16),
        make_linear(keys_then_values),
        torch.tensor([0, 1]),
        torch.tensor([0, 2]),
        kv_lora_rank=2,
        scale=1.0,
    )
    assert attended.item() == pytest.approx(0.25 * NEAR_WEIGHT, rel=2**-7)
