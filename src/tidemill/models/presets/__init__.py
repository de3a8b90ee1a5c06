"""Published models' configurations, as data: the fields of their `config.json` that shape them."""

import json
from importlib.resources import files

from tidemill.errors import ConfigError
from tidemill.models.config import ModelConfig


def preset_names() -> list[str]:
    """What `load_preset` knows, sorted."""
    folder = files(__name__).iterdir()
    return sorted(
        entry.name.removesuffix(".json") for entry in folder if entry.name.endswith(".json")
    )


def load_preset(name: str) -> ModelConfig:
    """The configuration that a published model has; ConfigError lists the names if it is none."""
    if name not in preset_names():
        raise ConfigError(f"preset is {name!r}, expected one of {preset_names()}")
    file = f"{name}.json"
    return ModelConfig.from_hf(json.loads((files(__name__) / file).read_text()), file)
