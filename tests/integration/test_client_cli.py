"""The installed `tidemill` command, as a process of its own."""

import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.scripted_router import (
    NUM_PROMPT_TOKENS,
    ScriptedRouter,
    after_waiting,
    answer,
    choices,
    refuse,
    serve,
    until_cancelled,
)
from tidemill import errors
from tidemill.api.router.v1 import router_service_pb2 as pb
from tidemill.billing.verification import verify_documents
from tidemill.certs import make_dev_certs
from tidemill.client.cli import main

COMMAND = Path(sys.executable).with_name("tidemill")


@dataclass
class Ended:
    status: int
    out: str
    err: str


async def start(
    arguments: Sequence[str], address: str, *, stdout: int = asyncio.subprocess.PIPE
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        COMMAND,
        *arguments,
        env={"TIDEMILL_ADDRESS": address, "TIDEMILL_API_KEY": "tm_key.secret"},
        stdin=asyncio.subprocess.PIPE,
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
    )


async def end(process: asyncio.subprocess.Process, stdin: bytes = b"") -> Ended:
    out, err = await process.communicate(stdin)
    assert process.returncode is not None
    return Ended(process.returncode, (out or b"").decode(), err.decode())


async def tidemill(*arguments: str, address: str = "127.0.0.1:1", stdin: bytes = b"") -> Ended:
    return await end(await start(arguments, address), stdin)


async def test_text_goes_to_stdout_and_the_bill_to_stderr() -> None:
    async with serve(ScriptedRouter([answer("Tide ", "mills.")])) as address:
        ended = await tidemill("generate", "What?", address=address)
    assert ended.status == 0
    assert ended.out == "Tide mills.\n"
    assert "128 hit (64 device, 64 cache_ram), 2 miss; completion 2" in ended.err
    assert " USD (" in ended.err


async def test_json_is_one_object_whose_receipt_verifies() -> None:
    router = ScriptedRouter([answer("Tide ", "mills.")])
    async with serve(router) as address:
        ended = await tidemill("chat", "What?", "--json", address=address)
    assert ended.status == 0
    assert ended.err == ""
    printed = json.loads(ended.out)
    assert list(printed) == ["text", "token_ids", "finish_reason", "usage", "receipt"]
    assert printed["text"] == "Tide mills."
    assert printed["token_ids"] == [100, 101]
    assert printed["finish_reason"] == "stop"
    assert printed["usage"]["prompt_tokens"] == NUM_PROMPT_TOKENS
    assert printed["usage"]["cache_hit_tokens"] == 128
    assert printed["usage"]["cache_miss_tokens"] == 2
    assert printed["usage"]["completion_tokens"] == 2
    assert printed["usage"]["reuse"] == {
        "device": 64,
        "host": 0,
        "cache_ram": 64,
        "cache_disk": 0,
        "peer": 0,
    }
    assert printed["receipt"]["state"] == "settled"
    books = {router.book.digest: router.book}
    assert not verify_documents([printed["receipt"]], books).faults


async def test_interrupt_ends_the_request_and_shows_its_bill() -> None:
    router = ScriptedRouter([until_cancelled()])
    async with serve(router) as address:
        process = await start(["generate", "p", "-m", "demo"], address)
        assert process.stdout is not None
        await process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        ended = await end(process)
    assert router.cancelled.is_set()
    assert ended.status == 130
    assert ended.err.startswith("[cancelled] prompt 130 tokens")
    assert "USD" in ended.err


async def test_a_model_cannot_steer_the_terminal() -> None:
    async with serve(ScriptedRouter([answer("a\tb", "\x1b[2J", "\x9b31m", "c")])) as address:
        raw = await tidemill("generate", "p", address=address)
        terminal, end_of_terminal = pty.openpty()
        try:
            process = await start(["generate", "p"], address, stdout=end_of_terminal)
            await end(process)
            shown = os.read(terminal, 1024).decode()
        finally:
            os.close(terminal)
            os.close(end_of_terminal)
    assert "\x1b[2J\x9b31m" in raw.out  # a file gets what the model said
    assert shown.strip() == "a\tb\ufffd[2J\ufffd31mc"


async def test_an_error_is_one_line_with_reason_and_request_id() -> None:
    router = ScriptedRouter([refuse(errors.ModelNotFound("no model\nnamed x"))])
    async with serve(router) as address:
        ended = await tidemill("generate", "p", "-m", "x", address=address)
    (request,) = router.requests
    assert ended.status == 1
    assert ended.out == ""
    assert ended.err == (
        f"error: MODEL_NOT_FOUND: no model named x (request {request.request_id})\n"
    )


async def test_a_conversation_remembers_and_survives_a_refusal() -> None:
    router = ScriptedRouter(
        [answer("one"), refuse(errors.InvalidRequest("too long")), answer("two")]
    )
    async with serve(router) as address:
        ended = await tidemill(
            "chat", "--system", "be brief", address=address, stdin=b"a\n\nb\nc\n"
        )
    assert ended.status == 0
    assert ended.out == "one\ntwo\n"
    assert "error: INVALID_REQUEST: too long" in ended.err
    said = [(message.role, message.content) for message in router.requests[-1].chat.messages]
    assert said == [
        (pb.CHAT_ROLE_SYSTEM, "be brief"),
        (pb.CHAT_ROLE_USER, "a"),
        (pb.CHAT_ROLE_ASSISTANT, "one"),
        (pb.CHAT_ROLE_USER, "c"),
    ]


async def test_a_prompt_may_come_from_stdin_and_options_reach_the_router() -> None:
    router = ScriptedRouter([answer("ok")])
    async with serve(router) as address:
        ended = await tidemill(
            *("generate", "-", "--max-tokens", "5", "--temperature", "0", "--max-cost", "0.02USD"),
            address=address,
            stdin=b"from a pipe",
        )
    assert ended.status == 0
    (request,) = router.requests
    assert request.prompt == "from a pipe"
    assert request.model == "demo"  # the only one served
    assert request.sampling.max_tokens == 5
    assert request.sampling.HasField("temperature")
    assert request.max_cost == pb.MaxCost(currency="USD", nano=20_000_000)


async def test_sampling_and_a_schema_reach_the_router(tmp_path: Path) -> None:
    router = ScriptedRouter([answer("{}")])
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    flags = {
        "--min-p": "0.1",
        "--repetition-penalty": "1.1",
        "--presence-penalty": "-0.5",
        "--frequency-penalty": "0.25",
        "--min-tokens": "3",
        "--json-schema": str(tmp_path / "schema.json"),
    }
    async with serve(router) as address:
        ended = await tidemill(
            *("generate", "p", "--ignore-eos", "--logit-bias", "5=-100", "--logit-bias", "6=1.5"),
            *(word for flag in flags.items() for word in flag),
            *("--logprobs", "2", "--prompt-logprobs", "--json"),
            address=address,
        )
    assert ended.status == 0
    (request,) = router.requests
    sampling = request.sampling
    assert (sampling.min_p, sampling.repetition_penalty, sampling.min_tokens) == (0.1, 1.1, 3)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-0.5, 0.25)
    assert dict(sampling.logit_bias) == {5: -100.0, 6: 1.5}
    assert sampling.ignore_eos
    assert sampling.logprobs == 2
    assert (sampling.prompt_logprobs, sampling.HasField("prompt_logprobs")) == (0, True)
    assert json.loads(request.response_format.json_schema.schema) == {"type": "object"}


async def test_several_answers_are_each_shown_whole() -> None:
    async with serve(ScriptedRouter([choices("mill", "sea")])) as address:
        ended = await tidemill("generate", "p", "--n", "2", "--json-object", address=address)
    assert ended.status == 0
    assert ended.out == "sea\nmill\n"
    assert ended.err.startswith("[choice 1: stop]\n[choice 0: length]\n")
    assert "completion 7" in ended.err


async def test_json_holds_every_choice_and_what_was_scored() -> None:
    async with serve(ScriptedRouter([choices("ab", "c")])) as address:
        ended = await tidemill("chat", "p", "--n", "2", "--logprobs", "--json", address=address)
    printed = json.loads(ended.out)
    top = [{"token_id": 1, "logprob": -0.5}, {"token_id": 2, "logprob": -1.5}]
    assert printed["text"] == "ab"
    assert [choice["text"] for choice in printed["choices"]] == ["ab", "c"]
    assert [choice["finish_reason"] for choice in printed["choices"]] == ["length", "stop"]
    assert printed["choices"][1]["logprobs"] == [{"token_id": 100, "logprob": -100.0, "top": top}]
    assert [each["token_id"] for each in printed["prompt_logprobs"]] == [1, 2, 3, 4]


async def test_models_and_keys_print_plain_lines() -> None:
    async with serve(ScriptedRouter([answer("ok")])) as address:
        models = await tidemill("models", address=address)
        made = await tidemill("keys", "create", "acme", "--label", "ci", address=address)
        listed = await tidemill("keys", "list", "--json", address=address)
        revoked = await tidemill("keys", "revoke", "key0", address=address)
        tenant = await tidemill("tenants", "create", "mill", address=address)
    assert "hit 0.07, miss 0.27, output 1.1 USD/1M tokens" in models.out
    assert made.out == "tm_key0.secret\n"
    assert json.loads(listed.out)["keys"][0]["label"] == "ci"
    assert revoked.out == "key key0 revoked\n"
    assert tenant.out == "tenant mill made\n"


async def test_dev_certs_are_made_where_asked(tmp_path: Path) -> None:
    ended = await tidemill("certs", "dev", str(tmp_path / "certs"), "--host", "mill.example")
    assert ended.status == 0
    assert ended.out == f"export TIDEMILL_CA={tmp_path / 'certs' / 'ca.pem'}\n"
    assert (tmp_path / "certs" / "router.key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["generate", "p", "--address", "nowhere"], "is not host:port"),
        (["chat", "--json"], "--json answers one message"),
        (["chat", "--n", "2"], "--n answers one message"),
        (["generate", "p", "--logprobs"], "are shown with --json"),
        (["generate", "p", "--json-schema", "/nonexistent"], "cannot be read"),
        (["models", "--api-key-file", "/nonexistent"], "cannot read the key"),
        (["models", "--ca", "/nonexistent"], "cannot read /nonexistent"),
    ],
)
async def test_wrong_settings_exit_with_two_and_say_what(
    arguments: list[str], complaint: str
) -> None:
    ended = await tidemill(*arguments)
    assert ended.status == 2
    assert ended.err.startswith("error: CONFIG_ERROR: ")
    assert complaint in ended.err


async def test_a_reader_that_leaves_ends_the_request() -> None:
    router = ScriptedRouter([until_cancelled()])
    async with serve(router) as address:
        process = await start(["generate", "p", "-m", "demo"], address)
        assert process.stdout is not None
        await process.stdout.read(1)
        process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
        await asyncio.wait_for(router.gone.wait(), 10)
        assert await process.wait() == 1


async def test_a_place_in_the_queue_is_told_with_the_expected_wait() -> None:
    router = ScriptedRouter([after_waiting((12, 20.4), (5, None), (1, 0.2), (0, 3.0), (0, 0.1))])
    async with serve(router) as address:
        ended = await tidemill(
            "generate", "p", "-m", "demo", "--priority", "batch", "--first-token-timeout", "30",
            address=address,
        )  # fmt: skip
    assert (ended.status, ended.out) == (0, "ok\n")
    assert ended.err.splitlines()[:4] == [
        "queued, 12 ahead, about 20 s",
        "queued, 5 ahead",
        "queued, 1 ahead, about 1 s",
        "queued, 0 ahead, about 3 s",
    ]
    assert router.requests[0].priority == pb.PRIORITY_BATCH
    assert router.requests[0].first_token_timeout_ms == 30_000


async def test_a_wait_before_another_attempt_is_told() -> None:
    limited = errors.LimitExceeded("60 a\nminute", reason="RATE_LIMITED", retry_after_s=1.1)
    async with serve(ScriptedRouter([refuse(limited), answer("ok")])) as address:
        ended = await tidemill("generate", "p", "-m", "demo", address=address)
    assert (ended.status, ended.out) == (0, "ok\n")
    assert ended.err.startswith("RATE_LIMITED: 60 a minute; trying again in 2 s\n[stop]")


async def test_a_wait_of_less_than_a_second_is_not_told() -> None:
    full = errors.QueueFull("full", retry_after_s=0.1)
    async with serve(ScriptedRouter([refuse(full), answer("ok")])) as address:
        ended = await tidemill("generate", "p", "-m", "demo", "--json", address=address)
    assert (ended.status, ended.err) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [("generate", "p", "--request-id", ""), ("grant", "acme", "1", "--operation-id", "")],
)
async def test_an_empty_idempotency_key_is_refused(arguments: tuple[str, ...]) -> None:
    ended = await tidemill(*arguments)
    assert ended.status == 2
    assert ended.err.endswith("-id: must not be empty\n")


async def test_the_version_is_that_of_the_package() -> None:
    ended = await tidemill("--version")
    assert (ended.status, ended.out) == (0, f"tidemill {version('tidemill')}\n")


async def test_a_port_that_does_not_answer_in_plaintext_is_asked_for_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TIDEMILL_CA", raising=False)
    make_dev_certs(tmp_path, [])
    command = ["balance", "--address", "127.0.0.1:1", "--api-key", "k"]
    assert await asyncio.to_thread(main, command) == 1
    assert capsys.readouterr().err.endswith("; does this port speak TLS? set TIDEMILL_CA\n")
    assert await asyncio.to_thread(main, [*command, "--ca", str(tmp_path / "ca.pem")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: UNAVAILABLE: ")
    assert "TLS?" not in said
