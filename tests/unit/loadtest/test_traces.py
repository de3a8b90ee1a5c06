from pathlib import Path
from random import Random
from statistics import mean, median

import pytest

from loadtest.traces import Lengths, Row, look_alike, look_alike_trace, read_trace
from tidemill.errors import ConfigError


def test_the_look_alike_has_the_trace_s_middle() -> None:
    rng = Random(0)
    drawn = [look_alike(rng) for _ in range(20_000)]
    prompts = [lengths.num_prompt_tokens for lengths in drawn]
    outputs = [lengths.num_output_tokens for lengths in drawn]
    assert 900 < mean(prompts) < 1300
    assert 600 < median(prompts) < 1100
    assert 180 < mean(outputs) < 240
    assert 120 < median(outputs) < 180


def test_a_good_third_of_the_look_alike_s_blocks_was_asked_for_before() -> None:
    known: set[int] = set()
    hits = total = 0
    for row in look_alike_trace(Random(0)):
        hits += len(known & set(row.blocks))
        total += len(row.blocks)
        known |= set(row.blocks)
    assert 0.25 < hits / total < 0.5


def test_traces_of_both_forms_are_read(tmp_path: Path) -> None:
    azure = tmp_path / "trace.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.1805900,396,109\n"
    )
    first, second = read_trace(azure)
    assert (first.lengths, second.lengths) == (Lengths(374, 44), Lengths(396, 109))
    assert second.at_s - first.at_s == pytest.approx(3.5)
    mooncake = tmp_path / "trace.jsonl"
    mooncake.write_text(
        '{"timestamp": 3000, "input_length": 700, "output_length": 6, "hash_ids": [0, 1]}\n'
        '{"timestamp": 1500, "input_length": 513, "output_length": 5, "hash_ids": [0, 2]}\n'
    )
    assert read_trace(mooncake) == [
        Row(1.5, Lengths(513, 5), (0, 2)),
        Row(3.0, Lengths(700, 6), (0, 1)),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("trace.csv", "TIMESTAMP,Context\n1,2\n"),
        ("trace.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n"),
        ("trace.jsonl", '{"timestamp": 1}\n'),
        ("trace.jsonl", "no json\n"),
    ],
)
def test_a_wrong_trace_is_named(tmp_path: Path, name: str, text: str) -> None:
    trace = tmp_path / name
    trace.write_text(text)
    with pytest.raises(ConfigError, match=name):
        read_trace(trace)
