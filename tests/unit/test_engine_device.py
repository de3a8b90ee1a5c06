import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine_harness import GREEDY, load_engine, make_sequence
from tidemill.engine import Engine, EngineConfig
from tidemill.engine import device as devices
from tidemill.engine.device import blocks_that_fit, find_device, refuse_widths, step_bytes
from tidemill.errors import ConfigError
from tidemill.kernels import choice
from tidemill.models.presets import load_preset

GIB = 1 << 30
DEMO = Path(__file__).parents[2] / "models/demo"


@pytest.mark.parametrize(("step_gib", "blocks"), [(0, 42), (8, 42), (20, 30)])
def test_the_pool_takes_what_model_and_step_leave_of_its_share(step_gib: int, blocks: int) -> None:
    """72 of 80 GiB may be used and 30 are, or less where a step takes more than the other 8."""
    fit = blocks_that_fit(
        total_bytes=80 * GIB,
        free_bytes=50 * GIB,
        memory_share=0.9,
        step_bytes=step_gib * GIB,
        block_bytes=GIB,
    )
    assert fit == blocks


@pytest.mark.parametrize(("max_context", "gib"), [(4096, 2.15), (131_072, 8.4)])
def test_a_step_of_deepseek_v3_takes_most_for_its_contexts_keys(
    max_context: int, gib: float
) -> None:
    """64 KB a token for 128 heads, of at least 32,768 tokens of several prompts together."""
    needed = step_bytes(
        load_preset("deepseek-v3"),
        value_bytes=2,
        step_tokens=512,
        max_batch=32,
        max_context=max_context,
    )
    assert needed / GIB == pytest.approx(gib, rel=0.1)


def test_a_steps_launches_go_to_its_own_device_from_any_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    devices.use(torch.device("cpu"))
    devices.use(torch.device("cuda", 1))
    assert used == [torch.device("cuda", 1)]


def test_a_step_ends_when_the_device_has_computed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk in the midst of a prompt draws nothing that would wait for the device."""
    engine = load_engine(DEMO, step_tokens=64)
    happened: list[str] = []

    def noting(name: str) -> Callable[[torch.device], None]:
        return lambda _: happened.append(name)

    monkeypatch.setattr(devices, "use", noting("use"))
    monkeypatch.setattr(devices, "wait_for", noting("wait"))
    engine.submit(make_sequence(engine, "a", [7] * 100, GREEDY))
    assert not engine.step()
    assert happened == ["use", "wait"]
    assert engine.step()
    assert happened == ["use", "wait", "use"]


def test_a_model_that_fills_its_share_is_refused_with_the_figures() -> None:
    with pytest.raises(ConfigError, match="no room for latents: 75 of 80 bytes are taken, 90%"):
        blocks_that_fit(total_bytes=80, free_bytes=5, memory_share=0.9, step_bytes=0, block_bytes=1)


@pytest.mark.parametrize("wanted", ["tpu?", "cuda:99", "mps"])
def test_a_device_that_is_not_there_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{wanted.replace('?', '.')}'"):
        find_device(wanted)


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"])
@pytest.mark.parametrize("width", [8, 144])
def test_widths_that_the_kernels_do_not_take_are_refused_by_name(name: str, width: int) -> None:
    config = load_preset("deepseek-v3")
    changed: dict[str, Any] = {name: width}
    refuse_widths(config)
    with pytest.raises(ConfigError, match=rf"{name} is {width}, .* powers of two from 16"):
        refuse_widths(replace(config, **changed))


def test_an_engine_on_kernels_refuses_widths_before_it_looks_for_weights(tmp_path: Path) -> None:
    config = json.loads((DEMO / "config.json").read_text()) | {"kv_lora_rank": 144}
    (tmp_path / "config.json").write_text(json.dumps(config))
    on_kernels = EngineConfig(num_blocks=12, device="cpu", kernels="triton")
    with choice.forced("auto"), pytest.raises(ConfigError, match="kv_lora_rank is 144"):
        Engine.load(tmp_path, on_kernels)
