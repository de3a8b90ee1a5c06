"""From the router's messages to the SDK's types: the one place that reads them."""

from collections.abc import Iterable

from tidemill.api.billing.v1 import receipt_pb2
from tidemill.api.common.v1 import lifecycle_pb2, logprobs_pb2, usage_pb2
from tidemill.api.router.v1 import admin_service_pb2, router_service_pb2
from tidemill.billing import Prices, Reuse, Unbilled
from tidemill.client.types import (
    Accepted,
    ChoiceEnd,
    Completed,
    Event,
    FinishReason,
    Key,
    Model,
    PromptScored,
    Queued,
    Receipt,
    TextChunk,
    Timing,
    TokenLogprobs,
    Usage,
)

_US = 1e-6
_FINISH_REASONS: dict[int, FinishReason] = {
    lifecycle_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    lifecycle_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    lifecycle_pb2.FINISH_REASON_BUDGET: FinishReason.BUDGET,
    lifecycle_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    lifecycle_pb2.FINISH_REASON_DEADLINE: FinishReason.DEADLINE,
    lifecycle_pb2.FINISH_REASON_SLOW_READER: FinishReason.SLOW_READER,
    lifecycle_pb2.FINISH_REASON_SERVER_FAULT: FinishReason.SERVER_FAULT,
}
_SITES: dict[int, str] = {
    usage_pb2.PREFILL_SITE_PREFILL_WORKER: "prefill_worker",
    usage_pb2.PREFILL_SITE_DECODE_WORKER: "decode_worker",
}
_STATES: dict[int, str] = {
    receipt_pb2.RECEIPT_STATE_PRICED: "priced",
    receipt_pb2.RECEIPT_STATE_PENDING: "pending",
    receipt_pb2.RECEIPT_STATE_SETTLED: "settled",
}
_DECIDED_BY: dict[int, str] = {
    receipt_pb2.DECIDING_INSTANT_COMPLETION: "completion",
    receipt_pb2.DECIDING_INSTANT_ARRIVAL: "arrival",
}


def event(message: router_service_pb2.GenerateResponse) -> Event | None:
    """The event in a message; None for a kind newer than this client."""
    match message.WhichOneof("event"):
        case "accepted":
            return Accepted(
                request_id=message.accepted.request_id,
                position=message.accepted.position,
                prompt_tokens=message.accepted.prompt_tokens,
                admitted_at_ms=message.accepted.admitted_at_ms,
                expected_wait_s=_expected_wait_s(message.accepted),
            )
        case "queued":
            return Queued(
                position=message.queued.position,
                expected_wait_s=_expected_wait_s(message.queued),
            )
        case "prompt_scored":
            return PromptScored(
                first_index=message.prompt_scored.first_index,
                logprobs=logprobs(message.prompt_scored.token_ids, message.prompt_scored.logprobs),
            )
        case "chunk":
            return _chunk(message.chunk)
        case "choice_end":
            return ChoiceEnd(
                choice=message.choice_end.choice,
                finish_reason=_finish_reason(message.choice_end.finish_reason),
                completion_tokens=message.choice_end.completion_tokens,
            )
        case "completed":
            return _completed(message.completed)
        case _:
            return None


def _expected_wait_s(
    message: router_service_pb2.Accepted | router_service_pb2.Queued,
) -> float | None:
    return message.expected_wait_ms / 1000 if message.HasField("expected_wait_ms") else None


def logprobs(
    token_ids: Iterable[int], messages: Iterable[logprobs_pb2.TokenLogprobs]
) -> tuple[TokenLogprobs, ...]:
    """Each token with how likely it was; empty where nothing is told of them."""
    return tuple(
        TokenLogprobs(
            token_id,
            message.logprob,
            tuple(zip(message.top_token_ids, message.top_logprobs, strict=False)),
        )
        for token_id, message in zip(token_ids, messages, strict=False)
    )


def usage(message: usage_pb2.Usage) -> Usage:
    """Counts, unchecked."""
    prompt, unbilled = message.prompt, message.unbilled
    return Usage(
        prompt_tokens=prompt.prompt_tokens,
        cache_hit_tokens=message.cache_hit_tokens,
        cache_miss_tokens=message.cache_miss_tokens,
        completion_tokens=message.completion_tokens,
        reasoning_tokens=message.reasoning_tokens,
        computed_tokens=prompt.computed_tokens,
        reuse=Reuse(
            device=prompt.reused_device_tokens,
            host=prompt.reused_host_tokens,
            cache_ram=prompt.reused_cache_ram_tokens,
            cache_disk=prompt.reused_cache_disk_tokens,
            peer=prompt.reused_peer_tokens,
        ),
        generated_tokens=message.generated_tokens,
        unbilled=Unbilled(
            overrun=unbilled.overrun_tokens,
            failover_redo=unbilled.failover_redo_tokens,
            lost=unbilled.lost_tokens,
            server_fault=unbilled.server_fault_tokens,
        ),
        drafted_tokens=message.drafted_tokens,
        accepted_tokens=message.accepted_tokens,
        prefill_site=_SITES.get(prompt.prefill_site, ""),
        prefill_worker_id=prompt.prefill_worker_id,
    )


def receipt(message: receipt_pb2.Receipt) -> Receipt:
    """The bill in the flat form that tidemill.billing hashes."""
    counts = usage(message.usage)
    reuse, unbilled = counts.reuse, counts.unbilled
    return Receipt(
        content={
            "format": "tidemill.receipt.v2",
            "request_id": message.request_id,
            "tenant_id": message.tenant_id,
            "key_id": message.key_id,
            "model": message.model,
            "price_model": message.price_model,
            "admitted_at_ms": message.admitted_at_ms,
            "decided_at_ms": message.decided_at_ms,
            "attempts": message.attempts,
            "hold_nano": message.hold_nano,
            "prompt_tokens": counts.prompt_tokens,
            "computed_tokens": counts.computed_tokens,
            "reused_device_tokens": reuse.device,
            "reused_host_tokens": reuse.host,
            "reused_cache_ram_tokens": reuse.cache_ram,
            "reused_cache_disk_tokens": reuse.cache_disk,
            "reused_peer_tokens": reuse.peer,
            "cache_hit_tokens": counts.cache_hit_tokens,
            "cache_miss_tokens": counts.cache_miss_tokens,
            "completion_tokens": counts.completion_tokens,
            "reasoning_tokens": counts.reasoning_tokens,
            "generated_tokens": counts.generated_tokens,
            "unbilled_overrun_tokens": unbilled.overrun,
            "unbilled_failover_redo_tokens": unbilled.failover_redo,
            "unbilled_lost_tokens": unbilled.lost,
            "unbilled_server_fault_tokens": unbilled.server_fault,
            "drafted_tokens": counts.drafted_tokens,
            "accepted_tokens": counts.accepted_tokens,
            "currency": message.currency,
            "book_id": message.book_id,
            "book_version": message.book_version,
            "book_digest": message.book_digest.hex(),
            "tariff_from_ms": message.tariff_from_ms,
            "window": message.window,
            "decided_by": _DECIDED_BY.get(message.decided_by, ""),
            "price_hit_pico": message.prices.hit_pico,
            "price_miss_pico": message.prices.miss_pico,
            "price_output_pico": message.prices.output_pico,
            "hit_cost_pico": message.hit_cost_pico,
            "miss_cost_pico": message.miss_cost_pico,
            "output_cost_pico": message.output_cost_pico,
            "amount_nano": message.amount_nano,
            "saved_nano": message.saved_nano,
        },
        state=_STATES.get(message.state, ""),
        content_sha256=message.content_sha256.hex(),
        position=message.position,
        previous_chain=message.previous_chain.hex(),
        chain=message.chain.hex(),
        granted_nano=message.granted_nano,
        topped_up_nano=message.topped_up_nano,
        signature=message.signature.hex(),
        signing_key_id=message.signing_key_id,
    )


def models(message: router_service_pb2.ListModelsResponse) -> list[Model]:
    """The models served, by name."""
    return [
        Model(
            name=model.name,
            context_tokens=model.context_tokens,
            max_output_tokens=model.max_output_tokens,
            currency=model.currency,
            prices=Prices(
                hit=model.prices.hit_pico,
                miss=model.prices.miss_pico,
                output=model.prices.output_pico,
            ),
            window=model.window,
            window_ends_at_ms=model.window_ends_at_ms or None,
            prefill_workers=model.prefill_workers,
            decode_workers=model.decode_workers,
        )
        for model in message.models
    ]


def key(message: admin_service_pb2.KeyInfo) -> Key:
    """A listed key."""
    return Key(
        key_id=message.key_id,
        tenant_id=message.tenant_id,
        label=message.label,
        created_at_ms=message.created_at_ms,
        revoked=message.revoked,
    )


def _chunk(message: router_service_pb2.TextChunk) -> TextChunk:
    return TextChunk(
        sequence=message.sequence,
        choice=message.choice,
        first_index=message.first_index,
        token_ids=tuple(message.token_ids),
        logprobs=logprobs(message.token_ids, message.logprobs),
        text=message.text,
        reasoning=message.reasoning_text,
        usage=usage(message.usage),
    )


def _finish_reason(number: int) -> FinishReason:
    return _FINISH_REASONS.get(number, FinishReason.UNKNOWN)


def _completed(message: router_service_pb2.Completed) -> Completed:
    timing = message.timing
    return Completed(
        finish_reason=_finish_reason(message.finish_reason),
        usage=usage(message.usage),
        receipt=receipt(message.receipt) if message.HasField("receipt") else None,
        seed=message.seed,
        timing=Timing(
            queued_s=timing.queued_us * _US,
            first_token_s=timing.first_token_us * _US,
            total_s=timing.total_us * _US,
            prefill_s=timing.prefill_us * _US,
            decode_busy_s=timing.decode_busy_seconds,
        ),
        text_replayed=message.text_replayed if message.HasField("text_replayed") else None,
    )
