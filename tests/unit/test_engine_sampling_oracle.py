"""The sampler against `tests.sampling_oracle`: every draw the same, and drawn as often as it says.

Draws are compared exactly. Logits are multiples of 1/8 or random fp32 numbers, so ties occur;
where a sum of probabilities would have to equal top_p to the last bit the two may differ, and such
values are not generated.
"""

import math
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.sampling_oracle import Asked, distribution, drawn
from tidemill.engine.sampling import SamplingParams, draw
from tidemill.engine.sequence import Sequence

VOCAB = 24


class Only:
    """Allows the same tokens everywhere."""

    def __init__(self, allowed: frozenset[int]) -> None:
        self._mask = torch.tensor([token in allowed for token in range(VOCAB)])

    def allowed(self, token_ids: Items[int]) -> Tensor:  # noqa: ARG002 - the protocol
        return self._mask


def sequence_of(asked: Asked, *, num_relayed: int = 0) -> Sequence:
    """The engine's form; the first `num_relayed` of the completion stand in its prompt."""
    params = SamplingParams(
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        seed=asked.seed,
        repetition_penalty=asked.repetition_penalty,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias=tuple(asked.logit_bias.items()),
        min_tokens=asked.min_tokens,
        stop_token_ids=asked.stop_token_ids,
    )
    seq = Sequence(
        "s",
        [*asked.prompt, *asked.completion[:num_relayed]],
        block_table=[],
        sampling=params,
        num_relayed_tokens=num_relayed,
        constraint=None if asked.allowed is None else Only(asked.allowed),
    )
    seq.token_ids += asked.completion[num_relayed:]
    return seq


def ours(logits: Tensor, *seqs: Sequence) -> list[int | None]:
    return [None if one.dead_end else one.token_id for one in draw(logits, list(seqs))]


token = st.integers(0, VOCAB - 1)
tokens = st.lists(token, max_size=12)
SHARES = [0.0313, 0.1777, 0.31, 0.4999, 0.7301, 0.9003, 0.9991]  # no sums of simple fractions
asked_for = st.builds(
    Asked,
    prompt=st.lists(token, min_size=1, max_size=12),
    completion=tokens,
    temperature=st.sampled_from([0.0, 0.25, 0.7, 1.0, 1.9]),
    top_p=st.sampled_from([*SHARES, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 5, VOCAB, 1000]),
    min_p=st.sampled_from([0.0, *SHARES]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 10.0]),
    presence_penalty=st.sampled_from([0.0, -2.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.3, 1.1]),
    logit_bias=st.dictionaries(token, st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=4),
    min_tokens=st.integers(0, 14),
    stop_token_ids=st.frozensets(token, max_size=3),
    allowed=st.none() | st.frozensets(token, min_size=0, max_size=VOCAB),
)
numbers = st.integers(-40, 40).map(lambda eighths: eighths / 8) | st.floats(
    -30, 30, width=32, allow_subnormal=False
)
rows = st.lists(numbers, min_size=VOCAB, max_size=VOCAB)


@settings(max_examples=300, deadline=None)
@given(logits=rows, asked=asked_for, relayed=st.integers(0, 12))
def test_every_rule_draws_the_oracles_token(
    logits: list[float], asked: Asked, relayed: int
) -> None:
    num_relayed = min(relayed, len(asked.completion))
    seq = sequence_of(asked, num_relayed=num_relayed)
    assert ours(torch.tensor([logits]), seq) == [drawn(logits, asked)]


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.7301},
        {"min_p": 0.1777},
        {"repetition_penalty": 1.3},
        {"presence_penalty": -0.7},
        {"frequency_penalty": 0.9},
        {"logit_bias": {2: 1.5, 9: -2.0}},
        {"allowed": frozenset({1, 4, 6, 11, 20})},
        {"min_tokens": 9, "stop_token_ids": frozenset({0, 7})},
    ],
    ids=lambda rule: "+".join(rule) or "plain",
)
def test_each_rule_alone_draws_the_oracles_token(rule: dict[str, Any]) -> None:
    rows = torch.randn(150, VOCAB, generator=torch.manual_seed(9)) * 2
    for seed, row in enumerate(rows):
        for temperature in (0.0, 1.0):
            asked = Asked([1, 2, 2], [3, 3, 3, 9], temperature=temperature, seed=seed, **rule)
            assert ours(row[None], sequence_of(asked)) == [drawn(row.tolist(), asked)]


@settings(max_examples=60, deadline=None)
@given(batch=st.lists(st.tuples(rows, asked_for), min_size=2, max_size=8), order=st.randoms())
def test_x2_a_draw_is_the_same_in_any_batch(
    batch: list[tuple[list[float], Asked]], order: Any
) -> None:
    alone = [ours(torch.tensor([row]), sequence_of(asked))[0] for row, asked in batch]
    places = list(range(len(batch)))
    order.shuffle(places)
    together = ours(
        torch.tensor([batch[place][0] for place in places]),
        *[sequence_of(batch[place][1]) for place in places],
    )
    assert together == [alone[place] for place in places]


@pytest.mark.parametrize("relayed", [0, 3, 7])
def test_x2_a_failover_leaves_every_draw_unchanged(relayed: int) -> None:
    asked = Asked(
        [1, 2, 3], [], temperature=0.8, seed=11, repetition_penalty=1.2,
        presence_penalty=0.4, frequency_penalty=0.3, min_tokens=9,
        stop_token_ids=frozenset({0, 5}),
    )  # fmt: skip
    logits = torch.randn(16, VOCAB, generator=torch.manual_seed(2))
    whole = sequence_of(asked)
    stream: list[int] = []
    for row in logits:
        stream += [one.token_id for one in draw(row[None], [whole])]
        whole.token_ids.append(stream[-1])
    resumed = sequence_of(replace(asked, completion=stream[:relayed]), num_relayed=relayed)
    for row in logits[relayed:]:
        resumed.token_ids += [one.token_id for one in draw(row[None], [resumed])]
    assert resumed.token_ids == whole.token_ids
    assert not {0, 5} & set(stream[:9])


# Half of the vocabulary is likely, the rest is a tail for the truncations to cut.
LOGITS = [round(math.sin(1.7 * i) * 2 + (1.0 if i < VOCAB // 2 else -1.0), 3) for i in range(VOCAB)]
PENALISED = {"prompt": [1, 2, 3, 3], "completion": [2, 5, 5, 5, 9]}
NUM_DRAWS = 4000

# The chi-square value that a thousandth of all samples exceeds, by degrees of freedom (any table).
CRITICAL = {
    1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12, 9: 27.88,
    10: 29.59, 11: 31.26, 12: 32.91, 13: 34.53, 14: 36.12, 15: 37.70, 16: 39.25, 17: 40.79,
    18: 42.31, 19: 43.82, 20: 45.31, 21: 46.80, 22: 48.27, 23: 49.73,
}  # fmt: skip


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.8},
        {"top_k": 6},
        {"top_p": 0.8},
        {"min_p": 0.15},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.1, "temperature": 1.3},
        {"repetition_penalty": 1.6, **PENALISED},
        {"presence_penalty": 1.1, **PENALISED},
        {"frequency_penalty": 0.5, **PENALISED},
        {"logit_bias": {0: 2.0, 7: -3.0}},
        {"allowed": frozenset(range(0, VOCAB, 3))},
        {"min_tokens": 99, "stop_token_ids": frozenset({0, 1})},
    ],
    ids=lambda rules: "+".join(rules) or "plain",
)
def test_draws_follow_the_distribution(rules: dict[str, Any]) -> None:
    asked = Asked(**{"prompt": [4], "completion": [], **rules})
    row = torch.tensor(LOGITS)
    counts = [0] * VOCAB
    for seed in range(NUM_DRAWS):
        (one,) = draw(row[None], [sequence_of(replace(asked, seed=seed))])
        counts[one.token_id] += 1
    expected = [NUM_DRAWS * share for share in distribution(LOGITS, asked)]
    assert all(count == 0 for count, share in zip(counts, expected, strict=True) if share == 0)
    assert _chi_square(counts, expected)


def _chi_square(counts: Items[int], expected: Items[float]) -> bool:
    """Whether counts fit; tokens that are expected fewer than five times are put together."""
    cells = [(c, e) for c, e in zip(counts, expected, strict=True) if e >= 5]
    rare = [(c, e) for c, e in zip(counts, expected, strict=True) if 0 < e < 5]
    if sum(e for _, e in rare) >= 5:
        cells.append((sum(c for c, _ in rare), sum(e for _, e in rare)))
    value = sum((c - e) ** 2 / e for c, e in cells)
    return value < CRITICAL[len(cells) - 1]


def test_positions_of_one_stream_follow_the_distribution_too() -> None:
    asked = Asked([4], [], seed=77, top_p=0.9)
    seq = sequence_of(asked)
    counts = [0] * VOCAB
    row = torch.tensor([LOGITS])
    for _ in range(NUM_DRAWS):
        (one,) = draw(row, [seq])
        seq.token_ids.append(one.token_id)
        counts[one.token_id] += 1
    assert _chi_square(counts, [NUM_DRAWS * share for share in distribution(LOGITS, asked)])


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    row = torch.zeros(1, VOCAB)
    assert ours(row, sequence_of(Asked([1], [], temperature=0.0))) == [0]
    assert ours(row, sequence_of(Asked([1], [], temperature=0.0, logit_bias={0: -1.0}))) == [1]


def test_x2_greedy_rows_take_the_same_alone_together_and_beside_others() -> None:
    rows = torch.randn(6, VOCAB, generator=torch.manual_seed(5)).mul(4).round()  # with ties
    greedy = [Asked([1], [], temperature=0.0) for _ in rows]
    alone = [drawn(row.tolist(), asked) for row, asked in zip(rows, greedy, strict=True)]
    assert ours(rows, *map(sequence_of, greedy)) == alone
    beside = [*greedy[:-1], Asked([1], [], temperature=0.0, logit_bias={3: 99.0})]
    assert ours(rows, *map(sequence_of, beside)) == [*alone[:-1], 3]


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    row = torch.tensor([LOGITS])
    best = [LOGITS.index(max(LOGITS))]
    for temperature in (1e-300, 1e-9, 2e-6):
        assert ours(row, sequence_of(Asked([1], [], temperature=temperature, top_p=0.9))) == best


def test_no_token_left_is_a_dead_end_and_its_neighbours_draw_on() -> None:
    row = torch.tensor([LOGITS])
    dead = Asked([1], [], allowed=frozenset({3}), min_tokens=1, stop_token_ids=frozenset({3}))
    other = Asked([1], [], seed=5)
    alone = ours(row, sequence_of(other))
    together = ours(row.expand(3, -1), *map(sequence_of, (other, dead, other)))
    assert together == [*alone, None, *alone]


def test_stop_ids_beyond_the_vocabulary_are_no_fault() -> None:
    asked = Asked([1], [], min_tokens=2, stop_token_ids=frozenset({VOCAB, VOCAB + 7}))
    assert ours(torch.tensor([LOGITS]), sequence_of(asked)) == [drawn(LOGITS, asked)]
