"""The engine, its pool and a hand-over on a GPU."""

from pathlib import Path

import pytest
import torch

from tests.engine_harness import generated, make_sequence, run_all
from tidemill.engine import BlockPool, Engine, EngineConfig, KvLayout, SamplingParams
from tidemill.engine.runner import ModelRunner
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


def test_recorded_steps_generate_what_eager_ones_do() -> None:
    config = EngineConfig(device="cuda", max_batch=8, max_context=512, num_blocks=64)
    engine = Engine.load(DEMO, config)
    assert isinstance(engine._runner, ModelRunner)
    assert engine._runner._graphs is not None
    found = []
    for runner in (engine._runner, ModelRunner(engine._runner.model, engine.pool)):
        engine._runner = runner
        for number, length in enumerate((1, 63, 200)):
            params = SamplingParams(temperature=0.8 * (number > 0), seed=number, max_tokens=24)
            token_ids = torch.randint(6, 512, (length,), generator=torch.manual_seed(length))
            engine.submit(make_sequence(engine, str(number), token_ids.tolist(), params))
        outputs = run_all(engine)
        found.append([generated(outputs, str(number)) for number in range(3)])
    assert found[0] == found[1]
    assert all(len(tokens) > 1 for tokens in found[0])


def test_the_pool_takes_what_the_model_leaves() -> None:
    config = EngineConfig(device="cuda", max_batch=2, max_context=512, memory_share=0.2)
    engine = Engine.load(DEMO, config)
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    assert engine.pool.latents.nbytes > 0
    assert total_bytes - free_bytes < 0.3 * total_bytes


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
