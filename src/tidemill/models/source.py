"""What the layers are built from: a checkpoint's tensors in the engine's dtype, one at a time."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from tidemill.errors import CheckpointError
from tidemill.models.checkpoint import PLAIN_DTYPES, Checkpoint
from tidemill.models.config import ModelConfig
from tidemill.models.fp8 import BLOCK, Fp8Matrix, dequantize, scale_shape

# (bytes read so far, bytes to read in all)
Progress = Callable[[int, int], None]

SCALE_SUFFIX = "_scale_inv"
# How often in one load malloc is made to return what it keeps.
NUM_TRIMS = 64
_SCALE_DTYPES = (torch.float32, torch.float8_e8m0fnu)


class WeightSource:
    """Gives each tensor once and knows which are left.

    CheckpointError names the tensor at fault and both shapes. `on_progress` is called after each
    tensor, from the same thread.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        dtype: torch.dtype,
        on_progress: Progress | None = None,
        *,
        device: torch.device,
        keep_fp8: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self.dtype = dtype
        self._on_progress = on_progress
        self.device = device
        self._keep_fp8 = keep_fp8 and config.weight_block_size == (BLOCK, BLOCK)
        self._left = {
            name
            for name in checkpoint.names
            if checkpoint.size(name) and not _stays_on_disk(name, config)
        }
        self._total = sum(checkpoint.size(name) for name in self._left)
        self._done = self._trimmed = 0

    def vector(self, name: str, size: int) -> Tensor:
        """A norm's weight or a bias, [size] in the engine's dtype."""
        return self._take(name, (size,)).to(self.device, self.dtype)

    def table(self, name: str, rows: int, columns: int) -> Tensor:
        """A matrix that is never quantised, [rows, columns] in the engine's dtype."""
        return self._take(name, (rows, columns)).to(self.device, self.dtype)

    def exact(self, name: str, *shape: int) -> Tensor:
        """A tensor that the model computes with in fp32."""
        return self._take(name, shape).to(self.device, torch.float32)

    def matrix(self, name: str, rows: int, columns: int) -> Tensor:
        """A layer's weight [rows, columns] in the engine's dtype, dequantised if it was FP8."""
        block = self._config.weight_block_size
        if block is None or not self._is_quantised(name):
            return self.table(name, rows, columns)
        values, scales = self._quantised(name, rows, columns, block)
        return dequantize(values, scales, block, self.dtype).to(self.device)

    def stored(self, name: str, rows: int, columns: int) -> Tensor | Fp8Matrix:
        """A layer's weight as `keeps_fp8` says: in FP8 or else as `matrix` gives it."""
        if not self.keeps_fp8(name, columns):
            return self.matrix(name, rows, columns)
        values, scales = self._quantised(name, rows, columns, (BLOCK, BLOCK))
        return Fp8Matrix(values, scales.float()).to(self.device)

    def keeps_fp8(self, name: str, columns: int) -> bool:
        """Whether the weight is stored in blocks that kernels multiply, and is to stay so."""
        return self._keep_fp8 and columns % BLOCK == 0 and self._is_quantised(name)

    def _is_quantised(self, name: str) -> bool:
        quantised = self._checkpoint.dtype(name) == torch.float8_e4m3fn
        return quantised or name + SCALE_SUFFIX in self._checkpoint

    def _quantised(
        self, name: str, rows: int, columns: int, block: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        scale_name = name + SCALE_SUFFIX
        weight = self._take(name, (rows, columns), (torch.float8_e4m3fn,))
        scales = self._take(scale_name, scale_shape((rows, columns), block), _SCALE_DTYPES)
        if not scales.float().isfinite().all():
            raise CheckpointError(
                f"{self._checkpoint.model_dir}: tensor {scale_name!r} of shape "
                f"{list(scales.shape)} holds a scale that is no finite number",
                tensor=scale_name,
                shape=tuple(scales.shape),
            )
        return weight, scales

    def finish(self) -> None:
        """After the last: CheckpointError names a tensor that no layer took."""
        _return_freed_memory()
        if self._left:
            name = min(self._left)
            raise CheckpointError(
                f"{self._checkpoint.model_dir}: tensor {name!r} and {len(self._left) - 1} more "
                "have no place in the model that config.json describes",
                tensor=name,
            )

    def _take(
        self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = PLAIN_DTYPES
    ) -> Tensor:
        value = self._checkpoint.tensor(name, shape, dtypes)
        self._left.discard(name)
        self._done += self._checkpoint.size(name)
        if (self._done - self._trimmed) * NUM_TRIMS > self._total:
            self._trimmed = self._done
            _return_freed_memory()
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)
        return value


def _return_freed_memory() -> None:
    """Give the system what converting left behind.

    glibc's malloc keeps freed buffers of a weight's size for itself, scattered between the weights:
    measured, a quarter of them. Other C libraries have no such call and need none.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _stays_on_disk(name: str, config: ModelConfig) -> bool:
    """Whether a tensor belongs to the checkpoint and not to what is computed.

    Multi-token-prediction layers follow the last layer; old files carry rotary frequencies, which
    the config determines; tied models may carry their embedding twice.
    """
    first, last = config.num_hidden_layers, config.num_nextn_predict_layers
    extra = tuple(f"model.layers.{index}." for index in range(first, first + last))
    if name.startswith(extra) or name.endswith(".rotary_emb.inv_freq"):
        return True
    return name == "lm_head.weight" and config.tie_word_embeddings
