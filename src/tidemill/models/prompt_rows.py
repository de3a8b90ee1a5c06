"""Chunks of several prompts in one step, and where in the pool their contexts lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

BLOCK_TOKENS = 64  # of a pool's blocks
# Keys and values of all contexts that are attended to together are there at once: 2 GiB a layer
# for the 128 heads of DeepSeek-V3. A longer context is attended to alone.
MOST_CONTEXT = 32768


@dataclass(frozen=True)
class PromptSpan:
    """Positions [start, end) of a prompt."""

    start: int
    end: int
    blocks: Sequence[int]  # the prompt's blocks, at least up to `end`


@dataclass(frozen=True)
class PromptRows:
    """Chunks of N prompts that are attended to together, one after the other.

    Prompt n has the rows from query_starts[n] to query_starts[n + 1], counted from `first`, and the
    context from context_starts[n] to context_starts[n + 1], of which its rows are the last.
    """

    first: int  # row of the batch
    end: int
    query_starts: Tensor  # [N + 1] int32
    context_starts: Tensor  # [N + 1] int32
    context: Tensor  # [C] int64: rows of a layer's pool, block * 64 + offset


def prompt_rows(
    first: int,
    spans: Sequence[PromptSpan],
    device: torch.device,
    *,
    most_context: int = MOST_CONTEXT,
) -> list[PromptRows]:
    """Spans whose rows follow each other from row `first` of a batch on, as few calls as may be.

    Neighbours go together while their contexts have at most `most_context` tokens in all. What is
    copied to the device, and how often, does not depend on the number of layers or of prompts.
    """
    groups: list[list[PromptSpan]] = []
    room = 0
    for span in spans:
        if not groups or span.end > room:
            groups.append([])
            room = most_context
        groups[-1].append(span)
        room -= span.end
    rows = []
    for group in groups:
        rows.append(_together(first, group, device))
        first = rows[-1].end
    return rows


def _together(first: int, spans: Sequence[PromptSpan], device: torch.device) -> PromptRows:
    query_starts = list(accumulate((span.end - span.start for span in spans), initial=0))
    context_starts = list(accumulate((span.end for span in spans), initial=0))
    return PromptRows(
        first=first,
        end=first + query_starts[-1],
        query_starts=torch.tensor(query_starts, dtype=torch.int32, device=device),
        context_starts=torch.tensor(context_starts, dtype=torch.int32, device=device),
        context=torch.cat([_pool_rows(span) for span in spans]).to(device),
    )


def _pool_rows(span: PromptSpan) -> Tensor:
    """[end] int64, on the host."""
    blocks = torch.tensor(span.blocks[: -(-span.end // BLOCK_TOKENS)])
    return (blocks.unsqueeze(1) * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).flatten()[: span.end]
