import asyncio

import pytest

from tidemill.rpc import tasks


async def test_a_task_that_loses_a_cancellation_is_ended_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "_AGAIN_S", 0.05)
    rounds = 0

    async def swallow_one() -> None:
        nonlocal rounds
        while True:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                rounds += 1
                if rounds == 2:
                    raise

    task = asyncio.create_task(swallow_one())
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await tasks.end(task)
    assert task.cancelled()
    assert rounds == 2


async def test_tasks_that_have_ended_or_failed_are_no_matter() -> None:
    async def fail() -> None:
        raise ValueError

    done = asyncio.create_task(asyncio.sleep(0))
    failed = asyncio.create_task(fail())
    await asyncio.wait([done, failed])
    await tasks.end(done, failed)
    await tasks.end()
    with pytest.raises(ValueError):  # noqa: PT011 - it has no message
        failed.result()
