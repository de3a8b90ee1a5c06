"""A router as a process of its own over workers that run already, for benchmarks."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.provenance import ROOT
from services.stack.state import SIGNING_KEY, new_signing_key
from tests.router_harness import ADMIN_KEY, BOOK_PATH, MODEL
from tidemill.rpc.tls import TlsFiles


def tls_files(certs: Path, role: str) -> TlsFiles:
    """What `make_dev_certs` wrote there for the role."""
    return TlsFiles(cert=certs / f"{role}.pem", key=certs / f"{role}.key", ca=certs / "ca.pem")


def write_config(
    folder: Path,
    name: str,
    *,
    ledger: str,
    port: int,
    workers: Sequence[str],
    coalesce_tokens: int = 8,
    own_cores: bool = False,
) -> Path:
    """The router's configuration file; the folder holds its certificates and its tokeniser."""
    for secret, value in (("pepper", "p" * 40), ("admin", ADMIN_KEY), (SIGNING_KEY, None)):
        if not (folder / secret).exists():
            (folder / secret).write_text(value or new_signing_key())
    tls = tls_files(folder / "certs", "router")
    path = folder / f"{name}.toml"
    path.write_text(
        f"""
[router]
price_book = "{BOOK_PATH}"
own_cores = {json.dumps(own_cores)}
[router.server]
address = "127.0.0.1:{port}"
drain_s = 0.2
[router.limits]
coalesce_tokens = {coalesce_tokens}
[router.ledger]
url = "{ledger}"
pepper_file = "pepper"
admin_key_file = "admin"
timeout_s = 10.0
[router.money]
signing_key_file = "{SIGNING_KEY}"
spool_dir = "spool-{name}"
[router.fleet]
workers = {json.dumps(list(workers))}
tls = {{cert = "{tls.cert}", key = "{tls.key}", ca = "{tls.ca}"}}
[[router.models]]
name = "{MODEL}"
path = "{folder}"
price_model = "deepseek-chat"
max_output_tokens = 1000000
""",
        encoding="utf-8",
    )
    return path


@contextmanager
def python_process(*arguments: str, core: int | None = None) -> Iterator[int]:
    """`python -m` with these arguments, on one core alone if it is given: its process's id.

    It is killed in the end.
    """
    command = (sys.executable, "-m", *arguments)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        try:
            yield process.pid
        finally:
            process.kill()
