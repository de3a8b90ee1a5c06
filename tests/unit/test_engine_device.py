import pytest
import torch

from tidemill.engine.device import blocks_that_fit, find_device
from tidemill.errors import ConfigError

GIB = 1 << 30


def test_the_pool_takes_what_the_model_leaves_of_its_share() -> None:
    fit = blocks_that_fit(
        total_bytes=80 * GIB, free_bytes=50 * GIB, memory_share=0.9, block_bytes=GIB
    )
    assert fit == 42  # 72 GiB may be used, 30 are


def test_a_model_that_fills_its_share_is_refused_with_the_figures() -> None:
    with pytest.raises(ConfigError, match="no room for latents: 75 of 80 bytes are taken, 90%"):
        blocks_that_fit(total_bytes=80, free_bytes=5, memory_share=0.9, block_bytes=1)


@pytest.mark.parametrize("wanted", ["tpu?", "cuda:99", "mps"])
def test_a_device_that_is_not_there_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{wanted.replace('?', '.')}'"):
        find_device(wanted)


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
