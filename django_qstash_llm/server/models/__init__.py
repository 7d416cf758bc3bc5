from __future__ import annotations

from .dead_letter import DeadLetter
from .deduplication import Deduplication
from .ending import Outcome
from .flow_control import FlowControlKey
from .gate import Gate
from .log_entry import LogEntry
from .message import Admitted, Message
from .queue import Queue
from .schedule import Schedule
from .signing_keys import SigningKeys
from .url_group import Endpoint, UrlGroup, admit

__all__ = [
    "Admitted",
    "DeadLetter",
    "Deduplication",
    "Endpoint",
    "FlowControlKey",
    "Gate",
    "LogEntry",
    "Message",
    "Outcome",
    "Queue",
    "Schedule",
    "SigningKeys",
    "UrlGroup",
    "admit",
]
