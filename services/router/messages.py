"""Protos to domain and back, for the public services."""

import hashlib

from services.router.admission import Ask, Conversation, Input
from services.router.finish import Completed, PrefillSite, Timing
from services.router.generation import Generation
from services.router.inter_token import StreamGaps
from services.router.outbox import Accepted, ChoiceEnd, Event, Moved, Piece, PromptScored
from services.router.response_format import ResponseFormat
from services.router.sampling import Wanted
from tidemill.api.billing.v1 import receipt_pb2
from tidemill.api.common.v1 import lifecycle_pb2, sampling_pb2, usage_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.billing import Decides, Prices, Receipt, Unbilled, Usage
from tidemill.policy import Priority
from tidemill.text import ChatMessage

_ROLES = {
    router_pb2.CHAT_ROLE_SYSTEM: "system",
    router_pb2.CHAT_ROLE_USER: "user",
    router_pb2.CHAT_ROLE_ASSISTANT: "assistant",
}
_DECIDES = {
    Decides.COMPLETION.value: receipt_pb2.DECIDING_INSTANT_COMPLETION,
    Decides.ARRIVAL.value: receipt_pb2.DECIDING_INSTANT_ARRIVAL,
}

_PRIORITIES = {
    router_pb2.PRIORITY_STANDARD: Priority.STANDARD,
    router_pb2.PRIORITY_BATCH: Priority.BATCH,
}

_MOST_MS = 2**32 - 1


def ask_of(request: router_pb2.GenerateRequest) -> Ask:
    """The domain form of a validated request."""
    return Ask(
        request_id=request.request_id,
        body_sha256=hashlib.sha256(request.SerializeToString(deterministic=True)).digest(),
        model=request.model,
        input=_input(request),
        stop=tuple(request.stop),
        sampling=_wanted(request.sampling),
        response_format=(
            _response_format(request.response_format)
            if request.HasField("response_format")
            else None
        ),
        max_cost=(
            (request.max_cost.currency, request.max_cost.nano)
            if request.HasField("max_cost")
            else None
        ),
        first_token_timeout_s=(
            request.first_token_timeout_ms / 1000
            if request.HasField("first_token_timeout_ms")
            else None
        ),
        total_timeout_s=(
            request.total_timeout_ms / 1000 if request.HasField("total_timeout_ms") else None
        ),
        priority=_PRIORITIES.get(request.priority, Priority.STANDARD),
    )


def _wanted(sampling: sampling_pb2.Sampling) -> Wanted:
    asked = {field.name: value for field, value in sampling.ListFields() if field.has_presence}
    return Wanted(
        logit_bias=dict(sampling.logit_bias),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        **asked,
    )


def _response_format(response_format: router_pb2.ResponseFormat) -> ResponseFormat:
    if response_format.HasField("json_schema"):
        return ResponseFormat(response_format.json_schema.schema)
    return ResponseFormat()


def _input(request: router_pb2.GenerateRequest) -> Input:
    match request.WhichOneof("input"):
        case "chat":
            messages = [
                ChatMessage(_ROLES[each.role], each.content) for each in request.chat.messages
            ]
            return Conversation(tuple(messages))
        case "prompt":
            return request.prompt
        case _:
            return tuple(request.tokens.token_ids)


class EventWriter:
    """Events of one generation as messages; numbers the chunks.

    All chunks are one message, changed and written again: making a new one costs more than the
    rest of its way through the router. It is good until the next. `gaps` hears of each chunk that
    has tokens.
    """

    def __init__(self, generation: Generation, gaps: StreamGaps) -> None:
        self._generation = generation
        self._gaps = gaps
        self._admitted = generation.admitted
        self._response = router_pb2.GenerateResponse()
        self._logprobs = generation.admitted.sampling.logprobs is not None
        self._others: tuple[object, ...] = ()
        self._sequence = 0

    def message(self, event: Event) -> router_pb2.GenerateResponse:
        """The event's message."""
        if isinstance(event, Piece):
            return self._chunk(event)
        match event:
            case Accepted():
                accepted = router_pb2.Accepted(
                    request_id=self._admitted.ask.request_id,
                    position=event.position,
                    prompt_tokens=len(self._admitted.token_ids),
                    admitted_at_ms=self._admitted.admitted_at_ms,
                    expected_wait_ms=_milliseconds(event.expected_wait_s),
                )
                return router_pb2.GenerateResponse(accepted=accepted)
            case Moved():
                queued = router_pb2.Queued(
                    position=event.position,
                    expected_wait_ms=_milliseconds(event.expected_wait_s),
                )
                return router_pb2.GenerateResponse(queued=queued)
            case PromptScored():
                return router_pb2.GenerateResponse(prompt_scored=_prompt_scored(event))
            case ChoiceEnd():
                return router_pb2.GenerateResponse(choice_end=_choice_end(event))
            case Completed():
                return completed_message(event)

    def _chunk(self, piece: Piece) -> router_pb2.GenerateResponse:
        if piece.token_ids:
            self._gaps.told(piece.choice)
        chunk = self._response.chunk
        usage, told = chunk.usage, piece.told
        if not self._sequence:
            so_far = self._generation.usage_so_far
            usage.CopyFrom(usage_message(so_far, self._generation.prefill_site))
        chunk.sequence = self._sequence
        chunk.first_index = piece.first_index
        chunk.ClearField("token_ids")
        chunk.token_ids.extend(piece.token_ids)
        chunk.text = piece.text
        chunk.reasoning_text = piece.reasoning
        chunk.choice = piece.choice
        usage.completion_tokens = told.completion_tokens
        usage.reasoning_tokens = told.reasoning_tokens
        usage.generated_tokens = told.generated_tokens
        if told[3:] != self._others:
            self._others = told[3:]
            usage.unbilled.CopyFrom(_unbilled_message(told.unbilled))
            usage.drafted_tokens = told.drafted_tokens
            usage.accepted_tokens = told.accepted_tokens
        if self._logprobs:
            chunk.ClearField("logprobs")
            chunk.logprobs.extend(piece.logprobs)
        self._sequence += 1
        return self._response


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else min(round(seconds * 1000), _MOST_MS)


def completed_message(completed: Completed) -> router_pb2.GenerateResponse:
    """The last message of a stream."""
    return router_pb2.GenerateResponse(
        completed=router_pb2.Completed(
            finish_reason=lifecycle_pb2.FinishReason.ValueType(completed.finish.value),
            usage=usage_message(completed.usage, completed.site),
            receipt=receipt_message(completed),
            seed=completed.seed,
            timing=_timing(completed.timing),
            text_replayed=False if completed.again else None,
        )
    )


def usage_message(usage: Usage, site: PrefillSite) -> usage_pb2.Usage:
    """The proto form; without a prefill the prompt's split is unset."""
    message = usage_pb2.Usage(
        cache_hit_tokens=usage.cache_hit_tokens,
        cache_miss_tokens=usage.cache_miss_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        generated_tokens=usage.generated_tokens,
        unbilled=_unbilled_message(usage.unbilled),
        drafted_tokens=usage.drafted_tokens,
        accepted_tokens=usage.accepted_tokens,
    )
    if usage.prompt_tokens:
        message.prompt.CopyFrom(
            usage_pb2.PromptUsage(
                prompt_tokens=usage.prompt_tokens,
                computed_tokens=usage.computed_tokens,
                reused_device_tokens=usage.reused.device,
                reused_host_tokens=usage.reused.host,
                reused_cache_ram_tokens=usage.reused.cache_ram,
                reused_cache_disk_tokens=usage.reused.cache_disk,
                reused_peer_tokens=usage.reused.peer,
                prefill_site=(
                    usage_pb2.PREFILL_SITE_DECODE_WORKER
                    if site.in_place
                    else usage_pb2.PREFILL_SITE_PREFILL_WORKER
                ),
                prefill_worker_id=site.worker_id,
            )
        )
    return message


def receipt_message(completed: Completed) -> receipt_pb2.Receipt:
    """The bill; PRICED and no more where it is neither in the ledger nor on the way there."""
    message = _receipt_content(completed.receipt, completed.site)
    message.signature = completed.signature
    message.signing_key_id = completed.signing_key_id
    if (chained := completed.chained) is not None:
        message.state = receipt_pb2.RECEIPT_STATE_SETTLED
        message.position = chained.position
        message.previous_chain = bytes.fromhex(chained.previous_chain)
        message.chain = bytes.fromhex(chained.chain)
        message.granted_nano = chained.granted_nano
        message.topped_up_nano = chained.topped_up_nano
    elif completed.pending:
        message.state = receipt_pb2.RECEIPT_STATE_PENDING
    return message


def _receipt_content(receipt: Receipt, site: PrefillSite) -> receipt_pb2.Receipt:
    charge = receipt.charge
    return receipt_pb2.Receipt(
        request_id=receipt.request_id,
        tenant_id=receipt.tenant_id,
        key_id=receipt.key_id,
        model=receipt.model,
        price_model=charge.model,
        book_id=charge.book_id,
        book_version=charge.book_version,
        book_digest=bytes.fromhex(charge.book_digest),
        currency=charge.currency,
        window=charge.window,
        prices=receipt_pb2.UnitPrices(
            hit_pico=charge.price_hit_pico,
            miss_pico=charge.price_miss_pico,
            output_pico=charge.price_output_pico,
        ),
        admitted_at_ms=receipt.admitted_at_ms,
        decided_at_ms=receipt.decided_at_ms,
        decided_by=_DECIDES[charge.decided_by],
        tariff_from_ms=charge.tariff_from_ms,
        usage=usage_message(receipt.usage, site),
        hit_cost_pico=charge.hit_cost_pico,
        miss_cost_pico=charge.miss_cost_pico,
        output_cost_pico=charge.output_cost_pico,
        amount_nano=charge.amount_nano,
        saved_nano=charge.saved_nano,
        attempts=receipt.attempts,
        hold_nano=receipt.hold_nano,
        state=receipt_pb2.RECEIPT_STATE_PRICED,
        content_sha256=bytes.fromhex(receipt.content_sha256),
    )


def unit_prices(prices: Prices) -> receipt_pb2.UnitPrices:
    """Prices of one window in one currency."""
    return receipt_pb2.UnitPrices(
        hit_pico=prices.hit, miss_pico=prices.miss, output_pico=prices.output
    )


def _unbilled_message(unbilled: Unbilled) -> usage_pb2.UnbilledUsage:
    return usage_pb2.UnbilledUsage(
        overrun_tokens=unbilled.overrun,
        failover_redo_tokens=unbilled.failover_redo,
        lost_tokens=unbilled.lost,
        server_fault_tokens=unbilled.server_fault,
    )


def _prompt_scored(scored: PromptScored) -> router_pb2.PromptScored:
    return router_pb2.PromptScored(
        first_index=scored.first_index, token_ids=scored.token_ids, logprobs=scored.logprobs
    )


def _choice_end(end: ChoiceEnd) -> router_pb2.ChoiceEnd:
    return router_pb2.ChoiceEnd(
        choice=end.choice,
        finish_reason=lifecycle_pb2.FinishReason.ValueType(end.finish.value),
        completion_tokens=end.completion_tokens,
    )


def _timing(timing: Timing) -> router_pb2.Timing:
    return router_pb2.Timing(
        queued_us=timing.queued_us,
        first_token_us=timing.first_token_us,
        total_us=timing.total_us,
        prefill_us=timing.prefill_us,
        decode_busy_seconds=timing.decode_busy_seconds,
    )
