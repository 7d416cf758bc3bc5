"""The doors to which QStash and monitors come."""

from __future__ import annotations

from .callback import callback
from .health import health
from .ping import ping

__all__ = ["callback", "health", "ping"]
