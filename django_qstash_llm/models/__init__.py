from __future__ import annotations

from .api_key import ApiKey
from .batch import Batch
from .batch_input import BatchInput
from .callback import CallbackResponse
from .circuit import Circuit
from .conversation import Conversation
from .file import File, FilePart
from .kept_answer import KeptAnswer
from .lane import Lane
from .price import Price
from .request import LLMRequest

__all__ = [
    "ApiKey",
    "Batch",
    "BatchInput",
    "CallbackResponse",
    "Circuit",
    "Conversation",
    "File",
    "FilePart",
    "KeptAnswer",
    "LLMRequest",
    "Lane",
    "Price",
]
