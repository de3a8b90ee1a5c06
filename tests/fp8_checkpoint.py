"""Turns a checkpoint's layer weights into FP8 e4m3 with 128x128 blocks, as DeepSeek-V3's files."""

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0


def make_fp8_checkpoint(
    plain: Path, path: Path, twin: Path, *, power_of_two: bool = False, e8m0: bool = False
) -> None:
    """Write `plain`'s weights to `path` in FP8 and to `twin` in fp32 after the rounding.

    `power_of_two` rounds scales up to powers of two (`scale_fmt` ue8m0); `e8m0` stores them as
    such in one byte. Routers, embeddings, norms and biases stay as they are.
    """
    tensors = load_file(plain / "model.safetensors")
    small, exact = {}, {}
    for name, value in tensors.items():
        exact[name] = value.float()
        small[name] = value
        if not _is_quantised(name, value):
            continue
        small[name], scale, exact[name] = quantise(value.float(), power_of_two)
        small[f"{name}_scale_inv"] = scale.to(torch.float8_e8m0fnu) if e8m0 else scale
    for folder, contents in ((path, small), (twin, exact)):
        shutil.copytree(plain, folder, dirs_exist_ok=True)
        save_file(contents, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    if power_of_two:
        config["quantization_config"]["scale_fmt"] = "ue8m0"
    (path / "config.json").write_text(json.dumps(config))


def quantise(weight: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 [N, K] -> e4m3 [N, K], scales [ceil(N / 128), ceil(K / 128)], their fp32 product."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales, exact = torch.empty(rows, columns), torch.empty(weight.shape)
    for row in range(rows):
        for column in range(columns):
            at = (
                slice(row * BLOCK, (row + 1) * BLOCK),
                slice(column * BLOCK, (column + 1) * BLOCK),
            )
            scale = weight[at].abs().max().item() / E4M3_MAX
            if power_of_two:
                scale = 2.0 ** math.ceil(math.log2(scale))
            scales[row, column] = scale
            stored[at] = (weight[at] / scales[row, column]).to(torch.float8_e4m3fn)
            exact[at] = stored[at].float() * scales[row, column]
    return stored, scales, exact


def _is_quantised(name: str, value: Tensor) -> bool:
    of_layer = name.startswith("model.layers.") and not name.endswith(".gate.weight")
    return of_layer and value.ndim == 2 and value.numel() > 0
