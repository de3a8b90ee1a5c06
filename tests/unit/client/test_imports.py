import json
import subprocess
import sys

HEAVY = {
    "cryptography",
    "hiredis",
    "jinja2",
    "numpy",
    "prometheus_client",
    "protovalidate",
    "redis",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
    "uvloop",
}
SCRIPT = """
import json, sys
import tidemill.client, tidemill.client.cli
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_the_sdk_and_its_command_import_nothing_heavy() -> None:
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True).stdout
    imported = set(json.loads(out))
    assert "grpc" in imported
    assert not imported & HEAVY
