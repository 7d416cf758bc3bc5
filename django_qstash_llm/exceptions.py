"""What our app raises. (What QStash's wire raises is in ``qstash.exceptions``.)

::

    QStashLLMError
    ├── ConfigurationError (ImproperlyConfigured)   a setting is missing or wrong
    ├── InvalidRequest (ValueError)                 an LLM request that cannot be made; .field
    ├── IllegalState                                a verb that this row's state does not allow
    └── UnreadableCompletion (ValueError)           an answer that is no completion; .code
"""

from __future__ import annotations

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


class IllegalState(QStashLLMError):
    """A verb was used on a row whose state does not allow it."""


class UnreadableCompletion(QStashLLMError, ValueError):
    """A provider's answer that cannot be read as a completion."""

    def __init__(self, code: str, problem: str, *, usage: Any = None) -> None:
        super().__init__(problem)
        self.usage = usage
        """The ``Usage`` it tells of all the same: it has to be paid for."""
        self.code = code
        """One word: ``truncated``, ``not_json``, ``empty``, ``no_choices``, or the provider's own."""
