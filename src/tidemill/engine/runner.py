"""Turns planned steps into batches for the model and runs them."""

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from tidemill.blocks import BLOCK_TOKENS
from tidemill.engine.block_pool import BlockPool
from tidemill.engine.scheduler import PrefillChunk
from tidemill.engine.sequence import Sequence
from tidemill.models.deepseek import Batch, DecodeRows, DeepseekModel, PromptSpan


class ModelRunner:
    """The model and the pool that it reads and writes."""

    def __init__(self, model: DeepseekModel, pool: BlockPool) -> None:
        self.model = model
        self.pool = pool

    @torch.inference_mode()
    def prefill(self, chunks: Items[PrefillChunk]) -> Tensor:
        """Compute the chunks' latents; logits [C, V] after the last position of each chunk."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[PromptSpan] = []
        for chunk in chunks:
            row = len(token_ids)
            token_ids += chunk.seq.token_ids[chunk.start : chunk.end]
            positions += range(chunk.start, chunk.end)
            slots += [chunk.seq.slot(position) for position in range(chunk.start, chunk.end)]
            blocks = chunk.seq.block_table[: -(-chunk.end // BLOCK_TOKENS)]
            spans.append(PromptSpan(row, len(token_ids), chunk.start, torch.tensor(blocks)))

        def on_layer(layer: int) -> None:
            for chunk in chunks:
                if chunk.seq.on_layer is not None:
                    chunk.seq.on_layer(layer, chunk.start, chunk.end)

        hidden = self.model.forward(
            torch.tensor(token_ids),
            Batch(torch.tensor(positions), torch.tensor(slots), spans=spans),
            self.pool.latents,
            on_layer if any(chunk.seq.on_layer for chunk in chunks) else None,
        )
        return self.model.logits(hidden[[span.row_end - 1 for span in spans]])

    @torch.inference_mode()
    def decode(self, seqs: Items[Sequence]) -> Tensor:
        """Compute each sequence's newest token; logits [B, V] for the one after it."""
        positions = [len(seq.token_ids) - 1 for seq in seqs]
        tables = [
            seq.block_table[: position // BLOCK_TOKENS + 1]
            for seq, position in zip(seqs, positions, strict=True)
        ]
        width = max(map(len, tables))
        padded = [table + table[:1] * (width - len(table)) for table in tables]
        position_row = torch.tensor(positions)
        hidden = self.model.forward(
            torch.tensor([seq.token_ids[-1] for seq in seqs]),
            Batch(
                positions=position_row,
                slots=torch.tensor(
                    [seq.slot(position) for seq, position in zip(seqs, positions, strict=True)]
                ),
                decodes=DecodeRows(torch.tensor(padded), position_row + 1),
            ),
            self.pool.latents,
        )
        return self.model.logits(hidden)
