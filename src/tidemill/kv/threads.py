"""Moving latents beside the event loop: copies in threads, one message ahead of the wire."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As asyncio.to_thread; but when cancelled, wait for the thread to end before leaving.

    So whoever frees blocks after this returns or raises frees them from under nobody.
    """
    work = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        raise


async def one_ahead(items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The items, each asked for while its predecessor is still being used. Closes `items`."""
    end = object()
    upcoming: asyncio.Task[T | object] = asyncio.create_task(_next(items, end))
    try:
        while (item := await upcoming) is not end:
            upcoming = asyncio.create_task(_next(items, end))
            yield cast(T, item)
    finally:
        upcoming.cancel()
        await asyncio.wait([upcoming])
        await items.aclose()


async def _next(items: AsyncGenerator[T, None], end: object) -> T | object:
    return await anext(items, end)
