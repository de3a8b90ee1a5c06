import json
import subprocess
import sys
from types import ModuleType

import pytest

import tidemill.billing
import tidemill.client
import tidemill.policy

HEAVY = ("torch", "triton", "redis", "numpy", "transformers", "tokenizers", "prometheus_client")
# Not grpc_health and grpc_reflection: grpc itself imports them where they are installed.
SERVER_ONLY = ("protovalidate", "uvloop", "cryptography")

# What is imported by `modules`, as a fresh interpreter finds it.
REPORT = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def imported_with(*modules: str) -> set[str]:
    command = [sys.executable, "-c", REPORT, *modules]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(found.stdout))


@pytest.mark.parametrize("module", [tidemill.client, tidemill.billing, tidemill.policy])
def test_public_names_are_listed_sorted_and_there(module: ModuleType) -> None:
    names: list[str] = module.__all__
    assert names == sorted(names)
    assert [name for name in names if not hasattr(module, name)] == []


def test_the_sdk_pulls_in_nothing_heavy() -> None:
    loaded = imported_with("tidemill.client", "tidemill.client.cli")
    assert loaded & {*HEAVY, *SERVER_ONLY} == set()


def test_the_package_itself_imports_nothing() -> None:
    assert imported_with("tidemill") & {*HEAVY, *SERVER_ONLY, "grpc", "google"} == set()


@pytest.mark.parametrize("part", ["tidemill.billing", "tidemill.policy"])
def test_decisions_are_made_without_io_libraries(part: str) -> None:
    assert imported_with(part) & {*HEAVY, *SERVER_ONLY, "google"} == set()


def test_the_engine_never_sees_a_proto() -> None:
    assert "google" not in imported_with("tidemill.engine", "tidemill.models", "tidemill.kernels")
