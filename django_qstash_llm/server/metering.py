"""Whose limits a message counts against, and what it takes of them.

Together with ``hosted_models`` the only place here that knows what a completion is. A message is
gated when it forwards a credential and its body asks a model: that is what providers count.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings

from ..cleaning import clean_text
from ..qstash import Message as WireMessage
from ..qstash.message import HOSTED_LLM
from . import conf
from .pacing import Caps, Charge

CREDENTIALS = ("authorization", "x-api-key", "api-key", "x-goog-api-key")
_QUESTIONS = ("messages", "input", "prompt", "contents")
_MOST_OUTPUT = (
    "max_completion_tokens",
    "max_tokens",
    "max_output_tokens",
    "maxOutputTokens",
)
BYTES_PER_TOKEN = 4
"""About; no tokenizer is needed to stay below a limit that answers tell exactly."""
LARGEST_CHARGE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Subject:
    """What has limits of its own: at a host, with a credential, a model or a group of them."""

    host: str
    group: str
    credential: str
    """A fingerprint of it, which nothing can be called with."""


@dataclass(frozen=True, slots=True)
class Metered:
    subject: Subject
    charge: Charge


def meter(message: WireMessage) -> Metered | None:
    """Against which limits ``message`` counts; None for one that is no model's to answer."""
    if not conf.current().gates or message.options.method != "POST":
        return None
    headers = {name.lower(): value for name, value in message.options.headers.items()}
    credential = next((headers[name] for name in CREDENTIALS if headers.get(name)), "")
    is_hosted = message.destination == HOSTED_LLM
    if not credential and not is_hosted:
        return None
    asked = _read(message.body)
    if asked is None:
        return None
    host = HOSTED_LLM if is_hosted else _host(message.destination)
    model = asked.get("model")
    # Google's and Azure's name it in the path.
    name = model if isinstance(model, str) and model else urlsplit(message.destination).path
    name = clean_text(name, limit=255)
    subject = Subject(host[:253], group_of(host, name)[:255], _fingerprint(credential))
    return Metered(subject, Charge(_input_tokens(message.body), _output_tokens(asked)))


def _read(body: bytes) -> dict[str, Any] | None:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if isinstance(asked, dict) and any(name in asked for name in _QUESTIONS):
        return asked
    return None


def _host(url: str) -> str:
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2].lower()


def _fingerprint(credential: str) -> str:
    if not credential:
        return ""
    # With the site's own key: of a short credential nobody is to find out by trying.
    salted = f"{settings.SECRET_KEY}\x00{credential}".encode("utf-8", "replace")
    return hashlib.sha256(salted).hexdigest()[:12]


def _input_tokens(body: bytes) -> float:
    return float(min(math.ceil(len(body) / BYTES_PER_TOKEN), LARGEST_CHARGE))


def _output_tokens(asked: Mapping[str, Any]) -> float:
    """What the answer may take at most: providers set it aside before they begin."""
    generation = asked.get("generationConfig")
    places = [asked, generation] if isinstance(generation, dict) else [asked]
    found = [_count(place.get(name)) for place in places for name in _MOST_OUTPUT]
    answers = max(1, _count(asked.get("n")))
    return float(min(max(found) * answers, LARGEST_CHARGE))


def _count(value: Any) -> int:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return min(value, LARGEST_CHARGE) if is_count and value > 0 else 0


LIMITS = frozenset({"RPM", "TPM", "CONCURRENCY", "GROUP"})
"""What ``GATE_LIMITS`` may say of one place."""

# --- what the site says of limits ---------------------------------------------------------------


def group_of(host: str, model: str) -> str:
    """The group that shares its limits with ``model``: by the settings, else the model itself."""
    return str(_said_of(host, model).get("GROUP") or model)


def caps_of(host: str, group: str) -> Caps:
    """What the settings allow at most."""
    said = _said_of(host, group)
    # What the system check refuses holds nobody where nobody ran it.
    return Caps(
        requests_per_minute=said.get("RPM") or None,
        tokens_per_minute=said.get("TPM") or None,
        concurrency=said.get("CONCURRENCY") or None,
    )


def _said_of(host: str, model: str) -> Mapping[str, Any]:
    limits = conf.current().gate_limits
    return {**limits.get(host, {}), **limits.get(f"{host}/{model}", {})}
