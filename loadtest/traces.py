"""Traces of real services, and a look-alike for where there is none.

Two forms are read: Azure's (csv: TIMESTAMP, ContextTokens, GeneratedTokens) and Mooncake's (jsonl:
timestamp in milliseconds, input_length, output_length, hash_ids of 512-token blocks).

The look-alike is two log-normals fitted to the Azure 2023 conversation trace (19,366 requests;
ContextTokens mean 1,155 and median 1,020, GeneratedTokens mean 211 and median 129), within its
extremes. Its requests arrive as a Poisson process, and as in Mooncake's traces a good third of all
blocks was asked for before: half the requests go on where an earlier one ended.
"""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from random import Random

from tidemill.errors import ConfigError

TRACE_BLOCK_TOKENS = 512  # of Mooncake's hash_ids

_PROMPT = (6.63, 0.985, 2, 14_050)  # mean and deviation of the logarithm, least, most
_OUTPUT = (5.02, 0.859, 7, 1_000)
_LOOK_ALIKE_ROWS = 2_000
_AGAIN = 0.5


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of one request."""

    num_prompt_tokens: int
    num_output_tokens: int

    def scaled(self, factor: float) -> "Lengths":
        """At least one token of each."""
        return Lengths(
            max(1, round(self.num_prompt_tokens * factor)),
            max(1, round(self.num_output_tokens * factor)),
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace. Equal `blocks` at the front are equal text; none: all text is new."""

    at_s: float
    lengths: Lengths
    blocks: tuple[int, ...] = ()


def look_alike(rng: Random) -> Lengths:
    """One draw from the look-alike."""
    return Lengths(_draw(rng, *_PROMPT), _draw(rng, *_OUTPUT))


def look_alike_trace(rng: Random) -> list[Row]:
    """A whole trace of the look-alike, one request a second on average."""
    rows: list[Row] = []
    at_s, next_block = 0.0, 0
    for _ in range(_LOOK_ALIKE_ROWS):
        at_s += rng.expovariate(1.0)
        lengths = look_alike(rng)
        num_blocks = math.ceil(lengths.num_prompt_tokens / TRACE_BLOCK_TOKENS)
        before = rng.choice(rows).blocks if rows and rng.random() < _AGAIN else ()
        shared = before[:num_blocks]
        fresh = num_blocks - len(shared)
        rows.append(Row(at_s, lengths, (*shared, *range(next_block, next_block + fresh))))
        next_block += fresh
    return rows


def read_trace(path: Path) -> list[Row]:
    """All rows of a trace, in order of time. ConfigError names the file."""
    read = _mooncake if path.suffix == ".jsonl" else _azure
    try:
        rows = sorted(read(path), key=lambda row: row.at_s)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error!r}") from error
    if not rows:
        raise ConfigError(f"the trace {path} holds no request")
    return rows


def _azure(path: Path) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            at = datetime.fromisoformat(row["TIMESTAMP"][:26] + "+00:00")  # drops a 7th digit
            lengths = Lengths(int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            yield Row(at.timestamp(), lengths)


def _mooncake(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            lengths = Lengths(int(row["input_length"]), int(row["output_length"]))
            yield Row(int(row["timestamp"]) / 1000, lengths, tuple(map(int, row["hash_ids"])))


def _draw(rng: Random, mean: float, deviation: float, least: int, most: int) -> int:
    return min(most, max(least, round(math.exp(rng.gauss(mean, deviation)))))
