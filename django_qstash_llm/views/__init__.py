"""The doors to which QStash, monitors and staff come."""

from __future__ import annotations

from .callback import callback
from .health import health
from .ping import ping
from .requests import attempts, llm_request
from .spend import budgets, spend

__all__ = ["attempts", "budgets", "callback", "health", "llm_request", "ping", "spend"]
