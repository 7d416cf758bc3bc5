"""What can go wrong on QStash's wire.

::

    QStashError
    ├── InvalidOption (ValueError)     an option that cannot be sent or cannot be read; .field
    ├── EnvelopeError (ValueError)     a callback's JSON that cannot be read
    ├── SignatureError                 a signature that must not be believed; .reason
    ├── TransportError                 no answer came back; .is_ambiguous
    │   └── UnreadableAnswer           one came, and cannot be read
    └── ResponseError                  QStash said no; .status .body .is_ambiguous
        ├── AuthenticationError        401, 403
        ├── NotFound                   404
        ├── QuotaExceeded              412: the plan's ceiling
        └── RateLimited                429; .limit .remaining .reset
            ├── ChatLimitExceeded      the withdrawn Chat API's limits
            ├── DailyLimitExceeded     the plan's messages of this day
            └── BurstLimitExceeded     requests per second
"""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from typing import Any


class QStashError(Exception):
    """The root: catch it to catch everything here."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Celery and process pools pickle errors; by default that calls __init__ with the message.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class InvalidOption(QStashError, ValueError):
    """An option, header or destination that the wire does not allow."""

    def __init__(self, field: str, problem: str, *, wire_text: str = "") -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        """The option's name, or the header's when it was read off the wire."""
        self.problem = problem
        self.wire_text = wire_text or f"invalid {field} header: {problem}"
        """How QStash itself words the refusal of a header."""


class EnvelopeError(QStashError, ValueError):
    """A callback's envelope that is not what QStash sends."""


class SignatureError(QStashError):
    """A request that was not signed by QStash for us, just now, with this body."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        """One word for logs and metrics: ``missing``, ``malformed``, ``no_key``, ``key``,
        ``claims``, ``issuer``, ``subject``, ``expired``, ``early`` or ``body``."""


class TransportError(QStashError):
    """The call ended without an answer."""

    def __init__(self, detail: str, *, is_ambiguous: bool) -> None:
        super().__init__(detail)
        self.is_ambiguous = is_ambiguous
        """True when QStash may have done the work although its answer was lost."""


class UnreadableAnswer(TransportError):
    """A 2xx whose body says nothing that we understand: the work is done, and we do not know how."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, is_ambiguous=True)


class ResponseError(QStashError):
    """QStash answered, and the answer is not a 2xx."""

    def __init__(self, status: int, body: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"QStash answered {status}: {body[:500]}")
        self.status = status
        self.body = body
        self.headers: Mapping[str, str] = headers or {}
        self.is_ambiguous = status >= 500
        """A 5xx may come after the work was done, and any refusal after a try whose answer was lost."""

    @staticmethod
    def from_response(status: int, body: str, headers: Mapping[str, str]) -> ResponseError:
        """The most telling class for an answer. Order as in the official SDKs: chat, daily, burst."""
        if status == 429:
            for kind in (ChatLimitExceeded, DailyLimitExceeded):
                if kind.limit_header in headers:
                    return kind(status, body, headers)
            # The per-second 429 sometimes carries no header at all.
            return BurstLimitExceeded(status, body, headers)
        kinds = {401: AuthenticationError, 403: AuthenticationError, 404: NotFound}
        kinds[412] = QuotaExceeded
        return kinds.get(status, ResponseError)(status, body, headers)


class AuthenticationError(ResponseError):
    """The token is wrong, read-only, or of another region."""


class NotFound(ResponseError):
    """No such message, dead letter, queue or flow-control key (any more)."""


class QuotaExceeded(ResponseError):
    """A ceiling of the plan: retries, delay, queues, parallelism."""


class RateLimited(ResponseError):
    """Too many requests. ``limit``, ``remaining`` and ``reset`` are integers or None when unsaid."""

    limit_header = ""
    remaining_header = ""
    reset_header = ""

    @property
    def limit(self) -> int | None:
        return self._number(self.limit_header)

    @property
    def remaining(self) -> int | None:
        return self._number(self.remaining_header)

    @property
    def reset(self) -> int | None:
        """When the limit resets, unix seconds."""
        return self._number(self.reset_header)

    def _number(self, header: str) -> int | None:
        value = self.headers.get(header, "")
        return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None


class ChatLimitExceeded(RateLimited):
    """The limits of the Chat API that Upstash has withdrawn."""

    limit_header = "x-ratelimit-limit-requests"
    remaining_header = "x-ratelimit-remaining-requests"
    reset_header = "x-ratelimit-reset-requests"


class DailyLimitExceeded(RateLimited):
    """The plan's messages of this day are used up."""

    limit_header = "ratelimit-limit"
    remaining_header = "ratelimit-remaining"
    reset_header = "ratelimit-reset"


class BurstLimitExceeded(RateLimited):
    """Too many requests this second."""

    limit_header = "burst-ratelimit-limit"
    remaining_header = "burst-ratelimit-remaining"
    reset_header = "burst-ratelimit-reset"
