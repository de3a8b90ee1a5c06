import pytest
from google.protobuf.descriptor import FileDescriptor

from services.cache.service import ALLOWED_ROLES
from tidemill.api.cache.v1 import cache_service_pb2
from tidemill.api.decode.v1 import decode_service_pb2
from tidemill.api.prefill.v1 import prefill_service_pb2
from tidemill.api.worker.v1 import worker_service_pb2
from tidemill.certs import ROLES
from tidemill.worker.process import ALLOWED

INTERNAL = {**ALLOWED_ROLES, **ALLOWED}


def methods(file: FileDescriptor) -> set[str]:
    return {
        f"/{service.full_name}/{method.name}"
        for service in file.services_by_name.values()
        for method in service.methods
    }


@pytest.mark.parametrize(
    "module", [cache_service_pb2, prefill_service_pb2, decode_service_pb2, worker_service_pb2]
)
def test_every_internal_method_says_who_may_call_it(module: object) -> None:
    declared = methods(module.DESCRIPTOR)  # type: ignore[attr-defined]  # a generated module
    assert declared
    assert declared <= set(INTERNAL)


def test_no_table_names_a_method_or_a_role_that_does_not_exist() -> None:
    modules = (cache_service_pb2, prefill_service_pb2, decode_service_pb2, worker_service_pb2)
    declared = {name for module in modules for name in methods(module.DESCRIPTOR)}
    assert set(INTERNAL) <= declared
    assert {role for roles in INTERNAL.values() for role in roles} <= set(ROLES)
