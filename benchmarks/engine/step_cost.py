"""How well the modelled cost of a step's parts foretells the time that they take.

    python -m benchmarks.engine.step_cost [--checkpoint DIRECTORY]

The model of benchmarks.engine.peers (489 M parameters, bf16). First steps of one kind alone: their
modelled cost over their measured time, relative to the geometric mean of all kinds, so that 1.0
everywhere would be a perfect model. Then joint steps of 4 decoding sequences and a prompt's chunk:
decode's share by the model, by the times that both take alone (what a share is held against), and
by tokens.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.engine.peers import make_checkpoint
from benchmarks.provenance import commit, cpu_name
from tidemill.engine import Engine, EngineConfig, SamplingParams, Sequence, StepCost

RESULT = Path(__file__).with_name("results") / "step_cost.json"
DECODES = ((1, 64), (4, 64), (16, 64), (32, 64), (4, 900))  # sequences, tokens of context
CHUNKS = (60, 250, 500)
JOINT = (4, 64)
STEPS = 15


@dataclass(frozen=True)
class Alone:
    """Steps of one kind: median milliseconds, modelled cost, their ratio over the mean of all."""

    kind: str
    ms: float
    cost: int
    relative: float = 1.0


@dataclass(frozen=True)
class Joint:
    """Decode's share of a joint step with a chunk of so many tokens."""

    chunk_tokens: int
    ms: float
    by_model: float
    by_times_alone: float
    by_tokens: float


class Bench:
    """An engine whose steps are timed, and their parts' costs."""

    def __init__(self, checkpoint: Path) -> None:
        self.engine = Engine.load(
            checkpoint, EngineConfig(num_blocks=400, max_batch=64, num_threads=2)
        )
        self.cost = StepCost(self.engine.model_config, value_bytes=2)

    def sequence(self, seq_id: str, length: int, max_tokens: int) -> Sequence:
        """Submitted, with a prompt of its own."""
        vocab_size = self.engine.model_config.vocab_size
        seq = Sequence(
            seq_id,
            [position * 7919 % vocab_size for position in range(length)],
            block_table=self.engine.pool.allocate(-(-length // 64)),
            sampling=SamplingParams(temperature=0, max_tokens=max_tokens),
        )
        self.engine.submit(seq)
        return seq

    def decoding(self, batch: int, context: int) -> list[Sequence]:
        """Sequences that all decode."""
        seqs = [self.sequence(f"decode {index}", context, 400) for index in range(batch)]
        while any(seq.num_uncomputed_prompt_tokens for seq in seqs):
            self.engine.step()
        for _ in range(3):
            self.engine.step()
        return seqs

    def step(self) -> tuple[float, int, int]:
        """One step: milliseconds, modelled cost of decode, of prefill."""
        started = time.perf_counter()
        self.engine.step()
        ms = (time.perf_counter() - started) * 1e3
        step = self.engine.current_step
        costs = self.cost(step)
        num_decodes = len(step.decodes)
        return ms, sum(costs[:num_decodes]), sum(costs[num_decodes:])

    def prefill(self, length: int, repeats: int = 4) -> tuple[float, int, int]:
        """A whole prompt in one step, the first of them not counted."""
        steps = []
        for index in range(repeats):
            seq = self.sequence(f"prompt {index}", length, 1)
            steps.append(self.step())
            self.engine.pool.release(seq.block_table)
        return statistics.median(ms for ms, _, _ in steps[1:]), *steps[-1][1:]

    def end(self, seqs: list[Sequence]) -> None:
        """Stop and release."""
        for seq in seqs:
            self.engine.stop(seq.seq_id, "cancelled")
        self.engine.step()
        for seq in seqs:
            self.engine.pool.release(seq.block_table)


def measure(bench: Bench) -> tuple[list[Alone], list[Joint]]:
    """All steps."""
    alone, joint = [], []
    for batch, context in DECODES:
        seqs = bench.decoding(batch, context)
        steps = [bench.step() for _ in range(STEPS)]
        ms = statistics.median(step[0] for step in steps)
        alone.append(Alone(f"decode {batch} x {context}", ms, steps[-1][1]))
        if (batch, context) == JOINT:
            joint = [(length, *bench.prefill(length)) for length in CHUNKS]
            decode_ms = ms
        bench.end(seqs)
    prefill_ms = {}
    for length in CHUNKS:
        prefill_ms[length], _, cost = bench.prefill(length)
        alone.append(Alone(f"prefill {length}", prefill_ms[length], cost))
    shares = [
        Joint(
            chunk_tokens=length,
            ms=ms,
            by_model=decode / (decode + prefill),
            by_times_alone=decode_ms / (decode_ms + prefill_ms[length]),
            by_tokens=JOINT[0] / (JOINT[0] + length),
        )
        for length, ms, decode, prefill in joint
    ]
    mean = math.exp(statistics.fmean(math.log(each.cost / each.ms) for each in alone))
    return [replace(each, relative=each.cost / each.ms / mean) for each in alone], shares


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, help="made by benchmarks.engine.peers before")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or Path(folder)
        if arguments.checkpoint is None:
            make_checkpoint(checkpoint)
        alone, joint = measure(Bench(checkpoint))
    for each in alone:
        print(f"{each.kind:16} {each.ms:8.1f} ms  modelled / measured {each.relative:.2f}")
    for share in joint:
        print(
            f"4 decode + {share.chunk_tokens:3}: decode's share {share.by_model:.3f}, "
            f"by times alone {share.by_times_alone:.3f}, by tokens {share.by_tokens:.3f}"
        )
    result = {
        "benchmark": "engine/step_cost",
        "command": "python -m benchmarks.engine.step_cost",
        "commit": commit(),
        "device": cpu_name(),
        "alone": [asdict(each) for each in alone],
        "joint": [asdict(share) for share in joint],
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
