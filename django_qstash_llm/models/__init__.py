from __future__ import annotations

from .batch import Batch
from .callback import CallbackResponse
from .circuit import Circuit
from .conversation import Conversation
from .lane import Lane
from .request import LLMRequest

__all__ = ["Batch", "CallbackResponse", "Circuit", "Conversation", "LLMRequest", "Lane"]
