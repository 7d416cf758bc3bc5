"""What this server takes: quotas, and destinations it will knock at."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from ..qstash import InvalidOption, Options
from ..qstash import Message as WireMessage
from ..qstash.message import HOSTED_LLM, check_destination
from . import conf, hosted_models
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
    "upstash-caller-ip",
    "upstash-message-id",
    "upstash-region",
    "upstash-retried",
    "upstash-schedule-id",
    "upstash-signature",
    "upstash-topic-name",
}


def deliverable(message: WireMessage) -> WireMessage:
    """The message without the forwarded headers that must not be forwarded."""
    options = _deliverable(message.options)
    return message if options is message.options else replace(message, options=options)


def _deliverable(options: Options) -> Options:
    headers = {
        name: value for name, value in options.headers.items() if name.lower() not in _UNDELIVERABLE
    }
    callback = options.callback and _deliverable(options.callback)
    failure_callback = options.failure_callback and _deliverable(options.failure_callback)
    if (
        len(headers) == len(options.headers)
        and callback is options.callback
        and failure_callback is options.failure_callback
    ):
        return options
    return replace(options, headers=headers, callback=callback, failure_callback=failure_callback)


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
    _check_retries(options)
    check_delay(options, now=now)
    for callback in (options.callback, options.failure_callback):
        if callback is not None:
            _check_headers(callback)
            _check_retries(callback)
            check_delay(callback, now=now)
    if message.queue and (options.delay is not None or options.not_before is not None):
        text = "a message in a queue cannot be delayed: its turn decides when it is delivered"
        raise Refusal(400, text)
    if len(message.body) > conf.current().max_body:
        raise Refusal(413, f"body is larger than {conf.current().max_body} bytes")


def _check_destination(message: WireMessage) -> None:
    if message.destination == HOSTED_LLM:
        hosted_models.check(message.body)
        return
    if not message.destination.lower().startswith(("http://", "https://")):
        raise Refusal(404, f"topic {message.destination} not found")
    _check_url(message.destination, "destination")


def check_endpoint(url: str) -> None:
    """Raise ``Refusal`` when a URL group's messages cannot go there."""
    if not url.lower().startswith(("http://", "https://")):
        text = "endpoint has invalid scheme, add http:// or https://"
        raise Refusal(400, f"invalid endpoint url: {text}")
    _check_url(url, "endpoint")


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


def check_delay(options: Options, *, now: datetime) -> None:
    delay = options.delay or 0
    if options.not_before is not None:
        delay = (options.not_before - now).total_seconds()
    if delay > conf.current().max_delay:
        raise Refusal(412, "quota maxDelay exceeded")


def _check_retries(options: Options) -> None:
    most = conf.current().max_retries
    if most is not None and (options.retries or 0) > most:
        raise Refusal(412, "quota maxRetries exceeded")
