"""What must hold of every answer, whatever the load."""

from tidemill.client import Completed, FinishReason
from tidemill.client.generation import Progress
from tidemill.errors import ReceiptError, UsageError

_MAY_END_UNREAD = (FinishReason.CANCELLED, FinishReason.DEADLINE)


def check(stream: Progress, completed: Completed) -> None:
    """U1, U2 and M4 of one answer, and its bill against itself. UsageError, ReceiptError."""
    usage = completed.usage
    usage.check()
    billed = usage.completion_tokens
    received = sum(len(choice.token_ids) for choice in stream.choices)
    unread = completed.finish_reason in _MAY_END_UNREAD
    if billed != received and not (unread and billed > received):
        raise UsageError(
            f"{billed} completion tokens billed, {received} received, end {completed.finish_reason}"
        )
    if completed.receipt is None:
        raise ReceiptError("the answer came without its receipt")
    bill = completed.receipt.to_billing().usage
    counts = ("prompt_tokens", "cache_hit_tokens", "cache_miss_tokens", "completion_tokens")
    differing = [name for name in counts if getattr(bill, name) != getattr(usage, name)]
    if differing:
        raise ReceiptError(f"receipt and usage differ in {', '.join(differing)}")
