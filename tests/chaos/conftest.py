"""A stack to be broken: one of each process, prefill at the end of a wire that can be slowed."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest

from services.stack.ports import free_port
from tests.slow_link import SlowLink
from tests.stack_harness import Stack
from tests.tiny_model import make_tiny_checkpoint
from tidemill.client import AsyncClient

CONTEXT_TOKENS = 8192


@dataclass(frozen=True)
class Breakable:
    """The stack, and the wire to its prefill worker."""

    stack: Stack
    wire: SlowLink


@pytest.fixture(scope="module")
def shared_breakable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Breakable]:
    model = tmp_path_factory.mktemp("tiny")
    make_tiny_checkpoint(model, max_position_embeddings=CONTEXT_TOKENS)
    wire_port = free_port()
    stack = Stack(
        tmp_path_factory.mktemp("stack") / "state",
        model,
        settings={
            "prefill": {
                "advertise": f"127.0.0.1:{wire_port}",
                "engine": {"step_tokens": 64},
                "handover": {"max_message_bytes": 65_536},
            },
        },
    )
    wire = SlowLink(wire_port, stack.plan.prefill_port)
    yield Breakable(stack, wire)
    statuses = stack.stop()
    wire.close()
    assert not any(statuses.values()), statuses


@pytest.fixture
async def wire(shared_breakable: Breakable) -> AsyncIterator[SlowLink]:
    """The wire from prefill to everyone, at full speed again afterwards."""
    yield shared_breakable.wire
    shared_breakable.wire.bytes_per_s = None


@pytest.fixture
async def stack(shared_breakable: Breakable) -> AsyncIterator[Stack]:
    """All of it running; afterwards nothing of any request may be left in what survived (R1)."""
    stack = shared_breakable.stack
    await stack.start()
    yield stack
    await stack.start()
    await stack.until_idle()


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[AsyncClient]:
    """A client of tenant `alice`."""
    async with stack.client(await stack.key_of("alice")) as made:
        yield made
