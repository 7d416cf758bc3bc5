"""What our app raises. (What QStash's wire raises is in ``qstash.exceptions``.)

::

    QStashLLMError
    ├── ConfigurationError (ImproperlyConfigured)   a setting is missing or wrong
    ├── InvalidRequest (ValueError)                 an LLM request that cannot be made; .field
    │   └── NoSuchModel                             a model that is not there, or not for this caller
    ├── IllegalState                                a verb that this row's state does not allow
    │   └── ConversationBusy                        another turn of it is being answered
    ├── BudgetExceeded                              it does not fit into a budget; .budget
    ├── ChatFailed                                  the Chat API got no whole answer; .llm_request
    └── UnreadableCompletion (ValueError)           an answer that is no completion; .code
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from django.core.exceptions import ImproperlyConfigured


class QStashLLMError(Exception):
    """The root: catch it to catch everything of ours."""


class ConfigurationError(QStashLLMError, ImproperlyConfigured):
    """A setting is missing or wrong; the message names it."""


class InvalidRequest(QStashLLMError, ValueError):
    """What was asked for cannot be asked. Nothing was stored."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        """The argument to look at, such as ``messages[2].role`` or ``items[7].model``."""
        self.problem = problem


class NoSuchModel(InvalidRequest):
    """A model that nobody here answers for. One that a caller may not ask is to them the same."""

    def __init__(self, name: str) -> None:
        super().__init__("model", f"{name[:255]!r} does not exist or you do not have access to it")
        self.name = name


class IllegalState(QStashLLMError):
    """A verb was used on a row whose state does not allow it."""


class ConversationBusy(IllegalState):
    """Another turn of the conversation was being answered for as long as was waited. Nothing was
    asked."""


class BudgetExceeded(QStashLLMError):
    """A request may cost more than is left of a budget. It was not asked."""

    def __init__(
        self,
        reason: str,
        *,
        budget: str,
        amount: Decimal,
        spent: Decimal,
        reserved: Decimal,
        needed: Decimal | None,
        renews_at: datetime | None = None,
    ) -> None:
        super().__init__(reason)
        self.budget = budget
        """Its name."""
        self.amount = amount
        """USD, as are the others."""
        self.spent = spent
        self.reserved = reserved
        """For requests under way."""
        self.needed = needed
        """The most that the request may cost; None where no price is known."""
        self.renews_at = renews_at
        """When the next period begins; None where it does not help, or there is none."""


class ChatFailed(QStashLLMError):
    """The provider gave no whole answer. The row says the same, with what came and what it cost."""

    def __init__(
        self,
        code: str,
        problem: str,
        *,
        llm_request: Any,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        trouble: str = "",
        wait: float | None = None,
    ) -> None:
        super().__init__(problem)
        self.code = code
        """One word: the provider's own, or ``http_…``, ``no_response``, ``timeout``; of a stream
        also ``cut``, ``stalled``, ``malformed``; of an answer that of ``UnreadableCompletion``."""
        self.llm_request = llm_request
        """Its row, which is failed."""
        self.status = status
        """HTTP's, 200 where a stream broke; None where no answer came."""
        self.headers = dict(headers or {})
        """The answer's, names in lower case, without cookies and keys."""
        self.body = body
        """The provider's own words as they came, without keys of ours."""
        self.trouble = trouble
        """A ``limits.Trouble``: what can be done about it. Empty where a stream broke by itself."""
        self.wait = wait
        """Seconds after which the provider says it may be tried again."""


class UnreadableCompletion(QStashLLMError, ValueError):
    """A provider's answer that cannot be read as a completion."""

    def __init__(self, code: str, problem: str, *, usage: Any = None) -> None:
        super().__init__(problem)
        self.usage = usage
        """The ``Usage`` it tells of all the same: it has to be paid for."""
        self.code = code
        """One word: ``truncated``, ``not_json``, ``empty``, ``no_choices``, or the provider's own."""
