"""A model whose next token is a hash of all latents before it, so that a wrong latent shows."""

import functools
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from tests.engine_harness import finish_of, generated
from tidemill.blocks import BLOCK_TOKENS
from tidemill.engine import (
    BlockPool,
    Engine,
    EngineConfig,
    FinishedOutput,
    KvLayout,
    Output,
    SamplingParams,
    Sequence,
)
from tidemill.engine.sampling import draw
from tidemill.engine.scheduler import Step
from tidemill.errors import PoolExhausted
from tidemill.models.config import ModelConfig

VOCAB = 24
MAX_CONTEXT = 640
ROOT = b"r" * 32
_PRIME = 16_777_213  # products of two residues fit an fp64
_WEIGHTS = torch.arange(1, MAX_CONTEXT + 1, dtype=torch.float64) * 7919 % 65_521


def latents_of(token_ids: list[int], salt: int, start: int = 0) -> Tensor:
    """What lies in the pool for positions from `start` on: [n, 1]."""
    tokens = torch.tensor(token_ids[start:], dtype=torch.float64)
    positions = torch.arange(start, len(token_ids), dtype=torch.float64)
    return ((tokens + 1) * 7717 + positions * 104_729 + salt).remainder(65_521).unsqueeze(1)


def salt_of(seq: Sequence) -> int:
    """Latents of different roots differ, so that one tenant's never pass for another's."""
    return 0 if seq.root is None else seq.root[0]


class HashingRunner:
    """One layer of latents with one value each. Whatever is findable must never be written."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(
            num_layers=1, num_blocks=num_blocks, latent_dim=1, dtype=torch.float64
        )
        self.steps: list[Step] = []

    def forward(self, step: Step) -> Tensor:
        """Writes the rows' latents, then hashes what each row can see: [T, 1]."""
        self.steps.append(step)
        spans = [(seq, len(seq.token_ids) - 1, len(seq.token_ids)) for seq in step.decodes]
        writes = spans + [(chunk.seq, chunk.write_start, chunk.end) for chunk in step.chunks]
        spans += [(chunk.seq, chunk.start, chunk.end) for chunk in step.chunks]
        for seq, start, end in writes:
            written = seq.block_table[start // BLOCK_TOKENS : blocks_up_to(end)]
            assert start == end or self.pool._hash_of.keys().isdisjoint(written)
            values = latents_of(seq.token_ids[:end], salt_of(seq), start)
            if end - start == 1:
                block, offset = divmod(start, BLOCK_TOKENS)
                self.pool.latents[0, seq.block_table[block], offset] = values[0]
            else:
                self.pool.write(0, seq.block_table, start, values)
        hidden = torch.zeros(step.num_tokens, 1, dtype=torch.float64)
        row = 0
        for seq, start, end in spans:
            row += end - start
            seen = self.pool.latents[0, seq.block_table].flatten()[:end]
            hidden[row - 1] = _hash(seen)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, 1] -> [N, VOCAB]."""
        return _logits(hidden)


def undisturbed(seq: Sequence, num_tokens: int) -> list[int]:
    """What the sequence generates when nothing ever gets in its way."""
    prompt = tuple(seq.token_ids[: seq.num_prompt_tokens])
    alone = _alone(prompt, seq.sampling, seq.root)
    while alone.num_generated < num_tokens:
        seen = latents_of(alone.token_ids, salt_of(alone)).flatten()
        (drawn,) = draw(_logits(_hash(seen).view(1, 1)), [alone])
        alone.token_ids.append(drawn.token_id)
    return alone.token_ids[alone.num_prompt_tokens :][:num_tokens]


def hashing_engine(
    *, num_blocks: int, swap_blocks: int = 8, max_batch: int = 4, step_tokens: int = 48
) -> tuple[Engine, HashingRunner]:
    """A whole engine around it."""
    runner = HashingRunner(num_blocks)
    config = EngineConfig(
        num_blocks=num_blocks,
        swap_blocks=swap_blocks,
        max_batch=max_batch,
        step_tokens=step_tokens,
    )
    shape = SimpleNamespace(vocab_size=VOCAB, max_position_embeddings=MAX_CONTEXT)
    engine = Engine(
        config=config,
        model_config=cast(ModelConfig, shape),
        eos_token_ids=frozenset(),
        runner=runner,
        layout=KvLayout("float32", 1, 1, b"hashing"),
        cost=lambda step: [1] * len(step.decodes) + [chunk.num_tokens for chunk in step.chunks],
    )
    return engine, runner


class HashingBench:
    """An engine, its sequences, and everything it has said; ended sequences are released."""

    def __init__(self, *, num_blocks: int, swap_blocks: int, step_tokens: int = 256) -> None:
        self.engine: Engine
        self.runner: HashingRunner
        self.engine, self.runner = hashing_engine(
            num_blocks=num_blocks, swap_blocks=swap_blocks, step_tokens=step_tokens
        )
        self.seqs: dict[str, Sequence] = {}
        self.outputs: list[Output] = []

    def submit(
        self,
        seq_id: str,
        length: int,
        max_tokens: int,
        *,
        funded: int | None = None,
        forks: int = 0,
        handed_over: bool = False,
    ) -> Sequence:
        """With `handed_over`, blocks and first tokens come as from another worker."""
        prompt = [(position + len(self.seqs)) % VOCAB for position in range(length)]
        choices = []
        for choice in range(forks + 1):
            sampling = SamplingParams(seed=choice, max_tokens=max_tokens)
            alone = Sequence("alone", prompt, sampling=sampling, root=ROOT)
            seq = Sequence(
                f"{seq_id}{choice or ''}",
                prompt,
                sampling=sampling,
                num_funded_tokens=funded,
                first_token_id=undisturbed(alone, 1)[0] if handed_over else None,
                root=ROOT,
            )
            choices.append(seq)
        parent = choices[0]
        parent.block_table = self.engine.pool.allocate(blocks_up_to(length))
        parent.forks = choices[1:]
        if handed_over:
            values = latents_of(prompt, salt_of(parent))
            self.engine.pool.write(0, parent.block_table, 0, values)
        try:
            self.engine.submit(parent)
        except PoolExhausted:
            self.engine.pool.release(parent.block_table)
            raise
        self.seqs |= {seq.seq_id: seq for seq in choices}
        return parent

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            outputs = self.engine.step()
            self.outputs += outputs
            for output in outputs:
                if isinstance(output, FinishedOutput):
                    self.engine.pool.release(self.seqs[output.seq_id].block_table)

    def until_swapped(self, count: int = 1) -> None:
        while self.engine.num_swapped < count:
            self.step()

    def run(self) -> None:
        """To the end; every stream is what it would have been alone, and nothing is left."""
        while self.engine.has_work:
            self.step()
            assert not self.engine.starved
        for seq_id, seq in self.seqs.items():
            tokens = generated(self.outputs, seq_id)
            first = seq.num_generated - len(tokens)
            assert tokens == undisturbed(seq, seq.num_generated)[first:]
            assert finish_of(self.outputs, seq_id).num_generated == seq.num_generated
        self.engine.check_idle()


def blocks_up_to(num_positions: int) -> int:
    """Blocks that so many positions take."""
    return -(-num_positions // BLOCK_TOKENS)


@functools.cache
def _alone(prompt: tuple[int, ...], sampling: SamplingParams, root: bytes | None) -> Sequence:
    """Grows as it is asked for more; the same prompt is asked for often."""
    return Sequence("alone", prompt, sampling=sampling, root=root)


def _hash(seen: Tensor) -> Tensor:
    return (seen * _WEIGHTS[: len(seen)]).remainder(_PRIME).sum().remainder(_PRIME)


def _logits(hidden: Tensor) -> Tensor:
    factors = torch.arange(1, VOCAB + 1, dtype=torch.float64) * 15_485_863 % 65_521
    return (hidden * factors).remainder(1009) / 200
