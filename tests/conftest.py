import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from services.stack import ports
from tests.redis_process import RedisProcess
from tidemill.certs import make_dev_certs
from tidemill.rpc.tls import TlsFiles

if shutil.which("nvidia-smi") is None:
    # Read by triton when it is first imported: kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# On a machine that is busy elsewhere an example may take any time at all.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out `slow` unless a marker expression was given, skip `gpu` without a CUDA device."""
    if not config.option.markexpr and not config.option.keyword:
        slow = [item for item in items if item.get_closest_marker("slow")]
        if slow:
            config.hook.pytest_deselected(items=slow)
            items[:] = [item for item in items if item not in slow]
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _has_cuda():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _has_cuda() -> bool:
    import torch  # noqa: PLC0415 - heavy, and needed only where gpu tests were collected

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def dev_certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the development authority and a certificate for each role."""
    directory = tmp_path_factory.mktemp("certs")
    make_dev_certs(directory)
    return directory


@pytest.fixture(scope="session")
def tls_files(dev_certs: Path) -> Callable[[str], TlsFiles]:
    """role -> its TlsFiles."""

    def files(role: str) -> TlsFiles:
        return TlsFiles(
            cert=dev_certs / f"{role}.pem", key=dev_certs / f"{role}.key", ca=dev_certs / "ca.pem"
        )

    return files


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """() -> a loopback port that nothing listens on at the moment."""
    return ports.free_port


@pytest.fixture(scope="session")
def redis_server(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Callable[..., RedisProcess]]:
    """(**settings) -> a real server of its own; redis.conf keys with underscores for dashes."""
    started: list[RedisProcess] = []

    def start(**settings: str) -> RedisProcess:
        directory = tmp_path_factory.mktemp("redis")
        process = RedisProcess(directory, port=free_port(), settings=settings)
        started.append(process)
        process.start()
        return process

    yield start
    for process in started:
        process.stop()
