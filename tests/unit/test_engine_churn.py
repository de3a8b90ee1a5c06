"""Sequences come, fork, pause, resume, outgrow the pool and are cancelled from other threads."""

import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine_harness import generated, load_engine, prompt_hashes, prompt_root
from tests.tiny_model import make_tiny_checkpoint
from tidemill.engine import (
    Engine,
    FinishedOutput,
    Output,
    PausedOutput,
    SamplingParams,
    Sequence,
)
from tidemill.errors import PoolExhausted

NUM_REQUESTS = 20


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def admitted(
    engine: Engine, seq_id: str, prompt: list[int], sampling: SamplingParams, num_forks: int
) -> Sequence:
    """As a decode worker takes a request on: promised, claimed, allocated; tries until it may."""
    hashes = prompt_hashes(engine, prompt)
    while True:
        if engine.admit(seq_id, len(prompt), sampling.max_tokens, choices=1 + num_forks):
            claimed = engine.pool.claim(hashes)
            try:
                fresh = engine.pool.allocate(-(-len(prompt) // 64) - len(claimed))
                break
            except PoolExhausted:
                engine.pool.release(claimed)
                engine.dismiss(seq_id)
        threading.Event().wait(0.002)
    root = prompt_root(engine)
    return Sequence(
        seq_id,
        prompt,
        block_table=claimed + fresh,
        num_cached_tokens=64 * len(claimed),
        sampling=sampling,
        root=root,
        forks=[
            Sequence(f"{seq_id}.{n}", prompt, sampling=replace(sampling, seed=n), root=root)
            for n in range(num_forks)
        ],
    )


def test_r1_every_sequence_ends_once_and_every_block_returns(model_dir: Path) -> None:
    rng = random.Random(5)
    engine = load_engine(model_dir, num_blocks=8, step_tokens=48, max_batch=8)
    shared = [rng.randrange(6, 512) for _ in range(140)]
    seqs: dict[str, Sequence] = {}
    outputs: list[Output] = []
    released: set[str] = set()
    wake = threading.Event()
    lock = threading.Lock()
    num_submitted = 0

    def client(number: int) -> None:
        nonlocal num_submitted
        own = random.Random(number)
        for index in range(number, NUM_REQUESTS, 4):
            prompt = [*shared[: own.randrange(0, 140)], index % 506 + 6]
            sampling = SamplingParams(seed=index, max_tokens=own.randrange(1, 80))
            seq = admitted(engine, str(index), prompt, sampling, own.choice([0, 0, 2]))
            members = [seq, *seq.forks]
            for member in members:
                member.num_funded_tokens = own.choice([None, 1, 5])
            with lock:
                seqs.update({member.seq_id: member for member in members})
            engine.submit(seq)
            with lock:
                num_submitted += 1
            wake.set()
            if index % 3 == 0:
                threading.Event().wait(own.random() * 0.05)
                for member in members:
                    engine.stop(member.seq_id, "cancelled", keep_tokens=0)
                wake.set()

    def handle(output: Output) -> None:
        outputs.append(output)
        if isinstance(output, PausedOutput):
            engine.fund(output.seq_id, 1000)
        elif isinstance(output, FinishedOutput):
            engine.pool.release(seqs[output.seq_id].block_table)
            released.add(output.seq_id)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in clients:
        thread.start()
    while num_submitted < NUM_REQUESTS or len(released) < len(seqs):
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
    engine.check_idle()
    assert engine.load_snapshot().waiting == 0
