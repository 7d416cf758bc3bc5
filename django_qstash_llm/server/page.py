"""The page at the development server's root: what goes on, for whoever sits at this machine.

No login guards it, so it is served only to this machine, by this machine's own names: another
site's page cannot reach it by a name of its own that it points here.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from django.db import DatabaseError, InterfaceError
from django.http import HttpRequest, HttpResponse, HttpResponseForbidden
from django.template import Context, Engine
from django.utils import timezone, translation
from django.utils.cache import get_conditional_response
from django.views.decorators.http import require_safe

from .overview import overview

_HERE = Path(__file__).parent
_FILES = {"page.js": "text/javascript", "page.css": "text/css"}
QUIET_PATHS = frozenset({"/", "/page/fragment", *(f"/page/{name}" for name in _FILES)})
"""Asked for every other second by a page that is open: no line of the log for each."""
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache, private",
}
_FORWARDED = ("HTTP_FORWARDED", "HTTP_X_FORWARDED_FOR", "HTTP_X_FORWARDED_HOST", "HTTP_VIA")

View = Callable[..., HttpResponse]


def for_this_machine(view: View) -> View:
    @wraps(view)
    def guarded(request: HttpRequest, **kwargs: Any) -> HttpResponse:
        problem = _stranger(request)
        response = (
            HttpResponseForbidden(f"{problem}\n", content_type="text/plain; charset=utf-8")
            if problem
            else view(request, **kwargs)
        )
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return guarded


def _stranger(request: HttpRequest) -> str:
    """Why the page is not for whoever asks; empty when it is."""
    if not _is_loopback(request.META.get("REMOTE_ADDR", "")):
        return "This page is only for the machine on which the server runs."
    if any(name in request.META for name in _FORWARDED):
        return "This page is not for those who come through a proxy or a tunnel."
    # Not get_host(): ALLOWED_HOSTS is the site's, and may be "*".
    if not _is_own_name(request.META.get("HTTP_HOST", "")):
        return "Ask for this page by localhost or 127.0.0.1: by another name it is not served."
    return ""


def _is_own_name(host: str) -> bool:
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    return name == "localhost" or name.endswith(".localhost") or _is_loopback(name)


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
        return found.ipv4_mapped.is_loopback
    return found.is_loopback


@for_this_machine
@require_safe
def page(request: HttpRequest) -> HttpResponse:
    return _answer(request, "page.html")


@for_this_machine
@require_safe
def fragment(request: HttpRequest) -> HttpResponse:
    """What of the page changes. 304 as long as it does not."""
    return _answer(request, "fragment.html")


@for_this_machine
@require_safe
def file(request: HttpRequest, name: str) -> HttpResponse:
    # By this server itself: it has no static files of the site's.
    content = (_HERE / "static" / "qstash_server" / name).read_bytes()
    return _unless_known(request, HttpResponse(content, content_type=_FILES[name]))


def _answer(request: HttpRequest, template: str) -> HttpResponse:
    now = timezone.now()
    try:
        # Whatever the site's language: only half of this would be in it.
        with translation.override("en"):
            shown = overview(now)
            context = {
                "overview": shown,
                "timezone": timezone.get_current_timezone_name(),
            }
            html = _templates().get_template(template).render(Context(context))
    except (DatabaseError, InterfaceError) as error:
        text = f"The database does not answer ({type(error).__name__}).\n"
        return HttpResponse(text, status=503, content_type="text/plain; charset=utf-8")
    return _unless_known(request, HttpResponse(html))


def _unless_known(request: HttpRequest, response: HttpResponse) -> HttpResponse:
    etag = f'"{hashlib.sha256(response.content).hexdigest()[:32]}"'
    response["ETag"] = etag
    answer: Any = get_conditional_response(request, etag=etag, response=response)
    found: HttpResponse = answer
    return found


@cache
def _templates() -> Engine:
    """Our own: a site may have another engine, or none."""
    return Engine(dirs=[str(_HERE / "templates" / "qstash_server")])
