"""``Upstash-Signature``: a JWT that says who sent which bytes to which URL, and when."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import random
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any, NamedTuple

import jwt

from .exceptions import SignatureError

HEADER = "Upstash-Signature"
ISSUER = "Upstash"
LIFETIME = 300
"""Seconds a signature is good for."""
LONGEST_LIFETIME = 900
"""Seconds. We refuse a signature that claims to be good for longer than any QStash makes."""
SHORTEST_KEY = 16
"""Characters. PyJWT before 2.13 took ``""`` as a key, and ``str(None)`` is one everywhere."""
_LONGEST_TOKEN = 16_384
_LARGEST_TIME = 2**53
_JWS = jwt.PyJWS(algorithms=["HS256"])


@dataclass(frozen=True, slots=True)
class Claims:
    """What a believed signature says. The body is still to be checked with ``check_body``."""

    subject: str
    body_hash: str
    issued_at: float
    expires_at: float
    jti: str
    key_index: int
    """Which of the keys verified it: 0 is the current one, 1 the next."""

    def check_body(self, body: bytes) -> None:
        """Raise ``SignatureError`` unless these are the very bytes that were signed."""
        claimed = self.body_hash.rstrip("=").encode("utf-8", "replace")
        if not hmac.compare_digest(claimed, hash_body(body).rstrip("=").encode()):
            raise SignatureError("body", "the body is not the one that was signed")


def hash_body(body: bytes) -> str:
    """The ``body`` claim: URL-safe base64 of SHA-256, padded as QStash sends it."""
    return base64.urlsafe_b64encode(hashlib.sha256(body).digest()).decode()


def is_usable_key(key: object) -> bool:
    """Whether a signing key can be trusted to be one."""
    return isinstance(key, str) and len(key) >= SHORTEST_KEY


def sign(body: bytes, *, url: str, key: str, now: float) -> str:
    """The ``Upstash-Signature`` for delivering ``body`` to ``url`` at ``now`` (unix seconds)."""
    claims = {
        "iss": ISSUER,
        "sub": url,
        "exp": int(now) + LIFETIME,
        "nbf": 0,  # QStash's own since September 2024
        "iat": int(now),
        # Unique, not secret; and no system call, of which a delivery makes few.
        "jti": f"jwt_{random.getrandbits(128):032x}",
        "body": hash_body(body),
    }
    if not is_usable_key(key):
        raise SignatureError("key", f"a signing key has {SHORTEST_KEY} characters or more")
    payload = _base64url(json.dumps(claims, separators=(",", ":")).encode())
    signed = f"{_HS256}.{payload}".encode()
    # The whole of JWS for one algorithm; PyJWT, which reads it, takes three times as long.
    return f"{_HS256}.{payload}.{_base64url(hmac.digest(key.encode(), signed, 'sha256'))}"


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


_HS256 = _base64url(b'{"alg":"HS256","typ":"JWT"}')


def verify(
    signature: str,
    body: bytes,
    *,
    url: str | Collection[str],
    keys: Sequence[str],
    now: float,
    leeway: float = 30.0,
) -> Claims:
    """Believe or refuse a delivery: ``verify_token``, then the body's hash."""
    claims = verify_token(signature, url=url, keys=keys, now=now, leeway=leeway)
    claims.check_body(body)
    return claims


def verify_token(
    signature: str,
    *,
    url: str | Collection[str],
    keys: Sequence[str],
    now: float,
    leeway: float = 30.0,
) -> Claims:
    """Check everything but the body, so that a forged request's body is never read.

    ``url``: the URL, or the equivalent URLs, that we published; never the one we were reached at.
    ``keys``: the current signing key, then the next. ``leeway``: seconds of clock difference
    allowed in both directions. Raises ``SignatureError``; its ``reason`` is for logs.
    """
    payload, key_index = _verified_payload(signature, keys)
    claims = _read_claims(payload)
    if claims["iss"] != ISSUER:
        raise SignatureError("issuer", "the issuer is not Upstash")
    urls = {url} if isinstance(url, str) else set(url)
    if claims["sub"] not in urls:
        raise SignatureError("subject", _wrong_subject(claims["sub"], urls))
    issued_at, expires_at = claims.get("iat", claims["nbf"]), claims["exp"]
    if now > expires_at + leeway:
        raise SignatureError("expired", f"expired {now - expires_at:.0f} s ago")
    if expires_at > now + LONGEST_LIFETIME + leeway:
        raise SignatureError("claims", "claims to be valid for longer than 15 minutes")
    if max(claims["nbf"], issued_at) > now + leeway:
        wait = max(claims["nbf"], issued_at) - now
        detail = f"not valid yet, for another {wait:.0f} s: is this machine's clock slow?"
        raise SignatureError("early", detail)
    return Claims(claims["sub"], claims["body"], issued_at, expires_at, claims["jti"], key_index)


def _verified_payload(signature: str, keys: Sequence[str]) -> tuple[bytes, int]:
    if not signature:
        raise SignatureError("missing", f"no {HEADER} header")
    if len(signature) > _LONGEST_TOKEN:
        raise SignatureError("malformed", "the signature is too long")
    # Indexes stay those of the caller's list: "verified by the next key" is worth knowing.
    usable = [(index, key) for index, key in enumerate(keys) if is_usable_key(key)]
    if not usable:
        raise SignatureError("no_key", "no usable signing key is configured")
    for index, key in usable:
        try:
            payload = _signed_as_qstash_does(signature, key)
            if payload is None:
                payload = _JWS.decode(signature, key, algorithms=["HS256"])
            return payload, index
        except jwt.InvalidSignatureError:
            continue
        # Foreign bytes: besides its own errors PyJWT lets json's and base64's through.
        except (jwt.PyJWTError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise SignatureError("malformed", f"not a signature: {error}") from error
    raise SignatureError("key", "signed with none of our keys")


# What QStash sends, to the letter: the one header, and base64url without padding.
_AS_QSTASH_DOES = re.compile(rf"({_HS256}\.([\w-]+))\.([\w-]{{43}})", re.ASCII)


def _signed_as_qstash_does(signature: str, key: str) -> bytes | None:
    """The payload of a token that is spelled as QStash spells it and signed with ``key``, in a third
    of PyJWT's time. Anything else is None, which says nothing: PyJWT has the last word on it."""
    token, prepared = _AS_QSTASH_DOES.fullmatch(signature), _prepared(key)
    if token is None or prepared is None:
        return None
    signed, payload, claimed = token.groups()
    digest = hmac.digest(prepared, signed.encode(), "sha256")
    if not hmac.compare_digest(_base64url(digest), claimed):
        return None
    with suppress(binascii.Error):
        decoded = base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
        return decoded if _base64url(decoded) == payload else None
    return None


@lru_cache(maxsize=8)
def _prepared(key: str) -> bytes | None:
    """``key`` where PyJWT takes it for a secret, and warns of nothing."""
    algorithm = _JWS.get_algorithm_by_name("HS256")
    try:
        secret: bytes = algorithm.prepare_key(key)
    except (jwt.PyJWTError, ValueError):
        return None
    return secret if len(secret) >= hashlib.sha256().digest_size else None


_CLAIM_TYPES: dict[str, type | tuple[type, ...]] = {
    "iss": str,
    "sub": str,
    "body": str,
    "exp": (int, float),
    "nbf": (int, float),
}
_OPTIONAL_CLAIM_TYPES: dict[str, type | tuple[type, ...]] = {"iat": (int, float), "jti": str}


def _read_claims(payload: bytes) -> dict[str, Any]:
    try:
        text = payload.decode(json.detect_encoding(payload), "surrogatepass")  # as ``loads`` does
        pairs = _CLAIMS.decode(text)
    except (ValueError, RecursionError) as error:
        raise SignatureError("claims", "the claims are not JSON") from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise SignatureError("claims", "the claims are not an object")
    claims = dict(pairs)
    if len(claims) != len(pairs):
        raise SignatureError("claims", "a claim is there twice")
    present = {name: kind for name, kind in _OPTIONAL_CLAIM_TYPES.items() if name in claims}
    for name, kind in (_CLAIM_TYPES | present).items():
        value = claims.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise SignatureError("claims", f"the claim {name} is missing or of the wrong type")
        # A whole number of JSON may be too large to be added to a float.
        if isinstance(value, int | float) and not abs(value) < _LARGEST_TIME:
            raise SignatureError("claims", f"the claim {name} is no moment in time")
    if claims.get("aud"):
        raise SignatureError("claims", "meant for another audience")
    return {"jti": "", **claims}


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


# Made once: ``loads`` makes one each time.
_CLAIMS = json.JSONDecoder(object_pairs_hook=list, parse_constant=_refuse_constant)


# --- what differs between two URLs ---------------------------------------------------------------

# Never refuses, unlike urlsplit: what was signed may be any text.
_PARTS = re.compile(
    r"(?:(?P<scheme>[^:/?#]*):)?"
    r"(?://(?:[^/?#]*@)?(?P<host>\[[^\]/?#]*\]|[^:/?#]*)(?::(?P<port>[^/?#]*))?)?"
    r"(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?(?P<fragment>#.*)?",
    re.DOTALL,
)
_CREDENTIALS = re.compile(r"//[^/?#]*@")
_LONGEST_SHOWN = 200


class Difference(NamedTuple):
    """A part in which two URLs differ, with what each of them has there."""

    part: str
    """``scheme``, ``host``, ``port``, ``path``, ``trailing slash``, ``query``, ``fragment`` or,
    where it is none of these, ``spelling``."""
    one: str
    other: str


def url_differences(one: str, other: str) -> list[Difference]:
    """In which parts ``one`` differs from ``other``. Names and passwords in them are not told."""
    if one == other:
        return []
    parts, others = _PARTS.fullmatch(one), _PARTS.fullmatch(other)
    assert parts is not None  # any text has a path
    assert others is not None
    found = [
        Difference(name, _shown(part), _shown(others[name]))
        for name, part in parts.groupdict().items()
        if part != others[name]
    ]
    path, other_path = parts["path"], others["path"]
    if path != other_path and path.removesuffix("/") == other_path.removesuffix("/"):
        slash = Difference("trailing slash", _with(path), _with(other_path))
        found = [slash if each.part == "path" else each for each in found]
    return found or [Difference("spelling", _shown(one), _shown(other))]


def difference(signed_for: str, published: Collection[str]) -> str:
    """In which parts the URL that was signed differs from the nearest of those we published:
    ``scheme: signed for http, published https``. For logs; empty when it is one of them."""
    if signed_for in published:
        return ""
    if not published:
        return "nothing was published: no base URL is set"

    def distance(url: str) -> tuple[int, float]:
        likeness = SequenceMatcher(None, signed_for[:1000], url).ratio()
        return len(url_differences(signed_for, url)), -likeness

    nearest = min(sorted(published), key=distance)
    return "; ".join(
        f"{part}: signed for {one}, published {other}"
        for part, one, other in url_differences(signed_for, nearest)
    )


def _wrong_subject(subject: str, urls: Collection[str]) -> str:
    signed_for = _without_credentials(subject)
    published = sorted(map(_without_credentials, urls))
    return (
        f"{difference(subject, urls)} "
        f"(signed for {signed_for!r}, but what we published is {published!r})"
    )


def _with(path: str) -> str:
    return "one with it" if path.endswith("/") else "one without it"


def _without_credentials(url: str) -> str:
    return _CREDENTIALS.sub("//…@", url)


def _shown(part: str | None) -> str:
    text = _without_credentials(part or "")
    if len(text) > _LONGEST_SHOWN:
        text = text[:_LONGEST_SHOWN] + "…"
    # Into one line of a log, whatever it holds.
    return (text if text.isprintable() else ascii(text)) or "none"
