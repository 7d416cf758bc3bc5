"""The doors of the OpenAI-compatible API."""

from __future__ import annotations

from .base import unknown
from .catalogue import model, models
from .chat import cancel, chat_completion, chat_completions

__all__ = ["cancel", "chat_completion", "chat_completions", "model", "models", "unknown"]
