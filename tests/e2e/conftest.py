"""One running stack for all tests of this folder that do not end it themselves."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.otlp_collector import Collector
from tests.stack_harness import Stack
from tests.tiny_model import make_tiny_checkpoint
from tidemill.client import AsyncClient

CONTEXT_TOKENS = 8192


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    return make_tiny_checkpoint(directory, max_position_embeddings=CONTEXT_TOKENS)


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """An OpenTelemetry collector that keeps what it is sent."""
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="session")
def shared_stack(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, collector: Collector
) -> Iterator[Stack]:
    """Prefill, decode, cache, router, both Redis, and a second model with one worker."""
    telling = {"drain_s": 60.0, "otlp_endpoint": collector.address}
    directory = tmp_path_factory.mktemp("stack") / "state"
    stack = Stack(
        directory,
        tiny_model,
        one_worker=True,
        settings={
            "prefill": {"server": telling},
            "decode": {"server": telling},
            "router": {
                "server": telling,
                "money": {"accelerator_hour_nano": {"USD": 2_000_000_000}},
            },
        },
    )
    yield stack
    statuses = stack.stop()
    assert not any(statuses.values()), statuses


@pytest.fixture
async def stack(shared_stack: Stack) -> AsyncIterator[Stack]:
    """The stack, all of it running; afterwards nothing may be left of any request (R1)."""
    await shared_stack.start()
    yield shared_stack
    await shared_stack.until_idle()


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[AsyncClient]:
    """A client of tenant `alice`."""
    async with stack.client(await stack.key_of("alice")) as made:
        yield made
