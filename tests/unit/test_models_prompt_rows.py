"""Chunks of several prompts, attended to together: what is gathered, and in how many launches."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tidemill import blocks
from tidemill.kernels import choice
from tidemill.kernels.linear import make_linear
from tidemill.kernels.mla_prefill import kernel
from tidemill.models.deepseek import Attention, Batch, Query
from tidemill.models.prompt_rows import BLOCK_TOKENS, PromptSpan, prompt_rows

CPU = torch.device("cpu")


def test_a_block_is_what_is_hashed() -> None:
    assert BLOCK_TOKENS == blocks.BLOCK_TOKENS


def test_a_prompts_context_is_all_before_its_last_row_wherever_its_blocks_lie() -> None:
    spans = [PromptSpan(64, 66, [5, 3]), PromptSpan(0, 3, [9, 8]), PromptSpan(129, 130, [1, 0, 7])]
    (rows,) = prompt_rows(4, spans, CPU)
    assert (rows.first, rows.end) == (4, 10)
    assert rows.query_starts.tolist() == [0, 2, 5, 6]
    assert rows.context_starts.tolist() == [0, 66, 69, 199]
    expected = [*range(320, 384), 192, 193, 576, 577, 578, *range(64, 128), *range(64), 448, 449]
    assert rows.context.tolist() == expected


@pytest.mark.parametrize(
    ("ends", "together"),
    [
        ([100, 100, 100], [[100, 100], [100]]),
        ([100, 101, 99], [[100], [101, 99]]),
        ([10, 500, 10], [[10], [500], [10]]),  # more than may be together is still attended to
        ([1] * 300, [[1] * 200, [1] * 100]),
        ([], []),
    ],
)
def test_prompts_go_together_while_their_contexts_leave_room(
    ends: list[int], together: list[list[int]]
) -> None:
    spans = [PromptSpan(end - 1, end, range(8)) for end in ends]
    groups = prompt_rows(3, spans, CPU, most_context=200)
    assert [group.context_starts.diff().tolist() for group in groups] == together
    bounds = [(group.first, group.end) for group in groups]
    firsts = [3, *[end for _, end in bounds]]
    assert bounds == [
        (first, first + len(group)) for first, group in zip(firsts, together, strict=False)
    ]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own lacks types
    """Names what a GPU would be given: operators of torch but for views, and kernels of ours."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        given = {storage(each) for each in tree_leaves(args) if isinstance(each, Tensor)}
        is_new = any(storage(each) not in given for each in tree_leaves(out))
        if is_new and func.overloadpacket is not torch.ops.aten.empty:
            self.names.append(str(func))
        return out

    def __getitem__(self, grid: tuple[int, ...]) -> "Launches":
        return self

    def __call__(self, *_: object, **__: object) -> None:
        self.names.append("ours")


def launches_of_attention(num_prompts: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """16 rows in all, each prompt with a cached prefix of another length."""
    heads, nope, rope, lora = 2, 16, 16, 32
    unused: Any = None
    config: Any = SimpleNamespace(kv_lora_rank=lora)
    attention = Attention(
        norm=unused,
        qkv_a=unused,
        q_a_norm=None,
        q_b=None,
        kv_a_norm=unused,
        kv_b=make_linear(torch.zeros(heads * 2 * nope, lora)),
        w_uk=unused,
        w_uv=unused,
        out=unused,
        config=config,
        scale=1.0,
    )
    spans = [PromptSpan(n, n + 16 // num_prompts, [n]) for n in range(num_prompts)]
    batch = Batch(unused, unused, prompts=prompt_rows(0, spans, CPU))
    pool = torch.zeros(num_prompts, 64, lora + rope)
    query = torch.zeros(16, heads, nope + rope)
    launches = Launches()
    monkeypatch.setattr(kernel, "_mla_prefill_kernel", launches)
    with torch.inference_mode(), choice.forced("triton"), launches:
        attention.attend(Query(query, None), batch, pool)
    return launches.names


def test_more_prompts_are_no_more_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = launches_of_attention(1, monkeypatch)
    assert alone.count("ours") == 1
    assert len(alone) == 3, alone  # the gather, the expansion, attention
    assert launches_of_attention(4, monkeypatch) == alone
    assert launches_of_attention(16, monkeypatch) == alone
