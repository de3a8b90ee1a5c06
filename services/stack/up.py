"""A stack that stays: says how to call it and waits."""

import asyncio
import shlex
from collections.abc import Callable
from pathlib import Path
from sys import executable

from services.stack.demo import make_key
from services.stack.plan import MODEL, Plan
from services.stack.state import write_private
from tidemill.client import AsyncClient
from tidemill.errors import Unauthenticated

TENANT = "local"


async def up(plan: Plan, say: Callable[[str], None]) -> None:
    """Print the way in, and stay until cancelled."""
    variables = {
        "TIDEMILL_ADDRESS": plan.address,
        "TIDEMILL_API_KEY": await _key(plan),
        "TIDEMILL_CA": str(plan.ca),
    }
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    env_file = plan.state.path / "env"
    pages = shlex.quote(" ".join(plan.worker_pages))
    load = f"export TIDEMILL_LOAD_METRICS={pages}"  # for `python -m loadtest`
    write_private(env_file, "\n".join([*exports, load]) + "\n")
    command = Path(executable).with_name("tidemill")
    say("\nTidemill is up. In another shell:\n")
    for line in exports:
        say(f"    {line}")
    say(f"    {command} generate --model {MODEL} 'The statistics module provides'\n")
    admin_key = shlex.quote(str(plan.state.secrets / "admin.key"))
    say(f"The same lines stand in {env_file}. You are the tenant {TENANT}.")
    say("For the operator's commands:\n")
    say(f"    export TIDEMILL_ADMIN_KEY=$(cat {admin_key})\n")
    say("Ctrl-C stops everything.")
    await asyncio.Event().wait()


async def _key(plan: Plan) -> str:
    """The key of the last time where the ledger still knows it, else a new one."""
    path = plan.state.secrets / "local.key"
    if path.exists():
        key = plan.state.secret("local.key")
        async with AsyncClient(plan.address, api_key=key, ca=plan.ca) as client:
            try:
                await client.models()
            except Unauthenticated:
                path.unlink()
            else:
                return key
    key = await make_key(plan, TENANT, "up")
    write_private(path, key)
    return key
