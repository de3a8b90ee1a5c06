"""Sequences come, pause, resume and are cancelled from other threads while the engine steps."""

import random
import threading
from pathlib import Path

import pytest

from tests.engine_harness import commit_prompt, generated, load_engine, make_sequence_with_reuse
from tests.tiny_model import make_tiny_checkpoint
from tidemill.engine import (
    FinishedOutput,
    Output,
    PausedOutput,
    PrefilledOutput,
    SamplingParams,
    Sequence,
)
from tidemill.errors import PoolExhausted

NUM_SEQUENCES = 64


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_r1_every_sequence_ends_once_and_every_block_returns(model_dir: Path) -> None:
    rng = random.Random(5)
    engine = load_engine(model_dir, num_blocks=40, step_tokens=48, max_batch=8)
    shared = [rng.randrange(6, 512) for _ in range(140)]
    seqs: dict[str, Sequence] = {}
    outputs: list[Output] = []
    released: set[str] = set()
    wake = threading.Event()
    lock = threading.Lock()

    def client(number: int) -> None:
        own = random.Random(number)
        for index in range(number, NUM_SEQUENCES, 4):
            prompt = [*shared[: own.randrange(0, 140)], index % 506 + 6]
            sampling = SamplingParams(seed=index, max_tokens=own.randrange(1, 25))
            while True:
                try:
                    seq = make_sequence_with_reuse(engine, str(index), prompt, sampling)
                    break
                except PoolExhausted:
                    threading.Event().wait(0.002)
            seq.num_funded_tokens = own.choice([None, 1, 5])
            with lock:
                seqs[seq.seq_id] = seq
            engine.submit(seq)
            wake.set()
            if index % 3 == 0:
                threading.Event().wait(own.random() * 0.05)
                engine.stop(seq.seq_id, "cancelled", keep_tokens=0)
                wake.set()

    def handle(output: Output) -> None:
        outputs.append(output)
        if isinstance(output, PrefilledOutput):
            commit_prompt(engine, seqs[output.seq_id])
        elif isinstance(output, PausedOutput):
            engine.fund(output.seq_id, 100)
        elif isinstance(output, FinishedOutput):
            engine.pool.release(seqs[output.seq_id].block_table)
            released.add(output.seq_id)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in clients:
        thread.start()
    while len(released) < NUM_SEQUENCES:
        wake.wait(1)
        wake.clear()
        while engine.has_work:
            for output in engine.step():
                handle(output)
    for thread in clients:
        thread.join()

    ends = [output for output in outputs if isinstance(output, FinishedOutput)]
    assert sorted(end.seq_id for end in ends) == sorted(seqs)
    for end in ends:
        seq = seqs[end.seq_id]
        assert end.reason in ("length", "cancelled")
        assert generated(outputs, end.seq_id) == seq.token_ids[seq.num_prompt_tokens :]
        assert end.num_generated == seq.num_generated
        if end.reason == "length":
            assert seq.num_generated == seq.sampling.max_tokens
    assert {end.reason for end in ends} == {"length", "cancelled"}
    engine.pool.check_integrity()
    assert engine.pool.num_referenced == 0
    assert engine.load_snapshot().waiting == 0
