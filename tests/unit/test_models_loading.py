"""Loading reads tensor by tensor, says how far it is, and names the tensor that does not fit."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.family import RAGGED, Variant
from tests.fp8_checkpoint import make_fp8_checkpoint
from tests.tiny_model import make_tiny_checkpoint
from tidemill.errors import CheckpointError
from tidemill.kernels.linear.reference import PlainLinear
from tidemill.models.checkpoint import Checkpoint
from tidemill.models.config import ModelConfig
from tidemill.models.deepseek import DeepseekModel, MoeMlp
from tidemill.models.fp8 import dequantize, scale_shape
from tidemill.models.weights import load_model

ROOT = Path(__file__).resolve().parents[2]
WEIGHT = "model.layers.1.mlp.experts.3.up_proj.weight"  # [136, 192] in 2 x 2 blocks
SCALE = WEIGHT + "_scale_inv"
PEAK_OVER_KEPT = 1.15


def load(path: Path, on_progress: Callable[[int, int], None] | None = None) -> DeepseekModel:
    config = ModelConfig.load(path)
    return load_model(Checkpoint(path), config, torch.float32, 512, on_progress)


def edit_tensors(path: Path, **changes: Tensor | None) -> None:
    """Replace, add or (None) remove tensors."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def fp8_dir(tmp_path: Path) -> Path:
    Variant("v3", RAGGED, "fp8").make(tmp_path / "model", tmp_path)
    return tmp_path / "model"


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """170 MB of bf16 weights: much against what a process grows by for other reasons."""
    sizes = {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 4,
        "n_routed_experts": 20,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "vocab_size": 512,
    }
    path = tmp_path_factory.mktemp("wide")
    return make_tiny_checkpoint(path / "plain", dtype="bfloat16", **sizes)


def peak_over_kept(path: Path, dtype: str) -> float:
    command = [sys.executable, "-m", "tests.load_probe", str(path), dtype]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    kept, peak, loaded_as = out.split()
    assert loaded_as == f"torch.{dtype}"
    return int(peak) / int(kept)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_little_more_memory_than_the_weights(
    wide_checkpoint: Path, dtype: str
) -> None:
    assert peak_over_kept(wide_checkpoint, dtype) < PEAK_OVER_KEPT


def test_loading_fp8_takes_little_more_memory_than_the_weights(
    wide_checkpoint: Path, tmp_path: Path
) -> None:
    make_fp8_checkpoint(wide_checkpoint, tmp_path / "fp8", tmp_path / "exact")
    assert peak_over_kept(tmp_path / "fp8", "bfloat16") < PEAK_OVER_KEPT


def test_progress_grows_with_every_tensor_up_to_all_bytes(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path)
    calls: list[tuple[int, int]] = []
    load(path, lambda done, total: calls.append((done, total)))
    tensors = load_file(path / "model.safetensors")
    done = [call[0] for call in calls]
    assert len(calls) == len(tensors)
    assert done == sorted(set(done))
    assert {call[1] for call in calls} == {done[-1]}
    assert done[-1] == sum(value.nbytes for value in tensors.values())


def test_digest_of_a_known_folder_stays_what_it_was() -> None:
    known = "7bccbabd41b87c54189fe7803267408c600eb3e3f3a053e284d48c3bcc406c2b"
    assert Checkpoint(ROOT / "models/demo").digest().hex() == known


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (700, 300), (1024, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e8m0fnu])
def test_dequantising_multiplies_each_block_by_its_scale(
    shape: tuple[int, int], dtype: torch.dtype, stored: torch.dtype
) -> None:
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.exp2(torch.randint(-9, 4, scale_shape(shape, (128, 128)))).to(stored)
    found = dequantize(weight, scales, (128, 128), dtype)
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            block = slice(row, row + 128), slice(column, column + 128)
            expected = weight[block].float() * scales[row // 128, column // 128].float()
            assert torch.equal(found[block], expected.to(dtype))


def test_missing_scale_is_named_with_its_shape(fp8_dir: Path) -> None:
    edit_tensors(fp8_dir, **{SCALE: None})
    with pytest.raises(CheckpointError, match=rf"'{SCALE}' is missing, expected shape \[2, 2\]"):
        load(fp8_dir)


def test_misshaped_scale_is_named_with_both_shapes(fp8_dir: Path) -> None:
    edit_tensors(fp8_dir, **{SCALE: torch.ones(2, 1)})
    with pytest.raises(CheckpointError, match=rf"'{SCALE}' has shape \[2, 1\], expected \[2, 2\]"):
        load(fp8_dir)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scale_that_is_no_number_is_named(fp8_dir: Path, value: float) -> None:
    edit_tensors(fp8_dir, **{SCALE: torch.full((2, 2), value)})
    with pytest.raises(CheckpointError, match=rf"'{SCALE}' .* no finite number"):
        load(fp8_dir)


def test_weight_that_was_widened_but_not_scaled_is_refused(fp8_dir: Path) -> None:
    tensors = load_file(fp8_dir / "model.safetensors")
    edit_tensors(fp8_dir, **{WEIGHT: tensors[WEIGHT].to(torch.bfloat16)})
    with pytest.raises(CheckpointError, match=rf"'{WEIGHT}' .*bfloat16, expected float8_e4m3fn"):
        load(fp8_dir)


def test_weights_left_wide_in_an_fp8_folder_are_taken_as_they_are(fp8_dir: Path) -> None:
    wide = torch.randn(136, 192)
    edit_tensors(fp8_dir, **{SCALE: None, WEIGHT: wide})
    moe = load(fp8_dir).layers[1].mlp
    assert isinstance(moe, MoeMlp)
    gate_up = moe.routed[3].gate_up
    assert isinstance(gate_up, PlainLinear)
    assert torch.equal(gate_up.weight[136:], wide)


def test_fp8_weights_without_their_config_are_refused(fp8_dir: Path) -> None:
    config = json.loads((fp8_dir / "config.json").read_text())
    del config["quantization_config"]
    (fp8_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="float8_e4m3fn, expected bfloat16 or float16 or"):
        load(fp8_dir)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_a_proj.bias", "model.layers.3.input_layernorm.weight"]
)
def test_tensor_that_no_layer_takes_is_named(tmp_path: Path, name: str) -> None:
    path = make_tiny_checkpoint(tmp_path)
    edit_tensors(path, **{name: torch.ones(64)})
    with pytest.raises(CheckpointError, match=rf"'{name}' and 0 more have no place"):
        load(path)


def test_multi_token_prediction_layers_stay_on_disk(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path, num_nextn_predict_layers=2)
    before = load(path)
    layer = {
        f"model.layers.{index}.{name}": torch.full((64, 64), float("nan"))
        for index in (3, 4)
        for name in ("eh_proj.weight", "shared_head.head.weight", "self_attn.o_proj.weight")
    }
    edit_tensors(path, **layer)
    totals: list[int] = []
    after = load(path, lambda _, total: totals.append(total))
    assert ModelConfig.load(path).num_nextn_predict_layers == 2
    assert len(after.layers) == len(before.layers) == 3
    plain = load_file(path / "model.safetensors")
    held = [value.nbytes for name, value in plain.items() if name not in layer]
    assert totals[-1] == sum(held)
