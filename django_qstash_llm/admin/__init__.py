"""What people look at. It shows the record of what happened, and changes it by verbs only."""

from __future__ import annotations

from .api_key import ApiKeyAdmin
from .batch import BatchAdmin
from .budget import BudgetAdmin
from .callback import CallbackResponseAdmin
from .circuit import CircuitAdmin
from .conversation import ConversationAdmin
from .cost_column import CostColumn
from .file import FileAdmin
from .lane import LaneAdmin
from .ledger import LedgerEntryAdmin
from .price import PriceAdmin
from .request import LLMRequestAdmin
from .spend import SpendAdmin

__all__ = [
    "ApiKeyAdmin",
    "BatchAdmin",
    "BudgetAdmin",
    "CallbackResponseAdmin",
    "CircuitAdmin",
    "ConversationAdmin",
    "CostColumn",
    "FileAdmin",
    "LLMRequestAdmin",
    "LaneAdmin",
    "LedgerEntryAdmin",
    "PriceAdmin",
    "SpendAdmin",
]
