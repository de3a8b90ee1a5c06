"""`tidemill generate` and `tidemill chat`: text to stdout, the bill to stderr."""

import argparse
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from tidemill.client.cli_admin import connect
from tidemill.client.cli_options import options
from tidemill.client.request import Options
from tidemill.client.sync import Client, Stream
from tidemill.client.types import (
    Accepted,
    Choice,
    ChoiceEnd,
    Completion,
    FinishReason,
    Message,
    Queued,
    TextChunk,
)
from tidemill.errors import ConfigError, TidemillError

MODEL = "TIDEMILL_MODEL"
_SHORT_WAIT_S = 1.0
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
_EXIT_STATUS = {FinishReason.SERVER_FAULT: 1, FinishReason.CANCELLED: 130}


def generate(args: argparse.Namespace) -> int:
    """Continue a prompt."""
    prompt, asked = _text(args.prompt), options(args)
    with connect(args) as client:
        model = served_model(client, args)
        stream = client.generate(prompt, model=model, stream=True, **asked)
        return _exit_status(_show(stream, as_json=args.json))


def chat(args: argparse.Namespace) -> int:
    """Answer one message, or hold a conversation until the input ends."""
    messages = [Message("system", args.system)] if args.system else []
    if args.message is None and args.json:
        raise ConfigError("--json answers one message: give it, or - for stdin")
    if args.message is None and (args.n or 1) > 1:
        raise ConfigError("--n answers one message: give it, or - for stdin")
    asked = options(args)
    with connect(args) as client:
        model = served_model(client, args)
        if args.message is None:
            return _converse(client, model, messages, asked)
        messages.append(Message("user", _text(args.message)))
        stream = client.chat(messages, model=model, stream=True, **asked)
        return _exit_status(_show(stream, as_json=args.json))


def _converse(client: Client, model: str, messages: list[Message], asked: Options) -> int:
    """Read a line, answer it with all that was said before, and so on; Ctrl-D ends it.

    Ctrl-C ends the answer under way and its bill is shown. A refusal is shown, its line forgotten.
    """
    while (line := _read_line()) is not None:
        if not line.strip():
            continue
        try:
            said = [*messages, Message("user", line)]
            completion = _show(client.chat(said, model=model, stream=True, **asked))
        except TidemillError as error:
            print(f"error: {error.reason}: {error}", file=sys.stderr)
        else:
            messages += [said[-1], Message("assistant", completion.text)]
    return 0


def _show(stream: Stream, *, as_json: bool = False) -> Completion:
    """Print the answer as it comes; several choices each in whole when it has ended."""
    several = len(stream.choices) > 1
    with stream, _cancelled_by_interrupt(stream):
        for event in stream:
            match event:
                case Accepted() | Queued() if _waits(event) and not as_json:
                    print(_place(event), file=sys.stderr)
                case ChoiceEnd() if not as_json:
                    _show_choice(stream.choices[event.choice])
                case TextChunk() if not as_json and not several:
                    _write(sys.stderr, event.reasoning)
                    _write(sys.stdout, event.text)
        completion = stream.completion()
    if as_json:
        print(json.dumps(completion.to_dict()))
    else:
        if not several:
            print()
        print(_summary(completion), file=sys.stderr)
    return completion


def _waits(place: Accepted | Queued) -> bool:
    ahead = isinstance(place, Queued) and place.position > 0
    return ahead or (place.expected_wait_s or 0.0) >= _SHORT_WAIT_S


def _place(place: Accepted | Queued) -> str:
    wait_s = place.expected_wait_s
    expected = "" if wait_s is None else f", about {max(round(wait_s), 1)} s"
    return f"queued, {place.position} ahead{expected}"


def _show_choice(choice: Choice) -> None:
    print(f"[choice {choice.index}: {choice.finish_reason}]", file=sys.stderr)
    _write(sys.stderr, choice.reasoning)
    _write(sys.stdout, choice.text + "\n")


def _write(to: TextIO, text: str) -> None:
    """Write at once; a terminal is spared control characters, which a model could steer it by."""
    to.write(_CONTROL.sub("\ufffd", text) if to.isatty() else text)
    to.flush()


@contextmanager
def _cancelled_by_interrupt(stream: Stream) -> Iterator[None]:
    """Ctrl-C ends the request so that its bill still comes; a second one gives it up.

    The handler must not raise: a message that gRPC was about to hand over would be lost.
    """

    def cancel() -> None:
        try:
            stream.cancel()
        except TidemillError as error:
            print(f"error: {error.reason}: {error}", file=sys.stderr)
            stream.close()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=cancel, daemon=True).start()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _exit_status(completion: Completion) -> int:
    return _EXIT_STATUS.get(completion.finish_reason, 0)


def _summary(completion: Completion) -> str:
    usage, timing = completion.usage, completion.timing
    tiers = ", ".join(
        f"{count} {tier}" for tier, count in usage.to_dict()["reuse"].items() if count
    )
    lines = [
        f"[{completion.finish_reason}] prompt {usage.prompt_tokens} tokens: "
        f"{usage.cache_hit_tokens} hit{f' ({tiers})' if tiers else ''}, "
        f"{usage.cache_miss_tokens} miss; completion {usage.completion_tokens}"
        + (f" ({usage.reasoning_tokens} reasoning)" if usage.reasoning_tokens else "")
    ]
    if receipt := completion.receipt:
        lines.append(f"{receipt.amount} ({receipt.window}, {receipt.state}), saved {receipt.saved}")
    pace = ""
    if usage.completion_tokens > 1 and timing.total_s > timing.first_token_s:
        rate = (usage.completion_tokens - 1) / (timing.total_s - timing.first_token_s)
        pace = f", then {rate:.1f} tokens/s"
    if completion.replayed:
        lines.append("this request had ended before: its bill is shown, its text is not kept")
    lines.append(
        f"first token {timing.first_token_s * 1000:.0f} ms{pace}; request {completion.request_id}"
    )
    return "\n".join(lines)


def served_model(client: Client, args: argparse.Namespace) -> str:
    """The model asked for, else the only one; ConfigError where it is not clear which."""
    name: str | None = args.model or os.environ.get(MODEL)
    if name:
        return name
    served = [model.name for model in client.models()]
    if len(served) != 1:
        names = ", ".join(served) or "none"
        raise ConfigError(f"which model? give --model; served: {names}")
    return served[0]


def _text(argument: str) -> str:
    return sys.stdin.read() if argument == "-" else argument


def _read_line() -> str | None:
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None
