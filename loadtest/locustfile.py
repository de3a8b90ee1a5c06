"""The locust side: arrivals, statistics, the table, the books.

Run by `python -m loadtest`, or by locust itself. Beside each call's own time locust shows TTFT,
TPOT, ITL and goodput (milliseconds; of goodput the rate counts). A usage that breaks U1, U2 or M4
is a failure, and so is any error but a refusal for lack of room. With the operator's key in
TIDEMILL_ADMIN_KEY users are of a new tenant with money of its own, and the run ends by
reconciling: what customers saw, their receipts, the ledger and, where --metrics names the
workers' pages, the engines' counters must agree to the token.
"""

import json
import math
import os
import sys
import time
from argparse import ArgumentParser
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import gevent
from gevent.pool import Pool
from grpc.experimental.gevent import init_gevent
from locust import User, events, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import STATE_RUNNING

from loadtest.books import Books, Reconciled
from loadtest.customers import Customer, failure
from loadtest.prompts import SAMPLE, Vocabulary
from loadtest.records import Asked, Behaviour, End, Objectives, Records, table
from loadtest.scenarios import SCENARIOS, Question, Terms, instants, trace_of
from loadtest.traces import read_trace
from tidemill.client import Client, Message, RetryPolicy
from tidemill.errors import ConfigError, ReceiptError, TidemillError, UsageError
from tidemill.rpc.address import is_loopback

init_gevent()

MOST_REQUESTS = 100_000
MOST_RUN_S = 2 * 3600.0
_LAST_ANSWERS_S = 90.0
_TOLD = (
    *("scale", "shared_tokens", "cancel_share", "hang_up_share", "slow_share", "again_share"),
    *("ttft_objective", "tpot_objective", "most_open", "run_time", "seed"),
)


class Load:
    """One run: what was asked for, and what came of it."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.scenario = SCENARIOS[options.scenario]
        self.rate = options.rate or self.scenario.rate
        self.rng = Random(options.seed)
        given = read_trace(Path(options.trace)) if options.trace else []
        self.trace = trace_of(self.scenario, given, self.rng)
        self.records = Records(Objectives(options.ttft_objective, options.tpot_objective))
        self.started_at = time.monotonic()
        admin_key = os.environ.get("TIDEMILL_ADMIN_KEY")
        pages = options.metrics.split()
        self.books = Books(options.address, admin_key, pages) if admin_key else None

    def clock(self) -> float:
        """Seconds since the run's start."""
        return time.monotonic() - self.started_at

    def behaviour(self) -> Behaviour:
        """What the next customer does about its answer."""
        options = self.options
        shares = {
            Behaviour.CANCELS: options.cancel_share,
            Behaviour.HANGS_UP: options.hang_up_share,
            Behaviour.READS_SLOWLY: options.slow_share,
            Behaviour.ASKS_AGAIN: options.again_share,
        }
        weights = [max(1 - sum(shares.values()), 0), *shares.values()]
        return self.rng.choices([Behaviour.READS, *shares], weights)[0]

    def asks(self, due_s: float, behaviour: Behaviour) -> Asked:
        """A new request, sent now."""
        asked = Asked(str(uuid4()), behaviour, due_s, self.clock())
        self.records.asked.append(asked)
        return asked


loads: dict[Environment, Load] = {}


@events.init_command_line_parser.add_listener
def add_arguments(parser: ArgumentParser) -> None:
    """Ours, and other defaults for locust's: one source of arrivals, for 30 seconds."""
    parser.set_defaults(num_users=1, run_time="30s", stop_timeout=f"{_LAST_ANSWERS_S:.0f}s")
    group = parser.add_argument_group("tidemill")

    def add(flag: str, **settings: Any) -> None:
        variable = "TIDEMILL_LOAD_" + flag.removeprefix("--").replace("-", "_").upper()
        group.add_argument(flag, env_var=variable, **settings)

    group.add_argument(
        "--address", env_var="TIDEMILL_ADDRESS", help="host:port of the router; loopback only"
    )
    group.add_argument("--model", env_var="TIDEMILL_MODEL", default="", help="default: the first")
    add("--scenario", choices=[*SCENARIOS], default="chat", help="see loadtest/scenarios.py")
    add("--rate", type=float, default=0.0, help="requests a second; default: the scenario's")
    add("--trace", default="", help="Azure (csv) or Mooncake (jsonl) trace; chat takes its lengths")
    add("--scale", type=float, default=0.1, help="of a trace's lengths")
    add("--shared-tokens", type=int, default=384, help="of chat's system message")
    add("--cancel-share", type=float, default=0.1)
    add("--hang-up-share", type=float, default=0.05)
    add("--slow-share", type=float, default=0.05)
    add("--again-share", type=float, default=0.05)
    add("--ttft-objective", type=float, default=2.0, help="seconds")
    add("--tpot-objective", type=float, default=0.1, help="seconds")
    add("--most-open", type=int, default=128, help="requests at once; more are held back")
    add("--most-requests", type=int, default=10_000, help="of the run")
    add("--seed", type=int, default=0)
    add("--output", default="", help="file for the summary and every request, JSON")
    add("--metrics", default="", help="URLs of all workers' metrics pages")


def checked(options: Any) -> Any:
    """ConfigError for what no run may be."""
    if not options.address:
        raise ConfigError("no router to load: give --address or set TIDEMILL_ADDRESS")
    if not is_loopback(options.address):
        raise ConfigError(f"{options.address} is not loopback: load stays on this machine")
    if not 0 < options.most_requests <= MOST_REQUESTS:
        raise ConfigError(f"--most-requests must be from 1 to {MOST_REQUESTS}")
    if not options.run_time or options.run_time > MOST_RUN_S:
        raise ConfigError(f"--run-time must be at most {MOST_RUN_S:.0f} seconds")
    if not 0 <= options.rate <= 1000 or options.scale <= 0 or options.most_open < 1:
        raise ConfigError("--rate must be from 0 to 1000, --scale and --most-open above 0")
    return options


@events.init.add_listener
def begin(environment: Environment, **_: Any) -> None:
    """Refuse what is not this machine, or has no end."""
    try:
        loads[environment] = Load(checked(environment.parsed_options))
    except TidemillError as error:
        print(f"error: {error.reason}: {error}", file=sys.stderr)
        sys.exit(2)
    # A slow start would otherwise count against --run-time: gevent's timers begin at the
    # time of the loop's last turn.
    gevent.get_hub().loop.update_now()


@events.quitting.add_listener
def conclude(environment: Environment, **_: Any) -> None:
    """Print the table; the exit status is 1 after any failure, violation or difference."""
    environment.process_exit_code = 1  # stays if this raises: locust only logs that
    load = loads[environment]
    records = load.records
    summary = records.summary(load.clock())
    print(table(summary))
    reconciled: Reconciled | None = None
    if load.books is not None:
        reconciled = load.books.reconcile(records.asked)
        print(reconciled)
        summary["reconciled"] = asdict(reconciled)
    if load.options.output:
        write(Path(load.options.output), load, summary)
    bad = records.failures or records.violations or not records.num(End.WHOLE)
    if not bad and (reconciled is None or not reconciled.differences):
        environment.process_exit_code = 0


def write(path: Path, load: Load, summary: dict[str, Any]) -> None:
    """The summary, what was asked for, and a row for every request (times in seconds)."""
    options = {name: getattr(load.options, name) for name in _TOLD}
    rows = [
        {
            "due_s": round(asked.due_s, 4),
            "sent_s": round(asked.sent_s, 4),
            "ended_s": round(asked.ended_s, 4),
            "behaviour": asked.behaviour.value,
            "end": asked.end.value,
            "good": load.records.objectives.met(asked),
            "ttft_s": None if asked.ttft_s is None else round(asked.ttft_s, 5),
            "tpot_s": None if asked.tpot_s is None else round(asked.tpot_s, 5),
            "prompt_tokens": asked.prompt_tokens,
            "tokens": asked.received_tokens,
            "gaps_ms": [round(gap * 1000, 1) for gap in asked.gaps_s],
        }
        for asked in load.records.asked
        if asked.behaviour is not Behaviour.SAMPLE
    ]
    document = {
        "scenario": load.options.scenario,
        "rate": load.rate,
        "trace": Path(load.options.trace).name,
        "options": options,
        "summary": summary,
        "requests": rows,
    }
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")


class Arrivals(User):
    """The one source of requests: sends each when it is due, whatever became of those before."""

    fixed_count = 1

    def on_start(self) -> None:
        """Connect, learn what is served, and have a sample of text counted."""
        self.load = loads[self.environment]
        self.name = self.load.options.scenario
        books = self.load.books
        # Retries would hide refusals and stretch TTFT: none.
        self.client = Client(
            self.load.options.address,
            books.api_key if books else None,
            retry=RetryPolicy(max_retries=0),
        )
        served = {model.name: model for model in self.client.models()}
        self.model = served[self.load.options.model or min(served)]
        self.open = Pool(self.load.options.most_open)
        self.asker = self.load.scenario.asker(self._terms())

    def on_stop(self) -> None:
        """Disconnect."""
        self.client.close()

    @task
    def arrive(self) -> None:
        """All of the run's requests; returns once the last of them has ended."""
        load = self.load
        run_s = float(load.options.run_time)
        load.started_at = time.monotonic()
        for due_s in instants(load.scenario, load.trace, load.rate, run_s, load.rng):
            time.sleep(max(due_s - load.clock(), 0))
            if len(load.records.asked) >= load.options.most_requests or load.clock() > run_s:
                break
            if self.open.full():
                load.records.held_back += 1
                continue
            asked = load.asks(due_s, load.behaviour())
            question = self.asker.ask(load.rng)
            self.open.spawn(self._one, question, asked, Random(load.rng.random()))
        else:
            time.sleep(max(run_s - load.clock(), 0))  # rates are of the whole run
        self.open.join(timeout=_LAST_ANSWERS_S - 5)
        load.records.failures += [
            f"no end came (request {each.request_id})"
            for each in load.records.asked
            if math.isnan(each.ended_s)
        ]
        runner = self.environment.runner
        assert runner is not None
        if runner.state == STATE_RUNNING:
            gevent.spawn(runner.quit)
        raise StopUser

    def _terms(self) -> Terms:
        load = self.load
        question = Question((Message("user", SAMPLE),), 1)
        sample = load.asks(load.clock(), Behaviour.SAMPLE)
        self._one(question, sample, load.rng)
        return Terms(
            model=self.model,
            vocabulary=Vocabulary.measured(sample.prompt_tokens or len(SAMPLE.split())),
            scale=load.options.scale,
            shared_tokens=load.options.shared_tokens,
            trace=load.trace,
            rng=load.rng,
        )

    def _one(self, question: Question, asked: Asked, rng: Random) -> None:
        load = self.load
        customer = Customer(
            self.client, asked, question, model=self.model.name, rng=rng, clock=load.clock
        )
        try:
            text = customer.run()
        except (UsageError, ReceiptError) as error:
            load.records.violations.append(failure(asked, error))
            self._fire("generate", asked.total_s, exception=error)
        except TidemillError as error:
            if asked.end is End.REFUSED:
                self._fire("refused", asked.total_s)
                return
            load.records.failures.append(failure(asked, error))
            self._fire("generate", asked.total_s, exception=error)
        else:
            if asked.end is End.WHOLE and asked.behaviour is Behaviour.READS:
                self.asker.answered(question, text)
            self._tell(asked)

    def _tell(self, asked: Asked) -> None:
        """Locust's statistics of an answer."""
        kind = "generate" if asked.end is End.WHOLE else asked.end.value
        self._fire(kind, asked.total_s, length=asked.received_tokens)
        if not asked.timed:
            return
        if asked.ttft_s is not None:
            self._fire("TTFT", asked.ttft_s)
        if asked.tpot_s is not None:
            self._fire("TPOT", asked.tpot_s)
        for gap_s in asked.gaps_s:
            self._fire("ITL", gap_s)
        if self.load.records.objectives.met(asked):
            self._fire("goodput", asked.total_s)

    def _fire(
        self, kind: str, seconds: float, exception: Exception | None = None, *, length: int = 0
    ) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=self.name,
            response_time=seconds * 1000,
            response_length=length,
            exception=exception,
            context={},
        )
