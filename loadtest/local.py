"""The whole stack on this machine under load: `python -m loadtest.local [SCENARIO...]`.

Starts two Redis, cache, workers and router anew, runs each scenario (all of them unless named) as
a process of its own against them, writes a report with plots for each and stops. What follows
`--` goes to `python -m loadtest`. The exit status is 1 if any run failed or its books differ.
"""

import argparse
import asyncio
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import commit, device
from loadtest.report import write_report
from loadtest.scenarios import SCENARIOS
from services.stack.launcher import DEMO_MODEL, run_stack
from services.stack.plan import ROOT, Plan
from tidemill.errors import TidemillError

REPORTS = ROOT / "docs" / "reports"


def say(line: str) -> None:
    print(line, flush=True)


def environ_of(plan: Plan) -> dict[str, str]:
    """What `python -m loadtest` needs to reach this stack and to see its books."""
    return os.environ | {
        "TIDEMILL_ADDRESS": plan.address,
        "TIDEMILL_CA": str(plan.ca),
        "TIDEMILL_ADMIN_KEY": plan.state.secret("admin.key"),
        "TIDEMILL_LOAD_METRICS": " ".join(plan.worker_pages),
    }


async def run_load(plan: Plan, arguments: Sequence[str], output: Path) -> int:
    """One run to its end, which writes `output`; its exit status."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtest", *arguments, "--output", str(output)),
        cwd=ROOT,
        env=environ_of(plan),
    )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


def read_run(output: Path) -> Any:
    """What a run wrote; None if it did not come so far."""
    return json.loads(output.read_text(encoding="utf-8")) if output.exists() else None


def provenance(module: str, arguments: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    """Where a report comes from."""
    return {
        "command": shlex.join(["python", "-m", module, *given]),
        "commit": commit(),
        "device": device(),
        "model": (arguments.model or DEMO_MODEL).name,
        "stack": "one worker of both roles" if arguments.both else "a prefill and a decode worker",
    }


async def load_stack(arguments: argparse.Namespace, directory: Path) -> int:
    """All scenarios in turn; the worst exit status."""
    worst = 0

    def report(output: Path) -> None:
        run = read_run(output)
        if run is not None:
            source = provenance("loadtest.local", arguments, arguments.given)
            page = write_report(run, source, arguments.reports)
            say(f"report: {os.path.relpath(page)}")

    async def use(plan: Plan) -> None:
        nonlocal worst
        for scenario in arguments.scenarios:
            say(f"\n== {scenario}")
            output = directory / f"{scenario}.json"
            own = ["--scenario", scenario, *arguments.options]
            worst = max(worst, await run_load(plan, own, output))
            await asyncio.to_thread(report, output)

    await run_stack(
        directory / "stack", use, say=say, model_dir=arguments.model, both=arguments.both
    )
    return worst


def main() -> int:
    given = sys.argv[1:]
    ours, options = given, []
    if "--" in given:
        ours, options = given[: given.index("--")], given[given.index("--") + 1 :]
    parser = argparse.ArgumentParser(prog="python -m loadtest.local", description=__doc__)
    parser.add_argument("scenarios", nargs="*", choices=[*SCENARIOS], default=[*SCENARIOS])
    parser.add_argument("--model", type=Path, help="Hugging Face folder; default: models/demo")
    parser.add_argument("--both", action="store_true", help="one worker that prefills and decodes")
    parser.add_argument("--reports", type=Path, default=REPORTS, help="folder of the reports")
    arguments = parser.parse_args(ours)
    arguments.options, arguments.given = options, given
    try:
        with tempfile.TemporaryDirectory(prefix="tidemill-load-") as directory:
            return asyncio.run(load_stack(arguments, Path(directory)))
    except TidemillError as error:
        say(f"loadtest: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
