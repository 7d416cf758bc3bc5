"""The doors of the OpenAI-compatible API."""

from __future__ import annotations

from .base import unknown
from .batches import batch, batches, cancel_batch
from .catalogue import model, models
from .chat import cancel, chat_completion, chat_completions
from .files import file, file_content, files

__all__ = [
    "batch",
    "batches",
    "cancel",
    "cancel_batch",
    "chat_completion",
    "chat_completions",
    "file",
    "file_content",
    "files",
    "model",
    "models",
    "unknown",
]
