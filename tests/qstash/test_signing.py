from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from contextlib import suppress
from typing import Any

import jwt
import pytest
import qstash
import qstash.errors
from hypothesis import given, settings
from hypothesis import strategies as st

from django_qstash_llm.qstash.exceptions import SignatureError
from django_qstash_llm.qstash.signing import (
    Claims,
    difference,
    hash_body,
    is_usable_key,
    sign,
    url_differences,
    verify,
    verify_token,
)

CURRENT = "sig_7kYjw48mhY7kAjqNGcy6cr29RJ6r"
NEXT = "sig_5ZB6DVzB1wjE8S6rZ7eenA8Pdnhs"
OTHER = "sig_7GVPjvuwsfqF65iC8fSrs1dfYruM"
KEYS = [CURRENT, NEXT]
URL = "https://example.com/llm/callback/7b6e/?attempt=1"
BODY = b'{"status":200,"sourceMessageId":"msg_1"}'
NOW = 1_750_000_000
LEEWAY = 30

fuzz = settings(max_examples=80, deadline=None, database=None)


def base64url(content: bytes) -> bytes:
    return base64.urlsafe_b64encode(content).rstrip(b"=")


def forge(payload: bytes, *, header: Any = None, key: str = CURRENT) -> str:
    """A token over any payload and header at all, signed by hand, which libraries refuse to do."""
    header = {"alg": "HS256", "typ": "JWT"} if header is None else header
    signed = base64url(json.dumps(header).encode()) + b"." + base64url(payload)
    mac = hmac.new(key.encode(), signed, hashlib.sha256).digest()
    return (signed + b"." + base64url(mac)).decode()


def documented(**changed: Any) -> dict[str, Any]:
    """The claims as QStash documents them; ``None`` leaves one out."""
    claims = {
        "iss": "Upstash",
        "sub": URL,
        "exp": NOW + 300,
        "nbf": NOW,
        "iat": NOW,
        "jti": "jwt_67kxXD6UBAk7DqU6hzuHMDdXFXfP",
        "body": hash_body(BODY),
    } | changed
    return {name: value for name, value in claims.items() if value is not None}


def token(**changed: Any) -> str:
    return forge(json.dumps(documented(**changed)).encode())


def reason(signature: Any, body: bytes = BODY, **changed: Any) -> str:
    """Why it is refused; ``believed`` when it is not."""
    try:
        verify(signature, body, **{"url": URL, "keys": KEYS, "now": NOW} | changed)
    except SignatureError as error:
        return error.reason
    return "believed"


# --- what QStash sends ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"nbf": 0},
        {"body": hash_body(BODY).rstrip("=")},
        {"aud": ""},
        {"jti": None},
        {"exp": NOW + 299.5, "nbf": NOW - 0.5, "iat": NOW - 0.5},
        {"something": {"new": [1, {"a": 1, "b": 2}]}},
    ],
    ids=repr,
)
def test_a_token_as_documented_is_believed(changed: dict[str, Any]) -> None:
    claims = documented(**changed)
    signature = jwt.encode(claims, CURRENT, algorithm="HS256")
    assert verify(signature, BODY, url=URL, keys=KEYS, now=NOW) == Claims(
        subject=URL,
        body_hash=claims["body"],
        issued_at=claims["iat"],
        expires_at=claims["exp"],
        jti=claims.get("jti", ""),
        key_index=0,
    )


def test_the_empty_body_has_the_documented_hash() -> None:
    assert hash_body(b"") == "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU="
    assert reason(token(body=hash_body(b"")), b"") == "believed"


def test_a_missing_issue_time_is_taken_from_not_before() -> None:
    claims = verify(token(iat=None), BODY, url=URL, keys=KEYS, now=NOW)
    assert claims.issued_at == NOW


def test_any_bytes_can_be_signed_and_verified() -> None:
    body = bytes(range(256))
    assert reason(sign(body, url=URL, key=CURRENT, now=NOW), body) == "believed"


@given(st.binary(max_size=200), st.text(min_size=1, max_size=50), st.integers(0, 2**40))
@fuzz
def test_what_we_sign_we_believe(body: bytes, path: str, now: int) -> None:
    url = f"https://example.com/{path}"
    signature = sign(body, url=url, key=NEXT, now=now + 0.7)
    claims = verify(signature, body, url=url, keys=KEYS, now=now)
    assert claims == Claims(url, hash_body(body), now, now + 300, claims.jti, 1)


def test_every_signature_is_told_apart_by_its_jti() -> None:
    pair = [sign(BODY, url=URL, key=CURRENT, now=NOW) for _ in range(2)]
    first, second = (verify(each, BODY, url=URL, keys=KEYS, now=NOW).jti for each in pair)
    assert first != second
    assert first.startswith("jwt_")


def test_our_claims_are_qstashs() -> None:
    signature = sign(BODY, url=URL, key=CURRENT, now=NOW + 0.9)
    decoded = jwt.decode_complete(signature, options={"verify_signature": False})
    assert decoded["header"] == {"alg": "HS256", "typ": "JWT"}
    assert decoded["payload"] == documented(nbf=0, jti=decoded["payload"]["jti"])


# --- the referee: the official SDK, which looks at the real clock --------------------------------


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("body", [b"", BODY, "žluťoučký 🐎".encode()])
def test_the_official_receiver_believes_what_we_sign(key: str, body: bytes) -> None:
    signature = sign(body, url=URL, key=key, now=time.time())
    qstash.Receiver(CURRENT, NEXT).verify(signature=signature, body=body.decode(), url=URL)


@pytest.mark.parametrize(
    ("key", "url", "body", "age"),
    [
        (OTHER, URL, BODY, 0),
        (CURRENT, URL + "x", BODY, 0),
        (CURRENT, URL, b"x", 0),
        (CURRENT, URL, BODY, 400),
    ],
)
def test_the_official_receiver_and_we_refuse_the_same(
    key: str, url: str, body: bytes, age: int
) -> None:
    now = time.time()
    signature = sign(BODY, url=URL, key=key, now=now - age)
    with pytest.raises(qstash.errors.SignatureError):
        qstash.Receiver(CURRENT, NEXT).verify(signature=signature, body=body.decode(), url=url)
    assert reason(signature, body, url=url, now=now) in {"key", "subject", "body", "expired"}


# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "keys", "index"),
    [
        (CURRENT, [CURRENT, NEXT], 0),
        (NEXT, [CURRENT, NEXT], 1),
        (NEXT, ["", NEXT], 1),
        (OTHER, [CURRENT, NEXT, OTHER], 2),
        (CURRENT, (CURRENT,), 0),
    ],
)
def test_the_current_key_is_tried_first_and_then_the_next(
    key: str, keys: list[str], index: int
) -> None:
    signature = sign(BODY, url=URL, key=key, now=NOW)
    assert verify(signature, BODY, url=URL, keys=keys, now=NOW).key_index == index


@pytest.mark.parametrize("keys", [[CURRENT, NEXT], [CURRENT], ["", CURRENT]])
def test_another_accounts_key_is_refused(keys: list[str]) -> None:
    assert reason(sign(BODY, url=URL, key=OTHER, now=NOW), keys=keys) == "key"


@pytest.mark.parametrize("key", ["", "None", "sig_", "x" * 15])
def test_a_key_that_is_none_opens_nothing(key: str) -> None:
    """PyJWT before 2.13 believed a token signed with the empty string when the key was empty."""
    forged = forge(json.dumps(documented()).encode(), key=key)
    assert (reason(forged, keys=[key]), reason(forged, keys=[CURRENT, key])) == ("no_key", "key")


@pytest.mark.parametrize("keys", [[], (), [""], ["", ""], [None], ["None", b"x" * 32], CURRENT])
def test_without_a_usable_key_nothing_is_believed(keys: Any) -> None:
    assert reason(token(), keys=keys) == "no_key"


@pytest.mark.parametrize(
    ("key", "is_usable"),
    [
        (CURRENT, True),
        ("x" * 16, True),
        ("x" * 15, False),
        ("", False),
        ("None", False),
        (None, False),
        (b"x" * 32, False),
        (0, False),
    ],
)
def test_a_usable_key_is_a_text_of_some_length(key: object, is_usable: bool) -> None:
    assert is_usable_key(key) is is_usable


# --- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "now", "expected"),
    [
        ({}, NOW + 300, "believed"),
        ({}, NOW + 300 + LEEWAY, "believed"),
        ({}, NOW + 300 + LEEWAY + 0.1, "expired"),
        ({}, NOW - LEEWAY, "believed"),
        ({}, NOW - LEEWAY - 0.1, "early"),
        ({"nbf": 0}, NOW - LEEWAY, "believed"),
        ({"nbf": 0}, NOW - LEEWAY - 0.1, "early"),
        ({"nbf": 0, "iat": None}, NOW - 300, "believed"),
        ({"iat": NOW + LEEWAY}, NOW, "believed"),
        ({"iat": NOW + LEEWAY + 1}, NOW, "early"),
        ({"nbf": NOW + LEEWAY + 1}, NOW, "early"),
        ({"exp": NOW + 900 + LEEWAY}, NOW, "believed"),
        ({"exp": NOW + 900 + LEEWAY + 1}, NOW, "claims"),
        ({"exp": 253_402_300_799}, NOW, "claims"),
        ({"exp": 0}, NOW, "expired"),
        ({"exp": -1}, NOW, "expired"),
    ],
)
def test_a_signature_is_good_for_its_time_and_the_leeway(
    changed: dict[str, Any], now: float, expected: str
) -> None:
    assert reason(token(**changed), now=now, leeway=LEEWAY) == expected


def test_without_leeway_the_clocks_must_agree() -> None:
    waits = [reason(token(), now=now, leeway=0) for now in (NOW - 1, NOW, NOW + 300, NOW + 301)]
    assert waits == ["early", "believed", "believed", "expired"]


# --- the URL we published ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/llm/callback/7b6e/?attempt=2",
        "https://example.com/llm/callback/7b6e/",
        "https://example.com/llm/callback/7b6e/?attempt=1&",
        "https://example.com/llm/callback/7b6e?attempt=1",
        "http://example.com/llm/callback/7b6e/?attempt=1",
        "https://EXAMPLE.com/llm/callback/7b6e/?attempt=1",
        "https://evil.example/llm/callback/7b6e/?attempt=1",
        "",
        [],
        [URL + "x", URL[:-1]],
    ],
)
def test_a_signature_for_another_url_is_refused(url: str | list[str]) -> None:
    assert reason(token(), url=url) == "subject"


def test_any_of_the_urls_we_published_will_do() -> None:
    assert reason(token(), url=["https://example.com/other", URL]) == "believed"


def test_the_refusal_names_both_urls_for_the_log() -> None:
    with pytest.raises(SignatureError) as caught:
        verify(token(), BODY, url="https://internal/", keys=KEYS, now=NOW)
    assert str(caught.value) == (
        "host: signed for example.com, published internal; "
        "path: signed for /llm/callback/7b6e/, published /; "
        "query: signed for attempt=1, published none "
        f"(signed for '{URL}', but what we published is ['https://internal/'])"
    )


@pytest.mark.parametrize(
    ("signed_for", "expected"),
    [
        ("http://example.com/llm/callback/1/", "scheme: signed for http, published https"),
        (
            "https://www.example.com/llm/callback/1",
            "host: signed for www.example.com, published example.com",
        ),
        (
            "https://EXAMPLE.com/llm/callback/1",
            "host: signed for EXAMPLE.com, published example.com",
        ),
        ("https://example.com:8443/llm/callback/1/", "port: signed for 8443, published none"),
        ("https://example.com:443/llm/callback/1/", "port: signed for 443, published none"),
        (
            "https://example.com/app/llm/callback/1/",
            "path: signed for /app/llm/callback/1/, published /llm/callback/1/",
        ),
        (
            "https://example.com/llm/callback/1//",
            "path: signed for /llm/callback/1//, published /llm/callback/1/",
        ),
        (
            "https://example.com/llm/callback/1/?a=1",
            "query: signed for a=1, published none",
        ),
        ("https://example.com/llm/callback/1/#a", "fragment: signed for #a, published none"),
        (
            "http://other.test:81/llm/callback/1/",
            "scheme: signed for http, published https; "
            "host: signed for other.test, published example.com; "
            "port: signed for 81, published none",
        ),
        ("https://example.com/llm/callback/1/", ""),
    ],
)
def test_a_refusal_says_in_which_part_the_urls_differ(signed_for: str, expected: str) -> None:
    published = {"https://example.com/llm/callback/1", "https://example.com/llm/callback/1/"}
    assert difference(signed_for, published) == expected


def test_a_trailing_slash_alone_is_called_so() -> None:
    expected = "trailing slash: signed for one without it, published one with it"
    assert difference("https://a.test/b", ["https://a.test/b/"]) == expected
    expected = "trailing slash: signed for one with it, published one without it"
    assert difference("https://a.test/b/", ["https://a.test/b"]) == expected


def test_the_nearest_of_the_published_urls_is_compared_with() -> None:
    published = ["https://old.test/llm/callback/1/", "http://new.test/app/callback/1/"]
    assert difference("https://new.test/llm/callback/1/", published) == (
        "host: signed for new.test, published old.test"
    )
    assert difference("https://new.test/", []) == "nothing was published: no base URL is set"


def test_the_refusal_tells_no_password_of_a_url() -> None:
    url = "https://name:canary@example.com/llm/"
    with pytest.raises(SignatureError) as caught:
        verify(token(sub=url), BODY, url=url.replace("https", "http"), keys=KEYS, now=NOW)
    assert "canary" not in str(caught.value)
    assert str(caught.value).startswith("scheme: signed for https, published http (")
    other = "https://name:canary2@example.com/llm/"
    assert url_differences(url, other)[0].part == "spelling"
    assert "canary" not in difference(url, [other])


@given(st.text(max_size=60), st.lists(st.text(max_size=60), max_size=3))
@fuzz
def test_any_two_texts_can_be_compared(signed_for: str, published: list[str]) -> None:
    said = difference(signed_for, published)
    assert bool(said) is (signed_for not in published)
    assert "\n" not in said


@pytest.mark.parametrize("url", ["//", "https://[::1", "https://[::1]:x/", "x" * 5000, "\n\udc80"])
def test_a_subject_that_is_no_url_is_refused_as_any_other(url: str) -> None:
    assert reason(token(sub=url)) == "subject"


def test_a_clock_that_is_slow_is_told_by_how_much() -> None:
    with pytest.raises(SignatureError, match="for another 600 s"):
        verify(token(), BODY, url=URL, keys=KEYS, now=NOW - 600)


# --- the body ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", BODY + b" ", BODY + b"\n", BODY.replace(b"200", b"500"), BODY[:-1], b"\xff" + BODY],
)
def test_a_body_changed_by_a_byte_is_refused(body: bytes) -> None:
    assert reason(token(), body) == "body"


@pytest.mark.parametrize(
    "claimed",
    [
        "",
        "=",
        "é",
        "\ud800",
        hash_body(BODY)[:-2],
        hashlib.sha256(BODY).hexdigest(),
        hash_body(BODY) + "A",
    ],
    ids=ascii,
)
def test_a_body_claim_that_is_no_hash_of_the_body_is_refused(claimed: str) -> None:
    assert reason(token(body=claimed)) == "body"


def test_the_token_is_checked_before_the_body_is_there() -> None:
    claims = verify_token(token(), url=URL, keys=KEYS, now=NOW)
    claims.check_body(BODY)
    with pytest.raises(SignatureError, match="not the one that was signed"):
        claims.check_body(b"another")


# --- claims --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"iss": "Up"}, "issuer"),
        ({"iss": "upstash"}, "issuer"),
        ({"iss": "Upstash "}, "issuer"),
        ({"iss": ""}, "issuer"),
        ({"iss": ["Upstash"]}, "claims"),
        ({"iss": None}, "claims"),
        ({"sub": None}, "claims"),
        ({"sub": [URL]}, "claims"),
        ({"exp": None}, "claims"),
        ({"nbf": None}, "claims"),
        ({"body": None}, "claims"),
        ({"body": 1}, "claims"),
        ({"exp": str(NOW + 300)}, "claims"),
        ({"exp": True}, "claims"),
        ({"exp": [NOW + 300]}, "claims"),
        ({"exp": 10**400}, "claims"),
        ({"exp": -(10**400)}, "claims"),
        ({"nbf": "0"}, "claims"),
        ({"nbf": False}, "claims"),
        ({"nbf": 10**400}, "claims"),
        ({"iat": "now"}, "claims"),
        ({"iat": 10**400}, "claims"),
        ({"jti": 1}, "claims"),
        ({"aud": "someone"}, "claims"),
        ({"aud": ["someone"]}, "claims"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_wrong_claim_is_refused_although_the_key_is_right(
    changed: dict[str, Any], expected: str
) -> None:
    assert reason(token(**changed)) == expected


@pytest.mark.parametrize(
    ("found", "put"),
    [
        (b'"exp": 1750000300', b'"exp": 1e400'),
        (b'"exp": 1750000300', b'"exp": NaN'),
        (b'"exp": 1750000300', b'"exp": Infinity'),
        (b'"exp": 1750000300', b'"exp": ' + b"9" * 5000),
        (b'"nbf": 1750000000', b'"nbf": -Infinity'),
        (b'"iss": "Upstash"', b'"iss": "Upstash", "iss": "Upstash"'),
        (b'"exp": 1750000300', b'"exp": 1, "exp": 1750000300'),
        (b'"sub"', b'"sub": "https://evil.example/", "sub"'),
        (b'"iss"', b'"\xff"'),
    ],
)
def test_claims_that_only_raw_json_can_hold_are_refused(found: bytes, put: bytes) -> None:
    payload = json.dumps(documented()).encode()
    assert payload.count(found) == 1
    assert reason(forge(payload)) == "believed"
    assert reason(forge(payload.replace(found, put))) == "claims"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"1",
        b'"Upstash"',
        b"[[1]]",
        b'[["iss", "Upstash"]]',
        b"{",
        b"\xff",
        b"[" * 8000,
    ],
    ids=lambda payload: repr(payload)[:30],
)
def test_a_payload_that_is_no_object_of_claims_is_refused(payload: bytes) -> None:
    assert reason(forge(payload)) == "claims"


# --- the token -----------------------------------------------------------------------------------


@pytest.mark.parametrize("signature", ["", None])
def test_a_missing_header_is_said_to_be_missing(signature: Any) -> None:
    assert reason(signature) == "missing"


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "none"},
        {"alg": "None"},
        {"alg": "hs256"},
        {"alg": "HS512"},
        {"alg": "RS256"},
        {"alg": ""},
        {"alg": None},
        {"alg": ["HS256"]},
        {"alg": {}},
        {"typ": "JWT"},
        {"alg": "HS256", "crit": ["exp"], "exp": 1},
        {"alg": "HS256", "crit": []},
        {"alg": "HS256", "crit": ["b64"], "b64": False},
        {"alg": "HS256", "b64": False},
        {"alg": "HS256", "kid": 1},
        [],
        "HS256",
        1,
    ],
    ids=repr,
)
def test_a_token_of_another_kind_is_refused_although_the_key_is_right(header: Any) -> None:
    assert reason(forge(json.dumps(documented()).encode(), header=header)) == "malformed"


@pytest.mark.parametrize(
    "header",
    [
        {"kid": "../../dev/null"},
        {"jku": "https://evil.example"},
        {"jwk": {"k": "AA"}},
        {"typ": "x"},
    ],
    ids=repr,
)
def test_header_fields_that_offer_a_key_are_not_looked_at(header: dict[str, Any]) -> None:
    payload = json.dumps(documented()).encode()
    assert reason(forge(payload, header={"alg": "HS256"} | header)) == "believed"
    assert reason(forge(payload, header={"alg": "HS256"} | header, key=OTHER)) == "key"


def test_alg_none_without_a_signature_is_refused() -> None:
    header, payload, _ = forge(json.dumps(documented()).encode(), header={"alg": "none"}).split(".")
    assert [reason(f"{header}.{payload}."), reason(f"{header}.{payload}")] == ["malformed"] * 2


def test_a_signature_is_not_carried_over_to_other_claims() -> None:
    header, _, mac = token().split(".")
    payload = base64url(json.dumps(documented(sub="https://evil.example/")).encode()).decode()
    assert reason(f"{header}.{payload}.{mac}", url="https://evil.example/") == "key"


@pytest.mark.parametrize(
    "signature",
    [
        "x",
        "..",
        "a.b.c",
        "not a token",
        "\u00e9.\u00e9.\u00e9",
        "\ud800.a.b",
        "Bearer " + token(),
        token() + ".",
        token() + "\n",
        " " + token(),
        token().replace(".", ".!", 1),
        "e30.e30.",
        "A" * 20_000,
        token() + "A" * 20_000,
        b"\xff.\xff.\xff",
    ],
    ids=lambda signature: ascii(signature)[:30],
)
def test_what_is_no_token_is_refused_as_malformed(signature: Any) -> None:
    assert reason(signature) == "malformed"


def test_the_refusal_of_a_long_token_does_not_repeat_it() -> None:
    with pytest.raises(SignatureError) as caught:
        verify_token("A" * 20_000, url=URL, keys=KEYS, now=NOW)
    assert str(caught.value) == "the signature is too long"


# --- anything at all -----------------------------------------------------------------------------

segments = st.text("ABCxyz019-_=.", max_size=40)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(st.characters(), max_size=10)
    | st.sampled_from(["Upstash", URL, hash_body(BODY), NOW, NOW + 300]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
claim_names = st.sampled_from(["iss", "sub", "exp", "nbf", "iat", "jti", "body", "aud"]) | st.text(
    max_size=3
)


@given(st.text(max_size=80) | st.lists(segments, min_size=2, max_size=4).map(".".join))
@fuzz
def test_no_header_value_is_believed_or_makes_the_verifier_fail(signature: str) -> None:
    assert reason(signature) in {"missing", "malformed", "key"}


@given(st.dictionaries(claim_names, values))
@fuzz
def test_no_claims_make_the_verifier_fail_even_when_signed(claims: dict[str, Any]) -> None:
    with suppress(SignatureError):
        verify(token(**claims), BODY, url=URL, keys=KEYS, now=NOW)


@given(st.dictionaries(st.sampled_from(["alg", "typ", "kid", "crit", "b64", "x5u"]), values))
@fuzz
def test_no_jose_header_makes_the_verifier_fail_even_when_signed(header: dict[str, Any]) -> None:
    forged = forge(json.dumps(documented()).encode(), header=header)
    assert reason(forged) in {"malformed", "believed"}


@given(st.binary(max_size=60))
@fuzz
def test_no_payload_makes_the_verifier_fail_even_when_signed(payload: bytes) -> None:
    assert reason(forge(payload)) == "claims"


# --- the short way and the long way --------------------------------------------------------------

# In a payload and in a MAC: letters of the alphabet, others, padding, and one part more or less.
spots = st.integers(0, 400)
edits = st.lists(
    st.tuples(spots, st.integers(0, 2), st.sampled_from("AQgw-_=+/.! \u00e9")), max_size=2
)
signing_keys = st.sampled_from(
    [
        CURRENT,
        "x" * 32,
        "\u00e9" * 20,
        "-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----",
        "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABAQ",
    ]
)


def edited(text: str, changes: list[tuple[int, int, str]]) -> str:
    for spot, removed, put in changes:
        spot %= len(text)
        text = text[:spot] + put + text[spot + removed :]
    return text


@given(edits, st.booleans(), signing_keys)
@settings(fuzz, max_examples=400)
def test_what_we_believe_pyjwt_believes_and_the_other_way_round(
    changes: list[tuple[int, int, str]], is_signed_again: bool, key: str
) -> None:
    header, payload, mac = sign(BODY, url=URL, key=key, now=NOW).split(".")
    signed = edited(f"{header}.{payload}", changes)
    if is_signed_again:
        mac = base64url(hmac.digest(key.encode(), signed.encode(), "sha256")).decode()
        token = f"{signed}.{mac}"
    else:
        token = edited(f"{header}.{payload}.{mac}", changes)
    try:
        told = jwt.PyJWS(algorithms=["HS256"]).decode(token, key, algorithms=["HS256"])
    except (jwt.PyJWTError, ValueError):
        assert reason(token, keys=[key]) in {"malformed", "key"}
    else:
        assert reason(token, keys=[key]) not in {"malformed", "key"}
        if told == base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)):
            assert reason(token, keys=[key]) == "believed"
