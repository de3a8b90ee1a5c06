"""Secrets for docker-compose.yml: `python -m services.stack.compose DIRECTORY --owner UID`.

Makes the authority, certificates, passwords and keys in DIRECTORY/all, once, and hands each
container a folder of its own in DIRECTORY with what it needs and nothing else. DIRECTORY/ca.pem is
for clients. Run by the service `init`.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from services.stack.redis import RedisInstance, acl_text, cache_redis, ledger_redis
from services.stack.state import SIGNING_KEY, StateDirectory, write_private

MOUNT = Path("/run/tidemill")
REDIS_PORT = 6379
CONTAINERS = ("redis-cache", "redis-ledger", "cache", "prefill", "decode", "router")


def prepare(directory: Path) -> StateDirectory:
    """Make what is missing and write every container's folder anew."""
    state = StateDirectory(directory / "all", hosts=CONTAINERS)
    state.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    state.prepare(empty=False)
    shutil.copyfile(state.certs / "ca.pem", directory / "ca.pem")
    cache, ledger = cache_redis(REDIS_PORT), ledger_redis(REDIS_PORT)
    for container in CONTAINERS:
        certificate = "redis" if container.startswith("redis-") else container
        _write(directory, container, "ca.pem", (state.certs / "ca.pem").read_text())
        for kind in ("pem", "key"):
            text = (state.certs / f"{certificate}.{kind}").read_text()
            _write(directory, container, f"tls.{kind}", text)
    for instance in (cache, ledger):
        _write(directory, instance.name, "redis.conf", _redis_conf(instance))
        _write(directory, instance.name, "users.acl", acl_text(instance, state))
    _write(directory, "cache", "redis-url", _url(cache, "cache", state))
    for worker in ("prefill", "decode"):
        _write(directory, worker, "registry-url", _url(cache, "worker", state))
    _write(directory, "router", "cache-url", _url(cache, "router", state))
    _write(directory, "router", "ledger-url", _url(ledger, "ledger", state))
    for name in ("pepper", "admin.key", SIGNING_KEY):
        _write(directory, "router", name, state.secret(name))
    return state


def _write(directory: Path, container: str, name: str, text: str) -> None:
    (directory / container).mkdir(mode=0o700, exist_ok=True)
    write_private(directory / container / name, text)


def _redis_conf(instance: RedisInstance) -> str:
    lines = [
        "bind *",
        "port 0",  # TLS alone
        f"tls-port {REDIS_PORT}",
        f"tls-cert-file {MOUNT}/tls.pem",
        f"tls-key-file {MOUNT}/tls.key",
        f"tls-ca-cert-file {MOUNT}/ca.pem",
        "tls-auth-clients no",  # the ACL's passwords tell who it is
        "dir /data",
        'save ""',
        f"aclfile {MOUNT}/users.acl",
        *instance.settings,
    ]
    return "\n".join(lines) + "\n"


def _url(instance: RedisInstance, user: str, state: StateDirectory) -> str:
    password = instance.password(state, user)
    host = f"{instance.name}:{REDIS_PORT}"
    return f"rediss://{user}:{password}@{host}/0?ssl_ca_certs={MOUNT}/ca.pem"


def give(owner: int, paths: Sequence[Path]) -> None:
    """Hand folders and all that is in them to the containers' user."""
    for root in paths:
        for path in (root, *root.rglob("*")):
            os.chown(path, owner, owner)


def main() -> int:
    """Prepare the folders, hand them over, hand over further empty volumes too."""
    parser = argparse.ArgumentParser(prog="python -m services.stack.compose", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--owner", type=int, required=True, help="uid the containers run as")
    parser.add_argument(
        "--volume", type=Path, action="append", default=[], help="data to hand over"
    )
    arguments = parser.parse_args()
    prepare(arguments.directory)
    folders = [arguments.directory / container for container in CONTAINERS]
    give(arguments.owner, [*folders, *arguments.volume])
    return 0


if __name__ == "__main__":
    sys.exit(main())
