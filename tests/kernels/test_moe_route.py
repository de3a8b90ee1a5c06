from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tidemill.kernels.cases import ROUTE_CASES, ROUTE_GPU_CASES, RouteCase
from tidemill.kernels.choice import Path, forced
from tidemill.kernels.moe_route import Routed, Rule, moe_route, reference, route_and_sort

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A token is a program of its own: a few show what many would, and the interpreter is slow.
FEW_TOKENS = [replace(case, num_tokens=min(case.num_tokens, 7)) for case in ROUTE_CASES]


def rule_of(case: RouteCase, normalize: bool = True) -> Rule:
    return Rule(
        scoring_func=case.scoring_func,
        n_group=case.n_group,
        topk_group=case.topk_group,
        top_k=case.top_k,
        normalize=normalize,
        scale=2.5,
    )


def random_inputs(case: RouteCase) -> tuple[Tensor, Tensor | None]:
    """Logits whose scores are far apart, [T, E] as a part of wider rows, and a bias where it is."""
    generator = torch.manual_seed(case.num_tokens + case.num_experts)
    shape = (case.num_tokens, case.num_experts)
    steps = torch.rand(shape, generator=generator).argsort(dim=1)
    logits = (steps - case.num_experts / 2) * (8 / case.num_experts)
    bias = torch.rand(case.num_experts, generator=generator) * 0.3
    wide = torch.cat((logits, logits), dim=1).to(DEVICE)
    return wide[:, : case.num_experts], None if case.scoring_func == "softmax" else bias.to(DEVICE)


def by_expert(ids: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """A token's choices have no order: ids ascending, the others with them."""
    ids, order = ids.long().sort(dim=1)
    return ids, *(other.gather(1, order) for other in others)


def assert_sorted(routed: Routed, num_experts: int) -> None:
    flat = routed.ids.flatten().long()
    assert torch.equal(routed.rows.long(), flat.argsort(stable=True))
    counts = flat.bincount(minlength=num_experts)
    assert torch.equal(routed.counts.long(), counts)
    assert torch.equal(routed.starts.long(), counts.cumsum(0) - counts)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_choices_lie_by_expert_and_then_by_number(path: Path) -> None:
    logits = torch.tensor([[0.0, 3, 2, -9], [5, 0, 4, -9], [-9, 7, 6, -9]], device=DEVICE)
    case = RouteCase(3, 4, 1, 1, 2, "softmax")
    with forced(path):
        routed = route_and_sort(logits, None, **rule_of(case))
    assert routed.ids.sort(dim=1).values.tolist() == [[1, 2], [0, 2], [1, 2]]
    assert routed.counts.tolist() == [1, 2, 3, 0]
    assert routed.starts.tolist() == [0, 1, 3, 6]
    assert (routed.rows // 2).tolist() == [1, 0, 2, 0, 1, 2]
    assert_sorted(routed, 4)


def assert_routes_alike(case: RouteCase, normalize: bool) -> None:
    logits, bias = random_inputs(case)
    rule = rule_of(case, normalize)
    with forced("triton"):
        weights, ids = moe_route(logits, bias, **rule)
    assert ids.dtype == torch.int64
    expected_weights, expected_ids = reference.moe_route(logits, bias, **rule)
    ids, weights = by_expert(ids, weights)
    expected_ids, expected_weights = by_expert(expected_ids, expected_weights)
    same = (ids == expected_ids).all(dim=1)
    # Of thousands of tokens one may have two scores that differ by less than a sigmoid's rounding.
    assert int((~same).sum()) <= case.num_tokens // 1000
    torch.testing.assert_close(weights[same], expected_weights[same], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", FEW_TOKENS, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_the_kernel_routes_as_the_reference(case: RouteCase, normalize: bool) -> None:
    assert_routes_alike(case, normalize)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ROUTE_GPU_CASES, ids=str)
def test_many_tokens_are_routed_as_the_reference_does(case: RouteCase) -> None:
    assert_routes_alike(case, normalize=True)
    logits, bias = random_inputs(case)
    assert_sorted(route_and_sort(logits, bias, **rule_of(case)), case.num_experts)


@pytest.mark.parametrize("case", [each for each in FEW_TOKENS if each.num_experts < 99], ids=str)
def test_the_kernel_sorts_what_it_routed(case: RouteCase) -> None:
    logits, bias = random_inputs(case)
    with forced("triton"):
        routed = route_and_sort(logits, bias, **rule_of(case))
        weights, ids = moe_route(logits, bias, **rule_of(case))
    assert torch.equal(routed.ids.long(), ids)
    assert torch.equal(routed.weights, weights)
    assert_sorted(routed, case.num_experts)


@pytest.mark.parametrize("num_tokens", [2, 150, 700])  # 1,200 fill one tile, 5,600 more than one
def test_many_choices_are_sorted_by_an_odd_number_of_experts(num_tokens: int) -> None:
    from tidemill.kernels.moe_route import kernel  # noqa: PLC0415 - triton is heavy

    generator = torch.manual_seed(num_tokens)
    ids = torch.rand(num_tokens, 9, generator=generator).topk(8, dim=1).indices
    ids[ids == 5] = 4  # which nobody chooses
    rows, starts, counts = (torch.empty(size, dtype=torch.int32) for size in (ids.numel(), 9, 9))
    routed = Routed(
        torch.empty(num_tokens, 8), *(each.to(DEVICE) for each in (ids.int(), rows, starts, counts))
    )
    kernel.sort_choices(routed)
    assert_sorted(routed, 9)


def test_of_equal_scores_the_kernel_takes_the_lowest_index() -> None:
    case = RouteCase(2, 12, 4, 2, 4)
    logits = torch.zeros(2, 12, device=DEVICE)
    logits[1, 7] = 1.0
    with forced("triton"):
        _, ids = moe_route(logits, torch.zeros(12, device=DEVICE), **rule_of(case))
    assert ids.tolist() == [[0, 1, 2, 3], [7, 0, 1, 2]]


@pytest.mark.parametrize("case", [RouteCase(1, 16, 4, 2, 4), RouteCase(2, 16, 1, 1, 4, "softmax")])
def test_the_kernel_gives_valid_ids_for_logits_with_nan(case: RouteCase) -> None:
    logits, _ = random_inputs(case)
    logits[:, 3] = float("nan")
    with forced("triton"):
        routed = route_and_sort(logits, None, **rule_of(case))
    assert all(len(set(row)) == case.top_k for row in routed.ids.tolist())
    assert 0 <= int(routed.ids.min()) <= int(routed.ids.max()) < case.num_experts
    assert_sorted(routed, case.num_experts)


def test_no_tokens_choose_no_experts() -> None:
    case = RouteCase(0, 8, 1, 1, 2)
    with forced("triton"):
        routed = route_and_sort(torch.zeros(0, 8, device=DEVICE), None, **rule_of(case))
    assert routed.ids.shape == (0, 2)
    assert routed.counts.tolist() == routed.starts.tolist() == [0] * 8


def test_the_kernel_refuses_more_choices_than_experts() -> None:
    logits = torch.zeros(1, 8, device=DEVICE)
    with forced("triton"), pytest.raises(ValueError, match=r"5 of 2 of 4 groups.*T=1, E=8"):
        moe_route(logits, None, **rule_of(RouteCase(1, 8, 4, 2, 5)))
