"""One sequence through a model, without an engine."""

from pathlib import Path

import torch
from torch import Tensor

from tidemill.models.checkpoint import Checkpoint
from tidemill.models.config import ModelConfig
from tidemill.models.deepseek import Batch, DecodeRows
from tidemill.models.prompt_rows import PromptSpan, prompt_rows
from tidemill.models.weights import load_model


class Probe:
    """Our model of a folder and latents for one sequence, in blocks 1 to 6 of a small pool."""

    def __init__(
        self, path: Path, dtype: torch.dtype, *, stacked: bool = False, device: str = "cpu"
    ) -> None:
        config = ModelConfig.load(path)
        self._device = torch.device(device)
        self.model = load_model(
            Checkpoint(path),
            config,
            dtype,
            max_context=512,
            device=self._device,
            stacked=stacked,
        )
        shape = (config.num_hidden_layers, 7, 64, config.latent_dim)
        self.latents = torch.zeros(shape, dtype=dtype, device=self._device)

    def prefill(self, token_ids: Tensor, start: int = 0) -> Tensor:
        """Logits [T - start, V] of positions from `start` on, in one chunk."""
        positions, blocks = self._place(token_ids, start)
        span = PromptSpan(start, len(token_ids), blocks.tolist())
        batch = Batch(positions, positions + 64, prompts=prompt_rows(0, [span], self._device))
        return self._forward(token_ids[start:], batch)

    def absorbed(self, token_ids: Tensor, start: int = 0) -> Tensor:
        """As `prefill` by decode attention: every position is a row of one batch."""
        positions, blocks = self._place(token_ids, start)
        rows = DecodeRows(blocks.expand(len(positions), -1), positions + 1)
        return self._forward(token_ids[start:], Batch(positions, positions + 64, rows))

    def _place(self, token_ids: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Positions from `start` on and the blocks of all: position p lies at row p + 64."""
        positions = torch.arange(start, len(token_ids), device=self._device)
        return positions, torch.arange(1, -(-len(token_ids) // 64) + 1, device=self._device)

    @torch.inference_mode()
    def _forward(self, token_ids: Tensor, batch: Batch) -> Tensor:
        ids = token_ids.to(self._device)
        return self.model.logits(self.model.forward(ids, batch, self.latents)).cpu()
