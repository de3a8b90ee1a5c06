"""The ways in which engines can come to the same tokens: what benchmarks.engine.numerics compares.

Each path takes requests and answers with the tokens of each. A path with neighbours runs the
requests together, the others one by one; all use the engine as a worker does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tidemill.blocks import BLOCK_TOKENS, chain_hashes, max_hit_tokens, root_hash
from tidemill.engine import (
    Engine,
    EngineConfig,
    FinishedOutput,
    PrefilledOutput,
    SamplingParams,
    TokensOutput,
)
from tidemill.engine import Sequence as Running
from tidemill.kv.segments import from_bytes, to_bytes

NUM_BLOCKS = 400
LONG_ENOUGH = 4096
REDISPATCHED_AFTER = 20
SCOPE = b"numerics"


@dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens to generate after it."""

    name: str
    prompt: list[int]
    num_new: int


Answers = dict[str, list[int]]
Path_ = Callable[["Engines", Sequence[Request]], Answers]


class Engines:
    """Engines over one checkpoint in one dtype, loaded once for each configuration."""

    def __init__(self, model_dir: Path, dtype: str) -> None:
        self._model_dir = model_dir
        self._base = EngineConfig(
            num_blocks=NUM_BLOCKS, dtype=dtype, step_tokens=LONG_ENOUGH, num_threads=1
        )
        self._loaded: dict[EngineConfig, Engine] = {}

    def get(self, **changes: Any) -> Engine:
        """The engine that differs from the plain one by `changes`; at most two are kept."""
        config = replace(self._base, **changes)
        if config not in self._loaded:
            while len(self._loaded) > 1:
                del self._loaded[next(reversed(self._loaded))]
            self._loaded[config] = Engine.load(self._model_dir, config)
        return self._loaded[config]


def greedy(num_new: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_new)


def root_of(engine: Engine) -> bytes:
    return root_hash(engine.layout.model_digest, engine.layout.kv_format, SCOPE)


def start(
    engine: Engine,
    request: Request,
    *,
    reuse: bool = False,
    room: int = BLOCK_TOKENS,
    **more: object,
) -> Running:
    """Blocks for the prompt and `room` more tokens, the prompt's start reused where it is held."""
    pool, prompt = engine.pool, request.prompt
    hashes = chain_hashes(root_of(engine), prompt)[: max_hit_tokens(len(prompt)) // BLOCK_TOKENS]
    claimed = pool.claim(hashes) if reuse else []
    needed = -(-min(len(prompt) + room, engine.max_context) // BLOCK_TOKENS)
    seq = Running(
        request.name,
        prompt,
        block_table=claimed + pool.allocate(needed - len(claimed)),
        sampling=greedy(request.num_new),
        num_cached_tokens=len(claimed) * BLOCK_TOKENS,
        **more,  # type: ignore[arg-type]  # passed on as they are
    )
    engine.submit(seq)
    return seq


def step(engine: Engine, seqs: Sequence[Running], answers: Answers) -> None:
    """One step: note the tokens, and give back at once what a sequence that has ended held."""
    for output in engine.step():
        if isinstance(output, TokensOutput):
            answers.setdefault(output.seq_id, []).extend(output.token_ids)
        elif isinstance(output, FinishedOutput):
            (ended,) = [seq for seq in seqs if seq.seq_id == output.seq_id]
            engine.pool.release(ended.block_table)


def finish(engine: Engine, *seqs: Running, answers: Answers | None = None) -> Answers:
    """Step until nothing is left, and give each sequence's tokens, after those noted before."""
    noted: Answers = {} if answers is None else answers
    while engine.has_work:
        step(engine, seqs, noted)
    engine.pool.check_integrity()
    assert engine.pool.num_referenced == 0
    return noted


def alone(engines: Engines, requests: Sequence[Request]) -> Answers:
    engine = engines.get()
    answers: Answers = {}
    for request in requests:
        answers |= finish(engine, start(engine, request))
    return answers


def chunked(step_tokens: int) -> Path_:
    def run(engines: Engines, requests: Sequence[Request]) -> Answers:
        engine = engines.get(step_tokens=step_tokens)
        answers: Answers = {}
        for request in requests:
            answers |= finish(engine, start(engine, request))
        return answers

    return run


def hit_device(engines: Engines, requests: Sequence[Request]) -> Answers:
    engine = engines.get(num_blocks=NUM_BLOCKS + 1)
    answers: Answers = {}
    for request in requests:
        finish(engine, start(engine, replace(request, num_new=1), root=root_of(engine)))
        answers |= finish(engine, start(engine, request, reuse=True))
    return answers


def split(engines: Engines, requests: Sequence[Request]) -> Answers:
    """Prefilled by one engine, its latents moved as bytes, decoded by another."""
    prefill, decode = engines.get(), engines.get(num_blocks=NUM_BLOCKS + 2)
    answers: Answers = {}
    for request in requests:
        seq = start(prefill, request, prefill_only=True)
        (done,) = [each for each in drain(prefill) if isinstance(each, PrefilledOutput)]
        needed = -(-(len(request.prompt) + BLOCK_TOKENS) // BLOCK_TOKENS)
        table = decode.pool.allocate(needed)
        for layer in range(prefill.layout.num_layers):
            moved = to_bytes(prefill.pool.read(layer, seq.block_table, 0, len(request.prompt)))
            values = from_bytes(moved, decode.pool.latents.dtype)
            decode.pool.write(layer, table, 0, values.view(len(request.prompt), -1))
        prefill.pool.release(seq.block_table)
        landed = Running(
            request.name,
            request.prompt,
            block_table=table,
            sampling=greedy(request.num_new),
            first_token_id=done.first_token_id,
        )
        decode.submit(landed)
        answers[request.name] = [done.first_token_id]
        answers[request.name] += finish(decode, landed)[request.name]
    return answers


def drain(engine: Engine) -> list[object]:
    outputs: list[object] = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def batch(size: int) -> Path_:
    """Up to `size` together, joining one step after the other and leaving when they are done.

    Neighbours fill the batch; steps are short enough that prompts are computed beside decoding.
    """

    def run(engines: Engines, requests: Sequence[Request]) -> Answers:
        engine = engines.get(step_tokens=max(2 * size, 48), max_batch=size)
        answers: Answers = {}
        for first in range(0, len(requests), size):
            group = requests[first : first + size]
            neighbours = [
                Request(f"neighbour {i}", [*each.prompt[::-1], 5 + i], 3 + 5 * (i % 7))
                for i, each in enumerate([*requests] * size)
            ][: size - len(group)]
            seqs: list[Running] = []
            noted: Answers = {}
            for request in [*group, *neighbours]:
                seqs.append(start(engine, request))
                step(engine, seqs, noted)
            answers |= finish(engine, *seqs, answers=noted)
        return {request.name: answers[request.name] for request in requests}

    return run


def swapped(engines: Engines, requests: Sequence[Request]) -> Answers:
    """Too few blocks for all: the youngest are swapped out to host memory and come back."""
    answers: Answers = {}
    size = 6
    for first in range(0, len(requests), size):
        group = requests[first : first + size]
        num_blocks = sum(-(-(len(each.prompt) + 1) // BLOCK_TOKENS) for each in group)
        engine = engines.get(num_blocks=num_blocks, swap_blocks=NUM_BLOCKS)
        seqs = [start(engine, each, room=1) for each in group]
        noted: Answers = {}
        while engine.has_work and not engine.load_snapshot().swapped:
            step(engine, seqs, noted)
        assert engine.has_work, "nothing was swapped out"
        answers |= finish(engine, *seqs, answers=noted)
    return answers


def forked(engines: Engines, requests: Sequence[Request]) -> Answers:
    """The last of three choices that share their prompt's blocks."""
    engine = engines.get()
    answers: Answers = {}
    for request in requests:
        forks = [
            Running(name, request.prompt, block_table=[], sampling=greedy(request.num_new))
            for name in ("second", f"{request.name} third")
        ]
        parent = start(engine, replace(request, name="first"), forks=forks)
        found = finish(engine, parent, *forks)
        answers[request.name] = found[f"{request.name} third"]
    return answers


def redispatched(engines: Engines, requests: Sequence[Request]) -> Answers:
    """The first tokens elsewhere; then prompt and tokens as a new prompt, as after a failover."""
    engine = engines.get()
    answers: Answers = {}
    for request in requests:
        kept = min(REDISPATCHED_AFTER, request.num_new - 1)
        begun = finish(engine, start(engine, replace(request, num_new=kept)))[request.name]
        rest = replace(request, prompt=request.prompt + begun, num_new=request.num_new - kept)
        resumed = start(engine, rest, num_relayed_tokens=kept)
        answers[request.name] = begun + finish(engine, resumed)[request.name]
    return answers


PATHS: dict[str, Path_] = {
    "whole prompt, then alone": alone,
    "chunks of 7": chunked(7),
    "chunks of 61": chunked(61),
    "hit, all but the last block": hit_device,
    "prefilled elsewhere": split,
    "batch of 8, joining and leaving": batch(8),
    "batch of 32, joining and leaving": batch(32),
    "swapped out and resumed": swapped,
    "third of three choices": forked,
    "re-dispatched after 20 tokens": redispatched,
}
