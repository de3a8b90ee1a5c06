"""What an operator does to an account. Each takes effect once per operation id."""

from dataclasses import asdict, replace

from tidemill.billing.canonical import canonical_bytes
from tidemill.billing.ledger_account import (
    ADJUSTMENT,
    GRANTED,
    HOLD,
    PAID_IN,
    REVENUE,
    TENANT,
    TOPPED_UP,
    Account,
    JournalEntry,
    Refunded,
    key_scope,
)
from tidemill.billing.ledger_commands import (
    MAX_NANO,
    Grant,
    Operation,
    Refund,
    SetLimits,
    TopUp,
)
from tidemill.billing.ledger_posting import operation_detail, posted
from tidemill.billing.ledger_replies import (
    Applied,
    NotSettled,
    OperationReply,
    OtherContent,
    RefundReply,
    State,
    TooMuch,
)


def operation_content(command: Operation) -> str:
    """What must be the same when an operation id comes again: all but the clock."""
    fields = asdict(command)
    del fields["operation_id"], fields["now_ms"]
    limits = fields.pop("limits", {})
    kept = {name: value for name, value in (fields | limits).items() if value is not None}
    return canonical_bytes({"kind": type(command).__name__, **kept}).decode()


def apply_operation(account: Account, command: Operation) -> tuple[Account, RefundReply]:
    """(the account after `command`, the reply)."""
    if command.operation_id in account.operations:
        content, amount = account.operations[command.operation_id]
        if content != operation_content(command):
            return account, OtherContent()
        return account, Applied(False, amount, account.balance)
    match command:
        case TopUp():
            return _credit(account, command, TOPPED_UP, PAID_IN, "top_up")
        case Grant():
            return _credit(account, command, GRANTED, ADJUSTMENT, "grant")
        case Refund():
            return _refund(account, command)
        case SetLimits():
            return _set_limits(account, command)


def _credit(
    account: Account, command: TopUp | Grant, to: str, counter: str, kind: str
) -> tuple[Account, OperationReply]:
    amount = command.amount_nano
    if amount > _room(account):
        return account, TooMuch(_room(account))
    moves = {to: amount, counter: -amount}
    detail = operation_detail(command)
    entry = JournalEntry(kind, command.operation_id, command.now_ms, moves, detail)
    account = posted(account, entry)
    return _done(account, command, amount)


def _refund(account: Account, command: Refund) -> tuple[Account, RefundReply]:
    request = account.requests.get(command.request_id)
    if request is None or request.posted is None:
        return account, NotSettled(request.state if request else State.UNKNOWN)
    before = request.refunded_nano
    left = request.amount_nano - before
    amount = left if command.amount_nano is None else command.amount_nano
    most = min(left, _room(account))
    if amount > most or amount == 0:
        return account, TooMuch(most)
    paid_in = request.topped_up_nano  # goes back first
    to_paid_in = min(before + amount, paid_in) - min(before, paid_in)
    refund = Refunded(command.operation_id, amount, command.now_ms, command.note)
    request = replace(request, refunds=(*request.refunds, refund))
    account = replace(account, requests={**account.requests, request.request_id: request})
    moves = {REVENUE: -amount, TOPPED_UP: to_paid_in, GRANTED: amount - to_paid_in}
    detail = operation_detail(command)
    entry = JournalEntry("refund", command.operation_id, command.now_ms, moves, detail)
    account = posted(account, entry)
    return _done(account, command, amount)


def _set_limits(account: Account, command: SetLimits) -> tuple[Account, OperationReply]:
    scope = TENANT if command.key_id is None else key_scope(command.key_id)
    account = replace(account, limits={**account.limits, scope: command.limits})
    return _done(account, command, 0)


def _room(account: Account) -> int:
    """How much more the account can keep."""
    return MAX_NANO - sum(account.balances[name] for name in (GRANTED, TOPPED_UP, HOLD))


def _done(account: Account, command: Operation, amount: int) -> tuple[Account, Applied]:
    done = {**account.operations, command.operation_id: (operation_content(command), amount)}
    return replace(account, operations=done), Applied(True, amount, account.balance)
