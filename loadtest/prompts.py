"""Text of about the length asked for, in the model's own tokens.

How many tokens a word takes is the model's secret: a run begins by having a sample counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from tidemill.client import Message

_TEXT = (
    "return the value of this function when called with a list of strings and an optional key "
    "argument which may be any object that supports iteration otherwise raise an error if module "
    "class method file name path is not found default none true false integer dictionary set "
    "tuple object type instance example note changed in version see also new sequence mapping "
    "thread process event loop socket buffer stream encoding bytes text line"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Writes texts for a model that takes so many tokens a word, measured on `SAMPLE`."""

    tokens_per_word: float

    def text(self, num_tokens: float, rng: Random) -> str:
        """At least one word."""
        return " ".join(rng.choices(_WORDS, k=max(1, round(num_tokens / self.tokens_per_word))))

    def num_tokens(self, messages: Sequence[Message]) -> float:
        """About how many tokens these come to."""
        return sum(len(each.content.split()) for each in messages) * self.tokens_per_word

    @classmethod
    def measured(cls, num_sample_tokens: int) -> "Vocabulary":
        """By what the router counted of `SAMPLE`, the template's few tokens included."""
        return cls(num_sample_tokens / len(SAMPLE.split()))


SAMPLE = Vocabulary(1.0).text(200, Random(0))
