"""What this server takes: quotas, and destinations it will knock at."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from ..qstash import InvalidOption, Options
from ..qstash import Message as WireMessage
from ..qstash.message import HOSTED_LLM, check_destination
from . import conf
from .destinations import refuse_literal_address
from .exceptions import AddressRefused, Refusal

MOST_HEADERS = 100
LARGEST_HEADERS = 64 * 1024

# What belongs to one connection, or is the server's own to say. Dropped, not refused: callers
# forward whole header maps.
_UNDELIVERABLE = {
    "connection",
    "content-length",
    "expect",
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
}


def deliverable(headers: Mapping[str, str]) -> dict[str, str]:
    """A message's headers without the forwarded ones that must not be forwarded."""
    return {name: value for name, value in headers.items() if _is_deliverable(name)}


def _is_deliverable(name: str) -> bool:
    _, is_forwarded, forwarded = name.lower().partition("-forward-")
    if not is_forwarded:
        return True
    return forwarded not in _UNDELIVERABLE and not forwarded.startswith("upstash-")


def check(message: WireMessage, *, now: datetime) -> None:
    """Raise ``InvalidOption`` or ``Refusal`` when the message is not taken."""
    _check_destination(message)
    for name, url in (
        ("callback", message.callback),
        ("failure callback", message.failure_callback),
    ):
        if url:
            _check_url(url, name)
    options = message.options
    _check_headers(options)
    _check_quotas(message, now)
    for callback in (options.callback, options.failure_callback):
        if callback is not None:
            _check_headers(callback)
            _check_retries(callback)
    if message.queue and (options.delay is not None or options.not_before is not None):
        text = "a message in a queue cannot be delayed: its turn decides when it is delivered"
        raise Refusal(400, text)
    if len(message.body) > conf.current().max_body:
        raise Refusal(413, f"body is larger than {conf.current().max_body} bytes")


def _check_destination(message: WireMessage) -> None:
    if message.destination == HOSTED_LLM:
        if not conf.current().hosted_models_url:
            raise Refusal(
                400,
                "api/llm is not served here: set HOSTED_MODELS_URL in QSTASH_SERVER, or publish "
                "to a provider's own URL",
            )
        return
    if not message.destination.lower().startswith(("http://", "https://")):
        raise Refusal(404, f"topic {message.destination} not found")
    _check_url(message.destination, "destination")


def _check_url(url: str, name: str) -> None:
    try:
        check_destination(url)
        refuse_literal_address(url)
    except InvalidOption as error:
        raise Refusal(400, f"invalid {name} url: {error.problem}") from error
    except AddressRefused as error:
        raise Refusal(400, f"invalid {name} url: {error}") from error


def _check_headers(options: Options) -> None:
    size = sum(len(name) + len(value) for name, value in options.headers.items())
    if len(options.headers) > MOST_HEADERS or size > LARGEST_HEADERS:
        raise Refusal(400, f"more than {MOST_HEADERS} headers or {LARGEST_HEADERS} bytes of them")


def _check_quotas(message: WireMessage, now: datetime) -> None:
    _check_retries(message.options)
    delay = message.options.delay or 0
    if message.options.not_before is not None:
        delay = (message.options.not_before - now).total_seconds()
    if delay > conf.current().max_delay:
        raise Refusal(412, "quota maxDelay exceeded")


def _check_retries(options: Options) -> None:
    most = conf.current().max_retries
    if most is not None and (options.retries or 0) > most:
        raise Refusal(412, "quota maxRetries exceeded")
