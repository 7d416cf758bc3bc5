"""``api/llm``: the hosted models, which a configured upstream answers for.

The one place of this server that knows what a chat completion is.
"""

from __future__ import annotations

import json
from typing import Any

from . import conf
from .exceptions import Refusal


def check(body: bytes) -> None:
    """Raise ``Refusal`` unless the upstream can be asked this."""
    settings = conf.current()
    if not settings.hosted_models_url:
        raise Refusal(
            400,
            "api/llm is not served here: set HOSTED_MODELS_URL in QSTASH_SERVER, or publish to a "
            "provider's own URL",
        )
    asked = _read(body)
    known = settings.hosted_models
    if known and asked.get("model") not in known:
        raise Refusal(400, f"model {asked.get('model')!r} is not hosted: {', '.join(known)} are")
    if asked.get("stream") is True:
        raise Refusal(400, "api/llm answers by callback, as a whole: leave stream out")


def call(body: bytes) -> tuple[str, dict[str, str], bytes]:
    """What is called in place of ``api/llm``: URL, headers, and the body with the model by its
    upstream's name."""
    settings = conf.current()
    url = f"{settings.hosted_models_url.rstrip('/')}/chat/completions"
    key = settings.hosted_models_key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if settings.hosted_models:
        asked = _read(body)
        asked["model"] = settings.hosted_models.get(asked.get("model", ""), asked.get("model"))
        body = json.dumps(asked, ensure_ascii=False).encode("utf-8", "replace")
    return url, headers, body


def _read(body: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "api/llm takes a chat completion's JSON: the body is none") from error
    if not isinstance(asked, dict) or not isinstance(asked.get("model"), str):
        raise Refusal(400, "api/llm takes a chat completion's JSON: the body names no model")
    return asked
