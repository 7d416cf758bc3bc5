from __future__ import annotations

from .api_key import ApiKey
from .batch import Batch
from .batch_input import BatchInput
from .budget import Budget
from .callback import CallbackResponse
from .circuit import Circuit
from .conversation import Conversation
from .file import File, FilePart
from .kept_answer import KeptAnswer
from .lane import Lane
from .ledger import LedgerEntry
from .message_count import MessageCount
from .price import Price
from .request import LLMRequest
from .spend import Spend

__all__ = [
    "ApiKey",
    "Batch",
    "BatchInput",
    "Budget",
    "CallbackResponse",
    "Circuit",
    "Conversation",
    "File",
    "FilePart",
    "KeptAnswer",
    "LLMRequest",
    "Lane",
    "LedgerEntry",
    "MessageCount",
    "Price",
    "Spend",
]
