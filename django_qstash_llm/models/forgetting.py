"""Forgetting: what is kept of a finished request's texts.

Until it is finished its messages have to be there, for the outbox sends them. What becomes of them
then is the setting ``STORE_MESSAGES``:

``full``
    They stay, until ``llm_purge`` forgets what is older than ``RETENTION_DAYS``.
``hashed``
    Messages and parameters go. The SHA-256 of the messages stays in ``digest``, by which one who
    knows a prompt finds the request: see ``asked``. A short prompt can be found by guessing.
``none``
    Messages and parameters go.

The completion, usage, cost, states and times stay in all three. A request of a conversation keeps
its texts as long as its conversation is there: the next question repeats them. The provider's words
(completion, error, receipts) go by age, see ``purge``.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ..cleaning import clean_json
from ..conf import app_settings

if TYPE_CHECKING:
    from .request import LLMRequest, LLMRequestQuerySet

FULL, HASHED = "full", "hashed"


def kept() -> str:
    """The value of ``STORE_MESSAGES``. Raises ``ConfigurationError`` where it is none of the three."""
    conf = app_settings()
    conf.check_storing()
    return conf.store_messages


def digest_of(messages: Any) -> str:
    """SHA-256, in hex, of the messages as canonical JSON in UTF-8.

    Canonical: as they are stored (see ``cleaning``), keys sorted, no spaces, characters as they are
    and not escaped, whole numbers without a fraction. For messages of texts that is::

        json.dumps(messages, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    """
    canonical = json.dumps(
        clean_json(_whole(messages)), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


def _whole(value: Any) -> Any:
    """``value`` with 1 for 1.0: PostgreSQL does not give every number back as it was written."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(each) for each in value]
    return value


def asked(rows: LLMRequestQuerySet, messages: Any) -> LLMRequestQuerySet:
    """Those of ``rows`` whose forgotten messages were these, where ``STORE_MESSAGES`` was ``hashed``."""
    return rows.filter(digest=digest_of(messages))


def changes_when_finished(messages: Any, now: datetime) -> dict[str, Any]:
    """What finishing a request changes besides, so that its texts are not kept; {} keeps them.

    ``messages`` are the row's own. Where there are none they have been forgotten before, and stay
    as they are: a request that failed may still be completed. Not for requests of a conversation, see
    ``changes_at_end``. Raises ``ConfigurationError`` on a ``STORE_MESSAGES`` that is none.
    """
    how = kept()
    if how == FULL or not messages:
        return {}
    return {
        "messages": [],
        "parameters": {},
        "digest": digest_of(messages) if how == HASHED else "",
        "forgotten_at": now,
    }


def changes_at_end(llm_request: LLMRequest, now: datetime) -> dict[str, Any]:
    """The same for this row. Its messages are read only where they have to be known."""
    if kept() == FULL or llm_request.conversation_id is not None:
        return {}
    return changes_when_finished(llm_request.messages, now)
