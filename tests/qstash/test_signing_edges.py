"""What is at the edge of a signature: the exact words of a refusal, and the last character taken."""

from __future__ import annotations

import base64
import json
from typing import Any

import jwt
import pytest

from django_qstash_llm.qstash.exceptions import SignatureError
from django_qstash_llm.qstash.signing import (
    Difference,
    difference,
    sign,
    url_differences,
    verify,
    verify_token,
)

from .test_signing import (
    BODY,
    CURRENT,
    KEYS,
    NEXT,
    NOW,
    OTHER,
    URL,
    documented,
    forge,
    token,
)


def refusal(signature: Any, body: bytes = BODY, **changed: Any) -> tuple[str, str]:
    with pytest.raises(SignatureError) as caught:
        verify(signature, body, **{"url": URL, "keys": KEYS, "now": NOW} | changed)
    return caught.value.reason, str(caught.value)


def raw(found: bytes, put: bytes) -> str:
    payload = json.dumps(documented()).encode()
    assert payload.count(found) == 1
    return forge(payload.replace(found, put))


@pytest.mark.parametrize(
    ("refused", "expected"),
    [
        ({"signature": ""}, ("missing", "no Upstash-Signature header")),
        ({"keys": [""]}, ("no_key", "no usable signing key is configured")),
        ({"keys": [OTHER]}, ("key", "signed with none of our keys")),
        ({"signature": "A" * 16_385}, ("malformed", "the signature is too long")),
        ({"body": b"x"}, ("body", "the body is not the one that was signed")),
        ({"signature": token(iss="Up")}, ("issuer", "the issuer is not Upstash")),
        ({"now": NOW + 331}, ("expired", "expired 31 s ago")),
        (
            {"signature": token(exp=NOW + 931)},
            ("claims", "claims to be valid for longer than 15 minutes"),
        ),
        (
            {"signature": token(nbf=NOW + 20, iat=NOW + 40)},
            ("early", "not valid yet, for another 40 s: is this machine's clock slow?"),
        ),
        (
            {"signature": token(nbf=NOW + 50, iat=NOW + 40)},
            ("early", "not valid yet, for another 50 s: is this machine's clock slow?"),
        ),
        ({"signature": forge(b"{")}, ("claims", "the claims are not JSON")),
        ({"signature": forge(b"1")}, ("claims", "the claims are not an object")),
        ({"signature": forge(b"[[1,2]]")}, ("claims", "the claims are not an object")),
        ({"signature": raw(b'"iss"', b'"sub"')}, ("claims", "a claim is there twice")),
        ({"signature": token(aud="x")}, ("claims", "meant for another audience")),
        *(
            (
                {"signature": token(**{name: None})},
                ("claims", f"the claim {name} is missing or of the wrong type"),
            )
            for name in ("iss", "sub", "body", "exp", "nbf")
        ),
        *(
            (
                {"signature": token(**{name: True})},
                ("claims", f"the claim {name} is missing or of the wrong type"),
            )
            for name in ("exp", "nbf", "iat", "jti")
        ),
        *(
            (
                {"signature": token(**{name: moment})},
                ("claims", f"the claim {name} is no moment in time"),
            )
            for name in ("exp", "nbf", "iat")
            for moment in (2**53, -(2**53))
        ),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_a_refusal_says_why(refused: dict[str, Any], expected: tuple[str, str]) -> None:
    assert refusal(**{"signature": token()} | refused) == expected


def test_what_pyjwt_says_of_a_token_is_told() -> None:
    reason, detail = refusal("no token")
    assert reason == "malformed"
    assert detail.startswith("not a signature: ")
    assert len(detail) > len("not a signature: ")


def test_a_constant_that_json_has_not_is_named() -> None:
    with pytest.raises(SignatureError) as caught:
        verify(raw(b'"exp": 1750000300', b'"exp": NaN'), BODY, url=URL, keys=KEYS, now=NOW)
    assert str(caught.value.__cause__) == "NaN is no number"


def test_the_longest_token_is_still_read() -> None:
    padded = [token(something="x" * size) for size in range(11_800, 12_000)]
    at_most = next(each for each in reversed(padded) if len(each) <= 16_384)
    assert len(at_most) in (16_383, 16_384)
    assert verify(at_most, BODY, url=URL, keys=KEYS, now=NOW).subject == URL
    assert refusal("A" * 16_384)[1] != "the signature is too long"


@pytest.mark.parametrize("name", ["exp", "nbf", "iat"])
def test_the_latest_moment_is_one(name: str) -> None:
    assert refusal(token(**{name: 2**53 - 1}))[1] != f"the claim {name} is no moment in time"
    assert refusal(token(**{name: -(2**53) + 1, "exp": 1}))[0] == "expired"


@pytest.mark.parametrize(
    ("changed", "now", "is_believed"),
    [
        ({}, NOW + 330, True),
        ({}, NOW + 330.5, False),
        ({}, NOW - 30, True),
        ({}, NOW - 30.5, False),
        ({"exp": NOW + 930}, NOW, True),
        ({"exp": NOW + 930.5}, NOW, False),
    ],
)
def test_the_leeway_is_30_seconds_unless_another_is_given(
    changed: dict[str, Any], now: float, is_believed: bool
) -> None:
    for check in (verify, verify_token):
        body = {"body": BODY} if check is verify else {}
        signed: dict[str, Any] = {"signature": token(**changed), "url": URL, "keys": KEYS}
        if is_believed:
            check(**signed, **body, now=now)
        else:
            with pytest.raises(SignatureError):
                check(**signed, **body, now=now)


def test_a_key_as_short_as_it_may_be_signs_and_a_shorter_one_does_not() -> None:
    assert sign(BODY, url=URL, key="k" * 16, now=NOW).count(".") == 2
    with pytest.raises(SignatureError) as caught:
        sign(BODY, url=URL, key="k" * 15, now=NOW)
    assert (caught.value.reason, str(caught.value)) == (
        "key",
        "a signing key has 16 characters or more",
    )


def test_the_token_is_as_short_as_json_can_be() -> None:
    """It is sent with every delivery, as a header."""
    assert all("=" not in sign(BODY, url=URL + "x" * n, key=CURRENT, now=NOW) for n in range(3))
    payload = sign(BODY, url=URL, key=CURRENT, now=NOW).split(".")[1]
    claims = base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
    assert b" " not in claims
    assert json.loads(claims)["jti"].removeprefix("jwt_").isalnum()


def test_a_jti_is_32_digits_long() -> None:
    """128 bits: never the same twice, and never longer, however often it is drawn."""
    lengths = set()
    for _ in range(64):
        signature = sign(BODY, url=URL, key=NEXT, now=NOW)
        jti = jwt.decode(signature, options={"verify_signature": False})["jti"]
        lengths.add(len(jti))
    assert lengths == {len("jwt_") + 32}


# --- what differs between two URLs ---


def test_a_trailing_slash_is_told_beside_the_other_differences() -> None:
    assert url_differences("http://a.test/b?c=1", "https://a.test/b/?c=2") == [
        Difference("scheme", "http", "https"),
        Difference("trailing slash", "one without it", "one with it"),
        Difference("query", "c=1", "c=2"),
    ]


def test_two_spellings_of_one_url_are_both_shown_without_credentials() -> None:
    one, other = "https://a:1@x.test/é", "https://b:22@x.test/é"
    shown = "https://…@x.test/é"
    assert url_differences(one, other) == [Difference("spelling", shown, shown)]


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/" + "x" * 199, "/" + "x" * 199),
        ("/" + "x" * 200, "/" + "x" * 199 + "…"),
        ("/a\nb", "'/a\\nb'"),
        ("/a\u202eb", "'/a\\u202eb'"),
    ],
)
def test_a_part_is_shown_in_one_line_of_bounded_length(path: str, shown: str) -> None:
    assert difference(f"https://a.test{path}", ["https://a.test/"]) == (
        f"path: signed for {shown}, published /"
    )


def test_the_log_shows_where_a_password_was() -> None:
    url = "https://me:secret@x.test/"
    _, detail = refusal(token(sub=url), url="https://x.test/b/")
    assert detail == (
        "path: signed for /, published /b/ "
        "(signed for 'https://…@x.test/', but what we published is ['https://x.test/b/'])"
    )
