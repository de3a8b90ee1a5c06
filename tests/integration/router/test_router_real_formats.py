"""Answers that must fit a format, through the router and real workers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.redis_process import RedisProcess
from tests.router_harness import MODEL, Heard
from tests.router_workers import TlsOf, ask, check_usage, router_over, split_pair
from tests.worker_harness import settled, worker_at
from tidemill.api.common.v1 import lifecycle_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.client import AsyncClient, FinishReason
from tidemill.errors import InvalidRequest
from tidemill.worker.config import Role

pytestmark = pytest.mark.redis

DEMO = Path(__file__).parents[3] / "models" / "demo"
SCHEMA = {
    "type": "object",
    "properties": {
        "mill": {"enum": ["tide", "wind", "hand"]},
        "wheels": {"type": "integer", "minimum": 1, "maximum": 9},
        "grinds": {"type": "boolean"},
    },
    "required": ["mill", "wheels", "grinds"],
    "additionalProperties": False,
}


def formatted(request_id: str, schema: Any, **sampling: Any) -> router_pb2.GenerateRequest:
    text = json.dumps(schema)
    wanted = router_pb2.ResponseFormat(json_schema=lifecycle_pb2.JsonSchema(schema=text))
    request = ask(request_id, max_tokens=700, response_format=wanted)
    for name, value in sampling.items():
        setattr(request.sampling, name, value)
    return request


def texts_of(heard: Heard, n: int) -> list[str]:
    return ["".join(c.text for c in heard.chunks if c.choice == each) for each in range(n)]


def check_fits(text: str) -> None:
    found = json.loads(text)
    assert set(found) == {"mill", "wheels", "grinds"}
    assert found["mill"] in SCHEMA["properties"]["mill"]["enum"]  # type: ignore[index]
    assert 1 <= found["wheels"] <= 9
    assert isinstance(found["grinds"], bool)


async def test_a_model_of_random_weights_answers_in_the_schema(
    tiny_dir: Path, ledger: RedisProcess, tls_files: TlsOf
) -> None:
    # One test, as a worker takes seconds to start its compiler.
    async with (
        worker_at(Role.BOTH, tiny_dir, tls_files) as both,
        router_over(tiny_dir, ledger, tls_files, f"both@{both.address}") as router,
    ):
        heard = await router.generate(formatted("greedy", SCHEMA))
        assert heard.completed.finish_reason == lifecycle_pb2.FINISH_REASON_STOP
        check_fits(heard.text)
        assert check_usage(heard, 200).completion_tokens == len(heard.token_ids)

        several = await router.generate(formatted("several", SCHEMA, temperature=1.0, seed=5, n=4))
        texts = texts_of(several, 4)
        for text in texts:
            check_fits(text)
        assert len(set(texts)) > 1
        check_usage(several, 200)

        refused = await router.generate(formatted("bad", {"type": "mill"}))
        assert isinstance(refused.error, InvalidRequest)
        assert refused.error.reason == "GRAMMAR_INVALID"
        assert refused.error.violations[0][0] == "response_format.json_schema.schema"
        check_fits((await router.generate(formatted("good", SCHEMA))).text)
        await settled(both)


@pytest.mark.slow
async def test_the_demo_model_answers_in_the_schema_whoever_draws_the_first_token(
    tmp_path: Path, ledger: RedisProcess, tls_files: TlsOf
) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(DEMO, folder)
    async with (
        split_pair(folder, ledger, tls_files) as (_, _, router),
        AsyncClient(router.process.server.address, router.key) as client,
    ):
        question = "What is a tide mill?"
        answer = await client.chat(
            question, model=MODEL, response_format=SCHEMA, n=3, max_tokens=400, seed=3
        )
        for choice in answer.choices:
            check_fits(choice.text)
        free = await client.chat(
            question, model=MODEL, response_format="json", max_tokens=400, seed=3
        )
        assert free.text.startswith("{")
        if free.finish_reason is FinishReason.STOP:
            assert isinstance(json.loads(free.text), dict)
