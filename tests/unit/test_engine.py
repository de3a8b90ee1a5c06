from pathlib import Path

import pytest

from tests.engine_harness import (
    GREEDY,
    finish_of,
    first_token_of,
    generated,
    load_engine,
    make_sequence,
    run_all,
    run_sequence,
)
from tests.tiny_model import make_tiny_checkpoint
from tidemill.blocks import chain_hashes
from tidemill.engine import (
    Drawn,
    Engine,
    EngineConfig,
    EngineLoad,
    FinishedOutput,
    PausedOutput,
    PrefilledOutput,
    SamplingParams,
    Sequence,
    StepCost,
    TokensOutput,
)
from tidemill.engine.scheduler import PrefillChunk, Step
from tidemill.errors import AlreadyExists, InvalidRequest

PROMPT = list(range(100, 170))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(model_dir: Path) -> Engine:
    return load_engine(model_dir, step_tokens=32)


@pytest.fixture(scope="module")
def greedy_stream(model_dir: Path) -> list[int]:
    engine = load_engine(model_dir)
    return run_sequence(engine, make_sequence(engine, "s", PROMPT))


def greedy(max_tokens: int, stop: frozenset[int] = frozenset()) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, stop_token_ids=stop)


def handed_over(
    engine: Engine, first: int, sampling: SamplingParams, funded: int | None = None
) -> Sequence:
    return Sequence(
        "d",
        PROMPT,
        block_table=engine.pool.allocate(2),
        sampling=sampling,
        first_token_id=first,
        num_funded_tokens=funded,
    )


def test_one_worker_sequence_reports_prefill_tokens_and_one_end(
    engine: Engine, greedy_stream: list[int]
) -> None:
    first_seq = make_sequence(engine, "s", PROMPT, greedy(4))
    engine.submit(first_seq)
    outputs = run_all(engine)
    first = PrefilledOutput("s", [Drawn(greedy_stream[0])])
    tokens = [TokensOutput("s", [token], i) for i, token in enumerate(greedy_stream[:4])]
    assert outputs[:-1] == [first, *tokens]
    end = outputs[-1]
    assert isinstance(end, FinishedOutput)
    assert (end.seq_id, end.reason, end.num_generated) == ("s", "length", 4)
    assert first_seq.prefill_ns > 0 < first_seq.decode_ns
    assert not engine.has_work


def test_stop_token_is_generated_counted_and_last(engine: Engine, greedy_stream: list[int]) -> None:
    stop = greedy_stream[3]
    expected = greedy_stream[: greedy_stream.index(stop) + 1]
    engine.submit(make_sequence(engine, "s", PROMPT, greedy(20, frozenset({stop}))))
    outputs = run_all(engine)
    assert generated(outputs, "s") == expected
    assert finish_of(outputs, "s").reason == "stop"
    assert finish_of(outputs, "s").num_generated == len(expected)


def test_full_context_ends_the_sequence(model_dir: Path) -> None:
    config = EngineConfig(num_blocks=8, max_context=75, num_threads=1)
    engine = Engine.load(model_dir, config)
    engine.submit(make_sequence(engine, "s", PROMPT, greedy(50)))
    end = finish_of(run_all(engine), "s")
    assert (end.reason, end.num_generated) == ("length", 5)


def test_prefill_only_sequence_leaves_with_its_first_token(
    engine: Engine, greedy_stream: list[int]
) -> None:
    layers: list[tuple[int, int, int]] = []
    seq = Sequence(
        "p",
        PROMPT,
        block_table=engine.pool.allocate(2),
        sampling=GREEDY,
        prefill_only=True,
        on_layer=lambda *seen: layers.append(seen),
    )
    engine.submit(seq)
    assert run_all(engine) == [PrefilledOutput("p", [Drawn(greedy_stream[0])])]
    chunks = [(0, 32), (32, 64), (64, 70)]
    assert layers == [(layer, *chunk) for chunk in chunks for layer in range(3)]
    assert seq.num_computed_tokens == 70
    assert seq.prefill_ns == engine.busy.prefill_ns > 0 == seq.decode_ns
    assert engine.pool.num_referenced == 2


def test_cached_tokens_are_not_computed_again(engine: Engine) -> None:
    first = make_sequence(engine, "a", PROMPT, greedy(2))
    engine.submit(first)
    run_all(engine)
    seen: list[tuple[int, int, int]] = []
    seq = Sequence(
        "b",
        PROMPT,
        block_table=first.block_table,
        sampling=greedy(2),
        num_cached_tokens=64,
        on_layer=lambda *layer: seen.append(layer),
    )
    engine.submit(seq)
    run_all(engine)
    assert seen == [(layer, 64, 70) for layer in range(3)]


def test_handed_over_sequence_starts_at_index_one(engine: Engine, greedy_stream: list[int]) -> None:
    seq = make_sequence(engine, "p", PROMPT, greedy(1))
    engine.submit(seq)
    first = first_token_of(run_all(engine), "p")
    moved = Sequence(
        "d", PROMPT, block_table=seq.block_table, sampling=greedy(4), first_token_id=first
    )
    engine.submit(moved)
    outputs = run_all(engine)
    assert generated(outputs, "d") == greedy_stream[1:4]
    assert [o.first_index for o in outputs if isinstance(o, TokensOutput)] == [1, 2, 3]
    assert finish_of(outputs, "d").num_generated == 4


@pytest.mark.parametrize(
    ("sampling", "reason"), [(greedy(9, frozenset({42})), "stop"), (greedy(1), "length")]
)
def test_handed_over_first_token_may_be_the_last(
    engine: Engine, sampling: SamplingParams, reason: str
) -> None:
    engine.submit(handed_over(engine, 42, sampling))
    (end,) = engine.step()
    assert isinstance(end, FinishedOutput)
    assert (end.reason, end.num_generated) == (reason, 1)
    assert not engine.has_work


def test_sequence_never_passes_its_funds_and_resumes_when_funded(
    engine: Engine, greedy_stream: list[int]
) -> None:
    seq = make_sequence(engine, "s", PROMPT, greedy(8))
    seq.num_funded_tokens = 3
    engine.submit(seq)
    outputs = run_all(engine)
    assert outputs[-1] == PausedOutput("s")
    assert generated(outputs, "s") == greedy_stream[:3]
    engine.fund("s", 2)
    assert not engine.has_work
    engine.fund("s", 5)
    assert generated(run_all(engine), "s") == greedy_stream[3:5]
    engine.fund("s", 100)
    outputs = run_all(engine)
    assert generated(outputs, "s") == greedy_stream[5:8]
    assert finish_of(outputs, "s").num_generated == 8


def test_handed_over_sequence_funded_for_one_token_pauses_at_once(engine: Engine) -> None:
    engine.submit(handed_over(engine, 42, greedy(5), funded=1))
    assert engine.step() == [PausedOutput("d")]
    assert not engine.has_work


def test_paused_sequence_can_be_stopped_for_want_of_budget(engine: Engine) -> None:
    engine.submit(handed_over(engine, 42, greedy(5), funded=1))
    engine.step()
    engine.stop("d", "budget")
    assert engine.has_work
    (end,) = engine.step()
    assert isinstance(end, FinishedOutput)
    assert (end.reason, end.num_generated) == ("budget", 1)


def test_stop_reaches_prefill_between_chunks(engine: Engine) -> None:
    seq = make_sequence(engine, "s", PROMPT)
    engine.submit(seq)
    assert engine.step() == []
    engine.stop("s", "cancelled", keep_tokens=0)
    engine.stop("s", "second stop loses")
    (end,) = engine.step()
    assert isinstance(end, FinishedOutput)
    assert (end.reason, end.num_generated) == ("cancelled", 0)
    assert seq.num_computed_tokens == 32
    assert not engine.has_work


def test_stop_of_an_unknown_or_finished_sequence_is_ignored(engine: Engine) -> None:
    engine.stop("nobody", "cancelled")
    engine.submit(make_sequence(engine, "s", PROMPT, greedy(1)))
    run_all(engine)
    engine.stop("s", "cancelled")
    assert not engine.has_work
    engine.submit(make_sequence(engine, "s", PROMPT, greedy(2)))
    assert finish_of(run_all(engine), "s").reason == "length"


def test_prompts_are_computed_beside_running_sequences_within_the_step_budget(
    engine: Engine,
) -> None:
    engine.submit(make_sequence(engine, "a", PROMPT[:20]))
    engine.step()
    prompt = make_sequence(engine, "b", PROMPT)
    engine.submit(prompt)
    computed = []
    for _ in range(2):
        assert [type(output).__name__ for output in engine.step()] == ["TokensOutput"]
        assert engine.current_step.num_tokens == 32
        computed.append(prompt.num_computed_tokens)
    assert computed == [31, 62]
    assert {output.seq_id for output in engine.step()} == {"a", "b"}


def test_busy_time_is_shared_by_what_each_computes(engine: Engine) -> None:
    running = make_sequence(engine, "a", PROMPT[:1])
    engine.submit(running)
    engine.step()
    prompt = make_sequence(engine, "b", PROMPT)
    engine.submit(prompt)
    engine.step()
    cost = StepCost(engine.model_config, value_bytes=4)
    (decode, chunk) = cost(Step([running], [PrefillChunk(prompt, 0, 31)]))
    assert prompt.prefill_ns / running.decode_ns == pytest.approx(chunk / decode, rel=0.01)
    assert (running.decode_ns, prompt.decode_ns) == (engine.busy.decode_ns, 0)


def test_short_prompts_share_a_prefill_step(engine: Engine) -> None:
    for name in ("a", "b", "c"):
        engine.submit(make_sequence(engine, name, PROMPT[:15], greedy(1)))
    assert {output.seq_id for output in engine.step()} == {"a", "b"}
    assert {output.seq_id for output in engine.step()} == {"c"}


def test_batch_limit_holds_and_the_rest_wait_their_turn(model_dir: Path) -> None:
    engine = load_engine(model_dir, max_batch=2)
    for name in ("a", "b", "c"):
        engine.submit(make_sequence(engine, name, PROMPT, greedy(3)))
    outputs = engine.step()
    assert len([o for o in outputs if isinstance(o, PrefilledOutput)]) == 3
    assert engine.load_snapshot() == EngineLoad(0, 2, 1, 64 - 6, 64)
    assert {output.seq_id for output in engine.step()} == {"a", "b"}
    assert finish_of(run_all(engine), "c").num_generated == 3


def test_load_snapshot_counts_queued_prompt_tokens(engine: Engine) -> None:
    engine.submit(make_sequence(engine, "a", PROMPT))
    engine.submit(make_sequence(engine, "b", PROMPT))
    assert engine.load_snapshot() == EngineLoad(140, 0, 2, 60, 64)
    engine.step()
    assert engine.load_snapshot().queued_prefill_tokens == 108


def test_busy_time_is_shared_by_the_sequences_of_a_step(engine: Engine) -> None:
    first, second = (make_sequence(engine, name, PROMPT[:10], greedy(5)) for name in ("a", "b"))
    engine.submit(first)
    engine.submit(second)
    run_all(engine)
    assert 0 < first.decode_ns == pytest.approx(second.decode_ns, abs=5)
    assert 0 < first.prefill_ns == pytest.approx(second.prefill_ns, abs=1)


def test_full_blocks_are_committed_as_they_are_computed_prompt_and_generated(
    engine: Engine,
) -> None:
    root = b"r" * 32
    seq = Sequence("s", PROMPT, block_table=engine.pool.allocate(2), sampling=greedy(70), root=root)
    engine.submit(seq)
    engine.step()
    assert (seq.num_committed, seq.block_hashes) == (0, [])
    engine.step()
    assert seq.block_hashes == chain_hashes(root, PROMPT)
    assert engine.pool.match(seq.block_hashes) == 1
    run_all(engine)
    assert seq.block_hashes == chain_hashes(root, seq.token_ids[:-1])
    assert seq.num_committed == 2
    engine.pool.release(seq.block_table)
    assert engine.pool.claim(seq.block_hashes) == seq.block_table[:2]


def test_blocks_reused_or_handed_over_are_not_committed_twice_and_their_chain_goes_on(
    engine: Engine,
) -> None:
    root = b"r" * 32
    seq = handed_over(engine, 42, greedy(60))
    seq.root = root
    engine.submit(seq)
    run_all(engine)
    assert engine.pool.match(chain_hashes(root, PROMPT)) == 0  # what preceded is the caller's
    second = chain_hashes(root, seq.token_ids[:-1])[1]
    assert engine.pool.claim([second]) == seq.block_table[1:2]


def test_without_a_root_nothing_is_committed(engine: Engine) -> None:
    seq = make_sequence(engine, "s", PROMPT, greedy(70))
    engine.submit(seq)
    run_all(engine)
    engine.pool.release(seq.block_table)
    assert seq.num_committed == 0
    assert engine.pool._block_of == {}


def test_the_prompts_own_logprobs_do_not_depend_on_its_chunks(engine: Engine) -> None:
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    engine.submit(make_sequence(engine, "neighbour", PROMPT[:5], greedy(30)))
    engine.step()
    engine.submit(make_sequence(engine, "chunked", PROMPT, scored))
    chunked = run_all(engine)
    (found,) = [o for o in chunked if isinstance(o, PrefilledOutput) and o.seq_id == "chunked"]
    hidden = engine._runner.forward(
        Step(chunks=[PrefillChunk(make_sequence(engine, "whole", PROMPT, scored), 0, 70)])
    )
    logprobs = engine._runner.logits(hidden).log_softmax(-1)
    assert len(found.prompt_logprobs) == 69
    for position, entry in enumerate(found.prompt_logprobs):
        assert entry.logprob == pytest.approx(
            logprobs[position, PROMPT[position + 1]].item(), abs=1e-4
        )
        assert entry.top_logprobs[0] == pytest.approx(logprobs[position].max().item(), abs=1e-4)


def test_a_scored_prompt_cannot_start_from_reused_blocks(engine: Engine) -> None:
    scored = SamplingParams(prompt_logprobs=0)
    with pytest.raises(InvalidRequest, match="at most 0 can be reused"):
        engine.submit(
            Sequence("s", PROMPT, block_table=[0, 1], sampling=scored, num_cached_tokens=64)
        )


def test_failure_inside_a_step_is_not_swallowed(engine: Engine) -> None:
    def fail(layer: int, start: int, end: int) -> None:
        raise RuntimeError("transfer thread is gone")

    seq = make_sequence(engine, "s", PROMPT)
    seq.on_layer = fail
    engine.submit(seq)
    with pytest.raises(RuntimeError, match="transfer thread is gone"):
        engine.step()


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ([], GREEDY, "prompt"),
        ([5, 512], GREEDY, "prompt"),
        ([-1], GREEDY, "prompt"),
        ([5] * 1024, GREEDY, "prompt"),
        ([5], SamplingParams(temperature=float("nan")), "sampling.temperature"),
        ([5], SamplingParams(temperature=-1), "sampling.temperature"),
        ([5], SamplingParams(top_p=0), "sampling.top_p"),
        ([5], SamplingParams(top_k=-1), "sampling.top_k"),
        ([5], SamplingParams(max_tokens=0), "sampling.max_tokens"),
    ],
)
def test_bad_input_is_refused_by_field(
    engine: Engine, prompt: list[int], sampling: SamplingParams, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.submit(Sequence("s", prompt, block_table=range(20), sampling=sampling))
    assert [violation[0] for violation in caught.value.violations] == [field]
    assert not engine.has_work


def test_too_few_blocks_and_impossible_reuse_are_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="block_table: has 1 blocks, 2 are needed"):
        engine.submit(Sequence("s", PROMPT, block_table=[0], sampling=greedy(1)))
    with pytest.raises(InvalidRequest, match="at most 64 can be reused"):
        engine.submit(
            Sequence("s", PROMPT, block_table=[0, 1], sampling=greedy(1), num_cached_tokens=70)
        )


def test_reused_sequence_id_is_refused_while_it_lives(engine: Engine) -> None:
    engine.submit(make_sequence(engine, "s", PROMPT))
    with pytest.raises(AlreadyExists):
        engine.submit(make_sequence(engine, "s", PROMPT))
