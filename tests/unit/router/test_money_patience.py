import asyncio
import time

import pytest

from services.router.money.patience import patience


async def test_a_limit_holds() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(30), patience(0.05):
            await asyncio.sleep(60)


async def test_what_is_done_within_the_limit_is_not_cut_off() -> None:
    async with patience(0.05):
        await asyncio.sleep(0)
    await asyncio.sleep(0.1)


async def test_a_cancellation_is_no_time_limit() -> None:
    async def wait() -> None:
        async with patience(60):
            await asyncio.sleep(60)

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_process_that_stands_still_for_ever_is_cut_off_all_the_same() -> None:
    num_stops = 0

    async def stand_still() -> None:
        nonlocal num_stops
        async with patience(0.1):
            while True:
                num_stops += 1
                time.sleep(0.3)  # noqa: ASYNC251 - that is what standing still is
                await asyncio.sleep(0)

    with pytest.raises(TimeoutError):
        await stand_still()
    assert 3 <= num_stops < 10
