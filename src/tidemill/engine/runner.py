"""Turns planned steps into batches for the model and runs them."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tidemill.blocks import BLOCK_TOKENS
from tidemill.engine.block_pool import BlockPool
from tidemill.engine.decode_graphs import DecodeGraphs
from tidemill.engine.device import send
from tidemill.engine.scheduler import Step
from tidemill.engine.sequence import Sequence
from tidemill.models.deepseek import Batch, DecodeRows, DeepseekModel
from tidemill.models.prompt_rows import PromptSpan, prompt_rows


class Runner(Protocol):
    """What computes a step: it reads and writes latents in `pool` by the sequences' tables.

    Of a chunk it writes positions [write_start, end) only.
    """

    pool: BlockPool

    def forward(self, step: Step) -> Tensor:
        """Compute the step's latents; hidden states [T, D], decode rows first, then the chunks."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, D] -> logits [N, V] for the positions after them."""


class ModelRunner:
    """The model and the pool that it reads and writes; `graphs` take steps that only decode."""

    def __init__(
        self, model: DeepseekModel, pool: BlockPool, graphs: DecodeGraphs | None = None
    ) -> None:
        self.model = model
        self.pool = pool
        self._graphs = graphs
        self._device = pool.latents.device

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        """As Runner.forward."""
        if self._graphs is not None and step.decodes and not step.chunks:
            return self._graphs.forward(step.decodes)
        token_ids = [seq.token_ids[-1] for seq in step.decodes]
        positions = [len(seq.token_ids) - 1 for seq in step.decodes]
        slots = [seq.slot(len(seq.token_ids) - 1) for seq in step.decodes]
        written = list(range(len(slots)))
        spans = []
        for chunk in step.chunks:
            row = len(token_ids)
            token_ids += chunk.seq.token_ids[chunk.start : chunk.end]
            positions += range(chunk.start, chunk.end)
            slots += [chunk.seq.slot(position) for position in range(chunk.write_start, chunk.end)]
            written += range(row + chunk.write_start - chunk.start, len(token_ids))
            spans.append(PromptSpan(chunk.start, chunk.end, chunk.seq.block_table))
        batch = Batch(
            positions=self._ids(positions),
            slots=self._ids(slots),
            written=None if len(written) == len(token_ids) else self._ids(written),
            decodes=self._decode_rows(step.decodes) if step.decodes else None,
            prompts=prompt_rows(len(step.decodes), spans, self._device),
        )
        return self.model.forward(
            self._ids(token_ids), batch, self.pool.latents, _layer_callback(step)
        )

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """As Runner.logits."""
        return self.model.logits(hidden)

    def _decode_rows(self, seqs: list[Sequence]) -> DecodeRows:
        lengths = [len(seq.token_ids) for seq in seqs]
        tables = [
            seq.block_table[: -(-length // BLOCK_TOKENS)]
            for seq, length in zip(seqs, lengths, strict=True)
        ]
        width = max(map(len, tables))
        padded = [table + table[:1] * (width - len(table)) for table in tables]
        # int32, as recorded steps have them: the same compiled kernel for both.
        block_tables = send(torch.tensor(padded, dtype=torch.int32), self._device)
        return DecodeRows(block_tables, self._ids(lengths))

    def _ids(self, values: list[int]) -> Tensor:
        return send(torch.tensor(values, dtype=torch.int64), self._device)


def _layer_callback(step: Step) -> Callable[[int], None] | None:
    """Tells each prompt that wants to know; None if none does."""
    watched = [
        (chunk.seq.on_layer, chunk) for chunk in step.chunks if chunk.seq.on_layer is not None
    ]
    if not watched:
        return None

    def on_layer(layer: int) -> None:
        for tell, chunk in watched:
            tell(layer, chunk.start, chunk.end)

    return on_layer
