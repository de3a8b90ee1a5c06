"""Steps that only decode, recorded once for each of a few batch sizes and replayed.

A step of a full model launches over a thousand kernels; started one by one they take a CPU longer
than a small batch takes the GPU. A recording reads its inputs where they lay when it was made, so
each size has its place in tensors that stay, and rows beyond the batch are padding: they attend to
one position and store nothing.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tidemill.blocks import BLOCK_TOKENS
from tidemill.engine.block_pool import BlockPool
from tidemill.engine.sequence import Sequence
from tidemill.models.deepseek import Batch, DecodeRows, DeepseekModel

NOT_STORED = -1  # the slot of a row whose latents go nowhere
_TOKEN, _POSITION, _SLOT, _LENGTH = range(4)


@dataclass(frozen=True)
class Recording:
    """`replay` runs what was recorded and fills `output` anew."""

    output: Tensor
    replay: Callable[[], None]


def record_graph(run: Callable[[], Tensor]) -> Recording:
    """Record `run` as a CUDA graph, after it has run once: kernels are compiled on first use."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return Recording(output, graph.replay)


def graph_sizes(max_batch: int) -> list[int]:
    """Batch sizes worth a recording: padding costs at most the next power of two, or 8 rows."""
    sizes = {1, 2, 4, max_batch} | set(range(8, max_batch, 8))
    return sorted(size for size in sizes if size <= max_batch)


class DecodeGraphs:
    """Recordings of one model on one pool; all are made at once, largest first."""

    def __init__(
        self,
        model: DeepseekModel,
        pool: BlockPool,
        *,
        max_batch: int,
        max_context: int,
        record: Callable[[Callable[[], Tensor]], Recording] = record_graph,
    ) -> None:
        device = pool.latents.device
        width = -(-max_context // BLOCK_TOKENS)
        pinned = device.type == "cuda"
        self._rows_here = torch.zeros(4, max_batch, dtype=torch.int64, pin_memory=pinned)
        self._tables_here = torch.zeros(max_batch, width, dtype=torch.int32, pin_memory=pinned)
        self._rows_here[_SLOT] = NOT_STORED
        self._rows_here[_LENGTH] = 1
        self._rows = self._rows_here.to(device)
        self._tables = self._tables_here.to(device)
        self._sizes = graph_sizes(max_batch)
        self._recordings = {
            size: record(partial(self._run, model, pool, size)) for size in reversed(self._sizes)
        }

    def forward(self, seqs: list[Sequence]) -> Tensor:
        """Hidden states [B, D] of each sequence's last token, valid until the next call."""
        size = self._sizes[bisect_left(self._sizes, len(seqs))]
        self._fill(seqs, size)
        recording = self._recordings[size]
        recording.replay()
        return recording.output[: len(seqs)]

    @torch.inference_mode()
    def _run(self, model: DeepseekModel, pool: BlockPool, size: int) -> Tensor:
        rows = self._rows[:, :size]
        decodes = DecodeRows(self._tables[:size], rows[_LENGTH])
        batch = Batch(positions=rows[_POSITION], slots=rows[_SLOT], decodes=decodes)
        return model.forward(rows[_TOKEN], batch, pool.latents)

    def _fill(self, seqs: list[Sequence], size: int) -> None:
        """Each sequence's row, and padding up to `size`, here and on the device."""
        lengths = [len(seq.token_ids) for seq in seqs]
        padding = size - len(seqs)
        columns = [
            [seq.token_ids[-1] for seq in seqs] + [0] * padding,
            [length - 1 for length in lengths] + [0] * padding,
            [seq.slot(length - 1) for seq, length in zip(seqs, lengths, strict=True)]
            + [NOT_STORED] * padding,
            [*lengths, *[1] * padding],
        ]
        self._rows_here[:, :size] = torch.tensor(columns)
        for row, (seq, length) in enumerate(zip(seqs, lengths, strict=True)):
            table = seq.block_table[: -(-length // BLOCK_TOKENS)]
            self._tables_here[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
        self._rows.copy_(self._rows_here, non_blocking=True)
        self._tables[:size].copy_(self._tables_here[:size], non_blocking=True)
