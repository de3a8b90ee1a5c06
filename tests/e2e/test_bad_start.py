"""A process that cannot serve says why in one line and exits with 2."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.stack import toml
from services.stack.plan import ROOT
from tests.redis_process import RedisProcess
from tests.router_harness import DURABLE
from tests.stack_harness import Stack

pytestmark = [pytest.mark.e2e, pytest.mark.redis]

TENSOR = "model.layers.1.self_attn.o_proj.weight"
END_S = 90


class Attempt:
    """A process that is expected to fail: its settings are the stack's own with some changed."""

    def __init__(self, directory: Path, stack: Stack, service: str, changes: Any) -> None:
        own: dict[str, Any] = {"server": {"address": "127.0.0.1:0", "metrics_address": None}}
        if service == "cache":  # a folder of blocks has one owner
            own["disk_path"] = str(directory / "blocks")
        section = toml.merged(toml.merged(stack.config[service], own), changes)
        path = directory / f"{service}.toml"
        path.write_text(toml.dumps({service: section}))
        command = [sys.executable, "-m", f"services.{service}", "--config", str(path)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        """The one line, last and for people, that it left among its log; it ended with 2."""
        _, said = self._process.communicate(timeout=END_S)
        assert self._process.returncode == 2, said
        assert "Traceback" not in said
        *log, line = said.splitlines()
        assert line.startswith("tidemill ")
        assert not any(each.startswith("tidemill ") for each in log)
        return line

    def end(self) -> None:
        """Whatever became of it, leave nothing running."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


Launch = Callable[[str, Any], Attempt]


@pytest.fixture
def launch(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """(service, changes to its section) -> a process on its way to failure."""
    attempts = []

    def start(service: str, changes: Any) -> Attempt:
        attempts.append(Attempt(tmp_path_factory.mktemp(service), stack, service, changes))
        return attempts[-1]

    yield start
    for attempt in attempts:
        attempt.end()


def copy_of(model: Path, directory: Path) -> Path:
    shutil.copytree(model, directory)
    return directory


def without_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors[TENSOR]
    save_file(tensors, model / "model.safetensors")


def with_a_misshapen_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[TENSOR] = torch.zeros(3, 5)
    save_file(tensors, model / "model.safetensors")


def truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def of_another_architecture(model: Path) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    config["architectures"], config["model_type"] = ["LlamaForCausalLM"], "llama"
    path.write_text(json.dumps(config))


async def test_a_worker_without_a_sound_checkpoint_names_what_is_wrong_with_it(
    launch: Launch, tiny_model: Path, tmp_path: Path
) -> None:
    cases: dict[Callable[[Path], None], list[str]] = {
        without_a_tensor: [TENSOR, "missing"],
        with_a_misshapen_tensor: [TENSOR, "[3, 5]", "[64, 64]"],
        truncated: ["model.safetensors", "truncated"],
        of_another_architecture: ["LlamaForCausalLM"],
    }
    attempts = []
    for spoil, said in cases.items():
        model = copy_of(tiny_model, tmp_path / spoil.__name__)
        spoil(model)
        changes = {"model_dir": str(model), "registry": None, "cache": None}
        attempts.append((launch("prefill", changes), said))
    for attempt, said in attempts:
        line = attempt.line()
        assert all(part in line for part in said), line


async def test_an_unknown_key_is_named_with_its_section_and_file(launch: Launch) -> None:
    services = ("router", "cache")
    attempts = [launch(service, {"server": {"adress": "here"}}) for service in services]
    for service, attempt in zip(services, attempts, strict=True):
        line = attempt.line()
        assert f"{service}.server.adress" in line
        assert f"{service}.toml" in line


async def test_a_port_in_use_is_named(launch: Launch, stack: Stack) -> None:
    services = ("router", "cache", "decode")
    taken = [stack.config[service]["server"]["address"] for service in services]
    attempts = [
        launch(service, {"server": {"address": address}, "registry": None})
        for service, address in zip(services, taken, strict=True)
    ]
    for address, attempt in zip(taken, attempts, strict=True):
        line = attempt.line()
        assert address in line
        assert "in use" in line


async def test_a_redis_that_refuses_is_named_without_the_password(
    launch: Launch, redis_server: Callable[..., RedisProcess]
) -> None:
    ledger, cache = redis_server(**DURABLE), redis_server()
    attempts = [
        launch("router", {"ledger": {"url": with_wrong_password(ledger)}}),
        launch("router", {"fleet": {"cache_url": with_wrong_password(cache)}}),
        launch("cache", {"redis_url": with_wrong_password(cache)}),
        launch("decode", {"registry": {"url": with_wrong_password(cache)}}),
    ]
    for attempt in attempts:
        line = attempt.line()
        assert "Redis" in line
        assert "invalid username-password pair" in line
        assert "wrong-password" not in line


async def test_a_router_whose_ledger_is_away_does_not_start(
    launch: Launch, redis_server: Callable[..., RedisProcess]
) -> None:
    ledger = redis_server(**DURABLE)
    ledger.kill()
    line = launch("router", {"ledger": {"url": ledger.url}}).line()
    assert f"127.0.0.1:{ledger.port}" in line
    assert "nothing was charged" not in line


def with_wrong_password(server: RedisProcess) -> str:
    return server.url.replace(server.password, "wrong-password")


async def test_a_ledger_that_could_lose_money_is_refused(
    launch: Launch, redis_server: Callable[..., RedisProcess]
) -> None:
    unsafe = {
        "appendfsync": "everysec",
        "appendonly": "no",
        "maxmemory_policy": "allkeys-lru",
    }
    attempts = {}
    for setting, value in unsafe.items():
        ledger = redis_server(**{**DURABLE, setting: value})
        attempts[setting] = launch("router", {"ledger": {"url": ledger.url}})
    for setting, attempt in attempts.items():
        line = attempt.line()
        assert setting.replace("_", "-") in line
        assert repr(unsafe[setting]) in line
