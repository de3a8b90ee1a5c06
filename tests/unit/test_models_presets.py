"""Presets against what was published about the models."""

import pytest

from tidemill.errors import ConfigError
from tidemill.models.parameters import num_active_parameters, num_parameters
from tidemill.models.presets import load_preset, preset_names

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
