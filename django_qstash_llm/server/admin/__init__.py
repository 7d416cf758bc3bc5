"""What happened and what goes on, to look at. The record is not edited; an action calls one verb."""

from __future__ import annotations

from .dead_letter import DeadLetterAdmin
from .flow_control import FlowControlKeyAdmin
from .gate import GateAdmin
from .log_entry import LogEntryAdmin
from .message import MessageAdmin
from .queue import QueueAdmin
from .schedule import ScheduleAdmin
from .signing_keys import SigningKeysAdmin
from .url_group import UrlGroupAdmin

__all__ = [
    "DeadLetterAdmin",
    "FlowControlKeyAdmin",
    "GateAdmin",
    "LogEntryAdmin",
    "MessageAdmin",
    "QueueAdmin",
    "ScheduleAdmin",
    "SigningKeysAdmin",
    "UrlGroupAdmin",
]
