"""What we depend on: a bill of materials, and whether any of it is known to be vulnerable.

    python deploy/audit.py ENVIRONMENT_PYTHON

Run by `make check` in an environment of its own (pip-audit, cyclonedx-bom), so that the tools are
not part of what they list. Writes build/sbom.cdx.json (CycloneDX) of the environment, and asks the
advisory service of the package index about every version in constraints.txt. Exits 1 on a finding.
Where the service cannot be asked it says so and exits 0: a check must not fail for want of a
network. pip-audit by itself calls packages that the service does not know "not vulnerable".
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "constraints.txt"
SBOM = ROOT / "build" / "sbom.cdx.json"
TOOLS = Path(sys.executable).parent
PATIENCE_S = 90.0  # for all packages together; pip-audit's own is for each


def write_sbom(environment: str) -> None:
    """List every package of the environment with version, licence and dependencies."""
    SBOM.parent.mkdir(exist_ok=True)
    command: list[str | Path] = [
        TOOLS / "cyclonedx-py",
        "environment",
        environment,
        "--output-reproducible",
    ]
    options: list[str | Path] = ["--pyproject", ROOT / "pyproject.toml", "--of", "JSON", "-o", SBOM]
    subprocess.run([*command, *options], check=True)
    components = json.loads(SBOM.read_text(encoding="utf-8"))["components"]
    print(f"sbom: {len(components)} packages in {SBOM.relative_to(ROOT)}")


def advisories() -> dict[str, Any] | None:
    """pip-audit's report on all pins; None where it could not be made."""
    command: list[str | Path] = [TOOLS / "pip-audit", "-r", PINS, "--no-deps", "--disable-pip"]
    try:
        done = subprocess.run(
            [*command, "-f", "json", "--progress-spinner", "off", "--desc", "off"],
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
        report: dict[str, Any] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        return None
    return report


def judge(report: dict[str, Any] | None) -> tuple[int, list[str]]:
    """(exit status, what to say) of a report."""
    packages = [] if report is None else report["dependencies"]
    known = [each for each in packages if "skip_reason" not in each]
    if not known:
        return 0, ["audit: NOT DONE, the advisory service knows none of our packages from here"]
    lines = [
        f"audit: {package['name']} {package['version']}: {finding['id']}, "
        f"fixed in {', '.join(finding['fix_versions']) or 'no version yet'}"
        for package in known
        for finding in package["vulns"]
    ]
    status = 1 if lines else 0
    skipped = [each["name"] for each in packages if "skip_reason" in each]
    if skipped:
        lines.append(f"audit: the advisory service does not know {', '.join(skipped)}")
    lines.append(f"audit: {len(known)} packages, {'FINDINGS' if status else 'no finding'}")
    return status, lines


def main() -> int:
    """Both; the status is the audit's."""
    write_sbom(sys.argv[1])
    status, lines = judge(advisories())
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
