"""The demo: one long prompt twice, what each answer cost, and whether the bills are true."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from services.stack.plan import MODEL, PRICE_BOOK, Plan
from services.stack.prompt import documentation_prompt
from tidemill.billing import load_price_book
from tidemill.billing.verification import verify_documents
from tidemill.client import AsyncClient, Completion, Receipt
from tidemill.errors import LocalError

TENANT = "demo"
MAX_TOKENS = 96
OPENING_NANO = 5 * 10**9
SEED = 7
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # a random model may steer a terminal

Row = tuple[str, str, str]


class DemoFailed(LocalError):
    """The stack answered, but not as it should."""

    reason = "DEMO_FAILED"


@dataclass(frozen=True)
class Answer:
    """One completion, and the seconds from sending the prompt to its first token."""

    completion: Completion
    ttft_s: float


async def demo(plan: Plan, say: Callable[[str], None]) -> None:
    """Ask twice, print both bills and check them.

    Raises DemoFailed if the second time reused nothing or a receipt does not verify.
    """
    key = await make_key(plan, TENANT, "demo")
    async with AsyncClient(plan.address, api_key=key, ca=plan.ca) as client:
        prompt = documentation_prompt()
        say(f"\nThe tenant {TENANT} has paid in: {(await client.balance()).available} to spend.")
        say(f"\nThe prompt: {len(prompt)} characters of documentation, ending in\n")
        say("    " + prompt.strip().rpartition("\n")[2] + "\n\nThe answer, as it comes:\n")
        first = await _ask(client, prompt)
        say("\nThe same prompt again:\n")
        second = await _ask(client, prompt)
        say("\n" + side_by_side(first, second))
        say(f"\nLeft: {(await client.balance()).available}.")
        keys = {key.signing_key_id: key.public_key for key in await client.signing_keys()}
    receipts = [each.completion.receipt for each in (first, second)]
    check_receipts([receipt for receipt in receipts if receipt], keys)
    say(f"Both receipts verify, computed anew from {PRICE_BOOK.name}, chained and signed.")
    if second.completion.usage.cache_hit_tokens == 0:
        raise DemoFailed("the second answer reused nothing of the first one's prompt")


def check_receipts(receipts: Sequence[Receipt], keys: Mapping[str, bytes]) -> None:
    """As anyone can who has the price book; DemoFailed names what is wrong."""
    book = load_price_book(PRICE_BOOK)
    documents = [receipt.to_dict() for receipt in receipts]
    verdict = verify_documents(documents, {book.digest: book}, keys)
    if verdict.faults or verdict.num_receipts != 2:
        wrong = [f"{fault.field} {fault.problem}" for fault in verdict.faults]
        raise DemoFailed(f"{verdict.num_receipts} receipts, at fault: {'; '.join(wrong) or 'none'}")


async def make_key(plan: Plan, tenant: str, label: str) -> str:
    """A new API key of `tenant`, which is created if need be and has paid in 5 USD, once."""
    admin_key = plan.state.secret("admin.key")
    async with AsyncClient(plan.address, api_key=admin_key, ca=plan.ca) as operator:
        await operator.admin.create_tenant(tenant)
        await operator.admin.top_up(tenant, OPENING_NANO, operation_id="opening")
        return (await operator.admin.create_key(tenant, label=label)).key


async def _ask(client: AsyncClient, prompt: str) -> Answer:
    stream = await client.generate(
        prompt, model=MODEL, max_tokens=MAX_TOKENS, seed=SEED, stream=True
    )
    async with stream:
        sys.stdout.write("    ")
        async for event in stream:
            text = getattr(event, "text", "") or getattr(event, "reasoning", "")
            sys.stdout.write(_CONTROL.sub("?", text).replace("\n", "\n    "))
            sys.stdout.flush()
        sys.stdout.write("\n")
        completion = await stream.completion()
        if stream.ttft_s is None:
            raise DemoFailed(f"no token came: {completion.finish_reason}")
        completion.usage.check()
        return Answer(completion, stream.ttft_s)


def side_by_side(first: Answer, second: Answer) -> str:
    """Both usages and bills as an aligned table."""
    rows: list[Row] = [("", "first", "again")]
    rows += [
        (name, left, right)
        for (name, left), (_, right) in zip(_lines(first), _lines(second), strict=True)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"  {name:<{widths[0]}}  {left:>{widths[1]}}  {right:>{widths[2]}}".rstrip()
        for name, left, right in rows
    )


def _lines(answer: Answer) -> list[tuple[str, str]]:
    usage, receipt = answer.completion.usage, answer.completion.receipt
    reuse = usage.reuse
    return [
        ("prompt tokens", f"{usage.prompt_tokens}"),
        ("  computed", f"{usage.computed_tokens}"),
        ("  reused: device", f"{reuse.device}"),
        ("  reused: host", f"{reuse.host}"),
        ("  reused: cache RAM", f"{reuse.cache_ram}"),
        ("  reused: cache disk", f"{reuse.cache_disk}"),
        ("  reused: peer", f"{reuse.peer}"),
        ("billed as hits", f"{usage.cache_hit_tokens}"),
        ("completion tokens", f"{usage.completion_tokens}"),
        ("time to first token", f"{answer.ttft_s * 1000:.0f} ms"),
        ("price", receipt.amount if receipt else "-"),
        ("saved by the cache", receipt.saved if receipt else "-"),
        ("tariff window", receipt.window if receipt else "-"),
    ]
