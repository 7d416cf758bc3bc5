from __future__ import annotations

from .dead_letter import DeadLetter
from .deduplication import Deduplication
from .log_entry import LogEntry
from .message import Message, Outcome
from .queue import Queue
from .signing_keys import SigningKeys

__all__ = [
    "DeadLetter",
    "Deduplication",
    "LogEntry",
    "Message",
    "Outcome",
    "Queue",
    "SigningKeys",
]
