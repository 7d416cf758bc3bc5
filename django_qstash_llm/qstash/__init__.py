"""QStash's wire protocol, both directions, in plain Python: no Django here.

``Client`` and ``AsyncClient`` talk to QStash (or to anything that speaks its wire, such as
``django_qstash_llm.server``); the other names are the wire formats, each held once with its
two directions side by side.
"""

from __future__ import annotations

from .callback import Callback
from .client import AsyncClient, Client
from .exceptions import (
    AuthenticationError,
    BurstLimitExceeded,
    ChatLimitExceeded,
    DailyLimitExceeded,
    EnvelopeError,
    InvalidOption,
    NotFound,
    QStashError,
    QuotaExceeded,
    RateLimited,
    ResponseError,
    SignatureError,
    TransportError,
    UnreadableAnswer,
)
from .message import Accepted, Message, Refused
from .options import FlowControl, Options
from .records import DeadLetter, FlowControlState, Keys, LogEntry, MessageRecord, Page, Queue
from .signing import Claims, sign, verify, verify_token

__all__ = [
    "Accepted",
    "AsyncClient",
    "AuthenticationError",
    "BurstLimitExceeded",
    "Callback",
    "ChatLimitExceeded",
    "Claims",
    "Client",
    "DailyLimitExceeded",
    "DeadLetter",
    "EnvelopeError",
    "FlowControl",
    "FlowControlState",
    "InvalidOption",
    "Keys",
    "LogEntry",
    "Message",
    "MessageRecord",
    "NotFound",
    "Options",
    "Page",
    "QStashError",
    "Queue",
    "QuotaExceeded",
    "RateLimited",
    "Refused",
    "ResponseError",
    "SignatureError",
    "TransportError",
    "UnreadableAnswer",
    "sign",
    "verify",
    "verify_token",
]
