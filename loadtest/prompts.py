"""Conversations whose first message all requests share, so that the caches have work."""

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

_FIRST_GUESS = 2.0


class Prompts:
    """Writes prompts of about the length asked for.

    How many tokens a word takes is the model's secret; it is learnt from what the router counts.
    """

    def __init__(self, *, num_shared_tokens: int, seed: int) -> None:
        self._tokens_per_word = _FIRST_GUESS
        self._num_shared_tokens = num_shared_tokens
        words = Random(seed).choices(_WORDS, k=round(num_shared_tokens / _FIRST_GUESS))
        self._shared = " ".join(words)

    def write(self, num_tail_tokens: int, rng: Random) -> list[Message]:
        """The shared system message, then a random question of about `num_tail_tokens`."""
        count = max(1, round(num_tail_tokens / self._tokens_per_word))
        question = " ".join(rng.choices(_WORDS, k=count))
        return [Message("system", self._shared), Message("user", question)]

    def learn(self, messages: list[Message], num_prompt_tokens: int) -> None:
        """Take in how many tokens a prompt came to."""
        num_words = sum(len(message.content.split()) for message in messages)
        self._tokens_per_word = num_prompt_tokens / num_words
