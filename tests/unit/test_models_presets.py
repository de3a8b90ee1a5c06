"""Presets against what was published about the models."""

import json
from pathlib import Path
from typing import Any

import pytest

from tidemill.errors import CheckpointError, ConfigError
from tidemill.models.config import ModelConfig
from tidemill.models.parameters import num_active_parameters, num_parameters
from tidemill.models.presets import load_preset, preset_names
from tidemill.models.rope import rope_table, softmax_scale

FOLDER = Path(__file__).resolve().parents[2] / "src/tidemill/models/presets"

# name -> billions of parameters and of those active for a token, each with how far it was rounded;
# latent bytes a token in bf16 over all layers.
PUBLISHED = {
    "deepseek-v2-lite": ((15.7, 0.05), (2.4, 0.06), 31_104),
    "deepseek-v2": ((236, 0.5), (21, 0.5), 69_120),
    "deepseek-v3": ((671, 0.5), (37, 0.5), 70_272),
    "moonlight-16b-a3b": ((16, 0.5), (3, 0.5), 31_104),
}


def test_every_preset_is_held_against_its_publication() -> None:
    assert preset_names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_size(name: str) -> None:
    config = load_preset(name)
    total, active, latent_bytes = PUBLISHED[name]
    assert abs(num_parameters(config) / 1e9 - total[0]) < total[1]
    assert abs(num_active_parameters(config) / 1e9 - active[0]) < active[1]
    assert config.num_hidden_layers * config.latent_dim * 2 == latent_bytes


def test_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'gpt-2', expected one of .*'deepseek-v3'"):
        load_preset("gpt-2")


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("value", [None, "", "x", [], ["x"], {}, {"a": 1}, -1, 0, 1, 2.5, True])
def test_any_value_of_any_key_makes_a_usable_config_or_a_named_error(name: str, value: Any) -> None:
    raw = json.loads((FOLDER / f"{name}.json").read_text())
    changed = [{**raw, key: value} for key in raw]
    for inside in ("rope_scaling", "quantization_config"):
        part = raw.get(inside, {})
        changed += [{**raw, inside: {**part, key: value}} for key in part]
    errors = [use(each) for each in changed]
    assert all(error.startswith("here: ") for error in errors if error is not None)


def use(raw: dict[str, Any]) -> str | None:
    """What is wrong with a config, or None after computing with it."""
    try:
        config = ModelConfig.from_hf(raw, "here")
    except CheckpointError as error:
        return str(error)
    assert num_active_parameters(config) > 0
    assert softmax_scale(config) > 0
    assert rope_table(config, 3).isfinite().all()
    return None
