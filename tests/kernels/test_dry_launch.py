"""What the first step on a GPU would do, on one that is not there (`dry_gpu.py`, `dry_runs.py`)."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels.compiling import HERE, ON_GPUS, output_of
from tests.kernels.dry_gpu import DryGpu, Launcher

MOST_LAUNCHES = 20  # of a decode step's layer


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(HERE, id="here"),
        pytest.param(ON_GPUS, id="3.6", marks=pytest.mark.slow),
    ],
)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What tests.kernels.dry_runs found, a row a run."""
    out = tmp_path_factory.mktemp("dry") / "dry.json"
    output_of(request.param, "-m", "tests.kernels.dry_runs", "--out", out)
    return json.loads(out.read_text("utf-8"))["rows"]


@pytest.mark.timeout(600)  # cold; some 25 s when Triton's cache knows the kernels
def test_every_run_comes_to_its_end(rows: list[dict[str, Any]]) -> None:
    assert rows
    assert {row["run"]: row["error"] for row in rows if row["error"]} == {}
    assert all(row["launches"] for row in rows)


@pytest.mark.timeout(600)
def test_nothing_waits_inside_a_graph(rows: list[dict[str, Any]]) -> None:
    assert {row["run"]: row["captured_waits"] for row in rows if row["captured_waits"]} == {}


@pytest.mark.timeout(600)
def test_no_kernel_as_it_is_launched_spills(rows: list[dict[str, Any]]) -> None:
    assert {row["run"]: row["spills"] for row in rows if row["spills"]} == {}


@pytest.mark.timeout(600)
def test_a_layer_of_a_decode_step_takes_few_launches(rows: list[dict[str, Any]]) -> None:
    layers = {row["run"]: row["launches_a_layer"] for row in rows if "decode " in row["run"]}
    assert len(layers) == 3
    assert {run: found for run, found in layers.items() if len(found) > MOST_LAUNCHES} == {}


@pytest.mark.timeout(600)
def test_a_layers_launches_do_not_grow_with_prompts(rows: list[dict[str, Any]]) -> None:
    found = {row["run"]: row["launches_a_layer"] for row in rows if "prefill " in row["run"]}
    assert 0 < len(found["prefill 3 300"]) <= len(found["prefill 1 300"])


@pytest.mark.timeout(600)
def test_an_engine_waits_for_tokens_and_logprobs_alone(rows: list[dict[str, Any]]) -> None:
    """Whatever a step sends is on its way while the device computes; what is read ends the step."""
    (waits,) = (row["waits"] for row in rows if row["run"] == "engine v3")
    of_steps: Counter[str] = Counter()
    for where, count in waits.items():
        file = Path(where.partition(":")[0])
        if file.parent.name == "engine" and file.stem != "decode_graphs":  # made once
            of_steps[file.stem] += count
    # Three steps draw; logprobs are of the prompt's 69 tokens and of three drawn ones.
    assert of_steps == {"sampling": 3, "logprobs": 6}


@pytest.mark.parametrize("read", ["item", "tolist", "cpu", "nonzero", "__float__", "__bool__"])
def test_a_read_is_a_wait(read: str) -> None:
    with DryGpu() as gpu:
        one = torch.zeros(1, device="cuda")[0]
        assert gpu.waits == []
        with gpu.capture():
            getattr(one, read)()
    assert [each.captured for each in gpu.waits] == [True]


def test_a_number_that_is_an_index_and_a_mask_are_reads() -> None:
    with DryGpu() as gpu:
        table = torch.zeros(8, 4, device="cuda")
        assert table[torch.tensor(1), 2:].shape == (2,)
        assert gpu.waits == []
        assert table[table[0, 0].long(), 2:].shape == (2,)
        table[table > 0]
        assert len(gpu.waits) == 2
        assert table[torch.zeros(3, device="cuda").long()].shape == (3, 4)
    assert len(gpu.waits) == 2


def test_a_send_from_pageable_memory_is_a_wait_and_one_from_pinned_memory_is_none() -> None:
    with DryGpu() as gpu:
        there = torch.empty(4, device="cuda")
        there.copy_(torch.zeros(4, pin_memory=True), non_blocking=True)
        assert gpu.waits == []
        there.copy_(torch.zeros(4), non_blocking=True)
        torch.tensor([1, 2], device="cuda")
    assert len(gpu.waits) == 2


def test_only_what_computes_is_a_launch() -> None:
    with DryGpu() as gpu:
        table = torch.zeros(8, 4, device="cuda")
        gpu.clear()
        view = table[2:, 1].unsqueeze(0).expand(3, -1)
        assert (view.shape, view.stride(), view.storage_offset()) == ((3, 6), (0, 4), 9)
        assert gpu.launches == []
        table[1] = 2
        torch.nn.functional.linear(table, table)
    assert [each.name for each in gpu.launches] == ["aten.copy_.default", "aten.mm.default"]


def launch(grid: tuple[int, int, int], *args: object, box: tuple[int, ...] = (1, 64)) -> None:
    descriptors = [{"swizzle": 3, "block_size": list(box)}]
    metadata = SimpleNamespace(
        global_scratch_size=0,
        tensordesc_meta=descriptors if isinstance(args[0], TensorDescriptor) else [],
    )
    source = SimpleNamespace(fn=SimpleNamespace(__name__="kernel"))
    Launcher(source, metadata)(*grid, 0, None, None, None, None, None, *args)


def test_what_the_hardware_would_refuse_is_refused() -> None:
    with DryGpu() as gpu:
        there = torch.empty(64, 64, device="cuda", dtype=torch.bfloat16)
        whole = TensorDescriptor.from_tensor(there, [1, 64])
        gpu.clear()
        launch((3, 1, 1), there)
        launch((3, 1, 1), whole)
        assert [each.grid for each in gpu.launches] == [(3, 1, 1)] * 2
        with pytest.raises(ValueError, match="a grid of"):
            launch((1, 65_536, 1), there)
        with pytest.raises(ValueError, match="CPU"):
            launch((1, 1, 1), torch.empty(4))
        with pytest.raises(ValueError, match="no descriptor"):
            launch((1, 1, 1), whole, box=(1, 512))
        moved = TensorDescriptor(there[:, 1:], [64, 32], [64, 1], [1, 32])
        with pytest.raises(ValueError, match="no descriptor"):
            launch((1, 1, 1), moved)
    assert len(gpu.launches) == 2
