"""The engine, its pool and a hand-over on a GPU."""

from pathlib import Path

import pytest
import torch

from tests.engine_harness import GREEDY, generated, make_sequence, run_all
from tidemill.engine import BlockPool, Engine, EngineConfig, KvLayout, SamplingParams, Sequence
from tidemill.engine.runner import ModelRunner
from tidemill.engine.scheduler import Step
from tidemill.engine.swap import SwapSpace

pytestmark = pytest.mark.gpu

DEMO = Path(__file__).parents[2] / "models/demo"
LAYERS, DIM = 3, 48


def random_pool(seed: int) -> BlockPool:
    pool = BlockPool(
        num_layers=LAYERS,
        num_blocks=8,
        latent_dim=DIM,
        dtype=torch.bfloat16,
        device="cuda",
        host_blocks=2,
    )
    pool.latents.copy_(torch.randn(pool.latents.shape, generator=torch.manual_seed(seed)))
    return pool


def test_recorded_steps_compute_what_eager_ones_do() -> None:
    """Bit for bit, but for a batch that is padded: its sums are of another order."""
    config = EngineConfig(device="cuda", max_batch=8, max_context=512, num_blocks=16)
    runner = Engine.load(DEMO, config)._runner
    assert isinstance(runner, ModelRunner)
    assert runner._graphs is not None
    eager = ModelRunner(runner.model, runner.pool)
    runner.pool.latents.normal_()
    seqs = [
        Sequence(str(length), list(range(6, 6 + length)), block_table=table, sampling=GREEDY)
        for length, table in ((1, [3]), (63, [9]), (200, [1, 8, 2, 12]))
    ]
    for batch in (1, 2, 3):
        step = Step(decodes=seqs[:batch])
        found, expected = runner.forward(step).clone(), eager.forward(step)
        if batch < 3:
            assert torch.equal(found, expected)
        differences = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
        assert differences.median().item() < 0.02  # rounding may turn a choice of experts


def test_an_engine_generates_on_a_gpu() -> None:
    config = EngineConfig(device="cuda", max_batch=8, max_context=512, num_blocks=64)
    engine = Engine.load(DEMO, config)
    for number, length in enumerate((1, 63, 200)):
        params = SamplingParams(temperature=0.8 * (number > 0), seed=number, max_tokens=24)
        token_ids = torch.randint(6, 512, (length,), generator=torch.manual_seed(length))
        engine.submit(make_sequence(engine, str(number), token_ids.tolist(), params))
    outputs = run_all(engine)
    assert all(len(generated(outputs, str(number))) > 1 for number in range(3))


def test_the_pool_takes_what_the_model_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that looks like one of 20 GB, 16 of them free: other tests use this one too."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(torch.device("cuda", 0))
    assert 0 < free_bytes < total_bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (16 << 30, 20 << 30))
    config = EngineConfig(
        device="cuda", max_batch=2, max_context=512, memory_share=0.3, swap_blocks=0
    )
    pool = Engine.load(DEMO, config).pool
    room = (6 << 30) - (4 << 30)
    assert room - pool.latents[:, 0].nbytes < pool.latents.nbytes <= room


def test_swapped_blocks_come_back_bitwise() -> None:
    pool = random_pool(1)
    swap = SwapSpace(2, pool.latents)
    before = pool.latents[:, 3].clone()
    kept = swap.put(pool.latents[:, 3], holders=1)
    pool.latents[:, 3] = 0
    pool.write_block(3, swap.read(kept))
    assert torch.equal(pool.latents[:, 3], before)


def test_a_hand_over_between_gpus_pools_is_bitwise() -> None:
    pytest.importorskip("xxhash")
    from tidemill.api.prefill.v1.prefill_service_pb2 import PullKvResponse  # noqa: PLC0415
    from tidemill.kv.segments import Landing, LatentMemory, LatentRange, pack  # noqa: PLC0415

    source, sink, tokens = random_pool(1), random_pool(2), 150
    layout = KvLayout("bfloat16", LAYERS, DIM, b"m" * 32)
    landing = Landing(sink, layout, [5, 1, 2], first_token=0, num_tokens=tokens)
    ranges = [LatentRange(layer, 0, tokens) for layer in range(LAYERS)]
    message = PullKvResponse.FromString(pack(LatentMemory(source), [7, 0, 3], ranges))
    landing.write(list(message.segments))
    landing.check_complete()
    for layer in range(LAYERS):
        assert torch.equal(
            sink.read(layer, [5, 1, 2], 0, tokens), source.read(layer, [7, 0, 3], 0, tokens)
        )
