"""The router over real workers on the tiny model: reuse, equality of paths, kill -9."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random

import pytest

from tests.redis_process import RedisProcess
from tests.router_harness import MODEL, Heard, listen
from tests.router_workers import Pair, TlsOf, ask, check_usage, router_over, split_pair
from tests.stopwatch import stopwatch
from tests.worker_harness import metric, prompt_of, settled, slow_down, worker_at
from tidemill.api.common.v1 import lifecycle_pb2, usage_pb2
from tidemill.blocks import block_names
from tidemill.errors import WorkerLost
from tidemill.worker.config import Role

pytestmark = pytest.mark.redis

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
async def pair(tiny_dir: Path, ledger: RedisProcess, tls_files: TlsOf) -> AsyncIterator[Pair]:
    async with split_pair(tiny_dir, ledger, tls_files) as made:
        yield made


async def test_a_repeated_prompt_is_a_hit_and_the_same_answer(pair: Pair) -> None:
    _, _, router = pair
    first, second = [await router.generate(ask(f"r{number}")) for number in range(2)]
    assert first.token_ids == second.token_ids
    assert len(first.token_ids) == 12
    assert first.text == second.text
    assert check_usage(first, 200).cache_hit_tokens == 0
    usage = check_usage(second, 200)
    assert usage.cache_hit_tokens == usage.prompt.reused_device_tokens == 192
    assert usage.prompt.prefill_worker_id == "p"
    assert usage.prompt.prefill_site == usage_pb2.PREFILL_SITE_PREFILL_WORKER
    assert second.completed.receipt.amount_nano < first.completed.receipt.amount_nano
    assert second.completed.receipt.saved_nano > 0


async def test_a_router_that_starts_learns_what_its_workers_hold(
    pair: Pair, tiny_dir: Path, ledger: RedisProcess, tls_files: TlsOf
) -> None:
    prefill, decode, router = pair
    first = await router.generate(ask("r1"))
    async with (
        worker_at(Role.PREFILL, tiny_dir, tls_files, worker_id="empty") as empty,
        router_over(
            tiny_dir,
            ledger,
            tls_files,
            *(f"prefill@{each.address}" for each in (prefill, empty)),
            f"decode@{decode.address}",
        ) as other,
    ):
        index = other.process.fleet.prefixes
        held = {each: each.worker.engine.pool.findable() for each in (prefill, decode)}
        names = block_names(
            [name for tiers in held.values() for each in tiers.values() for name in each]
        )
        await other.until(lambda: len(index) == len(set(names)) > 0)
        for number in range(3):
            again = await other.generate(ask(f"s{number}"), key=router.key)
            usage = check_usage(again, 200)
            assert again.token_ids == first.token_ids
            assert (usage.prompt.prefill_worker_id, usage.cache_hit_tokens) == ("p", 192)
        await settled(empty)
    assert index.overlap(names, 0.0) == {}  # it hung up


async def test_one_worker_doing_both_gives_the_same_answer(
    pair: Pair, tiny_dir: Path, ledger: RedisProcess, tls_files: TlsOf
) -> None:
    split = await pair[2].generate(ask("r1"))
    async with (
        worker_at(Role.BOTH, tiny_dir, tls_files) as both,
        router_over(tiny_dir, ledger, tls_files, f"both@{both.address}") as router,
    ):
        whole = await router.generate(ask("r2"))
        await settled(both)
    assert whole.token_ids == split.token_ids
    site = check_usage(whole, 200).prompt.prefill_site
    assert site == usage_pb2.PREFILL_SITE_DECODE_WORKER


async def test_a_tenant_never_hits_on_anothers_prompt(pair: Pair) -> None:
    router = pair[2]
    other = await router.make_tenant("eve")
    await router.generate(ask("r1"))
    heard = await router.generate(ask("r1"), key=other)
    assert check_usage(heard, 200).cache_hit_tokens == 0


async def test_a_stop_string_of_the_real_answer_ends_it_there(pair: Pair) -> None:
    router = pair[2]
    whole = await router.generate(ask("r1", max_tokens=24))
    cut = whole.text[len(whole.text) // 2 :][:3]
    heard = await router.generate(ask("r2", max_tokens=24, stop=[cut]))
    assert heard.completed.finish_reason == lifecycle_pb2.FINISH_REASON_STOP
    assert heard.text == whole.text[: whole.text.index(cut)]
    assert len(heard.token_ids) == check_usage(heard, 200).completion_tokens < 24


async def test_streams_cancelled_at_random_all_end_with_a_true_bill(pair: Pair) -> None:
    router, rng = pair[2], Random(7)

    async def one(number: int) -> Heard:
        call = router.call(ask(f"r{number}", 64 + 10 * number, max_tokens=48))
        if number % 3:
            return await listen(call)
        await asyncio.sleep(rng.uniform(0.0, 1.0))
        await router.cancel(f"r{number}")
        return await listen(call)

    heard = await asyncio.gather(*(one(number) for number in range(12)))
    for number, each in enumerate(heard):
        if each.completed.usage.HasField("prompt"):
            usage = check_usage(each, 64 + 10 * number)
            assert usage.completion_tokens == len(each.token_ids)
        else:
            assert each.completed.receipt.amount_nano == 0


async def test_a_client_that_vanishes_in_prefill_leaves_nothing(pair: Pair) -> None:
    prefill, decode, router = pair
    slow_down(prefill, 0.2)
    call = router.call(ask("r1", 900))
    await call.read()
    await router.until(lambda: not decode.worker.idle)
    await asyncio.sleep(0.3)
    call.cancel()
    await router.check_idle()
    await settled(prefill, decode)


class WorkerProcess:
    """`python -m services.{role}` on the tiny model."""

    def __init__(self, role: str, model_dir: Path, certs: Path, directory: Path, port: int) -> None:
        self.endpoint = f"{role}@127.0.0.1:{port}"
        path = directory / f"{role}.toml"
        path.write_text(
            f"""
[{role}]
worker_id = "{role}-0"
model = "{MODEL}"
model_dir = "{model_dir}"
engine = {{ num_blocks = 96, num_threads = 1 }}
in_place_tokens = 0
[{role}.server]
address = "127.0.0.1:{port}"
tls = {{ cert = "{certs}/{role}.pem", key = "{certs}/{role}.key", ca = "{certs}/ca.pem" }}
"""
        )
        self._command = [sys.executable, "-m", f"services.{role}", "--config", str(path)]
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            cwd=REPOSITORY,
            stderr=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
        )
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            if json.loads(line).get("message") == "serving":
                return
        raise AssertionError("the worker ended before it served")

    async def kill(self) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)
        await self._process.communicate()


@pytest.fixture
def processes(
    tiny_dir: Path, dev_certs: Path, tmp_path: Path, free_port: Callable[[], int]
) -> Callable[[str], WorkerProcess]:
    return lambda role: WorkerProcess(role, tiny_dir, dev_certs, tmp_path, free_port())


async def test_workers_killed_with_no_other_there_are_typed_errors_and_leave_nothing(
    tiny_dir: Path,
    ledger: RedisProcess,
    tls_files: TlsOf,
    processes: Callable[[str], WorkerProcess],
) -> None:
    prefill, decode = processes("prefill"), processes("decode")
    await asyncio.gather(prefill.start(), decode.start())
    try:
        async with router_over(
            tiny_dir, ledger, tls_files, prefill.endpoint, decode.endpoint
        ) as router:
            call = router.call(ask("r1", 64, max_tokens=900))
            for _ in range(4):
                await call.read()
            async with stopwatch() as watch:
                await decode.kill()
                heard = await listen(call)
            assert watch.seconds < 3
            assert isinstance(heard.error, WorkerLost)
            assert heard.error.request_id == "r1"
            await router.check_idle()

            await decode.start()
            await router.until(lambda: router.process.ready, timeout_s=60)
            call = router.call(ask("r2", 64, max_tokens=300))
            for _ in range(4):
                await call.read()
            await prefill.kill()
            heard = await listen(call)
            assert check_usage(heard, 64).completion_tokens == 300
            await router.until(lambda: not router.process.ready)
            assert (await router.generate(ask("r3"), timeout=1.0)).error is not None
    finally:
        await asyncio.gather(prefill.kill(), decode.kill())


async def test_the_next_turn_finds_the_answers_blocks_at_the_decode_worker(pair: Pair) -> None:
    prefill, decode, router = pair
    first = await router.generate(ask("turn1", 100, max_tokens=93))
    turn = ask("turn2", max_tokens=4)
    turn.tokens.token_ids[:] = [*prompt_of(100), *first.token_ids, *prompt_of(20, seed=4)]
    second = await router.generate(turn)
    prompt = check_usage(second, 213).prompt
    # 192 tokens have latents: 64 of them also where the prompt was prefilled.
    assert (prompt.reused_device_tokens, prompt.reused_peer_tokens) == (64, 128)
    assert prompt.prefill_worker_id == "p"
    assert metric(prefill, "reused_tokens_total", tier="peer") == 128
    assert metric(decode, "peer_served_blocks_total") == 2


async def test_a_prompt_that_no_pool_can_hold_is_refused_and_blocks_nobody(
    tiny_dir: Path, ledger: RedisProcess, tls_files: TlsOf
) -> None:
    async with (
        worker_at(Role.BOTH, tiny_dir, tls_files, num_blocks=8) as both,
        router_over(tiny_dir, ledger, tls_files, f"both@{both.address}") as router,
    ):
        heard = await router.generate(ask("r1", 512))
        assert heard.error is not None
        assert heard.error.reason == "CONTEXT_EXCEEDED"
        assert check_usage(await router.generate(ask("r2", 500)), 500).completion_tokens == 12
        many = await asyncio.gather(*(router.generate(ask(f"s{each}", 300)) for each in range(6)))
        assert [check_usage(each, 300).completion_tokens for each in many] == [12] * 6
        await settled(both)
