"""How long prompts and answers are: from a trace, or a look-alike of one.

The look-alike is two log-normals fitted to the Azure 2023 conversation trace (19,366 requests;
ContextTokens mean 1,155 and median 1,020, GeneratedTokens mean 211 and median 129), within its
extremes.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tidemill.errors import ConfigError

_PROMPT = (6.63, 0.985, 2, 14_050)  # mean and deviation of the logarithm, least, most
_OUTPUT = (5.02, 0.859, 7, 1_000)


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


def look_alike(rng: Random) -> Lengths:
    """One draw from the look-alike."""
    return Lengths(_draw(rng, *_PROMPT), _draw(rng, *_OUTPUT))


def read_trace(path: Path) -> list[Lengths]:
    """The rows of an Azure LLM trace (columns ContextTokens, GeneratedTokens). ConfigError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                Lengths(int(row["ContextTokens"]), int(row["GeneratedTokens"]))
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error!r}") from error
    if not rows:
        raise ConfigError(f"the trace {path} holds no request")
    return rows


def _draw(rng: Random, mean: float, deviation: float, least: int, most: int) -> int:
    return min(most, max(least, round(math.exp(rng.gauss(mean, deviation)))))
