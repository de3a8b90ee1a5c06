"""Loads a model in a process of its own: `python -m tests.load_probe FOLDER DTYPE`.

Writes the bytes of weights kept and the peak of the resident set above what it was before loading,
in which mapped pages of files count.
"""

import gc
import sys
from pathlib import Path

import torch

from tidemill.kernels.linear import make_linear
from tidemill.models.checkpoint import Checkpoint
from tidemill.models.config import ModelConfig
from tidemill.models.weights import load_model


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _kept_bytes() -> int:
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum(each.numel() * each.element_size() for each in tensors)


def _main(folder: Path, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    sample = torch.zeros(64, 64, dtype=dtype)
    make_linear(sample)(sample)  # what the first product sets up is no part of loading
    before, other = _status("VmRSS"), _kept_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    model = load_model(Checkpoint(folder), ModelConfig.load(folder), dtype, max_context=512)
    kept, peak = _kept_bytes() - other, _status("VmHWM") - before
    sys.stdout.write(f"{kept} {peak} {model.dtype}\n")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), getattr(torch, sys.argv[2]))
