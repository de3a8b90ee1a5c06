"""Loopback ports for processes that are about to start."""

import itertools
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack

# Below the ports that Linux gives to outgoing connections (32768 and up): one of those could be
# gone again before the process that is to listen on it has started.
_LOWEST, _BEYOND = 15_000, 30_000
_NEIGHBOURS = 8  # most ports that are asked for at once


def free_port() -> int:
    """A port that nothing listens on at the moment, and that no other caller of this process got.

    It stays its owner's while the owner is dead: no outgoing connection takes it.
    """
    return free_ports(1)


def free_ports(count: int) -> int:
    """The first of `count` (1 to 8) neighbouring ones."""
    assert 1 <= count <= _NEIGHBOURS, count
    return next(first for first in _walk if _all_free(range(first, first + count)))


def _steps() -> Iterator[int]:
    """Round the range for ever, from a random place: two processes rarely meet."""
    firsts = range(_LOWEST, _BEYOND, _NEIGHBOURS)
    start = random.randrange(len(firsts))
    return itertools.cycle([*firsts[start:], *firsts[:start]])


def _all_free(ports: range) -> bool:
    with ExitStack() as bound:
        try:
            for port in ports:
                bound.enter_context(socket.socket()).bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


_walk = _steps()
