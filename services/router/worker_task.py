"""The request as its workers get it: token ids and numbers."""

import hashlib

from services.router.admission import Admitted
from services.router.dispatch import Placed
from services.router.fleet import DECODE, PREFILL
from services.router.sampling import Sampling
from tidemill.api.common.v1 import lifecycle_pb2
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2

MAX_WIRE_ID = 64
FIRST_FENCE = 1


def wire_id(tenant_id: str, request_id: str) -> str:
    """The name of a request among workers, at most 64 characters.

    Tenants choose request ids without seeing each other's, so the tenant is part of it: as
    "tenant:request" where that fits, else as "h." and a hash. Neither form can be the other, nor
    can two requests share one, since a tenant's id holds no colon and no dot.
    """
    plain = f"{tenant_id}:{request_id}"
    if len(plain) <= MAX_WIRE_ID:
        return plain
    return f"h.{hashlib.sha256(plain.encode()).hexdigest()[: MAX_WIRE_ID - 2]}"


def start_message(admitted: Admitted, placed: Placed, *, attempt: int) -> decode_pb2.Start:
    """What begins an attempt at `placed`."""
    task = lifecycle_pb2.WorkerTask(
        id=lifecycle_pb2.AttemptId(
            request_id=wire_id(admitted.tenant.id, admitted.ask.request_id),
            attempt=attempt,
            fence=FIRST_FENCE,
        ),
        tenant_id=admitted.tenant.id,
        cache_scope=admitted.tenant.salt,
        token_ids=admitted.token_ids,
        sampling=_sampling_message(admitted.sampling),
        grammar=_grammar_message(admitted),
        model_digest=admitted.identity.digest,
    )
    for peer in placed.peers:
        role = PREFILL if PREFILL in peer.description.roles else DECODE
        task.peers.add(worker_id=peer.id, address=peer.description.address, role=role)
    start = decode_pb2.Start(task=task)
    if placed.prefill is not None:
        start.prefill.worker_id = placed.prefill.id
        start.prefill.address = placed.prefill.description.address
    return start


def _sampling_message(sampling: Sampling) -> lifecycle_pb2.ResolvedSampling:
    return lifecycle_pb2.ResolvedSampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        stop_token_ids=sampling.stop_token_ids,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        min_tokens=sampling.min_tokens,
        n=sampling.n,
    )


def _grammar_message(admitted: Admitted) -> lifecycle_pb2.Grammar | None:
    wanted = admitted.ask.response_format
    if wanted is None:
        return None
    grammar = lifecycle_pb2.Grammar(vocabulary_digest=admitted.model.tokenizer.vocabulary_digest)
    if wanted.schema is None:
        grammar.json_object.SetInParent()
    else:
        grammar.json_schema.schema = wanted.schema
    return grammar
