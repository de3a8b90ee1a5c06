"""Two of everything that serves, over one ledger, to be killed and brought back.

Leases are short, so that what a dead router leaves is taken up within seconds.
"""

import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from services.router.crash_points import VARIABLE
from services.stack.redis import answers
from tests.stack_harness import Process, Stack, eventually

ROUTERS = ("router", "router-1")
WORKERS = ("prefill", "prefill-1", "decode", "decode-1")
LEDGER = "redis-ledger"

LEASE_S = 1.0
HANDOVER_LEASE_S = 10.0
CONTEXT_TOKENS = 8192
_DIED_S = 20.0

SETTINGS = {
    "router": {
        "money": {"router_id": "router", "lease_s": LEASE_S},
        "ledger": {"timeout_s": 1.0},
        "server": {"drain_s": 0.5},
    },
    **{
        worker: {
            "handover": {"lease_s": HANDOVER_LEASE_S},
            "engine": {"step_tokens": 256},
            "server": {"drain_s": 0.5},
        }
        for worker in ("prefill", "decode")
    },
}


class Fleet:
    """The stack, and who in it is to die."""

    def __init__(self, directory: Path, model_dir: Path) -> None:
        self.stack = Stack(
            directory, model_dir, twins=("router", "prefill", "decode"), settings=SETTINGS
        )

    def __getitem__(self, name: str) -> Process:
        return self.stack[name]

    @property
    def ledger_url(self) -> str:
        """The ledger Redis, for reading what it holds."""
        plan = self.stack.plan
        return plan.ledger_redis.url(plan.state, "ledger")

    def worker_id(self, name: str) -> str:
        """What a worker's process is called in journals."""
        return name if name.endswith("-1") else f"{name}-0"

    async def ready(self, armed: Mapping[str, str]) -> None:
        """All of it runs, and of the routers those in `armed` die at that crash point."""
        for name in ROUTERS:
            environ = {VARIABLE: armed[name]} if name in armed else {}
            if self[name].environ != environ:
                self[name].environ = environ
                if self[name].running:
                    self[name].kill()
        await self.stack.start()

    async def restart(self, name: str) -> None:
        """Start a dead process, unarmed, and wait until it serves."""
        self[name].environ = {}
        self[name].start()
        if name == LEDGER:
            await eventually(partial(answers, self.ledger_url))
        else:
            await self[name].ready()

    async def has_no_work(self) -> bool:
        """Whether no worker that lives has anything to do for anybody."""
        for name in WORKERS:
            if self[name].running:
                load = await self.stack.load(name)
                left = (load.queued_uncached_tokens, load.prefilling, load.running, load.waiting)
                if any(left):
                    return False
        return True

    async def dies(self, name: str) -> None:
        """Wait for a process to die at its crash point, which nobody else would bring about."""
        status = await self[name].ended(_DIED_S)
        assert status == -signal.SIGKILL, f"{name} ended with {status}:\n{self[name].log_tail()}"
