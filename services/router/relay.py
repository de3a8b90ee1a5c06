"""From the tokens that workers generate to what the client is told, choice by choice."""

from collections.abc import Sequence

from services.router.admission import Admitted
from services.router.finish import Finish
from services.router.outbox import ChoiceEnd, Outbox, Piece, PromptScored
from services.router.tally import Counts, Tally
from tidemill.api.common.v1.logprobs_pb2 import TokenLogprobs
from tidemill.text import Delta, TextStream

_SCORED_TOKENS = 256  # in one message; each may have 20 alternatives


class Choice:
    """One completion: its tokens, text and counts, and why it ended (None: it has not)."""

    def __init__(self, index: int, admitted: Admitted, *, inside: bool) -> None:
        sampling = admitted.sampling
        self.index = index
        self.token_ids: list[int] = []
        self.counts = Counts(sampling.max_tokens)
        self.finish: Finish | None = None
        self.text = TextStream(
            admitted.model.tokenizer,
            admitted.ask.stop,
            min_tokens=sampling.min_tokens,
            reasoning=admitted.model.config.reasoning,
            inside=inside,
        )


class Relay:
    """Writes the completions of one request into its outbox and counts them in `tally`.

    A choice goes on where it stopped, whichever attempt brings its tokens. A message holds at most
    `max_tokens` tokens.
    """

    def __init__(self, admitted: Admitted, outbox: Outbox, *, max_tokens: int) -> None:
        inside = admitted.model.tokenizer.opens_reasoning(admitted.token_ids)
        self.choices = [
            Choice(index, admitted, inside=inside) for index in range(admitted.sampling.n)
        ]
        self.tally = Tally([choice.counts for choice in self.choices])
        self.last_finish: Finish | None = None
        self._prompt = admitted.token_ids
        self._outbox = outbox
        self._max_tokens = max_tokens

    @property
    def all_ended(self) -> bool:
        """Whether no choice goes on."""
        return all(choice.finish is not None for choice in self.choices)

    def score_prompt(self, logprobs: Sequence[TokenLogprobs]) -> None:
        """Pass on how likely the prompt's tokens were, from the second on."""
        for start in range(0, len(logprobs), _SCORED_TOKENS):
            some = tuple(logprobs[start : start + _SCORED_TOKENS])
            token_ids = tuple(self._prompt[start + 1 : start + 1 + len(some)])
            self._outbox.score(PromptScored(start + 1, token_ids, some))

    def push(
        self, choice: Choice, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> None:
        """Pass a choice's tokens on as text; a stop string in them ends the choice.

        Tokens of a choice that has ended are counted and go no further.
        """
        choice.token_ids += token_ids
        if len(token_ids) <= self._max_tokens:  # nearly always
            self._push(choice, token_ids, logprobs)
            return
        for start in range(0, len(token_ids), self._max_tokens):
            some = slice(start, start + self._max_tokens)
            self._push(choice, token_ids[some], logprobs[some])

    def _push(
        self, choice: Choice, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> None:
        choice.counts.received += len(token_ids)
        if choice.finish is not None:
            return
        first_index = choice.text.num_tokens
        delta = choice.text.push(token_ids)
        if delta.stopped:
            choice.counts.kept = choice.text.num_tokens
        self._put(choice, first_index, delta, logprobs[: len(delta.token_ids)])
        if delta.stopped:
            self.end(choice, Finish.STOP)

    def end(self, choice: Choice, finish: Finish) -> None:
        """The choice goes no further; of several the client is told. Only the first end counts."""
        if choice.finish is not None:
            return
        choice.finish = self.last_finish = finish
        first_index = choice.text.num_tokens
        self._put(choice, first_index, choice.text.finish(), ())
        if len(self.choices) > 1:
            self._outbox.end_choice(ChoiceEnd(choice.index, finish, choice.counts.billed))

    def _put(
        self, choice: Choice, index: int, delta: Delta, logprobs: Sequence[TokenLogprobs]
    ) -> None:
        choice.counts.reasoning = choice.text.num_reasoning_tokens
        if delta.token_ids or delta.content or delta.reasoning:
            self._outbox.put(
                Piece(
                    choice.index,
                    index,
                    list(delta.token_ids),
                    delta.content,
                    delta.reasoning,
                    self.tally.told(),
                    list(logprobs),
                )
            )
