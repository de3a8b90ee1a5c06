"""Prompts of its own before a worker serves: its memory is warm, and it knows what computing costs.

Without that a worker whose every prompt is held elsewhere would never learn when to compute, and
one that decodes would not know how much of a prompt it can compute without holding others up.
"""

import asyncio

from tidemill.blocks import BLOCK_TOKENS
from tidemill.engine import Output, PrefilledOutput, SamplingParams, Sequence
from tidemill.errors import Internal
from tidemill.policy import FetchOrRecompute
from tidemill.worker.engine_thread import EngineThread

LENGTHS = (64, 64, 512)  # tokens; the first is not counted


async def warm_up(thread: EngineThread, policy: FetchOrRecompute) -> None:
    """Compute a few prompts, as far as pool and context hold them. Raises what a step does.

    On a GPU first one of every kind that kernels are compiled for, which takes seconds each.
    """
    engine = thread.engine
    most = min(engine.max_context - 1, engine.pool.num_blocks * BLOCK_TOKENS)
    if engine.pool.latents.is_cuda:
        for num_tokens in kinds_of_rows(min(engine.config.step_tokens, most)):
            await _prefill(thread, num_tokens)
    for number, length in enumerate(LENGTHS):
        num_tokens = min(length, most)
        seconds = await _prefill(thread, num_tokens)
        if number:
            policy.computed(num_tokens / BLOCK_TOKENS, seconds)


def kinds_of_rows(most: int) -> list[int]:
    """Rows of a step, at most `most`, one number for each way in which kernels are compiled.

    Tiles change at powers of two, and what 16 divides is compiled apart, as is 1.
    """
    powers = [1 << power for power in range(most.bit_length())]
    return sorted({rows for power in powers for rows in (power - 1, power) if rows > 0} | {most})


def tokens_within(policy: FetchOrRecompute, seconds: float) -> int:
    """Prompt tokens that a step computes in that time more than it would without them."""
    return int(seconds / policy.compute_s(1) * BLOCK_TOKENS)


async def _prefill(thread: EngineThread, num_tokens: int) -> float:
    """Seconds of computing one prompt that nobody asked for."""
    pool, vocab_size = thread.engine.pool, thread.engine.model_config.vocab_size
    done: asyncio.Future[Output] = asyncio.get_running_loop().create_future()

    def on_output(output: Output | Internal) -> None:
        if isinstance(output, Internal):
            done.set_exception(output)
        else:
            done.set_result(output)

    seq = Sequence(
        "warm-up",
        [number * 7919 % vocab_size for number in range(num_tokens)],
        block_table=pool.allocate(-(-num_tokens // BLOCK_TOKENS)),
        sampling=SamplingParams(temperature=0, max_tokens=1),
        prefill_only=True,
    )
    thread.submit(seq, on_output)
    assert isinstance(await done, PrefilledOutput)
    pool.release(seq.block_table)
    return seq.prefill_ns / 1e9
