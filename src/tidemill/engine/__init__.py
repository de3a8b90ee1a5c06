"""The engine of one worker: sequences, scheduler, paged latent pool, runner, sampler.

engine = Engine.load(model_dir, EngineConfig(num_blocks=256))
engine.submit(Sequence("a", prompt, block_table=engine.pool.allocate(8), sampling=SamplingParams()))
while engine.has_work:
    for output in engine.step(): ...
"""

from tidemill.engine.block_pool import BlockPool
from tidemill.engine.config import EngineConfig
from tidemill.engine.engine import Engine
from tidemill.engine.layout import KvLayout
from tidemill.engine.logprobs import TokenLogprobs
from tidemill.engine.outputs import (
    EngineLoad,
    FinishedOutput,
    Output,
    PausedOutput,
    PrefilledOutput,
    TokensOutput,
)
from tidemill.engine.reservation import PoolTier, Reservation
from tidemill.engine.sampling import Drawn, SamplingParams
from tidemill.engine.sequence import FinishReason, Sequence
from tidemill.engine.step_cost import BusyTime, StepCost
from tidemill.errors import PoolCorrupted

__all__ = [
    "BlockPool",
    "BusyTime",
    "Drawn",
    "Engine",
    "EngineConfig",
    "EngineLoad",
    "FinishReason",
    "FinishedOutput",
    "KvLayout",
    "Output",
    "PausedOutput",
    "PoolCorrupted",
    "PoolTier",
    "PrefilledOutput",
    "Reservation",
    "SamplingParams",
    "Sequence",
    "StepCost",
    "TokenLogprobs",
    "TokensOutput",
]
