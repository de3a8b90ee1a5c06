"""A gRPC user: chats over a shared prefix, cancels some answers, checks every bill.

Run by `python -m loadtest`, or by locust itself. Beside each call's own time locust shows TTFT
and TPOT (milliseconds). A usage that breaks U1, U2 or M4 is a failure, and so is any error but a
refusal for lack of room. With the operator's key in TIDEMILL_ADMIN_KEY users are of a new tenant
with money of its own, and the run ends by reconciling: receipts, ledger and, where --metrics names
the workers' pages, engines' counters must agree to the token.
"""

import json
import os
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import gevent
from grpc.experimental.gevent import init_gevent
from locust import User, events, task
from locust.env import Environment

from loadtest.books import Books
from loadtest.checks import check
from loadtest.lengths import Lengths, look_alike, read_trace
from loadtest.prompts import Prompts
from loadtest.records import Answer, Records, table
from tidemill.client import Accepted, Client, RetryPolicy, TextChunk
from tidemill.errors import ConfigError, Overloaded, ReceiptError, TidemillError, UsageError
from tidemill.rpc.address import is_loopback

init_gevent()

NAME = "chat"


class Load:
    """What the users of this process share."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.records = Records()
        self.prompts = Prompts(num_shared_tokens=options.shared_tokens, seed=options.seed)
        self.trace = read_trace(Path(options.trace)) if options.trace else None
        self.started_at = time.monotonic()
        self.num_users = 0
        admin_key = os.environ.get("TIDEMILL_ADMIN_KEY")
        pages = options.metrics.split()
        self.books = Books(options.address, admin_key, pages) if admin_key else None

    def lengths(self, rng: Random) -> Lengths:
        """Tokens of the next request, scaled."""
        drawn = rng.choice(self.trace) if self.trace else look_alike(rng)
        return drawn.scaled(self.options.scale)


loads: dict[Environment, Load] = {}


@events.init_command_line_parser.add_listener
def add_arguments(parser: ArgumentParser) -> None:
    """Ours, and other defaults for locust's: 8 users for 30 seconds, answers left to end."""
    parser.set_defaults(num_users=8, spawn_rate=8.0, run_time="30s", stop_timeout="60s")
    group = parser.add_argument_group("tidemill")

    def add(flag: str, variable: str, **settings: Any) -> None:
        group.add_argument(flag, env_var=variable, **settings)

    add("--address", "TIDEMILL_ADDRESS", help="host:port of the router")
    add("--model", "TIDEMILL_MODEL", default="", help="default: the first one served")
    add("--trace", "TIDEMILL_TRACE", default="", help="Azure LLM trace (csv) to draw lengths from")
    add("--scale", "TIDEMILL_LOAD_SCALE", type=float, default=0.1, help="of all lengths")
    add("--shared-tokens", "TIDEMILL_LOAD_SHARED_TOKENS", type=int, default=384)
    add("--cancel-share", "TIDEMILL_LOAD_CANCEL_SHARE", type=float, default=0.2)
    add("--think", "TIDEMILL_LOAD_THINK", type=float, default=0.5, help="mean pause, seconds")
    add("--seed", "TIDEMILL_LOAD_SEED", type=int, default=0)
    add("--report", "TIDEMILL_LOAD_REPORT", default="", help="file to write the summary to, JSON")
    add("--metrics", "TIDEMILL_LOAD_METRICS", default="", help="URLs of all workers' metrics")
    group.add_argument("--beyond-loopback", action="store_true")


@events.init.add_listener
def begin(environment: Environment, **_: Any) -> None:
    """Refuse to load what is not this machine unless asked to."""
    options = environment.parsed_options
    assert options is not None
    try:
        if not options.address:
            raise ConfigError("no router to load: give --address or set TIDEMILL_ADDRESS")
        if not is_loopback(options.address) and not options.beyond_loopback:
            raise ConfigError(f"{options.address} is not loopback; --beyond-loopback allows it")
        loads[environment] = Load(options)
        # A slow start would otherwise count against --run-time: gevent's timers begin at the
        # time of the loop's last turn.
        gevent.get_hub().loop.update_now()
    except ConfigError as error:
        print(f"error: {error.reason}: {error}", file=sys.stderr)
        sys.exit(2)


@events.quitting.add_listener
def conclude(environment: Environment, **_: Any) -> None:
    """Print the table; the exit status is 1 after any failure or violation."""
    load = loads[environment]
    records = load.records
    summary = records.summary(time.monotonic() - load.started_at)
    print(table(summary))
    differences: Sequence[str] = ()
    if load.books is not None:
        reconciled = load.books.reconcile(records.receipts)
        print(reconciled)
        differences = reconciled.differences
        summary["reconciled"] = asdict(reconciled)
    if load.options.report:
        Path(load.options.report).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    bad = records.failures or records.violations or differences or not records.answers
    environment.process_exit_code = 1 if bad else 0


class ChatUser(User):
    """Asks, reads or cancels, thinks, asks again."""

    def on_start(self) -> None:
        """Connect, and learn what is served."""
        self.load = loads[self.environment]
        self.load.num_users += 1
        self.rng = Random(f"{self.load.options.seed}/{self.load.num_users}")
        # Retries would hide refusals and stretch TTFT: none.
        books = self.load.books
        self.client = Client(
            self.load.options.address,
            books.api_key if books else None,
            retry=RetryPolicy(max_retries=0),
        )
        served = {model.name: model for model in self.client.models()}
        self.model = served[self.load.options.model or min(served)]

    def on_stop(self) -> None:
        """Disconnect."""
        self.client.close()

    def wait_time(self) -> float:
        """Exponential pauses, so that the users together come near to a Poisson process."""
        return self.rng.expovariate(1.0 / self.load.options.think)

    @task
    def chat(self) -> None:
        """One answer, read to its end or cancelled at a random token."""
        lengths = self._fitting(self.load.lengths(self.rng))
        cancel_at = None
        if self.rng.random() < self.load.options.cancel_share:
            cancel_at = self.rng.randrange(lengths.num_output_tokens + 1)
        started = time.monotonic()
        try:
            answer = self._ask(lengths, cancel_at, started)
        except Overloaded as error:
            self.load.records.refused += 1
            self._fire("refused", NAME, time.monotonic() - started)
            time.sleep(error.retry_after_s or 0.5)
        except (UsageError, ReceiptError) as error:
            self.load.records.violations.append(f"{error} (request {error.request_id})")
            self._fire("grpc", NAME, time.monotonic() - started, error)
        except TidemillError as error:
            failure = f"{error.reason}: {error} (request {error.request_id})"
            self.load.records.failures.append(failure)
            self._fire("grpc", NAME, time.monotonic() - started, error)
        else:
            self._record(answer)

    def _ask(self, lengths: Lengths, cancel_at: int | None, started: float) -> Answer:
        messages = self.load.prompts.write(lengths.num_prompt_tokens, self.rng)
        stream = self.client.chat(
            messages, model=self.model.name, stream=True, max_tokens=lengths.num_output_tokens
        )
        cancelled = False
        with stream:
            for event in stream:
                if isinstance(event, Accepted):
                    self.load.prompts.learn(messages, event.prompt_tokens)
                due = cancel_at is not None and len(stream.token_ids) >= cancel_at
                if due and not cancelled and isinstance(event, (Accepted, TextChunk)):
                    cancelled = True
                    stream.cancel()
        total_s = time.monotonic() - started
        assert stream.completed is not None
        try:
            check(stream, stream.completed)
        except (UsageError, ReceiptError) as error:
            error.request_id = stream.request_id
            raise
        return Answer(
            ttft_s=stream.ttft_s,
            total_s=total_s,
            num_tokens=len(stream.token_ids),
            usage=stream.completed.usage,
            receipt=stream.completed.receipt,
            cancelled=cancelled,
        )

    def _fitting(self, lengths: Lengths) -> Lengths:
        """Within the model's context, with room for the template and a wrong guess of words."""
        context = self.model.context_tokens
        output = min(lengths.num_output_tokens, self.model.max_output_tokens, context // 4)
        room = (context - output) // 2 - self.load.options.shared_tokens
        return Lengths(max(1, min(lengths.num_prompt_tokens, room)), max(1, output))

    def _record(self, answer: Answer) -> None:
        self.load.records.answers.append(answer)
        name = f"{NAME} (cancelled)" if answer.cancelled else NAME
        self._fire("grpc", name, answer.total_s, length=answer.num_tokens)
        if not answer.cancelled:
            if answer.ttft_s is not None:
                self._fire("TTFT", NAME, answer.ttft_s)
            if answer.tpot_s is not None:
                self._fire("TPOT", NAME, answer.tpot_s)

    def _fire(
        self,
        kind: str,
        name: str,
        seconds: float,
        exception: Exception | None = None,
        *,
        length: int = 0,
    ) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=seconds * 1000,
            response_length=length,
            exception=exception,
            context={},
        )
