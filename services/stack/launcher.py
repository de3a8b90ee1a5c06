"""Brings a local stack up, has something done with it, and takes it down again."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from services.stack.plan import ROOT, Plan, new_metrics_ports
from services.stack.ports import free_port
from services.stack.processes import Supervisor
from services.stack.state import StateDirectory
from tidemill.errors import ConfigError

STORES_TIMEOUT_S = 20.0
SERVICES_TIMEOUT_S = 120.0
DEMO_MODEL = ROOT / "models" / "demo"

Use = Callable[[Plan], Awaitable[None]]
Say = Callable[[str], None]


def choose_model(given: Path | None) -> Path:
    """The folder of the model to serve: the one given, else models/demo."""
    folder = given or DEMO_MODEL
    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds no model: it has no config.json")
    return folder.resolve()


async def run_stack(
    directory: Path,
    use: Use,
    *,
    say: Say,
    model_dir: Path | None = None,
    both: bool = False,
    port: int = 0,
    routers: int = 1,
    empty: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Start everything in `directory`, await `use`, stop everything in reverse order.

    `port` is the router's, 0 for a free one; `routers` processes share it. With `empty` the ledger
    starts from nothing. `settings` are laid over the configuration. Raises ConfigError before
    anything is started, and ChildFailed when a process ends by itself.
    """
    state = StateDirectory(directory)
    with state.held(), state.shared_memory() as shm_dir:
        state.prepare(empty=empty)
        plan = Plan(
            state,
            choose_model(model_dir),
            both=both,
            shm_dir=shm_dir,
            router_port=port or free_port(),
            routers=routers,
            metrics_ports=new_metrics_ports(routers),
            settings=settings or {},
        )
        plan.write_config()
        say(f"starting in {_short(directory)}, logs in {_short(state.logs)}")
        async with Supervisor(
            state.logs,
            directory=ROOT,
            environ=_environ(),
            say=say,
            started=state.note_pids,
            inherited=[state.lock_fd],
        ) as supervisor:
            for children, timeout_s in (
                (plan.stores(), STORES_TIMEOUT_S),
                (plan.services(), SERVICES_TIMEOUT_S),
            ):
                await supervisor.start(children, timeout_s=timeout_s)
            await _first_to_end(use(plan), supervisor.watch())


async def _first_to_end(use: Awaitable[None], watch: Awaitable[None]) -> None:
    """Until `use` ends; whatever ends first decides, the other one is cancelled."""
    tasks = [asyncio.ensure_future(use), asyncio.ensure_future(watch)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _environ() -> dict[str, str]:
    """Ours, less the settings: the generated file alone decides.

    OpenMP's threads sleep while they wait: spinning ones would take the cores from the stack's
    other processes.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TIDEMILL_")}
    return {"OMP_WAIT_POLICY": "passive"} | kept


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
