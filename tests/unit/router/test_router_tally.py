from services.router.finish import Finish, PrefillSite
from services.router.tally import Counts, Ended, Prefilled, Tally
from tidemill.api.common.v1 import lifecycle_pb2
from tidemill.billing import Reuse


def prefilled() -> Prefilled:
    return Prefilled(
        token_ids=(5,),
        prompt_tokens=130,
        computed_tokens=66,
        reused=Reuse(cache_ram=64),
        site=PrefillSite(worker_id="p"),
        prefill_us=1,
    )


def ended(generated: int, finish: Finish = Finish.LENGTH) -> Ended:
    return Ended(
        finish=finish,
        generated_tokens=generated,
        drafted_tokens=6,
        accepted_tokens=4,
        busy_seconds=0.5,
    )


def running(*received: int, most: int = 100) -> Tally:
    return Tally([Counts(most, received=each) for each in received], prefilled=prefilled())


def test_what_was_generated_is_billed_with_its_prompt() -> None:
    tally = running(9)
    tally.choices[0].reasoning = 3
    tally.end(ended(9))
    found = tally.usage()
    assert (found.prompt_tokens, found.cache_hit_tokens, found.cache_miss_tokens) == (130, 64, 66)
    assert (found.completion_tokens, found.reasoning_tokens, found.unbilled.total) == (9, 3, 0)
    assert (found.drafted_tokens, found.accepted_tokens) == (6, 4)


def test_tokens_after_the_stop_string_are_overrun() -> None:
    tally = running(9)
    tally.choices[0].kept = 7
    tally.choices[0].reasoning = 8
    tally.end(ended(12))
    found = tally.usage()
    assert (found.completion_tokens, found.unbilled.overrun) == (7, 5)
    assert found.reasoning_tokens == 7


def test_after_a_cancel_all_tokens_up_to_final_are_billed() -> None:
    tally = running(4)
    tally.end(ended(11, Finish.CANCELLED))
    assert tally.usage().completion_tokens == 11


def test_without_final_what_the_router_received_is_billed() -> None:
    assert running(4).usage().completion_tokens == 4


def test_never_more_is_billed_than_max_tokens() -> None:
    found = running(9, most=5).usage()
    assert (found.completion_tokens, found.unbilled.overrun) == (5, 4)


def test_without_a_first_token_nothing_is_billed() -> None:
    tally = Tally([Counts(100)])
    tally.end(ended(1, Finish.CANCELLED))
    found = tally.usage()
    assert (found.prompt_tokens, found.completion_tokens) == (0, 0)
    assert (found.generated_tokens, found.unbilled.overrun) == (1, 1)


def test_a_lost_attempt_costs_nothing_and_is_counted() -> None:
    tally = running(9)
    tally.write_off()
    found = tally.usage()
    assert (found.prompt_tokens, found.completion_tokens) == (0, 0)
    assert (found.generated_tokens, found.unbilled.lost) == (9, 9)


def test_an_attempt_that_failed_with_a_final_is_the_servers_fault() -> None:
    tally = running(9)
    tally.end(ended(10, Finish.SERVER_FAULT))
    tally.write_off()
    found = tally.usage()
    assert (found.generated_tokens, found.unbilled.server_fault) == (10, 10)


def test_attempts_add_up() -> None:
    tally = running(2, 1)
    tally.write_off()
    tally.prefilled = prefilled()
    tally.choices[0].received, tally.choices[1].received = 3, 2
    tally.end(ended(5))
    found = tally.usage()
    assert (found.completion_tokens, found.unbilled.lost, found.generated_tokens) == (5, 3, 8)


def test_choices_add_up_each_with_its_own_end_and_the_prompt_once() -> None:
    tally = running(9, 4, 20, most=15)
    tally.choices[0].kept, tally.choices[0].reasoning = 7, 2
    tally.choices[1].reported, tally.choices[1].reasoning = 6, 6
    tally.end(ended(40))
    found = tally.usage()
    assert found.prompt_tokens == 130
    assert found.completion_tokens == 7 + 6 + 15
    assert found.reasoning_tokens == 2 + 6
    assert (found.generated_tokens, found.unbilled.overrun) == (40, 40 - 28)


def test_finish_reasons_are_those_of_the_wire() -> None:
    for name, number in lifecycle_pb2.FinishReason.items():
        if number:
            assert Finish(number).name == name.removeprefix("FINISH_REASON_")
