"""The `tidemill` command: its arguments, and how its failures look.

Exit status: 0 done, 1 refused or failed, 2 wrong arguments or settings, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from tidemill.client import (
    cli_account,
    cli_admin,
    cli_answer,
    cli_margin,
    cli_options,
    cli_prices,
    cli_receipts,
    settings,
)
from tidemill.errors import ConfigError, TidemillError, Unavailable

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except TidemillError as error:
        print(_line(error) + _hint(error, args), file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read us has gone; keep Python from complaining about it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _line(error: TidemillError) -> str:
    text = " ".join(str(error).split())
    request = f" (request {error.request_id})" if error.request_id else ""
    return f"error: {error.reason}: {text}{request}"


def _hint(error: TidemillError, args: argparse.Namespace) -> str:
    """What a call that reached no router without an authority most often lacks."""
    unreached = error.reason == Unavailable.reason and hasattr(args, "ca")
    if not unreached or args.ca or os.environ.get(settings.CA):
        return ""
    return f"; does this port speak TLS? set {settings.CA}"


class _Version(argparse.Action):
    """Prints the installed version, which is looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"tidemill {version('tidemill')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tidemill", description="Call a Tidemill router.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print it and end")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    connection = _connection()
    _add_answers(commands, connection)

    models = commands.add_parser(
        "models", parents=[connection], help="models served, their limits and present prices"
    )
    models.set_defaults(run=cli_admin.models)

    tenants = commands.add_parser("tenants", help="make tenants (operator)")
    actions = tenants.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", parents=[connection], help="make a tenant")
    create.add_argument("tenant_id", metavar="TENANT")
    create.add_argument("--currency", default="USD", help="of its account (default: USD)")
    create.set_defaults(run=cli_admin.create_tenant)

    _add_keys(commands, connection)
    cli_account.add(commands, connection)
    cli_receipts.add(commands, connection)
    cli_margin.add(commands, connection)
    _add_certs(commands)
    cli_prices.add_parser(commands)
    return parser


def _connection() -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("connection")
    group.add_argument("--address", help="host:port of the router (default: $TIDEMILL_ADDRESS)")
    group.add_argument(
        "--api-key",
        help="default: $TIDEMILL_API_KEY; of operator's commands first $TIDEMILL_ADMIN_KEY",
    )
    group.add_argument(
        "--api-key-file", type=Path, metavar="PATH", help="file that holds the key: hidden from ps"
    )
    group.add_argument(
        "--ca", metavar="PEM", help="authority that signed the router's certificate ($TIDEMILL_CA)"
    )
    parent.add_argument("--json", action="store_true", help="print one JSON object")
    return parent


def _add_answers(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    connection: argparse.ArgumentParser,
) -> None:
    sampling = cli_options.parser()
    generate = commands.add_parser(
        "generate", parents=[connection, sampling], help="continue a prompt"
    )
    generate.add_argument("prompt", nargs="?", default="-", help="text; - or nothing: from stdin")
    generate.set_defaults(run=cli_answer.generate)

    chat = commands.add_parser(
        "chat", parents=[connection, sampling], help="answer a message, or hold a conversation"
    )
    chat.add_argument("message", nargs="?", help="-: from stdin; nothing: a conversation")
    chat.add_argument("--system", metavar="TEXT", help="instructions that come first")
    chat.set_defaults(run=cli_answer.chat)
    cli_account.add_quote(commands, connection, sampling)


def _add_keys(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    connection: argparse.ArgumentParser,
) -> None:
    keys = commands.add_parser("keys", help="make, revoke and list API keys (operator)")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", parents=[connection], help="make a key; shown once")
    create.add_argument("tenant_id", metavar="TENANT")
    create.add_argument("--label", default="", help="a name for people")
    create.set_defaults(run=cli_admin.create_key)
    revoke = actions.add_parser("revoke", parents=[connection], help="revoke a key")
    revoke.add_argument("key_id", metavar="KEY_ID")
    revoke.set_defaults(run=cli_admin.revoke_key)
    listing = actions.add_parser("list", parents=[connection], help="list keys")
    listing.add_argument("--tenant", dest="tenant_id", metavar="TENANT", help="only this one's")
    listing.set_defaults(run=cli_admin.list_keys)


def _add_certs(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    certs = commands.add_parser("certs", help="make certificates")
    actions = certs.add_subparsers(required=True, metavar="ACTION")
    dev = actions.add_parser("dev", help="a development authority and a certificate for each role")
    dev.add_argument("directory", type=Path, metavar="DIR")
    dev.add_argument(
        "--host",
        dest="hosts",
        action="append",
        default=[],
        help="further host name or address to be reached by; may be repeated",
    )
    dev.set_defaults(run=cli_admin.dev_certs)
