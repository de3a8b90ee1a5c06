import asyncio
import importlib.util
import json
import signal
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.worker_harness import eventually
from tidemill.api.common.v1.lifecycle_pb2 import WorkerTask
from tidemill.errors import FailedPrecondition, InvalidRequest
from tidemill.vocabulary import load_token_bytes, vocabulary_digest
from tidemill.worker.grammars import Grammars

DEMO = Path(__file__).parents[2] / "models" / "demo"
DIGEST = vocabulary_digest(load_token_bytes(DEMO))
FIELD = "response_format.json_schema.schema"

# Takes the compiler more than half a minute.
BOMB = {
    "type": "object",
    "properties": {f"k{index}": {"type": "string"} for index in range(1000)},
}


def wanting(schema: dict[str, Any] | None, digest: bytes = DIGEST) -> WorkerTask:
    task = WorkerTask()
    task.grammar.vocabulary_digest = digest
    if schema is None:
        task.grammar.json_object.SetInParent()
    else:
        task.grammar.json_schema.schema = json.dumps(schema)
    return task


# Starting the compiler takes seconds: the tests share one, in this order, and one event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def grammars() -> AsyncIterator[Grammars]:
    made = Grammars(DEMO, 6144, compile_s=1.5)
    yield made
    await made.close()


def process_of(grammars: Grammars) -> Any:
    return grammars._process._process


async def refusal(grammars: Grammars, schema: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        await grammars.of(wanting(schema))
    assert caught.value.reason == "GRAMMAR_INVALID"
    assert [field for field, _ in caught.value.violations] == [FIELD]
    return caught.value


async def test_a_task_without_a_grammar_starts_nothing(grammars: Grammars) -> None:
    assert await grammars.of(WorkerTask()) is None
    assert process_of(grammars) is None


async def test_each_grammar_is_compiled_once_whoever_asks(grammars: Grammars) -> None:
    schema = {"type": "integer"}
    first, second = await asyncio.gather(grammars.of(wanting(schema)), grammars.of(wanting(schema)))
    assert first is not None
    assert first is second is await grammars.of(wanting(schema))
    assert first is not await grammars.of(wanting(None))


async def test_a_schema_that_takes_too_long_is_refused_and_the_next_one_served(
    grammars: Grammars,
) -> None:
    await grammars.of(wanting(None))
    process = process_of(grammars)
    started = time.monotonic()
    error = await refusal(grammars, BOMB)
    assert time.monotonic() - started < 10
    assert "takes longer than 1.5 s" in str(error)
    await eventually(lambda: process.returncode is not None)
    assert await grammars.of(wanting({"type": "boolean"})) is not None
    assert process_of(grammars) is not process


@pytest.mark.slow
async def test_a_killed_compiler_is_replaced(grammars: Grammars) -> None:
    await grammars.of(wanting(None))
    process_of(grammars).kill()
    await process_of(grammars).wait()
    assert await grammars.of(wanting({"type": "boolean"})) is not None


async def test_a_refused_schema_says_why_and_again_without_compiling(grammars: Grammars) -> None:
    schema = {"type": "integer", "minimum": 5, "maximum": 3}
    first = await refusal(grammars, schema)
    assert "minimum greater than maximum" in str(first)
    process_of(grammars).send_signal(signal.SIGSTOP)  # it would answer nothing else in time
    try:
        assert str(await refusal(grammars, schema)) == str(first)
    finally:
        process_of(grammars).send_signal(signal.SIGCONT)


async def test_another_vocabulary_is_no_match(grammars: Grammars) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        await grammars.of(wanting(None, digest=b"x" * 32))
    assert caught.value.reason == "VOCABULARY_MISMATCH"


async def test_a_worker_without_the_package_says_so(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "tidemill.worker.grammars.find_spec",
        lambda name: None if name == "xgrammar" else found(name),
    )
    with pytest.raises(FailedPrecondition) as caught:
        await grammars.of(wanting(None))
    assert caught.value.reason == "GRAMMAR_UNAVAILABLE"


@pytest.mark.slow
async def test_a_compiler_whose_worker_was_killed_does_not_go_on_for_ever() -> None:
    program = (
        "import pathlib, sys, tidemill.engine.grammar_compiler as compiler;"
        "compiler.LONGEST_S = 1; compiler.main(pathlib.Path(sys.argv[1]), 6144)"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(DEMO), stdin=PIPE, stdout=PIPE
    )
    assert process.stdin is not None
    body = json.dumps(BOMB).encode()
    process.stdin.write(len(body).to_bytes(4, "little") + body)
    process.stdin.close()
    async with asyncio.timeout(60):
        assert await process.wait() == -signal.SIGALRM


@pytest.mark.slow
async def test_closing_ends_the_compiler_in_the_middle_of_its_work() -> None:
    grammars = Grammars(DEMO, 6144, compile_s=60)
    await grammars.of(wanting(None))
    process = process_of(grammars)
    asking = asyncio.create_task(grammars.of(wanting(BOMB)))
    await asyncio.sleep(0.2)
    await grammars.close()
    assert process.returncode is not None
    with pytest.raises(asyncio.CancelledError):
        await asking
