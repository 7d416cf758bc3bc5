"""What a publish asks for, read off the raw request target.

The destination stands in the path as it is, ``//`` and query and all:
``/qstash/v2/publish/https://host/p?x=1``. Django's ``path_info`` is decoded, and what was
``%2F`` is a slash in it; so the raw target is used wherever the server in front tells it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote, unquote, unquote_plus, urlsplit

from django.http import HttpRequest

from ..qstash.options import read_bool

# Not the percent sign: in a decoded path it stands for itself. The backslash stays, to be refused.
_SAFE = "/:@!$&'()*+,;=~[]\\"
# Never handed on under Upstash-Header-Forward: ours, or about this very connection.
_NOT_FORWARDED = {
    "accept-encoding",
    "authorization",
    "connection",
    "content-length",
    "content-type",
    "cookie",
    "expect",
    "forwarded",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "x-real-ip",
}


class Target(NamedTuple):
    rest: str
    """The path after ``/v2/publish/`` or ``/v2/enqueue/``, still as it was sent."""
    query: str
    """The raw query."""

    @property
    def destination(self) -> str:
        """The URL, with its own query: what is left of ours without our parameters. A name has
        none."""
        # Proxies that merge slashes make https:/host of it.
        path = re.sub(r"^(https?):/(?!/)", r"\1://", self.rest, flags=re.IGNORECASE)
        if not path.lower().startswith(("http://", "https://")):
            return path
        kept = [pair for pair in self.query.split("&") if pair and not _is_ours(pair)]
        return f"{path}?{'&'.join(kept)}" if kept else path

    @property
    def options(self) -> dict[str, str]:
        """``?upstash-retries=3`` says what the header of that name would."""
        pairs = (pair.partition("=") for pair in self.query.split("&"))
        options = {unquote_plus(name).lower(): unquote_plus(value) for name, _, value in pairs}
        return {name: value for name, value in options.items() if name.startswith("upstash-")}


def _is_ours(pair: str) -> bool:
    name = unquote_plus(pair.partition("=")[0]).lower()
    return name == "qstash_token" or name.startswith("upstash-")


def target_of(request: HttpRequest, marker: str) -> Target:
    """``marker`` is where the destination begins: ``/v2/publish/``."""
    query = request.META.get("QUERY_STRING", "")
    raw = _raw_path(request)
    if marker in raw:
        return Target(_ascii(raw.partition(marker)[2]), query)
    return Target(quote(request.path.partition(marker)[2], safe=_SAFE), query)


def _raw_path(request: HttpRequest) -> str:
    """The path before decoding, or ``""`` when the server in front does not tell."""
    scope = getattr(request, "scope", None)
    if scope is not None:
        return (scope.get("raw_path") or b"").decode("latin-1").partition("?")[0]
    # gunicorn's name, then uwsgi's and mod_wsgi's.
    raw = request.META.get("RAW_URI") or request.META.get("REQUEST_URI") or ""
    if raw[:4].lower() == "http":
        raw = urlsplit(raw).path
    raw = raw.partition("?")[0]
    # A middleware or server that rewrote the path knows better than the request line.
    return raw if unquote(raw, errors="replace").endswith(request.path_info) else ""


def _ascii(text: str) -> str:
    """Bytes that should have been sent percent-encoded are, now."""
    return re.sub(r"[^\x00-\x7f]", lambda match: quote(match[0].encode("latin-1", "replace")), text)


def headers_of(
    request: HttpRequest, target: Target, defaults: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The publish's headers in lower case, with what the query says where no header does, and
    ``defaults`` where neither does."""
    sent = {name.lower(): value for name, value in request.headers.items()}
    if not sent.get("content-type"):
        sent.pop("content-type", None)
    headers = {**(defaults or {}), **target.options, **sent}
    asked = headers.get("upstash-header-forward", "").strip()
    if asked and read_bool(asked, "Upstash-Header-Forward"):
        headers = _forwarding_all(sent) | headers
    return headers


def _forwarding_all(sent: Mapping[str, str]) -> dict[str, str]:
    return {
        f"upstash-forward-{name}": value
        for name, value in sent.items()
        if name not in _NOT_FORWARDED and not name.startswith(("upstash-", "x-forwarded-"))
    }
