"""What a worker answers about one attempt, in domain terms and held to its contract."""

import logging
from collections.abc import Sequence

from services.router.finish import Finish, PrefillSite
from services.router.tally import ChoiceEnded, Ended, Generated, Prefilled
from tidemill.api.common.v1 import lifecycle_pb2, usage_pb2
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2
from tidemill.billing import Reuse
from tidemill.errors import Internal

Report = Prefilled | Generated | ChoiceEnded | Ended

logger = logging.getLogger(__name__)


class ReportReader:
    """Reads the answers to one Start in order; Internal `WORKER_FAULT` where they cannot be true.

    Counts that do not add up, tokens that are missing and log-probabilities that were asked for
    and are not there all end the request rather than reach its client or its bill.
    """

    def __init__(self, task: lifecycle_pb2.WorkerTask) -> None:
        self._num_prompt_tokens = len(task.token_ids)
        self._logprobs = task.sampling.HasField("logprobs")
        self._prompt_logprobs = (
            task.sampling.HasField("prompt_logprobs") and not task.relayed_tokens
        )
        self._expected = [1] * max(task.sampling.n, 1)
        self._going_on = set(range(len(self._expected)))
        self.prefilled = False

    def read(self, response: decode_pb2.DecodeResponse) -> Report:
        """The report that the response holds."""
        if response.HasField("chunk"):
            return self.generated(response.chunk)
        match response.WhichOneof("event"):
            case "prefill_done":
                return self._prefilled(response.prefill_done)
            case "choice_ended":
                return self._choice_ended(response.choice_ended)
            case "final":
                return read_final(response.final)
            case _:
                raise _broken("an event that this router does not know")

    def is_due(self, response: decode_pb2.DecodeResponse) -> bool:
        """Whether all tokens have been read that the response counts."""
        if not self.prefilled:
            return True
        if response.HasField("choice_ended"):
            ended = response.choice_ended
            known = ended.choice in self._going_on
            return not known or self._expected[ended.choice] >= ended.generated_tokens
        if response.HasField("final"):
            return sum(self._expected) >= response.final.generated_tokens
        return True

    def _prefilled(self, done: lifecycle_pb2.PrefillDone) -> Prefilled:
        usage = done.usage
        prefilled = Prefilled(
            token_ids=tuple(done.first_token_ids) or (done.first_token_id,),
            logprobs=tuple(done.first_logprobs),
            prompt_logprobs=tuple(done.prompt_logprobs),
            prompt_tokens=usage.prompt_tokens,
            computed_tokens=usage.computed_tokens,
            reused=reuse_of(usage),
            site=site_of(usage),
            prefill_us=done.prefill_us,
            busy_seconds=done.busy_seconds,
        )
        if prefilled.prompt_tokens != self._num_prompt_tokens:
            raise _broken(f"{prefilled.prompt_tokens} prompt tokens of {self._num_prompt_tokens}")
        if prefilled.prompt_tokens != prefilled.computed_tokens + prefilled.reused.total:
            raise _broken("its prompt split does not add up (U1)")
        if len(prefilled.token_ids) != len(self._expected):
            raise _broken(f"{len(prefilled.token_ids)} first tokens of {len(self._expected)}")
        self._require_logprobs(prefilled.token_ids, prefilled.logprobs)
        scored = len(prefilled.prompt_logprobs)
        if scored != (self._num_prompt_tokens - 1 if self._prompt_logprobs else 0):
            raise _broken(f"{scored} prompt tokens scored")
        self.prefilled = True
        return prefilled

    def generated(self, chunk: decode_pb2.Chunk) -> Generated:
        """The report that a Chunk is."""
        choice, token_ids, logprobs = chunk.choice, chunk.token_ids[:], chunk.logprobs
        self._require_choice(choice)
        expected = self._expected[choice]
        if chunk.first_index != expected:
            raise _broken(f"chunk {chunk.first_index} in place of {expected}")
        self._expected[choice] = expected + len(token_ids)
        self._require_logprobs(token_ids, logprobs)
        return Generated(choice, token_ids, logprobs[:] if self._logprobs else ())

    def _choice_ended(self, ended: decode_pb2.ChoiceEnded) -> ChoiceEnded:
        self._require_choice(ended.choice)
        self._going_on.remove(ended.choice)
        return ChoiceEnded(
            choice=ended.choice,
            finish=Finish(ended.reason or Finish.SERVER_FAULT),
            generated_tokens=ended.generated_tokens,
        )

    def _require_choice(self, choice: int) -> None:
        if choice not in self._going_on:
            raise _broken(f"word of choice {choice}, which there is not or no more")

    def _require_logprobs(self, token_ids: Sequence[int], logprobs: Sequence[object]) -> None:
        if len(logprobs) != (len(token_ids) if self._logprobs else 0):
            raise _broken(f"{len(logprobs)} log-probabilities for {len(token_ids)} tokens")


def reuse_of(usage: usage_pb2.PromptUsage) -> Reuse:
    """Reused tokens by tier, as the prefilling worker counted them."""
    return Reuse(
        device=usage.reused_device_tokens,
        host=usage.reused_host_tokens,
        cache_ram=usage.reused_cache_ram_tokens,
        cache_disk=usage.reused_cache_disk_tokens,
        peer=usage.reused_peer_tokens,
    )


def site_of(usage: usage_pb2.PromptUsage) -> PrefillSite:
    """Who prefilled."""
    return PrefillSite(
        worker_id=usage.prefill_worker_id,
        in_place=usage.prefill_site == usage_pb2.PREFILL_SITE_DECODE_WORKER,
    )


def read_final(final: decode_pb2.Final) -> Ended:
    """An attempt's last word."""
    return Ended(
        finish=Finish(final.reason or Finish.SERVER_FAULT),
        generated_tokens=final.generated_tokens,
        drafted_tokens=final.drafted_tokens,
        accepted_tokens=final.accepted_tokens,
        busy_seconds=final.busy_seconds,
        prefill_busy_seconds=final.prefill_busy_seconds,
        prefill_worker_id=final.prefill_worker_id,
    )


def _broken(what: str) -> Internal:
    logger.error("a worker broke the contract: %s", what)
    return Internal("a worker broke its contract", reason="WORKER_FAULT")
