"""A call and a channel that do not wait for one another, put in order."""

from collections.abc import Sequence

import pytest

from services.router.answers import Answers
from services.router.finish import Finish
from services.router.reports import Report, ReportReader
from services.router.tally import ChoiceEnded, Ended, Generated, Prefilled
from tidemill.api.common.v1 import lifecycle_pb2, usage_pb2
from tidemill.api.decode.v1 import decode_service_pb2 as pb
from tidemill.errors import Internal

LENGTH = lifecycle_pb2.FINISH_REASON_LENGTH


class Heard:
    """What the attempt took, in order."""

    def __init__(self, *, n: int = 1, routed: bool = True) -> None:
        self.reports: list[Report] = []
        task = lifecycle_pb2.WorkerTask(
            token_ids=[1, 2, 3], sampling=lifecycle_pb2.ResolvedSampling(n=n)
        )
        self.answers = Answers(ReportReader(task), self.reports.append, routed=routed)

    @property
    def kinds(self) -> list[type]:
        return [type(report) for report in self.reports]


def prefilled(*token_ids: int) -> pb.DecodeResponse:
    usage = usage_pb2.PromptUsage(prompt_tokens=3, computed_tokens=3)
    done = lifecycle_pb2.PrefillDone(
        first_token_id=token_ids[0], first_token_ids=token_ids, usage=usage
    )
    return pb.DecodeResponse(prefill_done=done)


def chunk(first_index: int, token_ids: Sequence[int], *, choice: int = 0) -> pb.Chunk:
    return pb.Chunk(first_index=first_index, token_ids=token_ids, choice=choice)


def choice_ended(choice: int, generated: int) -> pb.DecodeResponse:
    ended = pb.ChoiceEnded(choice=choice, reason=LENGTH, generated_tokens=generated)
    return pb.DecodeResponse(choice_ended=ended)


def final(generated: int) -> pb.DecodeResponse:
    return pb.DecodeResponse(final=pb.Final(reason=LENGTH, generated_tokens=generated))


def test_chunks_that_overtake_the_first_token_wait_for_it() -> None:
    heard = Heard()
    heard.answers.chunk(chunk(1, [8]))
    heard.answers.chunk(chunk(2, [9]))
    assert not heard.reports
    heard.answers.word(prefilled(7))
    assert heard.kinds == [Prefilled, Generated, Generated]


def test_final_waits_for_the_tokens_that_it_counts() -> None:
    heard = Heard()
    heard.answers.word(prefilled(7))
    heard.answers.word(final(4))
    heard.answers.chunk(chunk(1, [8, 9]))
    assert heard.kinds == [Prefilled, Generated]
    heard.answers.chunk(chunk(3, [10]))
    assert heard.kinds == [Prefilled, Generated, Generated, Ended]
    assert heard.answers.ended == heard.reports[-1]
    assert not heard.answers.give_up()


def test_the_end_of_a_choice_waits_for_its_own_tokens_alone() -> None:
    heard = Heard(n=2)
    heard.answers.word(prefilled(7, 17))
    heard.answers.word(choice_ended(1, 2))
    heard.answers.word(choice_ended(0, 3))
    heard.answers.word(final(5))
    heard.answers.chunk(chunk(1, [18], choice=1))
    assert heard.kinds == [Prefilled, Generated, ChoiceEnded]
    heard.answers.chunk(chunk(1, [8, 9]))
    assert heard.kinds[3:] == [Generated, ChoiceEnded, Ended]


def test_a_final_without_prefill_waits_for_nothing() -> None:
    heard = Heard()
    heard.answers.word(final(0))
    assert heard.kinds == [Ended]


def test_of_what_waits_for_lost_tokens_only_final_is_still_true() -> None:
    heard = Heard(n=2)
    heard.answers.word(prefilled(7, 17))
    heard.answers.word(choice_ended(1, 5))
    heard.answers.word(final(9))
    assert heard.answers.give_up()
    assert heard.kinds == [Prefilled, Ended]
    assert heard.answers.ended is not None
    assert heard.answers.ended.finish is Finish.LENGTH


def test_a_call_alone_is_in_order_whatever_it_counts() -> None:
    heard = Heard(routed=False)
    heard.answers.word(prefilled(7))
    heard.answers.word(pb.DecodeResponse(chunk=chunk(1, [8])))
    heard.answers.word(final(4))
    assert heard.kinds == [Prefilled, Generated, Ended]


def test_tokens_that_are_missing_in_the_channel_are_a_broken_contract() -> None:
    heard = Heard()
    heard.answers.word(prefilled(7))
    with pytest.raises(Internal):
        heard.answers.chunk(chunk(2, [9]))


def test_the_end_of_a_choice_that_there_is_not_is_a_broken_contract() -> None:
    heard = Heard()
    heard.answers.word(prefilled(7))
    with pytest.raises(Internal):
        heard.answers.word(choice_ended(3, 1))
