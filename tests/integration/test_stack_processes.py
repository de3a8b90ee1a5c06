"""Starting, watching and stopping child processes."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from services.stack.processes import GRACE_S, Child, ChildFailed, Supervisor


class Stage:
    """A supervisor of shell scripts, and what it said."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.said: list[str] = []
        self.pids: dict[str, int] = {}
        self.supervisor = Supervisor(
            directory,
            directory=directory,
            environ=dict(os.environ),
            say=self.said.append,
            started=self.pids.update,
        )

    def child(
        self, name: str, script: str, ready: Callable[[], Awaitable[bool]] | None = None
    ) -> Child:
        async def at_once() -> bool:
            return True

        return Child(name, ("/bin/sh", "-c", script), ready or at_once)

    def made(self, name: str) -> Callable[[], Awaitable[bool]]:
        """Ready once the child has made a file of that name."""

        async def exists() -> bool:
            return (self.directory / name).exists()

        return exists


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_children_are_stopped_in_reverse_order(stage: Stage) -> None:
    script = "trap 'echo {0} >> order; exit 0' TERM; touch {0}; while :; do sleep 0.05; done"
    names = ["one", "two", "three"]
    async with stage.supervisor as supervisor:
        children = [stage.child(each, script.format(each), stage.made(each)) for each in names]
        await supervisor.start(children, timeout_s=20)
        assert list(stage.pids) == names
        assert [line.split()[:2] for line in sorted(stage.said)] == [
            [each, "ready"] for each in sorted(names)
        ]
    assert (stage.directory / "order").read_text().split() == names[::-1]
    assert not any(map(is_alive, stage.pids.values()))


async def test_a_child_that_ends_at_start_is_reported_with_the_end_of_its_log(
    stage: Stage,
) -> None:
    async def never() -> bool:
        return False

    steady = stage.child("steady", "exec sleep 60")
    broken = stage.child("broken", "echo the reason >&2; exit 3", never)
    async with stage.supervisor as supervisor:
        with pytest.raises(ChildFailed) as caught:
            await supervisor.start([steady, broken], timeout_s=20)
    assert "broken ended with status 3" in str(caught.value)
    assert "the reason" in str(caught.value)
    assert not any(map(is_alive, stage.pids.values()))


async def test_a_child_that_dies_later_ends_the_watch(stage: Stage) -> None:
    async with stage.supervisor as supervisor:
        await supervisor.start([stage.child("victim", "exec sleep 60")], timeout_s=20)
        os.kill(stage.pids["victim"], 9)
        with pytest.raises(ChildFailed, match="victim ended by signal 9"):
            await supervisor.watch()


async def test_a_child_that_never_gets_ready_is_given_up(stage: Stage) -> None:
    async def never() -> bool:
        return False

    async with stage.supervisor as supervisor:
        slow = stage.child("slow", "echo still thinking; exec sleep 60", never)
        with pytest.raises(ChildFailed, match=r"not ready after 0.3 s: slow"):
            await supervisor.start([slow], timeout_s=0.3)


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.stack.processes.GRACE_S", 0.3)
    stubborn = stage.child(
        "stubborn", "trap '' TERM; touch up; while :; do sleep 0.05; done", stage.made("up")
    )
    async with stage.supervisor as supervisor:
        await supervisor.start([stubborn], timeout_s=20)
    assert any("stubborn did not stop" in line for line in stage.said)
    assert not is_alive(stage.pids["stubborn"])


async def test_a_second_interrupt_kills_at_once(stage: Stage) -> None:
    stubborn = stage.child(
        "stubborn", "trap '' TERM; touch up; while :; do sleep 0.05; done", stage.made("up")
    )

    started = asyncio.Event()

    async def run() -> None:
        async with stage.supervisor as supervisor:
            await supervisor.start([stubborn], timeout_s=20)
            started.set()
            await supervisor.watch()

    task = asyncio.create_task(run())
    await started.wait()
    begun = time.monotonic()
    task.cancel()
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - begun < GRACE_S
    async with asyncio.timeout(30):
        while is_alive(stage.pids["stubborn"]):  # noqa: ASYNC110 - until it is reaped
            await asyncio.sleep(0.02)
