"""Real workers killed with -9 in the middle: the answer is the one of an undisturbed run (X1, X2).

A worker dies the moment the router has read so much of its attempt; what it had on the wire
besides is thrown away, as if it had died a little earlier still.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from services.router.attempt import Attempt
from tests.forked_workers import ForkedWorker, forked
from tests.redis_process import RedisProcess
from tests.router_harness import Heard, RouterHarness
from tests.router_workers import TlsOf, ask, check_usage, router_over
from tests.slow_link import SlowLink
from tidemill.api.common.v1 import lifecycle_pb2
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.worker.config import Role

pytestmark = pytest.mark.redis

NUM_PROMPT = 150
MAX_TOKENS = 40
STEP_S = 0.004


class Executioner:
    """Kills the worker that `victim` names, once, when the router has read so many tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.workers: dict[str, ForkedWorker] = {}
        self.after_tokens: int | None = None
        self.victim: Callable[[Attempt], str] = lambda attempt: attempt.worker.id
        self.on_kill: Callable[[], None] = lambda: None
        self.killed: list[str] = []
        self._read = Attempt._read
        self._arrived = Attempt.arrived
        self._counts: dict[Attempt, int] = {}
        self._deaf: set[Attempt] = set()
        for name, function in self._patched().items():
            monkeypatch.setattr(Attempt, name, function)

    def _patched(self) -> dict[str, Any]:
        """Functions, so that the class binds them."""

        async def read(attempt: Attempt) -> decode_pb2.DecodeResponse | None:
            return await self._reading(attempt)

        def arrived(attempt: Attempt, chunk: decode_pb2.Chunk) -> None:
            self._strike(attempt)
            if attempt not in self._deaf:
                self._arrived(attempt, chunk)
                self._count(attempt, len(chunk.token_ids))

        return {"_read": read, "arrived": arrived}

    async def _reading(self, attempt: Attempt) -> decode_pb2.DecodeResponse | None:
        self._strike(attempt)
        response = await self._read(attempt)
        if response is not None and response.HasField("final"):
            await self._in_order(attempt, response.final.generated_tokens)
        while response is not None and attempt in self._deaf:
            response = await self._read(attempt)
        if response is not None:
            self._count(attempt, _num_tokens(response))
        return response

    async def _in_order(self, attempt: Attempt, num_tokens: int) -> None:
        """A Final that overtook its tokens is read after them, unless death comes between."""
        while self._counts.get(attempt, 0) < num_tokens:
            if attempt in self._deaf or attempt._failure is not None:
                return
            await asyncio.sleep(0.001)

    def _strike(self, attempt: Attempt) -> None:
        if self._due(attempt):
            self.kill(self.victim(attempt))
            if attempt.worker.id in self.killed:
                self._deaf.add(attempt)

    def _count(self, attempt: Attempt, num_tokens: int) -> None:
        self._counts[attempt] = self._counts.get(attempt, 0) + num_tokens

    def _due(self, attempt: Attempt) -> bool:
        if self.after_tokens is None or self.killed:
            return False
        return self._counts.get(attempt, 0) >= self.after_tokens

    def kill(self, worker_id: str) -> None:
        """Now."""
        self.killed.append(worker_id)
        self.workers[worker_id].kill()
        self.on_kill()


def _num_tokens(response: decode_pb2.DecodeResponse) -> int:
    if response.HasField("prefill_done"):
        return 1
    return len(response.chunk.token_ids)


@pytest.fixture
def executioner(monkeypatch: pytest.MonkeyPatch) -> Executioner:
    return Executioner(monkeypatch)


Place = Callable[..., Any]


@pytest.fixture
def place(
    tiny_dir: Path, ledger: RedisProcess, tls_files: TlsOf, executioner: Executioner
) -> Place:
    """(*roles) -> a router over such workers, as a context manager."""

    @asynccontextmanager
    async def run(*roles: Role, **settings: Any) -> AsyncIterator[RouterHarness]:
        async with forked(tiny_dir, tls_files, roles, **{"step_s": STEP_S, **settings}) as workers:
            executioner.workers = {worker.worker_id: worker for worker in workers}
            endpoints = [worker.endpoint for worker in workers]
            async with router_over(tiny_dir, ledger, tls_files, *endpoints) as router:
                await router.until(lambda: len(router.process.fleet) == len(workers))
                yield router

    return run


def sampled(request_id: str, **sampling: Any) -> router_pb2.GenerateRequest:
    request = ask(request_id, NUM_PROMPT, max_tokens=MAX_TOKENS)
    for name, value in {"seed": 1, **sampling}.items():
        setattr(request.sampling, name, value)
    return request


async def disturbed_and_not(
    router: RouterHarness, executioner: Executioner, request: router_pb2.GenerateRequest
) -> tuple[Heard, Heard]:
    """The request with a worker killed, and again with those that are left."""
    disturbed = await router.generate(request)
    assert len(executioner.killed) == 1
    again = router_pb2.GenerateRequest()
    again.CopyFrom(request)
    again.request_id = "undisturbed"
    undisturbed = await router.generate(again)
    check_same(disturbed, undisturbed)
    return disturbed, undisturbed


def check_same(disturbed: Heard, undisturbed: Heard) -> None:
    """One stream without a gap, one bill, and of the usage all but where the prompt lay."""
    found, wanted = disturbed.completed, undisturbed.completed
    assert disturbed.token_ids == undisturbed.token_ids
    assert disturbed.text == undisturbed.text
    assert [c.first_index for c in disturbed.chunks if not c.choice] == _starts(disturbed)
    assert [chunk.sequence for chunk in disturbed.chunks] == list(range(len(disturbed.chunks)))
    assert found.finish_reason == wanted.finish_reason
    assert found.seed == wanted.seed
    for usage in (check_usage(disturbed, NUM_PROMPT), check_usage(undisturbed, NUM_PROMPT)):
        assert usage.completion_tokens == wanted.usage.completion_tokens
        assert usage.reasoning_tokens == wanted.usage.reasoning_tokens
    assert wanted.receipt.attempts == 1
    assert found.receipt.amount_nano >= wanted.receipt.amount_nano > 0


def _starts(heard: Heard) -> list[int]:
    lengths = [len(chunk.token_ids) for chunk in heard.chunks if not chunk.choice]
    return [sum(lengths[:number]) for number in range(len(lengths))]


@pytest.mark.parametrize("after_tokens", [0, 1, 17, MAX_TOKENS - 1])
async def test_one_worker_dies_and_the_other_gives_the_same_answer(
    place: Place, executioner: Executioner, after_tokens: int
) -> None:
    executioner.after_tokens = after_tokens
    async with place(Role.BOTH, Role.BOTH) as router:
        disturbed, _ = await disturbed_and_not(router, executioner, sampled("r1"))
        assert disturbed.completed.receipt.attempts == 2


async def test_one_that_dies_after_its_last_token_needs_no_other(
    place: Place, executioner: Executioner
) -> None:
    executioner.after_tokens = MAX_TOKENS
    async with place(Role.BOTH, Role.BOTH) as router:
        disturbed, _ = await disturbed_and_not(router, executioner, sampled("r1"))
        assert disturbed.completed.receipt.attempts == 1


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.8, "seed": 8, "top_p": 0.9, "repetition_penalty": 1.3},
        {"temperature": 1.1, "seed": 9, "presence_penalty": 1.0, "frequency_penalty": 0.7},
        {"temperature": 1.0, "seed": 10, "min_tokens": 30, "top_k": 50},
    ],
    ids=["plain", "repetition", "presence", "min_tokens"],
)
async def test_seed_and_penalties_are_rebuilt_from_the_tokens(
    place: Place, executioner: Executioner, sampling: dict[str, Any]
) -> None:
    executioner.after_tokens = 17
    async with place(Role.BOTH, Role.BOTH) as router:
        disturbed, _ = await disturbed_and_not(router, executioner, sampled("r1", **sampling))
        assert disturbed.completed.receipt.attempts == 2


async def test_log_probabilities_go_on_over_a_loss(place: Place, executioner: Executioner) -> None:
    executioner.after_tokens = 17
    async with place(Role.BOTH, Role.BOTH) as router:
        request = sampled("r1", logprobs=2, prompt_logprobs=1)
        disturbed, undisturbed = await disturbed_and_not(router, executioner, request)
        told, wanted = (
            [one for chunk in heard.chunks for one in chunk.logprobs]
            for heard in (disturbed, undisturbed)
        )
        assert len(told) == MAX_TOKENS
        for one, other in zip(told, wanted, strict=True):
            assert one.top_token_ids == other.top_token_ids
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        scored = sum(len(each.prompt_scored.logprobs) for each in disturbed.messages)
        assert scored == NUM_PROMPT - 1


async def test_a_stop_string_may_span_the_loss(place: Place, executioner: Executioner) -> None:
    async with place(Role.BOTH, Role.BOTH) as router:
        whole = await router.generate(sampled("whole"))
        pieces = [chunk.text for chunk in whole.chunks]
        position = next(at for at in range(8, len(pieces) - 2) if pieces[at] and pieces[at + 1])
        stop = pieces[position] + pieces[position + 1]
        executioner.after_tokens = whole.chunks[position].first_index + 1
        request = sampled("r1")
        request.stop.append(stop)
        disturbed, _ = await disturbed_and_not(router, executioner, request)
        assert disturbed.completed.finish_reason == lifecycle_pb2.FINISH_REASON_STOP
        assert disturbed.text == whole.text[: whole.text.index(stop)]


async def test_a_schema_is_followed_to_its_end_over_a_loss(
    place: Place, executioner: Executioner
) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"n": {"enum": ["tide", "wind", "hand"]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    executioner.after_tokens = 4
    async with place(Role.BOTH, Role.BOTH) as router:
        request = sampled("r1", temperature=1.0, seed=3, max_tokens=200)
        request.response_format.json_schema.schema = json.dumps(schema)
        disturbed, _ = await disturbed_and_not(router, executioner, request)
        assert disturbed.completed.receipt.attempts == 2
        assert json.loads(disturbed.text)["n"] in {"tide", "wind", "hand"}


async def test_several_choices_go_on_each_with_its_own_noise(
    place: Place, executioner: Executioner
) -> None:
    executioner.after_tokens = 30
    async with place(Role.BOTH, Role.BOTH) as router:
        request = sampled("r1", temperature=1.0, seed=5, n=3)
        disturbed = await router.generate(request)
        request.request_id = "undisturbed"
        undisturbed = await router.generate(request)
        for choice in range(3):
            told, wanted = (
                [id_ for chunk in heard.chunks if chunk.choice == choice for id_ in chunk.token_ids]
                for heard in (disturbed, undisturbed)
            )
            assert told == wanted
        assert check_usage(disturbed, NUM_PROMPT).completion_tokens == 3 * MAX_TOKENS
        assert disturbed.completed.receipt.attempts == 4


async def test_a_worker_that_stands_still_in_the_queue_and_dies_is_replaced(
    place: Place, executioner: Executioner
) -> None:
    async with place(Role.BOTH, Role.BOTH) as router:
        for worker in executioner.workers.values():
            worker.freeze()
        executioner.after_tokens = 0
        call = router.call(sampled("r1"))
        await router.until(lambda: bool(executioner.killed))
        for worker in executioner.workers.values():
            worker.thaw()
        heard = Heard()
        while (message := await call.read()) and isinstance(message, router_pb2.GenerateResponse):
            heard.messages.append(message)
        assert heard.completed.receipt.attempts == 2
        undisturbed = await router.generate(sampled("undisturbed"))
        check_same(heard, undisturbed)


class TestSplit:
    """A prefill and a decode worker share the work."""

    @pytest.mark.parametrize("after_tokens", [0, 1, 17, MAX_TOKENS - 1])
    async def test_the_decode_worker_dies(
        self, place: Place, executioner: Executioner, after_tokens: int
    ) -> None:
        executioner.after_tokens = after_tokens
        async with place(Role.PREFILL, Role.DECODE, Role.DECODE) as router:
            disturbed, _ = await disturbed_and_not(router, executioner, sampled("r1"))
            assert disturbed.completed.receipt.attempts == 2

    async def test_the_prefill_worker_dies_while_it_computes(
        self, place: Place, executioner: Executioner
    ) -> None:
        executioner.after_tokens = 0
        executioner.victim = lambda attempt: attempt._start.prefill.worker_id
        async with place(Role.PREFILL, Role.PREFILL, Role.DECODE, step_s=0.2) as router:
            request = sampled("r1", max_tokens=4)
            disturbed, _ = await disturbed_and_not(router, executioner, request)
            assert disturbed.completed.receipt.attempts == 2

    async def test_the_prefill_worker_dies_during_the_hand_over(
        self,
        tiny_dir: Path,
        ledger: RedisProcess,
        tls_files: TlsOf,
        executioner: Executioner,
        free_port: Callable[[], int],
    ) -> None:
        roles = (Role.PREFILL, Role.PREFILL, Role.DECODE)
        async with forked(tiny_dir, tls_files, roles, step_s=STEP_S) as workers:
            executioner.workers = {worker.worker_id: worker for worker in workers}
            links = {
                worker.worker_id: SlowLink(free_port(), int(worker.address.rpartition(":")[2]))
                for worker in workers[:2]
            }
            endpoints = [f"prefill@127.0.0.1:{link.port}" for link in links.values()]
            try:
                async with router_over(
                    tiny_dir, ledger, tls_files, *endpoints, workers[2].endpoint
                ) as router:
                    await router.until(lambda: len(router.process.fleet) == 3)
                    await self._hand_over_slowly(router, executioner, links)
            finally:
                for link in links.values():
                    link.close()

    async def _hand_over_slowly(
        self, router: RouterHarness, executioner: Executioner, links: dict[str, SlowLink]
    ) -> None:
        def cut() -> None:
            links[executioner.killed[0]].cut()
            for link in links.values():
                link.bytes_per_s = None

        for link in links.values():
            link.bytes_per_s = 20_000
        executioner.after_tokens = 1
        executioner.victim = lambda attempt: attempt._start.prefill.worker_id
        executioner.on_kill = cut
        disturbed, _ = await disturbed_and_not(router, executioner, sampled("r1"))
        assert disturbed.completed.receipt.attempts == 2
