"""What people look at. It shows the record of what happened, and changes it by verbs only."""

from __future__ import annotations

from .api_key import ApiKeyAdmin
from .batch import BatchAdmin
from .callback import CallbackResponseAdmin
from .circuit import CircuitAdmin
from .conversation import ConversationAdmin
from .file import FileAdmin
from .lane import LaneAdmin
from .price import PriceAdmin
from .request import LLMRequestAdmin

__all__ = [
    "ApiKeyAdmin",
    "BatchAdmin",
    "CallbackResponseAdmin",
    "CircuitAdmin",
    "ConversationAdmin",
    "FileAdmin",
    "LLMRequestAdmin",
    "LaneAdmin",
    "PriceAdmin",
]
