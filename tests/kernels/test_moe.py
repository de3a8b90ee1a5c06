import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from tidemill.kernels.cases import EXPERT_CASES, ROUTE_CASES, ExpertCase, RouteCase
from tidemill.kernels.expert_mlp import Expert, expert_mlp, gather_rows, scatter_rows
from tidemill.kernels.linear import make_linear
from tidemill.kernels.linear.onednn import can_pack
from tidemill.kernels.moe_route import moe_route


def choose_by_hand(scores: list[float], case: RouteCase) -> set[int]:
    """The rules of the DeepSeek-V2 and V3 reports, one token, in Python."""
    size = case.num_experts // case.n_group
    best = 2 if case.scoring_func == "sigmoid" else 1
    groups = [range(start, start + size) for start in range(0, case.num_experts, size)]
    ranked = sorted(groups, key=lambda g: -sum(sorted((scores[e] for e in g), reverse=True)[:best]))
    allowed = [expert for group in ranked[: case.topk_group] for expert in group]
    return set(sorted(allowed, key=lambda e: -scores[e])[: case.top_k])


@pytest.mark.parametrize("case", ROUTE_CASES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_routes_as_the_reports_say(case: RouteCase, normalize: bool) -> None:
    generator = torch.manual_seed(case.num_tokens)
    logits = torch.randn(case.num_tokens, case.num_experts, generator=generator)
    bias = torch.randn(case.num_experts, generator=generator) * 0.3
    softmax = case.scoring_func == "softmax"
    weights, ids = moe_route(
        logits,
        None if softmax else bias,
        scoring_func=case.scoring_func,
        n_group=case.n_group,
        topk_group=case.topk_group,
        top_k=case.top_k,
        normalize=normalize,
        scale=2.5,
    )
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    choice = scores if softmax else scores + bias
    for token in range(case.num_tokens):
        chosen = ids[token].tolist()
        assert set(chosen) == choose_by_hand(choice[token].tolist(), case)
        unbiased = scores[token, ids[token]]
        if not normalize:
            expected = unbiased * 2.5
        elif softmax:  # the published code scales or normalises, and leaves one expert as it is
            expected = unbiased / unbiased.sum() if case.top_k > 1 else unbiased * 2.5
        else:
            expected = unbiased / unbiased.sum() * 2.5
        torch.testing.assert_close(weights[token], expected)


def test_bias_steers_the_choice_and_never_the_weights() -> None:
    logits = torch.zeros(1, 4)
    bias = torch.tensor([0.0, 9.0, 0.0, 9.0])
    weights, ids = moe_route(
        logits,
        bias,
        scoring_func="sigmoid",
        n_group=1,
        topk_group=1,
        top_k=2,
        normalize=True,
        scale=1.0,
    )
    assert set(ids[0].tolist()) == {1, 3}
    assert weights[0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("case", EXPERT_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sorted_experts_equal_the_sum_over_choices(case: ExpertCase, dtype: torch.dtype) -> None:
    generator = torch.manual_seed(case.num_tokens)

    def weight(rows: int, columns: int) -> Tensor:
        matrix = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        return matrix.to(dtype)

    shapes = [(case.width, case.hidden), (case.width, case.hidden), (case.hidden, case.width)]
    matrices = [[weight(*shape) for shape in shapes] for _ in range(case.num_experts)]
    experts = [
        Expert(make_linear(torch.cat((gate, up))), make_linear(down)) for gate, up, down in matrices
    ]
    x = torch.randn(case.num_tokens, case.hidden, generator=generator).to(dtype)
    ids = (
        torch.rand(case.num_tokens, case.num_experts, generator=generator).topk(case.top_k).indices
    )
    weights = torch.rand(ids.shape, generator=generator)

    tokens = gather_rows(x, ids, case.num_experts)
    assert sum(count for _, count in tokens.runs) == ids.numel()
    out = scatter_rows(expert_mlp(tokens, experts), tokens.order, weights)

    expected = torch.zeros(x.shape)
    for token in range(case.num_tokens):
        for choice, expert in enumerate(ids[token].tolist()):
            gate, up, down = (matrix.float() for matrix in matrices[expert])
            row = x[token].float()
            expected[token] += weights[token, choice] * (down @ (silu(gate @ row) * (up @ row)))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


def test_an_experts_output_ignores_the_neighbours_that_fill_up_its_product() -> None:
    generator = torch.manual_seed(1)
    gate_up, down = (torch.randn(64, 32, generator=generator).to(torch.bfloat16) for _ in range(2))
    experts = [Expert(make_linear(gate_up), make_linear(down[:32])) for _ in range(3)]
    counts = [1, 21, 18]
    x = torch.randn(sum(counts), 32, generator=generator).to(torch.bfloat16)
    x[0] = math.nan  # all that the first expert gets; the last fill up theirs with rows before them
    ids = torch.repeat_interleave(torch.tensor(counts)).unsqueeze(1)
    out = expert_mlp(gather_rows(x, ids, len(experts)), experts)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1:], experts[0](x[1:]), atol=2e-2, rtol=2e-2)


def test_rows_of_any_number_meet_few_sizes_of_a_packed_product() -> None:
    """Without steps each of these 1,024 numbers has a product prepared for it."""
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)
    if not can_pack(weight):
        pytest.skip("this build or CPU has no bf16 products to pack for")
    product = make_linear(weight)
    sizes = [product.enough(count) for count in range(1, 1025)]
    assert all(size >= count for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 80
