"""How fast an engine is just now, told from its steps.

What a step computes differs, so a prompt's part of it is measured against its modelled cost
(docs/adr/0017): neither short prompts nor long contexts make a worker look slow.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tidemill.engine import Engine, SamplingParams
from tidemill.engine import Sequence as SequenceInEngine
from tidemill.engine.scheduler import PrefillChunk, Step

HALF_LIFE_S = 2.0
PROMPT_TOKENS = 512  # of the prompt by whose cost computing is told in tokens


class _Lately(NamedTuple):
    """An amount and the seconds that it took, both fading; `at` is when the last was added."""

    amount: float
    seconds: float
    at: float

    def add(self, amount: float, seconds: float, *, at: float) -> "_Lately":
        kept = 0.5 ** ((at - self.at) / HALF_LIFE_S)
        return _Lately(self.amount * kept + amount, self.seconds * kept + seconds, at)


_PROMPT = Step(
    chunks=[
        PrefillChunk(
            SequenceInEngine("pace", [0] * PROMPT_TOKENS, sampling=SamplingParams()),
            0,
            PROMPT_TOKENS,
        )
    ]
)


class Pace:
    """Moving averages over steps; `took` is the engine thread's to call, the rest is anyone's.

    `on_decode_step` hears how many seconds each step took that generated.
    """

    def __init__(self, engine: Engine, *, on_decode_step: Callable[[float], None]) -> None:
        self._cost_per_token = sum(engine.cost(_PROMPT)) / PROMPT_TOKENS
        self._on_decode_step = on_decode_step
        self._prefill = self._decode = _Lately(0.0, 0.0, 0.0)

    def took(self, step: Step, costs: Sequence[int], seconds: float, *, now: float) -> None:
        """A step has ended at `now`; `costs` are its decodes' and then its chunks'."""
        num_decodes = len(step.decodes)
        decode_cost, prefill_cost = sum(costs[:num_decodes]), sum(costs[num_decodes:])
        each = seconds / (decode_cost + prefill_cost)
        if step.chunks:
            self._prefill = self._prefill.add(prefill_cost, each * prefill_cost, at=now)
        if step.decodes:
            self._decode = self._decode.add(1, each * decode_cost, at=now)
            self._on_decode_step(seconds)

    @property
    def prefill_tokens_per_s(self) -> int:
        """Prompt tokens that a second of prefilling computes; 0: not known."""
        cost, seconds, _ = self._prefill
        return round(cost / self._cost_per_token / seconds) if seconds else 0

    @property
    def decode_step_us(self) -> int:
        """Microseconds of a step that generates, without its prompts' part; 0: not known."""
        steps, seconds, _ = self._decode
        return round(1e6 * seconds / steps) if steps else 0
