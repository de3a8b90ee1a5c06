from prometheus_client import CollectorRegistry

from services.router.inter_token import InterTokenLatency

NAME = "tidemill_router_inter_token_latency_seconds"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def counted(registry: CollectorRegistry, model: str, at_most: str) -> float | None:
    return registry.get_sample_value(f"{NAME}_bucket", {"model": model, "le": at_most})


def test_each_message_after_the_first_is_one_gap() -> None:
    clock, registry = Clock(), CollectorRegistry()
    stream = InterTokenLatency(registry, clock).stream("tiny")
    for gap in (5.0, 0.004, 0.02, 0.3, 60.0):  # the first is no gap
        clock.now += gap
        stream.told(0)
    assert counted(registry, "tiny", "0.0025") == 0
    assert counted(registry, "tiny", "0.005") == 1
    assert counted(registry, "tiny", "0.03") == 2
    assert counted(registry, "tiny", "10.0") == 3
    assert counted(registry, "tiny", "+Inf") == 4
    assert registry.get_sample_value(f"{NAME}_count", {"model": "tiny"}) == 4
    total = registry.get_sample_value(f"{NAME}_sum", {"model": "tiny"})
    assert total is not None
    assert abs(total - 60.324) < 1e-9


def test_choices_and_streams_have_gaps_of_their_own() -> None:
    clock, registry = Clock(), CollectorRegistry()
    latency = InterTokenLatency(registry, clock)
    one, other = latency.stream("tiny"), latency.stream("tiny")
    for stream, choice in ((one, 0), (one, 1), (other, 0)):
        stream.told(choice)
        clock.now += 0.05
    assert counted(registry, "tiny", "+Inf") == 0
    one.told(1)
    assert counted(registry, "tiny", "0.1") == 1
    assert counted(registry, "tiny", "0.05") == 0


def test_models_are_counted_apart_and_nothing_is_shown_before_there_is_a_stream() -> None:
    clock, registry = Clock(), CollectorRegistry()
    latency = InterTokenLatency(registry, clock)
    assert counted(registry, "tiny", "+Inf") is None
    for model in ("tiny", "large"):
        stream = latency.stream(model)
        stream.told(0)
        clock.now += 0.01
        stream.told(0)
    assert counted(registry, "tiny", "+Inf") == counted(registry, "large", "+Inf") == 1
