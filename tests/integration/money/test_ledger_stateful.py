"""The Lua scripts against the rules: the same commands in any order, the same replies and books."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from services.router.config import LedgerConfig
from services.router.money.accounts import Accounts
from services.router.money.ledger import Ledger
from tests.ledger_commands import LEASE_MS, NOON_MS, orphan, release, reserve, send, settle, sha256
from tests.redis_process import RedisProcess
from tidemill.billing import ledger as rules

pytestmark = pytest.mark.redis

DAY_MS = 86_400_000
NUM_REQUESTS = 12
KEYS = ["k1", "k2", "tenant"]  # the last one would read as the account's own scope
OWNERS = ["router-a", "router-b"]

# Three times in four one that is live.
request_ids = st.builds(
    lambda books, pick: books.picked(pick), st.runner(), st.integers(0, 4 * NUM_REQUESTS - 1)
)
new_ids = st.builds("r{}".format, st.integers(0, NUM_REQUESTS - 1))
small = st.integers(0, 60)
tokens = st.integers(0, 40)
# Mostly as it should be, sometimes one that is stale or was never given.
fence_errors = st.sampled_from([0, 0, 0, 0, 0, 0, -1, -1, 1])
amounts = st.one_of(small, small, st.integers(rules.MAX_NANO - 200, rules.MAX_NANO))
bounds = st.builds(
    rules.Limits,
    requests_per_minute=st.none() | st.sampled_from([1, 3, 7, 20, 10**7]),
    tokens_per_minute=st.none() | st.sampled_from([11, 60, 100, 400, 10**11]),
    concurrency=st.none() | st.integers(2, 5),
    daily_budget_nano=st.none() | st.sampled_from([40, 150, 300, rules.MAX_NANO]),
)
steps = st.sampled_from(
    [
        -2 * DAY_MS,
        -DAY_MS,
        -20_000,
        -400,
        -1,
        1,
        7,
        999,
        4_321,
        LEASE_MS - 1,
        LEASE_MS,
        61_000,
        DAY_MS,
        3 * DAY_MS,
    ]
)  # clocks step back too
ages = st.sampled_from([DAY_MS, DAY_MS, LEASE_MS, LEASE_MS - 1, 0])  # of the ledger's process


class Books(RuleBasedStateMachine):
    """`model` is what the rules say; every command goes to it and to the real ledger."""

    loop: asyncio.AbstractEventLoop
    accounts: tuple[Accounts, Accounts]  # of two routers, in turn
    numbers = itertools.count()

    @initialize(limits=st.none() | bounds)
    def begin(self, limits: rules.Limits | None) -> None:
        self.tenant_id = f"t{next(self.numbers)}"
        self.model = rules.Account()
        self.now_ms = NOON_MS
        self.operations = itertools.count()
        self.sent: list[rules.Command] = []
        self.do(rules.TopUp(operation_id="first", now_ms=self.now_ms, amount_nano=300))
        self.do(rules.Grant(operation_id="second", now_ms=self.now_ms, amount_nano=200))
        if limits is not None:
            self.limit(limits, None)

    def do(self, command: rules.Command) -> None:
        self.sent.append(command)
        self.model, expected = rules.apply(self.model, command)
        accounts = self.accounts[len(self.sent) // 2 % 2]
        got = self.loop.run_until_complete(send(accounts, self.tenant_id, command))
        assert got == expected, command

    def live(self) -> list[str]:
        return sorted(known.request_id for known in self.model.requests.values() if known.live)

    def picked(self, pick: int) -> str:
        live = self.live()
        at, of_live = pick % NUM_REQUESTS, pick >= NUM_REQUESTS and live
        return live[at % len(live)] if of_live else f"r{at}"

    def settled(self, pick: int) -> str:
        settled = sorted(known.request_id for known in self.model.requests.values() if known.posted)
        return settled[pick % len(settled)] if pick and settled else f"r{pick % NUM_REQUESTS}"

    def fence(self, request_id: str, error: int) -> int:
        known = self.model.requests.get(request_id)
        return max((known.fence if known else 1) + error, 0)

    @rule(step=steps)
    def time_passes(self, step: int) -> None:
        self.now_ms += step

    @rule(
        request_id=new_ids | new_ids | request_ids,
        key_id=st.sampled_from(KEYS),
        owner=st.sampled_from(OWNERS),
        nano=st.tuples(small, amounts),
        counts=st.tuples(tokens, tokens),
        up_for=ages,
    )
    def reserves(
        self,
        *,
        request_id: str,
        key_id: str,
        owner: str,
        nano: tuple[int, int],
        counts: tuple[int, int],
        up_for: int,
    ) -> None:
        self.do(
            reserve(
                request_id,
                key_id=key_id,
                owner=owner,
                now_ms=self.now_ms,
                least_nano=nano[0],
                full_nano=min(sum(nano), rules.MAX_NANO),
                prompt_tokens=counts[0],
                max_tokens=counts[1],
                ledger_up_since_ms=self.now_ms - up_for,
                terms=f'{{"of":"{owner}"}}',
            )
        )

    @rule(pick=st.integers(0, NUM_REQUESTS), key_id=st.sampled_from(KEYS), nano=small)
    def a_new_request_comes(self, pick: int, key_id: str, nano: int) -> None:
        unknown = [f"n{i}" for i in range(pick + 1) if f"n{i}" not in self.model.requests]
        if unknown:
            self.do(
                reserve(
                    unknown[-1],
                    key_id=key_id,
                    now_ms=self.now_ms,
                    full_nano=nano + 9,
                    least_nano=nano // 2,
                )
            )

    @rule(request_id=request_ids)
    def comes_with_another_body(self, request_id: str) -> None:
        self.do(reserve(request_id, now_ms=self.now_ms, body_sha256=sha256("other")))

    @precondition(lambda self: self.live())
    @rule(
        pick=st.integers(0, NUM_REQUESTS),
        act=st.sampled_from(["extend", "settle", "settle", "release", "wait"]),
        share=st.integers(0, 100),
    )
    def an_owner_goes_on(self, pick: int, act: str, share: int) -> None:
        live = self.live()
        request_id = live[pick % len(live)]
        if act == "extend":
            self.extends(request_id, 0, share)
        elif act == "settle":
            amount = self.model.requests[request_id].amount_nano * share // 100
            self.settles(request_id, 0, amount, share // 3, 0)
        elif act == "release":
            self.releases(request_id, 0, share)
        else:
            self.owner_vanishes(request_id)

    @rule(request_id=request_ids, error=fence_errors, add=amounts)
    def extends(self, request_id: str, error: int, add: int) -> None:
        self.do(
            rules.Extend(
                request_id=request_id,
                fence=self.fence(request_id, error),
                now_ms=self.now_ms,
                add_nano=add,
                checkpoint=f'{{"add":{add}}}',
            )
        )

    @rule(request_id=request_ids, error=fence_errors, attempts=st.integers(0, 3))
    def checkpoints(self, request_id: str, error: int, attempts: int) -> None:
        self.do(
            rules.Checkpoint(
                request_id=request_id,
                fence=self.fence(request_id, error),
                now_ms=self.now_ms,
                attempts=attempts,
                checkpoint=f'{{"attempts":{attempts}}}',
            )
        )

    @rule(
        owner=st.sampled_from([*OWNERS, "resolver"]),
        errors=st.lists(st.tuples(request_ids, fence_errors), max_size=5),
    )
    def renews(self, owner: str, errors: list[tuple[str, int]]) -> None:
        holds = tuple((request_id, self.fence(request_id, error)) for request_id, error in errors)
        self.do(rules.Renew(owner=owner, now_ms=self.now_ms, lease_ms=LEASE_MS, holds=holds))

    @rule(
        request_id=request_ids,
        error=fence_errors,
        amount=st.none() | amounts,
        total_tokens=tokens,
        late=st.sampled_from([0, 3, 5_000]),
    )
    def settles(
        self, request_id: str, error: int, amount: int | None, total_tokens: int, late: int
    ) -> None:
        known = self.model.requests.get(request_id)
        held = known.amount_nano if known else 0
        self.do(
            settle(
                request_id,
                fence=self.fence(request_id, error),
                now_ms=self.now_ms,
                decided_at_ms=self.now_ms - late,
                amount_nano=held if amount is None else amount,
                content_sha256=sha256(f"{request_id} {self.now_ms}"),
                record=f'{{"at":{self.now_ms}}}',
                total_tokens=total_tokens,
            )
        )

    @rule(request_id=request_ids, error=fence_errors, lost=small)
    def releases(self, request_id: str, error: int, lost: int) -> None:
        self.do(
            release(
                request_id,
                fence=self.fence(request_id, error),
                now_ms=self.now_ms,
                unbilled=f'{{"lost":{lost}}}',
            )
        )

    @rule(
        request_id=request_ids,
        owner=st.sampled_from(["resolver", "router-b"]),
        up_for=ages,
    )
    def orphans(self, request_id: str, owner: str, up_for: int) -> None:
        since = self.now_ms - up_for
        self.do(orphan(request_id, now_ms=self.now_ms, owner=owner, ledger_up_since_ms=since))

    @rule(request_id=request_ids)
    def owner_vanishes(self, request_id: str) -> None:
        self.now_ms += LEASE_MS
        self.do(orphan(request_id, now_ms=self.now_ms))

    @rule(
        kind=st.sampled_from([rules.TopUp, rules.Grant]),
        amount=st.integers(1, 200) | st.integers(rules.MAX_NANO - 300, rules.MAX_NANO),
        note=st.sampled_from(["", "sorry", "ä b  c\n\"'"]),
    )
    def is_credited(
        self, kind: type[rules.TopUp] | type[rules.Grant], amount: int, note: str
    ) -> None:
        operation_id = f"o{next(self.operations)}"
        self.do(kind(operation_id=operation_id, now_ms=self.now_ms, amount_nano=amount, note=note))

    @rule(
        request_id=st.builds(
            lambda books, pick: books.settled(pick), st.runner(), st.integers(0, NUM_REQUESTS)
        ),
        amount=st.none() | st.integers(1, 40) | st.just(rules.MAX_NANO),
        note=st.sampled_from(["", "two  words\n"]),
    )
    def refunds(self, request_id: str, amount: int | None, note: str) -> None:
        self.do(
            rules.Refund(
                operation_id=f"o{next(self.operations)}",
                now_ms=self.now_ms,
                request_id=request_id,
                amount_nano=amount,
                note=note,
            )
        )

    @rule(limits=bounds, key_id=st.sampled_from([None, "k1", "k1", *KEYS]))
    def limit(self, limits: rules.Limits, key_id: str | None) -> None:
        self.do(
            rules.SetLimits(
                operation_id=f"o{next(self.operations)}",
                now_ms=self.now_ms,
                key_id=key_id,
                limits=limits,
            )
        )

    @rule(back=st.integers(0, 8), how=st.sampled_from(["same", "later", "other content"]))
    def a_command_comes_again(self, back: int, how: str) -> None:
        command = self.sent[-1 - min(back, len(self.sent) - 1)]
        if how == "other content" and isinstance(command, rules.TopUp | rules.Grant):
            command = replace(command, amount_nano=7)
        self.do(command if how == "same" else replace(command, now_ms=self.now_ms))

    @invariant()
    def books_are_in_order(self) -> None:
        assert rules.check(self.model) == []

    def teardown(self) -> None:
        stored = self.loop.run_until_complete(self.accounts[0].read(self.tenant_id))
        assert rules.check(stored) == []
        assert stored == expected_in_redis(self.model)


def expected_in_redis(model: rules.Account) -> rules.Account:
    """`model`, where Redis does not tell "never set" from "nothing"."""
    scopes = {rules.TENANT, *model.limits, *model.use}
    return replace(
        model,
        balances=dict(model.balances),
        limits={scope: model.limits.get(scope, rules.Limits()) for scope in scopes},
        use={scope: model.use.get(scope, rules.Use()) for scope in scopes},
    )


def run_books(ledger_redis: RedisProcess, **bounds_of_run: Any) -> None:
    loop = asyncio.new_event_loop()
    config = LedgerConfig(url=ledger_redis.url, pepper_file=Path(), admin_key_file=Path())

    async def connect() -> Ledger:
        return Ledger(config)

    ledger = loop.run_until_complete(connect())

    class Connected(Books):
        accounts = (Accounts(ledger), Accounts(ledger))

    Connected.loop = loop
    try:
        run_state_machine_as_test(
            Connected,
            settings=settings(
                deadline=None,
                suppress_health_check=list(HealthCheck),
                **bounds_of_run,
            ),
        )
    finally:
        loop.run_until_complete(ledger.close())
        loop.close()


def test_scripts_and_rules_agree_whatever_is_asked(ledger_redis: RedisProcess) -> None:
    run_books(ledger_redis, max_examples=60, stateful_step_count=50)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_scripts_and_rules_agree_for_long(
    redis_server: Callable[..., RedisProcess],
) -> None:
    run_books(redis_server(), max_examples=1500, stateful_step_count=60)
