"""The request as its workers get it: token ids and numbers."""

import hashlib
from collections.abc import Sequence

from services.router.admission import Admitted
from services.router.fleet import DECODE, PREFILL
from services.router.relay import Choice
from services.router.sampling import Sampling
from services.router.ticket import Placed
from tidemill.api.common.v1 import lifecycle_pb2
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2
from tidemill.policy.seeds import choice_seed

MAX_WIRE_ID = 64


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


def start_message(
    admitted: Admitted,
    placed: Placed,
    choices: Sequence[Choice],
    *,
    attempt: int,
    fence: int,
    funded_tokens: int | None,
) -> decode_pb2.Start:
    """What begins an attempt at `placed` for all choices, or takes one of them up where it is.

    A choice alone is a request with the choice's own seed, so it draws what it would have drawn
    among the others (X2). `funded_tokens` are what these choices may come to in all.
    """
    relayed = choices[0].token_ids if len(choices) == 1 else ()
    task = lifecycle_pb2.WorkerTask(
        id=lifecycle_pb2.AttemptId(
            request_id=wire_id(admitted.tenant.id, admitted.ask.request_id),
            attempt=attempt,
            fence=fence,
        ),
        tenant_id=admitted.tenant.id,
        cache_scope=admitted.tenant.salt,
        token_ids=[*admitted.token_ids, *relayed],
        relayed_tokens=len(relayed),
        sampling=_sampling_message(admitted.sampling, choices),
        grammar=_grammar_message(admitted),
        model_digest=admitted.identity.digest,
    )
    for peer in placed.peers:
        role = PREFILL if PREFILL in peer.description.roles else DECODE
        task.peers.add(worker_id=peer.id, address=peer.description.address, role=role)
    start = decode_pb2.Start(task=task, relayed_tokens=len(relayed), funded_tokens=funded_tokens)
    if placed.prefill is not None:
        start.prefill.worker_id = placed.prefill.id
        start.prefill.address = placed.prefill.description.address
    return start


def _sampling_message(
    sampling: Sampling, choices: Sequence[Choice]
) -> lifecycle_pb2.ResolvedSampling:
    return lifecycle_pb2.ResolvedSampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=choice_seed(sampling.seed, choices[0].index),
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
        n=len(choices),
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
