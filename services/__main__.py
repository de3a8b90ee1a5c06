"""The whole of Tidemill on this machine: both Redis, cache, workers, router.

python -m services          start, say how to call it, stay until Ctrl-C
python -m services demo     start, ask twice, show both bills, stop
"""

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from services.stack.demo import demo
from services.stack.launcher import run_stack
from services.stack.plan import ROOT
from services.stack.up import up
from tidemill.errors import ConfigError, TidemillError


def say(line: str) -> None:
    """One line of progress."""
    print(line, flush=True)


async def _run(arguments: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)

    verb = {"up": up, "demo": demo}[arguments.verb]
    await run_stack(
        (arguments.state / arguments.verb).resolve(),
        lambda plan: verb(plan, say),
        model_dir=arguments.model,
        both=arguments.role == "both",
        port=arguments.port,
        routers=arguments.routers,
        empty=arguments.verb == "demo",
        say=say,
    )


def main() -> int:
    """Parse the command line; 0 is success, 1 a failure, 2 a wrong configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m services",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", nargs="?", choices=["up", "demo"], default="up")
    parser.add_argument(
        "--role",
        choices=["split", "both"],
        default="split",
        help="a prefill and a decode worker, or one worker that does both",
    )
    parser.add_argument("--model", type=Path, help="Hugging Face folder; default: models/demo")
    parser.add_argument("--port", type=int, default=0, help="the router's; default: a free one")
    parser.add_argument(
        "--routers", type=int, default=1, help="router processes on that port; default: 1"
    )
    parser.add_argument("--state", type=Path, default=ROOT / ".tidemill", help="state directory")
    arguments = parser.parse_args()
    try:
        asyncio.run(_run(arguments))
    except asyncio.CancelledError:
        return 0 if arguments.verb == "up" else 130
    except TidemillError as error:
        print(f"tidemill: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
