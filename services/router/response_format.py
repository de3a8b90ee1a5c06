"""What a completion must conform to, as far as a router can judge it."""

import json
from dataclasses import dataclass
from typing import NoReturn

from services.router.sampling import Sampling, Wanted
from tidemill.errors import InvalidRequest

SCHEMA_FIELD = "response_format.json_schema.schema"


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """JSON that fits `schema`; None: any JSON object."""

    schema: str | None = None

    def check(self, wanted: Wanted) -> None:
        """InvalidRequest if the schema is no JSON object, or the sampling forbids the end.

        Whether a schema can be compiled only a worker knows.
        """
        if self.schema is not None:
            _check_schema(self.schema)
        # After the last brace only a stop token may follow.
        if wanted.ignore_eos:
            _refuse("response_format", "cannot be asked for together with ignore_eos")
        if wanted.min_tokens:
            _refuse("response_format", "cannot be asked for together with min_tokens")

    def check_end(self, sampling: Sampling) -> None:
        """InvalidRequest if nothing could end the completion but its length."""
        if not sampling.stop_token_ids:
            _refuse("response_format", "needs a stop token, and this model has none of its own")


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        why = "is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(
            f"the schema is no JSON: {why}", violations=[(SCHEMA_FIELD, f"is no JSON: {why}")]
        ) from error
    if not isinstance(schema, dict):
        _refuse(SCHEMA_FIELD, "must be a JSON object")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _refuse(path: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"{path} {problem}", violations=[(path, problem)])
