"""How a service process begins and ends."""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from tidemill.errors import TidemillError
from tidemill.rpc import logs

try:
    import uvloop
except ImportError:  # not on every platform; asyncio's own loop serves as well, slower
    _new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
else:
    _new_event_loop = uvloop.new_event_loop

Main = Callable[[asyncio.Event], Awaitable[None]]

logger = logging.getLogger(__name__)


def run(service: str, main: Main, *, log_level: str = "INFO") -> int:
    """Run `main(stop)` to its end and return the exit status.

    SIGTERM and SIGINT set `stop`; main drains and returns. A second signal ends at once (130).
    A TidemillError (a bad configuration or checkpoint, a store that refuses) is one line on
    stderr and 2; anything else is 1, with its traceback in the log.
    """
    logs.configure(service, level=log_level)
    gc.freeze()  # what is imported stays: no collection need look at it again
    try:
        with asyncio.Runner(loop_factory=_new_event_loop) as runner:
            runner.run(_supervise(main))
    except asyncio.CancelledError:
        return 130
    except Exception as error:
        cause = _cause(error)
        if isinstance(cause, TidemillError):
            sys.stderr.write(f"tidemill {service}: {cause}\n")
            return 2
        logger.exception("the process failed")
        return 1
    return 0


def _cause(error: BaseException) -> BaseException:
    """The one exception inside a task group's, where there is only one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def _supervise(main: Main) -> None:
    stop = asyncio.Event()
    task: asyncio.Task[Any] | None = asyncio.current_task()
    assert task is not None

    def on_signal(name: str) -> None:
        if stop.is_set():
            task.cancel()
        else:
            logger.info("stopping", extra={"signal": name})
            stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number.name)
    try:
        await main(stop)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
