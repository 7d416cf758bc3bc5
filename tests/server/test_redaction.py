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
    ],
)
def test_headers_that_hold_keys_are_known(name: str) -> None:
    assert redaction.is_secret(name)


@pytest.mark.parametrize("name", ["Content-Type", "Accept", "Anthropic-Version", "X-Trace"])
def test_others_are_shown(name: str) -> None:
    assert not redaction.is_secret(name)


def test_of_a_finished_message_only_the_names_of_its_keys_are_left() -> None:
    headers = {"Upstash-Forward-Authorization": "Bearer k", "Upstash-Retries": "2"}
    assert redaction.scrubbed(headers) == {
        "Upstash-Forward-Authorization": "REDACTED",
        "Upstash-Retries": "2",
    }


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
