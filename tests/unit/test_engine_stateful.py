"""Pool, scheduler, swap and forks against a simple model, whatever order things come in.

The model: every sequence generates what it would generate alone; every block has exactly the
holders that tables, swapped pages and outsiders account for; whatever is findable holds what its
hash promises; and a sequence that nobody stops ends within a bounded number of steps.
"""

from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.hashing_runner import (
    VOCAB,
    blocks_up_to,
    hashing_engine,
    latents_of,
    salt_of,
    undisturbed,
)
from tidemill.blocks import BLOCK_TOKENS, chain_hashes
from tidemill.engine import (
    FinishedOutput,
    Output,
    PausedOutput,
    PrefilledOutput,
    SamplingParams,
    Sequence,
    TokensOutput,
)
from tidemill.errors import PoolExhausted


@dataclass
class Submitted:
    """A sequence and what has been heard of it."""

    seq: Sequence
    tokens: list[int] = field(default_factory=list)
    end: FinishedOutput | None = None
    stopped: bool = False


@dataclass(frozen=True)
class Wish:
    """A prompt as a client would ask for it. Two variants part after 64 tokens."""

    length: int
    variant: int
    root: bytes
    max_tokens: int
    choices: int
    funded: int | None
    handed_over: bool

    @property
    def prompt(self) -> list[int]:
        tokens = [(7 * position) % VOCAB for position in range(self.length)]
        return tokens[:64] + [(token + self.variant) % VOCAB for token in tokens[64:]]


# Few prompts with long common starts, so that prefixes are hit; lengths around block borders.
WISHES = st.builds(
    Wish,
    length=st.sampled_from([1, 60, 63, 64, 65, 100, 127, 128]),
    variant=st.integers(0, 1),
    root=st.sampled_from([b"a" * 32, b"b" * 32]),
    max_tokens=st.sampled_from([200, 180, 150, 130, 70, 1]),
    choices=st.sampled_from([1, 1, 2, 3]),
    funded=st.sampled_from([None, None, None, 1, 5]),
    handed_over=st.booleans(),
)


class EngineMachine(RuleBasedStateMachine):
    """A worker of sorts: it admits, claims, submits, funds, stops, releases, and keeps count."""

    @initialize(
        num_blocks=st.integers(5, 7),
        swap_blocks=st.sampled_from([9, 8, 5, 1, 0]),
        max_batch=st.sampled_from([4, 3, 2, 1]),
        step_tokens=st.sampled_from([2, 3, 17, 64, 150]),
    )
    def begin(self, num_blocks: int, swap_blocks: int, max_batch: int, step_tokens: int) -> None:
        self.engine, self.runner = hashing_engine(
            num_blocks=num_blocks,
            swap_blocks=swap_blocks,
            max_batch=max_batch,
            step_tokens=step_tokens,
        )
        self.submitted: dict[str, Submitted] = {}
        self.outsiders: list[list[int]] = []
        self.names: dict[bytes, tuple[bytes, list[int]]] = {}

    @rule(wishes=st.lists(WISHES, min_size=2, max_size=4))
    def submit_several(self, wishes: list[Wish]) -> None:
        for wish in wishes:
            self.submit(wish)

    def submit(self, wish: Wish) -> None:
        seq_id = f"s{len(self.submitted)}"
        prompt, root, handed_over = wish.prompt, wish.root, wish.handed_over
        length, max_tokens, choices = len(prompt), wish.max_tokens, wish.choices
        if not self.engine.admit(seq_id, length, max_tokens, choices=choices):
            return
        most = blocks_up_to(min(length + max_tokens - 1, length + BLOCK_TOKENS))
        hashes = chain_hashes(root, prompt)
        claimed = self.engine.pool.claim(hashes)
        try:
            table = claimed + self.engine.pool.allocate(most - len(claimed))
        except PoolExhausted:
            self.engine.pool.release(claimed)
            self.engine.dismiss(seq_id)
            return
        start = len(claimed) * BLOCK_TOKENS
        if handed_over:  # as a transfer would: the caller writes and commits
            salt = salt_of(Sequence(seq_id, prompt, sampling=SamplingParams(), root=root))
            self.engine.pool.write(0, table, start, latents_of(prompt, salt, start))
            for block, block_hash in zip(table, hashes, strict=False):
                self.engine.pool.commit(block, block_hash, root)

        def choice_of(number: int, forks: list[Sequence]) -> Sequence:
            sampling = SamplingParams(
                temperature=float(number > 0), seed=number + length, max_tokens=max_tokens
            )
            alone = Sequence("alone", prompt, sampling=sampling, root=root)
            return Sequence(
                f"{seq_id}.{number}" if number else seq_id,
                prompt,
                sampling=sampling,
                root=root,
                num_funded_tokens=wish.funded,
                first_token_id=undisturbed(alone, 1)[0] if handed_over else None,
                block_table=() if number else table,
                num_cached_tokens=0 if number or handed_over else start,
                forks=forks,
            )

        forks = [choice_of(number, []) for number in range(1, choices)]
        seqs = [choice_of(0, forks), *forks]
        self.engine.submit(seqs[0])
        for seq in seqs:
            tokens = seq.token_ids[length:]
            self.submitted[seq.seq_id] = Submitted(seq, list(tokens))

    @rule(num_steps=st.sampled_from([150, 90, 30, 5]))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.engine.has_work:
                self.one_step()

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), total=st.integers(1, 200))
    def fund(self, data: st.DataObject, total: int) -> None:
        self.engine.fund(data.draw(st.sampled_from(self.alive)), total)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(self.alive))
        self.engine.stop(seq_id, "cancelled")
        self.submitted[seq_id].stopped = True

    @rule(num_blocks=st.integers(1, 4))
    def hold_blocks(self, num_blocks: int) -> None:
        """Hand-overs and prompts on their way hold blocks that no sequence accounts for."""
        try:
            self.outsiders.append(self.engine.pool.allocate(num_blocks))
        except PoolExhausted:
            return

    @precondition(lambda self: self.outsiders)
    @rule()
    def let_go(self) -> None:
        self.engine.pool.release(self.outsiders.pop(0))

    @invariant()
    def every_block_has_the_holders_accounted_for(self) -> None:
        if not hasattr(self, "engine"):
            return
        expected: Counter[int] = Counter()
        for submitted in self.submitted.values():
            if submitted.end is None:
                expected.update(submitted.seq.block_table)
        for swapped in self.engine._tables._swapped.values():
            expected.update(page for page in swapped.pages if isinstance(page, int))
        for blocks in self.outsiders:
            expected.update(blocks)
        pool = self.engine.pool
        assert {b: n for b in range(pool.num_blocks) if (n := pool.num_holders(b))} == expected
        pool.check_integrity()
        assert self.engine._tables.swap.num_used <= self.engine.num_swap_blocks

    @invariant()
    def findable_blocks_hold_what_their_hashes_promise(self) -> None:
        if not hasattr(self, "engine"):
            return
        for submitted in self.submitted.values():
            seq = submitted.seq
            assert seq.root is not None
            for index, block_hash in enumerate(seq.block_hashes):
                self.names[block_hash] = (seq.root, seq.token_ids[: (index + 1) * BLOCK_TOKENS])
        for block_hash, block in self.engine.pool._block_of.items():
            if block_hash in self.names:
                root, tokens = self.names[block_hash]
                assert chain_hashes(root, tokens)[-1] == block_hash
                expected = latents_of(tokens, root[0], len(tokens) - BLOCK_TOKENS)
                assert torch.equal(self.engine.pool.latents[0, block], expected)

    @property
    def alive(self) -> list[str]:
        """Names of sequences that have not ended."""
        return sorted(name for name, each in self.submitted.items() if each.end is None)

    def one_step(self) -> None:
        num_steps = len(self.runner.steps)
        outputs = self.engine.step()
        for step in self.runner.steps[num_steps:]:
            assert 0 < step.num_tokens <= self.engine.config.step_tokens
            assert len(step.decodes) <= self.engine.config.max_batch
        self.hear(outputs)
        assert self.outsiders or not self.engine.starved

    def hear(self, outputs: list[Output]) -> None:
        for output in outputs:
            submitted = self.submitted[output.seq_id]
            assert submitted.end is None
            if isinstance(output, TokensOutput):
                assert output.first_index == len(submitted.tokens)
                submitted.tokens += output.token_ids
            elif isinstance(output, FinishedOutput):
                submitted.end = output
                self.engine.pool.release(submitted.seq.block_table)
            elif isinstance(output, PrefilledOutput):
                assert len(output.first_tokens) == 1 + len(submitted.seq.forks)
            else:
                assert isinstance(output, PausedOutput)
                assert not submitted.seq.is_funded

    def teardown(self) -> None:
        """Everything ends: outsiders leave, funds come, and nobody waits for ever."""
        if not hasattr(self, "engine"):
            return
        for blocks in self.outsiders:
            self.engine.pool.release(blocks)
        self.outsiders = []
        for seq_id in self.submitted:
            self.engine.fund(seq_id, 1000)
        left = [each.seq for each in self.submitted.values() if each.end is None]
        bound = sum(
            seq.num_uncomputed_prompt_tokens + seq.sampling.max_tokens - seq.num_generated + 1
            for seq in left
        )
        while self.engine.has_work:
            assert bound >= 0
            bound -= 1
            self.one_step()
            self.every_block_has_the_holders_accounted_for()
        self.findable_blocks_hold_what_their_hashes_promise()
        for submitted in self.submitted.values():
            end, seq = submitted.end, submitted.seq
            assert end is not None
            assert end.num_generated == len(submitted.tokens)
            assert end.reason == "length" or (submitted.stopped and end.reason == "cancelled")
            if end.reason == "length":
                assert len(submitted.tokens) == seq.sampling.max_tokens
            assert submitted.tokens == undisturbed(seq, len(submitted.tokens))
        self.engine.check_idle()


def explore(examples: int, steps: int) -> None:
    torch.set_num_threads(1)
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            phases=[Phase.generate],  # a long history takes minutes to shrink
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_no_block_is_lost_no_sequence_starves_and_no_token_changes() -> None:
    explore(100, 20)


@pytest.mark.slow
def test_the_same_over_many_more_histories() -> None:
    explore(1500, 30)
