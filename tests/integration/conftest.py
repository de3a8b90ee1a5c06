"""One tiny checkpoint for all who only read it."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests.tiny_model makes of its defaults."""
    from tests.tiny_model import make_tiny_checkpoint  # noqa: PLC0415 - torch, which few need

    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def model_dir(tiny_dir: Path) -> Path:
    """The model that workers load, unless a folder or module has another."""
    return tiny_dir
