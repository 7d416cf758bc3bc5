"""A site whose clock is moved while it runs, by libfaketime, and what its callback view answers.

Started by ``test_clock_edges``, with libfaketime loaded. Reads one JSON line a case from its input,
``{"clock": …, "leeway": …, "age": …}``, and prints for each the status and how many receipts
there are. ``clock``: a moment (unix seconds), at which the clock then stands still, or how far it
is off (``+25s``). ``age``: how many seconds before now, by the true clock, the callback was
signed; without it it was signed at ``SIGNED_AT``.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

SIGNED_AT = datetime(2026, 3, 1, 12, tzinfo=UTC)


def turn(clock: int | str) -> None:
    if isinstance(clock, int):
        # In the process's own time zone, which Django has set to the site's.
        clock = f"{datetime.fromtimestamp(clock):%Y-%m-%d %H:%M:%S}"
    Path(os.environ["FAKETIME_TIMESTAMP_FILE"]).write_text(f"{clock}\n")


def post(number: int, uuid: UUID, case: dict[str, Any]) -> dict[str, Any]:
    from django.conf import settings
    from django.test import Client, override_settings
    from django.utils import timezone

    from django_qstash_llm.models import CallbackResponse
    from django_qstash_llm.qstash import Callback, sign

    turn("+0")
    now = timezone.now().timestamp() - case["age"] if "age" in case else SIGNED_AT.timestamp()
    url = f"http://testserver/llm/callback/{uuid}/"
    body = Callback(status=503, retried=number, max_retries=99, source_message_id="msg").to_json()
    signature = sign(body, url=url, key=settings.QSTASH_CURRENT_SIGNING_KEY, now=now)
    turn(case["clock"])
    with override_settings(QSTASH_LLM=settings.QSTASH_LLM | {"SIGNATURE_LEEWAY": case["leeway"]}):
        response = Client().generic("POST", url, body, headers={"Upstash-Signature": signature})
    turn("+0")
    return {"status": response.status_code, "receipts": CallbackResponse.objects.count()}


def main(uuid: UUID) -> None:
    import django

    django.setup()
    for number, line in enumerate(sys.stdin):
        print(json.dumps(post(number, uuid, json.loads(line))), flush=True)


if __name__ == "__main__":
    main(UUID(sys.argv[1]))
