"""Drives engines in tests as a worker does: allocates, commits and releases their blocks."""

from collections.abc import Iterable
from pathlib import Path

from tidemill.blocks import chain_hashes, root_hash
from tidemill.engine import (
    Engine,
    EngineConfig,
    FinishedOutput,
    Output,
    PrefilledOutput,
    SamplingParams,
    Sequence,
    TokensOutput,
)
from tidemill.errors import PoolExhausted

GREEDY = SamplingParams(temperature=0, max_tokens=32)


def load_engine(
    path: Path, *, num_blocks: int = 64, step_tokens: int = 512, max_batch: int = 32
) -> Engine:
    """An fp32-or-as-saved engine on one thread, so that test processes do not fight over cores."""
    config = EngineConfig(
        num_blocks=num_blocks,
        step_tokens=step_tokens,
        max_batch=max_batch,
        num_threads=1,
    )
    return Engine.load(path, config)


def make_sequence(
    engine: Engine, seq_id: str, prompt: list[int], sampling: SamplingParams = GREEDY
) -> Sequence:
    """A one-worker sequence with freshly allocated blocks."""
    blocks = engine.pool.allocate(-(-(len(prompt) + sampling.max_tokens) // 64))
    return Sequence(seq_id, prompt, block_table=blocks, sampling=sampling)


def make_sequence_with_reuse(
    engine: Engine, seq_id: str, prompt: list[int], sampling: SamplingParams = GREEDY
) -> Sequence:
    """As `make_sequence`, starting from the longest committed prefix."""
    claimed = engine.pool.claim(prompt_hashes(engine, prompt))
    needed = -(-(len(prompt) + sampling.max_tokens) // 64)
    try:
        blocks = claimed + engine.pool.allocate(needed - len(claimed))
    except PoolExhausted:
        engine.pool.release(claimed)
        raise
    return Sequence(
        seq_id,
        prompt,
        block_table=blocks,
        sampling=sampling,
        num_cached_tokens=64 * len(claimed),
    )


def prompt_hashes(engine: Engine, prompt: list[int]) -> list[bytes]:
    """Chain hashes of the prompt's full blocks."""
    return chain_hashes(prompt_root(engine), prompt)


def prompt_root(engine: Engine) -> bytes:
    """What the chains of one tenant hang on."""
    return root_hash(engine.layout.model_digest, engine.layout.kv_format, b"tenant")


def commit_prompt(engine: Engine, seq: Sequence) -> None:
    """Make the full blocks of a computed prompt findable."""
    hashes = prompt_hashes(engine, seq.token_ids[: seq.num_prompt_tokens])
    for block, block_hash in zip(seq.block_table, hashes, strict=False):
        engine.pool.commit(block, block_hash)


def run_all(engine: Engine) -> list[Output]:
    """Step until nothing is left to do."""
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def run_sequence(engine: Engine, seq: Sequence) -> list[int]:
    """Run one sequence to its end, release its blocks, return the tokens that were reported."""
    engine.submit(seq)
    tokens = generated(run_all(engine), seq.seq_id)
    engine.pool.release(seq.block_table)
    return tokens


def generated(outputs: Iterable[Output], seq_id: str) -> list[int]:
    """The sequence's tokens in order; asserts that indices are consecutive."""
    tokens: list[int] = []
    first: int | None = None
    for output in outputs:
        if isinstance(output, TokensOutput) and output.seq_id == seq_id:
            first = output.first_index if first is None else first
            assert output.first_index == first + len(tokens)
            tokens += output.token_ids
    return tokens


def finish_of(outputs: Iterable[Output], seq_id: str) -> FinishedOutput:
    """The sequence's one FinishedOutput."""
    (found,) = [o for o in outputs if isinstance(o, FinishedOutput) and o.seq_id == seq_id]
    return found


def first_token_of(outputs: Iterable[Output], seq_id: str) -> int:
    """The token that prefill drew."""
    (found,) = [o for o in outputs if isinstance(o, PrefilledOutput) and o.seq_id == seq_id]
    return found.first_token_id
