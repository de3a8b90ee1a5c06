"""Two of everything that serves, over one ledger, to be killed and brought back.

Leases are short, so that what a dead router leaves is taken up within seconds.
"""

import asyncio
import signal
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from services.router.crash_points import VARIABLE
from services.stack import toml
from services.stack.redis import answers
from tests.stack_harness import Process, Stack, eventually
from tidemill.blocks import BLOCK_TOKENS

ROUTERS = ("router", "router-1")
WORKERS = ("prefill", "prefill-1", "decode", "decode-1")
LEDGER = "redis-ledger"

LEASE_S = 2.0  # a machine that is busy elsewhere may stand still for one
HANDOVER_LEASE_S = 10.0
CONTEXT_TOKENS = 8192
_DIED_S = 60.0

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

# A prompt asked before is held up to its last block: nearly all of those are prefilled in place.
IN_PLACE_SETTINGS = toml.merged(SETTINGS, {"decode": {"in_place_tokens": BLOCK_TOKENS}})


class Fleet:
    """The stack, and who in it is to die. `router_name`, `router_processes` are as for Stack."""

    def __init__(
        self,
        directory: Path,
        model_dir: Path,
        *,
        router_name: str | None = None,
        router_processes: int = 1,
        settings: Mapping[str, Any] = SETTINGS,
    ) -> None:
        self.stack = Stack(
            directory,
            model_dir,
            twins=("router", "prefill", "decode"),
            router_name=router_name,
            router_processes=router_processes,
            settings=settings,
        )
        for name in ROUTERS:
            self[name].environ = {VARIABLE: f"@{self._crash_file(name)}"}

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

    async def ready(self) -> None:
        """All of it runs and serves."""
        await self.stack.start()
        await asyncio.gather(*(self[name].ready() for name in (*ROUTERS, *WORKERS)))

    def arm(self, name: str, point: str) -> None:
        """From now on the router dies at this crash point."""
        self._crash_file(name).write_text(point)

    def revive(self) -> None:
        """Start whatever is dead, and do not wait."""
        for name, process in self.stack.processes.items():
            if not process.running:
                self._crash_file(name).unlink(missing_ok=True)
                process.start()

    async def restart(self, name: str) -> None:
        """Start a dead process and wait until it serves."""
        self._crash_file(name).unlink(missing_ok=True)
        self[name].start()
        if name == LEDGER:
            await eventually(partial(answers, self.ledger_url))
        else:
            await self[name].ready()

    def _crash_file(self, name: str) -> Path:
        return self.stack.plan.state.path / f"crash-{name}"

    async def has_no_work(self, workers: Iterable[str]) -> bool:
        """Whether none of these workers has anything to do for anybody."""
        loads = [await self.stack.load(name) for name in workers]
        return not any(
            each.queued_uncached_tokens or each.prefilling or each.running or each.waiting
            for each in loads
        )

    async def dies(self, name: str) -> None:
        """Wait for a process to die at its crash point, which nobody else would bring about."""
        status = await self[name].ended(_DIED_S)
        assert status == -signal.SIGKILL, f"{name} ended with {status}:\n{self[name].log_tail()}"
