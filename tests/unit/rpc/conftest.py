from collections.abc import Callable

import pytest


@pytest.fixture
def unused_address(free_port: Callable[[], int]) -> str:
    """A loopback address where nothing listens."""
    return f"127.0.0.1:{free_port()}"
