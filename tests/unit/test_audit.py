import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "audit.py"


@pytest.fixture(scope="module")
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def known(name: str, *findings: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "version": "1.0", "vulns": list(findings)}


UNKNOWN = {"name": "ours", "skip_reason": "not found"}
FINDING = {"id": "PYSEC-2026-1", "fix_versions": ["1.1", "2.0"]}


def test_a_finding_fails_the_check_and_says_what_helps(audit: Any) -> None:
    status, lines = audit.judge({"dependencies": [known("good"), known("bad", FINDING)]})
    assert status == 1
    assert lines[0] == "audit: bad 1.0: PYSEC-2026-1, fixed in 1.1, 2.0"


def test_without_findings_the_check_passes_and_names_what_was_not_looked_at(audit: Any) -> None:
    status, lines = audit.judge({"dependencies": [known("good"), UNKNOWN]})
    assert status == 0
    assert lines == [
        "audit: the advisory service does not know ours",
        "audit: 1 packages, no finding",
    ]


@pytest.mark.parametrize("report", [None, {"dependencies": []}, {"dependencies": [UNKNOWN]}])
def test_an_audit_that_could_not_be_made_is_no_clean_one(audit: Any, report: Any) -> None:
    status, lines = audit.judge(report)
    assert status == 0
    assert "NOT DONE" in lines[0]
