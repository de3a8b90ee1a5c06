"""What `tidemill generate` and `tidemill chat` take beside their prompt."""

import argparse
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

from tidemill.client.cli_table import identifier
from tidemill.client.request import Options
from tidemill.client.types import MaxCost
from tidemill.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    """The options' arguments, to be a parent of the commands' parsers."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(
        "-m", "--model", help="default: $TIDEMILL_MODEL, else the only model served"
    )
    parent.add_argument("--max-tokens", type=int, metavar="N")
    parent.add_argument("--n", type=int, metavar="N", help="so many answers; one prompt is billed")
    parent.add_argument(
        "--stop", action="append", metavar="TEXT", help="ends the answer; may be repeated"
    )
    parent.add_argument(
        "--max-cost", type=max_cost, metavar="0.01USD", help="the answer ends before it costs more"
    )
    parent.add_argument("--timeout", type=float, metavar="S", help="seconds for the whole answer")
    parent.add_argument(
        "--first-token-timeout",
        type=float,
        metavar="S",
        help="seconds to the first token; what is expected later is refused at once",
    )
    parent.add_argument(
        "--priority",
        choices=("standard", "batch"),
        help="batch: what standard requests leave, and a small share (default: standard)",
    )
    parent.add_argument(
        "--request-id", type=identifier, metavar="ID", help="idempotency key (default: a UUID)"
    )
    _add_sampling(parent.add_argument_group("sampling"))
    _add_format(parent.add_argument_group("format"))
    return parent


def options(args: argparse.Namespace) -> Options:
    """The options that the arguments say. ConfigError if a schema cannot be read."""
    if not args.json and (args.logprobs is not None or args.prompt_logprobs is not None):
        raise ConfigError("--logprobs and --prompt-logprobs are shown with --json")
    return {
        "max_tokens": args.max_tokens,
        "min_tokens": args.min_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "seed": args.seed,
        "repetition_penalty": args.repetition_penalty,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "logit_bias": dict(args.logit_bias or ()),
        "ignore_eos": args.ignore_eos,
        "logprobs": args.logprobs,
        "prompt_logprobs": args.prompt_logprobs,
        "n": args.n,
        "response_format": "json" if args.json_object else _schema(args.json_schema),
        "stop": args.stop or (),
        "max_cost": args.max_cost,
        "timeout": args.timeout,
        "first_token_timeout": args.first_token_timeout,
        "priority": args.priority,
        "request_id": args.request_id,
    }


def max_cost(text: str) -> MaxCost:
    """Parse "0.01USD" or "0.01 USD"; nothing finer than 10^-9."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([A-Z]{3})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount such as 0.01USD")
    return MaxCost(match[2], int(Decimal(match[1]).scaleb(9)))


def _add_sampling(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--min-p", type=float, metavar="P", help="share of the likeliest token's")
    group.add_argument("--seed", type=int)
    group.add_argument("--repetition-penalty", type=float, metavar="F", help="1 is off")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="0 is off")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="0 is off")
    group.add_argument(
        "--logit-bias",
        type=_bias,
        action="append",
        metavar="ID=BIAS",
        help="added to a token's logit; may be repeated",
    )
    group.add_argument("--min-tokens", type=int, metavar="N", help="does not end before")
    group.add_argument(
        "--ignore-eos", action="store_true", help="go on after the model's own end token"
    )
    group.add_argument(
        "--logprobs",
        type=int,
        nargs="?",
        const=0,
        metavar="K",
        help="with --json: how likely each token was, and the K likeliest",
    )
    group.add_argument(
        "--prompt-logprobs",
        type=int,
        nargs="?",
        const=0,
        metavar="K",
        help="and of the prompt",
    )


def _add_format(group: "argparse._ArgumentGroup") -> None:
    formats = group.add_mutually_exclusive_group()
    formats.add_argument(
        "--json-object", action="store_true", help="the answer is to be a JSON object"
    )
    formats.add_argument(
        "--json-schema", type=Path, metavar="FILE", help="the answer is to fit this JSON schema"
    )


def _bias(text: str) -> tuple[int, float]:
    match = re.fullmatch(r"(\d+)=([-+]?\d+(?:\.\d*)?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=BIAS, such as 42=-100")
    return int(match[1]), float(match[2])


def _schema(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--json-schema: {path} cannot be read: {error}") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"--json-schema: {path} must hold a JSON object")
    return schema
