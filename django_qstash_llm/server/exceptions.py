"""What this server says no with.

::

    ServerError
    ├── ConfigurationError (ImproperlyConfigured)   a setting that cannot be used
    ├── Refusal                                     an answer: .status and the text of ``{"error"}``
    └── AddressRefused                              a destination's address that is off limits
"""

from __future__ import annotations

from django.core.exceptions import ImproperlyConfigured


class ServerError(Exception):
    """The root."""


class ConfigurationError(ServerError, ImproperlyConfigured):
    """A value in ``QSTASH_SERVER`` that cannot be used."""


class Refusal(ServerError):
    """The caller asked for something that is answered with an error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class AddressRefused(ServerError):
    """The address lies where this server must not knock."""
