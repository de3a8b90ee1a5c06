"""The operator's side of a run: a tenant with money, and its books once all is over."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any
from urllib.request import urlopen
from uuid import uuid4

from prometheus_client.parser import text_string_to_metric_families

from tidemill.billing import Unbilled
from tidemill.client import Client, Receipt
from tidemill.errors import ConfigError

MONEY_NANO = 1000 * 10**9
_ENDED_S = 60.0
_LOOK_S = 0.2
_METRICS_TIMEOUT_S = 10.0
_GENERATED = "tidemill_worker_generated_tokens"


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What a run came to by its books, and every difference in words: none is as it should be."""

    num_charges: int
    amount_nano: int
    generated_tokens: int
    differences: Sequence[str]

    def __str__(self) -> str:
        text = f"{self.num_charges} charges of {self.amount_nano} nano-units, "
        text += f"{self.generated_tokens} tokens generated: {len(self.differences)} differences"
        return "\n".join([text, *(f"difference: {each}" for each in self.differences[:20])])


class Books:
    """A tenant made for one run. `metrics` are the workers' metrics pages, all of them or none."""

    def __init__(self, address: str, admin_key: str, metrics: Sequence[str]) -> None:
        self.tenant_id = f"loadtest-{uuid4().hex[:8]}"
        self._metrics = metrics
        self._client = Client(address, admin_key)
        admin = self._client.admin
        admin.create_tenant(self.tenant_id)
        admin.top_up(self.tenant_id, MONEY_NANO, operation_id="loadtest")
        self.api_key = admin.create_key(self.tenant_id, label="loadtest").key
        self._generated_before = self._generated()

    def reconcile(self, receipts: Sequence[Receipt]) -> Reconciled:
        """Hold what customers got against the journal, and the journal against the engines."""
        with self._client:
            deadline = time.monotonic() + _ENDED_S
            while any(self._client.admin.account(self.tenant_id).holds.values()):
                if time.monotonic() > deadline:
                    raise ConfigError(f"money of {self.tenant_id} is still held")
                time.sleep(_LOOK_S)
            entries = list(self._client.admin.journal(self.tenant_id))
        settled = [(each.subject, each.detail) for each in entries if each.kind == "settle"]
        released = [each.detail["unbilled"] for each in entries if each.kind == "release"]
        generated = sum(int(record["generated_tokens"]) for _, record in settled)
        generated += sum(int(part[each.name]) for part in released for each in fields(Unbilled))
        differences = compare(receipts, settled)
        counted = self._generated() - self._generated_before
        if self._metrics and counted != generated:
            differences.append(f"engines generated {counted} tokens, the journal has {generated}")
        return Reconciled(
            num_charges=len(settled),
            amount_nano=sum(int(record["amount_nano"]) for _, record in settled),
            generated_tokens=generated,
            differences=differences,
        )

    def _generated(self) -> int:
        return sum(_counter(url) for url in self._metrics)


def compare(
    receipts: Sequence[Receipt], settled: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[str]:
    """In what customers' receipts differ from the journal's charges (request id, record)."""
    times = Counter(request_id for request_id, _ in settled)
    differences = [f"{each} was charged {times[each]} times" for each in times if times[each] > 1]
    records = dict(settled)
    for receipt in receipts:
        request_id = str(receipt.content["request_id"])
        record = records.get(request_id)
        if record is None:
            if receipt.state != "priced":
                differences.append(f"{request_id} has a {receipt.state} receipt and no charge")
        elif record["content_sha256"] != receipt.content_sha256:
            differences.append(f"{request_id} has another receipt than its charge")
    return differences


def _counter(url: str) -> int:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no address of a metrics page")
    with urlopen(url, timeout=_METRICS_TIMEOUT_S) as page:  # noqa: S310 - checked above
        text = page.read().decode()
    samples = [
        sample
        for family in text_string_to_metric_families(text)
        if family.name == _GENERATED
        for sample in family.samples
        if sample.name == f"{_GENERATED}_total"
    ]
    return int(sum(sample.value for sample in samples))
