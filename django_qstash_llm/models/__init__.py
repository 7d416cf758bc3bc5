from __future__ import annotations

from .api_key import ApiKey
from .batch import Batch
from .callback import CallbackResponse
from .circuit import Circuit
from .conversation import Conversation
from .kept_answer import KeptAnswer
from .lane import Lane
from .request import LLMRequest

__all__ = [
    "ApiKey",
    "Batch",
    "CallbackResponse",
    "Circuit",
    "Conversation",
    "KeptAnswer",
    "LLMRequest",
    "Lane",
]
