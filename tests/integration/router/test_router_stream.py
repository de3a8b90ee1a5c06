"""What a client of the router sees on its stream; the workers are scripted."""

from pathlib import Path

import pytest

from tests.router_harness import MODEL, RouterHarness, spell
from tests.scripted_worker import ScriptedWorker, answer
from tidemill.api.router.v1 import router_service_pb2 as router_pb2

pytestmark = pytest.mark.redis


async def test_one_request_from_prompt_to_receipt(
    model_dir: Path, router: RouterHarness, decode: ScriptedWorker
) -> None:
    decode.scripts = [answer(spell(model_dir, "hello"), device=64)]
    request = router_pb2.GenerateRequest(request_id="r1", model=MODEL, prompt="x" * 100)
    heard = await router.generate(request)
    assert heard.kinds == ["accepted", "chunk", "completed"]
    assert heard.text == "hello"
