"""A checkpoint that cannot be served is refused with the key, tensor and shapes at fault."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_model import YARN, make_tiny_checkpoint
from tidemill.engine import Engine, EngineConfig
from tidemill.errors import CheckpointError, ConfigError
from tidemill.models.checkpoint import Checkpoint
from tidemill.models.config import ModelConfig, YarnScaling, load_eos_token_ids

TENSOR = "model.layers.1.mlp.experts.3.up_proj.weight"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "model")


def edit_config(model_dir: Path, **changes: Any) -> None:
    path = model_dir / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))


def shard(model_dir: Path) -> list[Path]:
    """Split the single file in two, with an index, as large models are published."""
    tensors = load_file(model_dir / "model.safetensors")
    names = sorted(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map: dict[str, str] = {}
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, model_dir / file)
        weight_map |= dict.fromkeys(part, file)
    (model_dir / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    return [model_dir / file for file in files]


def load(model_dir: Path, **config: Any) -> Engine:
    return Engine.load(model_dir, EngineConfig(num_blocks=4, num_threads=1, **config))


def test_sharded_and_single_files_are_the_same_model(model_dir: Path) -> None:
    digest = Checkpoint(model_dir).digest()
    shard(model_dir)
    assert Checkpoint(model_dir).digest() == digest
    load(model_dir)


def test_digest_changes_with_any_config_name_or_value(model_dir: Path, tmp_path: Path) -> None:
    digest = Checkpoint(model_dir).digest()
    assert Checkpoint(make_tiny_checkpoint(tmp_path / "same")).digest() == digest
    assert Checkpoint(make_tiny_checkpoint(tmp_path / "other", seed=1)).digest() != digest
    edit_config(model_dir, rms_norm_eps=2e-6)
    assert Checkpoint(model_dir).digest() != digest


def test_missing_tensor_is_named_with_the_expected_shape(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    del tensors[TENSOR]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"'{TENSOR}' is missing.*\[32, 64\]") as caught:
        load(model_dir)
    assert (caught.value.tensor, caught.value.expected) == (TENSOR, (32, 64))


def test_misshaped_tensor_is_named_with_both_shapes(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    tensors[TENSOR] = tensors[TENSOR][:, :50].contiguous()
    save_file(tensors, path)
    with pytest.raises(
        CheckpointError, match=r"has shape \[32, 50\], expected \[32, 64\]"
    ) as caught:
        load(model_dir)
    assert caught.value.tensor == TENSOR
    assert caught.value.shape == (32, 50)


def test_integer_weights_are_refused(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    tensors[TENSOR] = tensors[TENSOR].to(torch.int8)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"'{TENSOR}'.*int8"):
        load(model_dir)


@pytest.mark.parametrize("sharded", [False, True])
def test_truncated_file_names_the_first_tensor_cut(model_dir: Path, sharded: bool) -> None:
    path = shard(model_dir)[1] if sharded else model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"truncated: tensor '\S+' of shape \[.*\] ends at"):
        load(model_dir)


@pytest.mark.parametrize("kept", [0, 4, 100])
def test_file_cut_in_its_header_is_refused(model_dir: Path, kept: int) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=str(path)):
        load(model_dir)


def test_missing_weights_file_is_named(model_dir: Path) -> None:
    files = shard(model_dir)
    files[0].unlink()
    with pytest.raises(CheckpointError, match=f"{files[0]}: no such file"):
        load(model_dir)


def test_index_that_points_elsewhere_is_refused(model_dir: Path) -> None:
    shard(model_dir)
    path = model_dir / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../outside.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not a file name"):
        load(model_dir)


def test_index_entry_absent_from_its_file_is_named(model_dir: Path) -> None:
    shard(model_dir)
    path = model_dir / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"'model\.extra' is in the index but not in the file"
    ):
        load(model_dir)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["LlamaForCausalLM"]),
        ("architectures", "absent"),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("q_lora_rank", "absent"),
        ("q_lora_rank", 0),
        ("q_lora_rank", "24"),
        ("hidden_size", -64),
        ("hidden_act", "gelu"),
        ("attention_bias", 1),
        ("mlp_bias", True),
        ("moe_layer_freq", [0, 1, 1]),
        ("moe_layer_freq", 0),
        ("num_nextn_predict_layers", -1),
        ("num_key_value_heads", 2),
        ("quantization_config", {"quant_method": "fp8"}),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [64, 64]}),
        ("quantization_config", {**FP8, "fmt": "e5m2"}),
        ("quantization_config", {**FP8, "scale_fmt": "e4m3"}),
        ("quantization_config", {**FP8, "activation_scheme": "static"}),
        ("quantization_config", {**FP8, "quant_method": "compressed-tensors"}),
        ("quantization_config", {"bits": 4}),
        ("quantization_config", "fp8"),
        ("topk_group", 9),
        ("num_experts_per_tok", 12),
        ("n_group", 3),
        ("kv_lora_rank", "absent"),
    ],
)
def test_unsupported_config_names_the_key(model_dir: Path, key: str, value: Any) -> None:
    edit_config(model_dir, **{key: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{key}"):
        load(model_dir)


def test_unknown_rope_type_is_named(model_dir: Path) -> None:
    edit_config(model_dir, rope_parameters={"rope_type": "longrope", "factor": 2.0})
    with pytest.raises(CheckpointError, match="rope_type is 'longrope'"):
        load(model_dir)


def test_yarn_without_its_original_context_is_refused(model_dir: Path) -> None:
    edit_config(model_dir, rope_parameters={"rope_type": "yarn", "factor": 2.0})
    with pytest.raises(CheckpointError, match="original_max_position_embeddings is missing"):
        load(model_dir)


def test_old_and_new_rope_keys_mean_the_same(model_dir: Path) -> None:
    raw = json.loads((model_dir / "config.json").read_text())
    new = raw | {"rope_parameters": {**YARN, "rope_theta": 5000.0}}
    old = {key: value for key, value in raw.items() if key != "rope_parameters"}
    old |= {"rope_theta": 5000.0, "rope_scaling": {**YARN, "type": "yarn"}}
    del old["rope_scaling"]["rope_type"]
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old)
    assert ModelConfig.from_hf(new).rope_scaling == YarnScaling(16.0, 64, 32.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_broken_config_json_is_named(model_dir: Path, content: str) -> None:
    (model_dir / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(model_dir)


def test_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load(tmp_path)


@pytest.mark.parametrize(("value", "expected"), [(7, {7}), ([1, 2], {1, 2}), (None, {1})])
def test_eos_ids_come_from_generation_config_first(
    model_dir: Path, value: Any, expected: set[int]
) -> None:
    path = model_dir / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": value}))
    assert load_eos_token_ids(model_dir) == expected
    path.unlink()
    assert load_eos_token_ids(model_dir) == {1}


def test_dtype_override_and_context_limit_are_checked(model_dir: Path) -> None:
    assert load(model_dir, max_context=100).max_context == 100
    for dtype in (torch.bfloat16, torch.float16):
        engine = load(model_dir, dtype=str(dtype).removeprefix("torch."))
        assert engine.pool.latents.dtype == dtype
    with pytest.raises(ConfigError, match="dtype is 'float8'"):
        load(model_dir, dtype="float8")
    with pytest.raises(ConfigError, match="max_context is 2000"):
        load(model_dir, max_context=2000)
