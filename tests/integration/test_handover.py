"""Prefill to decode over real mutual TLS: same tokens, same bytes, nothing left behind."""

from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_checkpoint
from tests.worker_harness import Tls, make_start, prompt_of, router_of, settled, worker_at
from tidemill.worker.config import Role


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


async def test_split_workers_answer_as_one_worker_does(model_dir: Path, tls_files: Tls) -> None:
    prompt = prompt_of(200)
    async with (
        worker_at(Role.BOTH, model_dir, tls_files) as both,
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        worker_at(Role.DECODE, model_dir, tls_files) as decode,
        router_of(both, tls_files) as one,
        router_of(decode, tls_files) as split,
    ):
        alone = await one.ask(make_start(prompt, max_tokens=24))
        answer = await split.ask(make_start(prompt, prefill=prefill, max_tokens=24))
        assert answer.error is None
        assert answer.tokens == alone.tokens
        assert len(answer.tokens) == 24
        assert answer.reason == alone.reason == "LENGTH"
        await settled(both, prefill, decode)
