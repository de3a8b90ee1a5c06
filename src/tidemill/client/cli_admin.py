"""`tidemill models`, `tenants`, `keys` and `certs`."""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tidemill.billing.integers import format_per_million
from tidemill.client.retry import RetryPolicy
from tidemill.client.sync import Client
from tidemill.client.types import Model
from tidemill.errors import ConfigError, TidemillError

ADMIN_KEY = "TIDEMILL_ADMIN_KEY"


def connect(args: argparse.Namespace, *, admin: bool = False) -> Client:
    """A client by the command line, then the environment; `admin` prefers TIDEMILL_ADMIN_KEY."""
    key: str | None = args.api_key
    if key is None and args.api_key_file is not None:
        key = _read(args.api_key_file)
    if key is None and admin:
        key = os.environ.get(ADMIN_KEY)
    return Client(args.address, key, args.ca, retry=RetryPolicy(on_wait=_say_wait))


def _say_wait(error: TidemillError, wait_s: float) -> None:
    if wait_s > 1:
        text = " ".join(str(error).split())
        print(f"{error.reason}: {text}; trying again in {math.ceil(wait_s)} s", file=sys.stderr)


def models(args: argparse.Namespace) -> int:
    """Print the models served."""
    with connect(args) as client:
        served = client.models()
    if args.json:
        _print_json({"models": [asdict(model) for model in served]})
    else:
        for model in served:
            print(_describe(model))
    return 0


def create_tenant(args: argparse.Namespace) -> int:
    """Make a tenant."""
    with connect(args, admin=True) as client:
        created = client.admin.create_tenant(args.tenant_id, currency=args.currency)
    if args.json:
        _print_json({"tenant_id": args.tenant_id, "created": created})
    else:
        print(f"tenant {args.tenant_id} {'made' if created else 'was there already'}")
    return 0


def create_key(args: argparse.Namespace) -> int:
    """Make a key and show it, this once."""
    with connect(args, admin=True) as client:
        made = client.admin.create_key(args.tenant_id, label=args.label)
    if args.json:
        _print_json({"key_id": made.key_id, "key": made.key})
    else:
        print(made.key)
    return 0


def revoke_key(args: argparse.Namespace) -> int:
    """Revoke a key."""
    with connect(args, admin=True) as client:
        revoked = client.admin.revoke_key(args.key_id)
    if args.json:
        _print_json({"key_id": args.key_id, "revoked": revoked})
    else:
        print(f"key {args.key_id} {'revoked' if revoked else 'was not in force'}")
    return 0


def list_keys(args: argparse.Namespace) -> int:
    """List keys without their secrets."""
    with connect(args, admin=True) as client:
        keys = client.admin.list_keys(args.tenant_id)
    if args.json:
        _print_json({"keys": [asdict(key) for key in keys]})
    else:
        for key in keys:
            made = datetime.fromtimestamp(key.created_at_ms / 1000, UTC)
            state = "revoked" if key.revoked else "in force"
            print(f"{key.key_id}\t{key.tenant_id}\t{made:%Y-%m-%d %H:%M}Z\t{state}\t{key.label}")
    return 0


def dev_certs(args: argparse.Namespace) -> int:
    """Make a development authority and certificates. ConfigError without `cryptography`."""
    try:
        from tidemill.certs import make_dev_certs  # noqa: PLC0415 - no part of the base install
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"certs needs the package {error.name}: pip install 'tidemill[server]'"
        ) from error
    try:
        make_dev_certs(args.directory, args.hosts)
    except OSError as error:
        raise ConfigError(f"cannot write to {args.directory}: {error.strerror}") from error
    print(f"export TIDEMILL_CA={args.directory / 'ca.pem'}")
    return 0


def _describe(model: Model) -> str:
    until = ""
    if model.window_ends_at_ms is not None:
        ends = datetime.fromtimestamp(model.window_ends_at_ms / 1000, UTC)
        until = f" until {ends:%Y-%m-%d %H:%M}Z"
    prices = model.prices
    return (
        f"{model.name}\tcontext {model.context_tokens}, output {model.max_output_tokens}\t"
        f"{model.window}{until}: "
        f"hit {format_per_million(prices.hit)}, miss {format_per_million(prices.miss)}, "
        f"output {format_per_million(prices.output)} {model.currency}/1M tokens\t"
        f"{model.prefill_workers} prefill, {model.decode_workers} decode"
    )


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the key from {path}: {error}") from error
