from __future__ import annotations

import hashlib

import pytest

from django_qstash_llm.server import redaction


@pytest.mark.parametrize(
    "name",
    [
        "Authorization",
        "x-api-key",
        "Cookie",
        "Set-Cookie",
        "Helicone-Auth",
        "X-Auth-Token",
        "api-key",
        "Proxy-Authorization",
        "X-Goog-Api-Key",
        "Ocp-Apim-Subscription-Key",
        "X-Client-Secret",
        "Upstash-Forward-Authorization",
    ],
)
def test_headers_that_hold_keys_are_known(name: str) -> None:
    assert redaction.is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *("Content-Type", "Accept", "Anthropic-Version", "X-Trace", "X-Author", "Idempotency-Key"),
        *("OpenAI-Organization", "X-Ratelimit-Remaining-Tokens", "X-Monkey", "Sec-Websocket-Key"),
        *("Upstash-Signature", "X-Secretary", "X-Cookie-Consent", "Authority"),
    ],
)
def test_others_are_shown(name: str) -> None:
    assert not redaction.is_secret(name)


def test_the_headers_that_hold_keys_are_kept_apart_from_the_others() -> None:
    headers = {"Upstash-Forward-Authorization": "Bearer k", "Upstash-Retries": "2"}
    assert redaction.parted(headers) == (
        {"Upstash-Forward-Authorization": "REDACTED", "Upstash-Retries": "2"},
        {"Upstash-Forward-Authorization": "Bearer k"},
    )


def test_what_is_to_be_hidden_is_kept_apart_too_with_its_fingerprint_in_its_place() -> None:
    headers = {
        "Upstash-Redact-Fields": "body, header[authorization],header[X-Plain]",
        "Upstash-Forward-Authorization": "Bearer k",
        "Upstash-Callback-Forward-X-Plain": "v",
        "Upstash-Forward-X-Other": "o",
    }
    shown, secrets = redaction.parted(headers)
    assert secrets == {
        "Upstash-Forward-Authorization": "Bearer k",
        "Upstash-Callback-Forward-X-Plain": "v",
    }
    assert shown == headers | {
        "Upstash-Forward-Authorization": redaction.fingerprint(b"Bearer k"),
        "Upstash-Callback-Forward-X-Plain": redaction.fingerprint(b"v"),
    }
    assert redaction.parted(shown) == (shown, {})


@pytest.mark.parametrize(
    ("fields", "hidden"),
    [
        (["header"], {"A", "B"}),
        (["HEADERS"], {"A", "B"}),
        (["header[a]"], {"A"}),
        (["headers[B]"], {"B"}),
        (["body"], set()),
    ],
)
def test_headers_are_hidden_as_asked(fields: list[str], hidden: set[str]) -> None:
    shown = redaction.redacted_header({"A": ["1"], "B": ["1"]}, fields)
    mark = f"REDACTED:{hashlib.sha256(b'1').hexdigest()}"
    assert {name for name, values in shown.items() if values == [mark]} == hidden


def test_the_body_is_hidden_as_asked() -> None:
    assert redaction.redacted_body(b"prompt", ["header"]) == b"prompt"
    digest = hashlib.sha256(b"prompt").hexdigest()
    assert redaction.redacted_body(b"prompt", ["Body"]) == f"REDACTED:{digest}".encode()
