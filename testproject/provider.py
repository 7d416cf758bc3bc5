"""An OpenAI-compatible provider that needs no network and no key worth stealing.

Its one model, `extractive-offline-1`, is what its name says: it invents nothing, it answers with
the sentences of the prompt that score highest. The rest is what a client meets at a real provider:
usage that was counted, limits that refill, latency, streams, and failures on demand.

    with Provider(rpm=60, burst=8, latency=0.3) as provider:
        httpx.post(f"{provider.base_url}/chat/completions", ...)

or in the foreground: `python testproject/provider.py --port 9000 --rpm 60 --burst 8`.

A request header `X-Fail` asks for trouble: a status (`500`, `429`), `hang` (never answers) or
`cut` (closes in the middle of the body). `Provider.fail_next()` does the same from a test.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import re
import signal
import socket
import socketserver
import sys
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

MODEL = "extractive-offline-1"
# Changes when the sentences chosen for the same prompt would change.
FINGERPRINT = "fp_extractive_1"
ROLES = ("developer", "system", "user", "assistant", "tool", "function")
LARGEST_BODY = 10_000_000

Fault = int | Literal["hang", "cut"]


class Refusal(Exception):
    """An error answer, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": code}
        self.headers = dict(headers or {})

    def answer(self) -> Answer:
        return Answer.json(self.status, {"error": self.error}, self.headers)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


@dataclass(frozen=True)
class Piece:
    """Bytes to write, and how long the model takes to think of them."""

    body: bytes
    pause: float = 0.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    pieces: tuple[Piece, ...] = ()
    """One for a JSON body, one per event for a stream."""
    fault: Literal["hang", "cut"] | None = None

    @classmethod
    def json(
        cls, status: int, content: object, headers: Mapping[str, str], *, pause: float = 0.0
    ) -> Answer:
        body = json.dumps(content).encode()
        typed = {"content-type": "application/json", "content-length": str(len(body)), **headers}
        return cls(status, typed, (Piece(body, pause),))

    @property
    def body(self) -> bytes:
        return b"".join(piece.body for piece in self.pieces)


@dataclass(frozen=True)
class Call:
    """One line of the journal: what was asked of the model, by whom, and what came of it."""

    at: float
    key: str
    """A fingerprint; the key itself is kept nowhere."""
    model: str | None
    status: int | None
    """None for a call left hanging."""
    message_id: str | None
    retried: int | None


# One token is a run of letters and digits, or a single mark. Cruder than a real tokeniser, and
# the same on every machine.
TOKEN = re.compile(r"\w+|[^\w\s]")


def count_tokens(text: str) -> int:
    return sum(1 for _ in TOKEN.finditer(text))


def split_tokens(text: str) -> list[str]:
    """The text in pieces of one token, each with the white space before it."""
    return re.findall(rf"\s*(?:{TOKEN.pattern})", text)


SENTENCE_END = re.compile(
    # «Mr.» ends no sentence, nor does the B. of «Susan B. Anthony».
    r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMessrs\.)(?<!\b[A-Z]\.)"
    r"(?:(?<=[.!?…])|(?<=[.!?…][\"'”’)\]]))\s++(?![a-z])"
    r"|(?<=[。！？])"
    r"|\n\s*\n"
)
WHOLE_SENTENCE = re.compile(r"[.!?…。！？][\"'”’)\]]*$")
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}
NUMBERS |= {"single": 1, "eight": 8, "nine": 9, "ten": 10}
SENTENCE_COUNT = re.compile(
    rf"\b(\d{{1,2}}|{'|'.join(NUMBERS)})[ -](?:[a-z]+[ -])?sentences?\b", re.IGNORECASE
)
PREAMBLE = re.compile(r"\A[^.!?\n:]*\b(?:summar\w+|sentences?)\b[^.!?\n:]*:\s*", re.IGNORECASE)
INSTRUCTION = re.compile(
    r"\A(?:please\s+)?(?:answer|describe|explain|rewrite|shorten|summari[sz]e)\b", re.IGNORECASE
)
WORD = re.compile(r"\w+")
# Short words say little, and these longer ones no more.
LONG_STOP_WORDS = frozenset(
    WORD.findall(
        "about after also another been before being could does down each even ever every from have "
        "here himself into itself just like made make many might more most much must never only "
        "other over same shall should some such than that their them then there these they this "
        "those though through under unto upon very well were what when where which while whom will "
        "with within without would your"
    )
)


def sentences(text: str) -> list[str]:
    """What reads as a sentence: a heading or a list of words has no full stop, and is not one."""
    parts = (part.strip() for part in SENTENCE_END.split(text))
    return [part for part in parts if WHOLE_SENTENCE.search(part)]


def is_instruction(sentence: str) -> bool:
    return bool(INSTRUCTION.match(sentence) or SENTENCE_COUNT.search(sentence))


def material(text: str) -> list[str]:
    """The sentences of a prompt without those that say what to do with them."""
    return [s for s in sentences(PREAMBLE.sub("", text)) if not is_instruction(s)]


def content_words(sentence: str) -> list[str]:
    words = WORD.findall(sentence.lower())
    return [word for word in words if len(word) > 3 and word not in LONG_STOP_WORDS]


def weights(candidates: list[str]) -> list[float]:
    """Frequent words make a sentence heavy (Luhn, 1958); leading the text makes it heavier."""
    frequency = Counter(word for sentence in candidates for word in content_words(sentence))
    found = []
    for index, sentence in enumerate(candidates):
        words = content_words(sentence)
        # Neither the sum, which only likes long sentences, nor the mean, which only likes short.
        weight = sum(frequency[word] for word in words) / (len(words) + 2) ** 0.75
        found.append(weight * (1 + 0.5 / (index + 1)))
    return found


def extract(candidates: list[str], count: int) -> str:
    scored = list(enumerate(weights(candidates)))
    heaviest = sorted(scored, key=lambda pair: -pair[1])[:count]
    return " ".join(candidates[index] for index, _ in sorted(heaviest))


def wanted_sentences(texts: list[str]) -> int:
    """How many sentences were asked for, by the first text that says."""
    for text in texts:
        if found := SENTENCE_COUNT.search(text):
            number = found[1].lower()
            return max(1, NUMBERS.get(number) or int(number))
    return 2


def reply(messages: list[Message]) -> str:
    spoken = [m.text for m in reversed(messages) if m.role == "user"] or [messages[-1].text]
    ordered = [m.text for m in messages if m.role in ("system", "developer")]
    count = wanted_sentences(spoken[:1] + ordered + spoken[1:])
    # «And now in one sentence?» brings no text of its own: it is about what was said before.
    for text in spoken:
        candidates = material(text)
        if any(not sentence.endswith("?") for sentence in candidates):
            return extract(candidates, count)
    return spoken[0].strip()


@dataclass(frozen=True)
class Choice:
    text: str
    finish_reason: Literal["stop", "length"]

    @classmethod
    def cut_to(cls, text: str, *, stop: tuple[str, ...], max_tokens: int | None) -> Choice:
        for sequence in stop:
            text = text.partition(sequence)[0]
        text = text.rstrip()
        tokens = split_tokens(text)
        if max_tokens is None or len(tokens) <= max_tokens:
            return cls(text, "stop")
        return cls("".join(tokens[:max_tokens]), "length")


@dataclass(frozen=True)
class Message:
    role: str
    text: str


@dataclass(frozen=True)
class Question:
    """The body of a chat completion request, checked."""

    model: str
    messages: list[Message]
    n: int
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool

    @classmethod
    def from_json(cls, body: bytes) -> Question:
        fields = json_object(body)
        refuse_what_it_cannot_do(fields)
        stream = boolean(fields, "stream")
        return cls(
            model=string(fields, "model"),
            messages=messages(fields),
            n=integer(fields, "n", most=128) or 1,
            max_tokens=max_tokens(fields),
            stop=stop_sequences(fields),
            stream=stream,
            include_usage=include_usage(fields, stream=stream),
        )


def invalid_type(name: str, expected: str) -> Refusal:
    return Refusal(
        400, f"Invalid type for '{name}': expected {expected}.", param=name, code="invalid_type"
    )


def json_object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "We could not parse the JSON body of your request.") from error
    if not isinstance(fields, dict):
        raise Refusal(400, "The JSON body of your request must be an object.")
    return fields


def string(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise missing(name)
    if not isinstance(value, str):
        raise invalid_type(name, "a string")
    return value


def missing(name: str) -> Refusal:
    return Refusal(
        400,
        f"Missing required parameter: '{name}'.",
        param=name,
        code="missing_required_parameter",
    )


def boolean(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid_type(name, "a boolean")
    return bool(value)


def integer(fields: dict[str, Any], name: str, *, most: int | None = None) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise invalid_type(name, "an integer")
    if value < 1:
        raise out_of_range(name, "below minimum", f">= 1, but got {value}", "integer_below_min")
    if most is not None and value > most:
        raise out_of_range(
            name, "above maximum", f"<= {most}, but got {value}", "integer_above_max"
        )
    return value


def out_of_range(name: str, where: str, expected: str, code: str) -> Refusal:
    message = f"Invalid '{name}': integer {where} value. Expected a value {expected} instead."
    return Refusal(400, message, param=name, code=f"{code}_value")


def max_tokens(fields: dict[str, Any]) -> int | None:
    old, new = integer(fields, "max_tokens"), integer(fields, "max_completion_tokens")
    if old and new:
        raise Refusal(
            400,
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
            param="max_tokens",
            code="invalid_parameter_combination",
        )
    return new or old


def stop_sequences(fields: dict[str, Any]) -> tuple[str, ...]:
    value = fields.get("stop")
    if value is None:
        return ()
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise invalid_type("stop", "a string or an array of strings")
    return tuple(filter(None, value))


def include_usage(fields: dict[str, Any], *, stream: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise Refusal(
            400,
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            param="stream_options",
        )
    if not isinstance(options, dict):
        raise invalid_type("stream_options", "an object")
    return boolean(options, "include_usage")


def refuse_what_it_cannot_do(fields: dict[str, Any]) -> None:
    """A model that can only quote says so, rather than answer as if it had been asked less."""
    wanted = [name for name in ("tools", "functions", "logprobs", "audio") if fields.get(name)]
    shape = fields.get("response_format")
    if shape and shape != {"type": "text"}:
        wanted.append("response_format")
    for name in wanted:
        raise Refusal(
            400,
            f"Unsupported parameter: '{name}' is not supported with this model.",
            param=name,
            code="unsupported_parameter",
        )


def messages(fields: dict[str, Any]) -> list[Message]:
    value = fields.get("messages")
    if value is None:
        raise missing("messages")
    if not isinstance(value, list):
        raise invalid_type("messages", "an array of objects")
    if not value:
        raise Refusal(
            400,
            "Invalid 'messages': empty array. Expected an array with minimum length 1.",
            param="messages",
            code="empty_array",
        )
    return [message(item, f"messages[{index}]") for index, item in enumerate(value)]


def message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise invalid_type(where, "an object")
    role = value.get("role")
    if role is None:
        raise missing(f"{where}.role")
    if role not in ROLES:
        raise Refusal(
            400,
            f"Invalid value: {role!r}. Supported values are: {', '.join(map(repr, ROLES))}.",
            param=f"{where}.role",
            code="invalid_value",
        )
    # An assistant that called a tool said nothing.
    if role == "assistant" and value.get("content") is None:
        return Message(role, "")
    return Message(role, text_of(value.get("content"), f"{where}.content"))


def text_of(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid_type(where, "one of a string or array of objects")
    return "\n\n".join(text_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def text_part(part: object, where: str) -> str:
    if not isinstance(part, dict):
        raise invalid_type(where, "an object")
    if part.get("type") != "text":
        raise Refusal(
            400,
            f"Invalid value: {part.get('type')!r}. Supported values are: 'text'.",
            param=f"{where}.type",
            code="invalid_value",
        )
    if not isinstance(part.get("text"), str):
        raise invalid_type(f"{where}.text", "a string")
    return str(part["text"])


@dataclass(frozen=True)
class Completion:
    """What the model made of a question, before it is a body or a stream."""

    id: str
    created: int
    question: Question
    choices: tuple[Choice, ...]
    input_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, question: Question) -> Completion:
        text = reply(question.messages)
        choice = Choice.cut_to(text, stop=question.stop, max_tokens=question.max_tokens)
        return cls(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            question=question,
            # The same prompt gives the same sentences, whatever the temperature.
            choices=(choice,) * question.n,
            input_tokens=sum(count_tokens(m.text) for m in question.messages),
            output_tokens=count_tokens(choice.text) * question.n,
        )

    @property
    def charge(self) -> int:
        """What it takes from the token limit: as at OpenAI, room for the longest answer allowed."""
        longest = (self.question.max_tokens or 0) * self.question.n
        return self.input_tokens + max(longest, self.output_tokens)

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.input_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.input_tokens + self.output_tokens,
        }

    def to_json(self) -> dict[str, object]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self.choices)
        ]
        return self._envelope("chat.completion", choices=choices, usage=self.usage())

    def to_events(self, *, first_pause: float, token_pause: float) -> Iterator[Piece]:
        pause = first_pause
        for index, choice in enumerate(self.choices):
            yield Piece(self._event(index, {"role": "assistant", "content": ""}), pause)
            for token in split_tokens(choice.text):
                yield Piece(self._event(index, {"content": token}), token_pause)
            yield Piece(self._event(index, {}, choice.finish_reason))
            pause = 0.0
        if self.question.include_usage:
            chunk = self._envelope("chat.completion.chunk", choices=[], usage=self.usage())
            yield Piece(event(json.dumps(chunk)))
        yield Piece(event("[DONE]"))

    def _event(self, index: int, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        chunk = self._envelope("chat.completion.chunk", choices=[choice])
        if self.question.include_usage:
            chunk["usage"] = None
        return event(json.dumps(chunk))

    def _envelope(self, kind: str, **fields: object) -> dict[str, object]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": MODEL,
            "system_fingerprint": FINGERPRINT,
            **fields,
        }


def event(line: str) -> bytes:
    return f"data: {line}\n\n".encode()


def model_card() -> dict[str, object]:
    return {"id": MODEL, "object": "model", "created": 1767225600, "owned_by": "offline"}


def go_duration(seconds: float) -> str:
    """As Go prints one, and OpenAI's headers with it: `120ms`, `1.5s`, `6m0s`."""
    milliseconds = rounded_up(seconds * 1000)
    if milliseconds == 0:
        return "0s"
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    larger = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{larger}{milliseconds / 1000:g}s"


def rounded_up(number: float) -> int:
    # 0.1 + 0.2 is no reason to make anyone wait one more millisecond.
    return math.ceil(round(number, 6))


class Bucket:
    """Holds up to `capacity` and refills by `limit` a minute."""

    def __init__(self, limit: int, *, capacity: int, now: float) -> None:
        self.limit = limit
        self.capacity = capacity
        self.level = float(capacity)
        self.filled_at = now

    def refill(self, now: float) -> None:
        dripped = (now - self.filled_at) * self.limit / 60
        self.level = min(self.capacity, self.level + max(0.0, dripped))
        self.filled_at = now

    def seconds_until(self, level: float) -> float:
        lacking = round(level - self.level, 6)
        return max(0.0, lacking) * 60 / self.limit

    @property
    def remaining(self) -> int:
        return math.floor(round(self.level, 6))


class Allowance:
    """What one API key may still use."""

    UNITS: Mapping[str, str] = {"requests": "RPM", "tokens": "TPM"}

    def __init__(self, buckets: Mapping[str, Bucket]) -> None:
        self.buckets = buckets

    def refill(self, now: float) -> None:
        for bucket in self.buckets.values():
            bucket.refill(now)

    def take(self, costs: Mapping[str, int]) -> None:
        """All or nothing: a refused request uses up neither limit."""
        self._refuse_impossible(costs)
        waits = {name: bucket.seconds_until(costs[name]) for name, bucket in self.buckets.items()}
        slowest = max(waits, key=waits.__getitem__, default=None)
        if slowest is not None and waits[slowest] > 0:
            raise self.exhausted(slowest, requested=costs[slowest], wait=waits[slowest])
        for name, bucket in self.buckets.items():
            bucket.level -= costs[name]

    def _refuse_impossible(self, costs: Mapping[str, int]) -> None:
        for name, bucket in self.buckets.items():
            if costs[name] > bucket.capacity:
                raise self._refusal(
                    f"Request too large for {MODEL} on {name} per min ({self.UNITS[name]}): "
                    f"Limit {bucket.capacity}, Requested {costs[name]}. The input or output "
                    f"tokens must be reduced in order to run successfully.",
                    name,
                )

    def exhausted(self, name: str, *, requested: int, wait: float) -> Refusal:
        bucket = self.buckets[name]
        hints = {
            "retry-after": str(max(1, rounded_up(wait))),
            "retry-after-ms": str(rounded_up(wait * 1000)),
        }
        return self._refusal(
            f"Rate limit reached for {MODEL} on {name} per min ({self.UNITS[name]}): "
            f"Limit {bucket.limit}, Used {bucket.limit - bucket.remaining}, "
            f"Requested {requested}. Please try again in {go_duration(wait)}.",
            name,
            hints,
        )

    def _refusal(self, message: str, name: str, hints: Mapping[str, str] | None = None) -> Refusal:
        headers = {**self.headers(), **(hints or {})}
        return Refusal(429, message, kind=name, code="rate_limit_exceeded", headers=headers)

    def headers(self) -> dict[str, str]:
        headers = {}
        for name, bucket in self.buckets.items():
            headers[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(bucket.remaining)
            # Until the bucket is full, not until the next request fits: that is retry-after.
            until_full = bucket.seconds_until(bucket.capacity)
            headers[f"x-ratelimit-reset-{name}"] = go_duration(until_full)
        return headers


class Provider:
    """The provider, with or without a socket in front of it.

    `rpm` and `tpm` are limits per key and minute, None for no limit; `burst` is how many requests
    an idle key may make at once, a minute's worth unless told. `api_keys` are the only keys
    accepted; without it any key is.
    """

    def __init__(
        self,
        *,
        rpm: int | None = None,
        tpm: int | None = None,
        burst: int | None = None,
        latency: float = 0.0,
        per_token: float = 0.0,
        api_keys: Collection[str] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if any(limit is not None and limit < 1 for limit in (rpm, tpm, burst)):
            raise ValueError("rpm, tpm and burst are at least 1, or None for no limit")
        self.rpm, self.tpm, self.burst = rpm, tpm, burst
        self.latency, self.per_token = latency, per_token
        self.api_keys = None if api_keys is None else frozenset(api_keys)
        self.host, self.port = host, port
        self.clock, self.sleep = clock, sleep
        # Appended to by every connection's thread; list.append needs no lock.
        self.journal: list[Call] = []
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._allowances: dict[str, Allowance] = {}
        self._faults: deque[Fault] = deque()
        self._server: Server | None = None

    def __repr__(self) -> str:
        return f"<Provider {self.base_url if self._server else 'not started'}>"

    def __enter__(self) -> Provider:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def base_url(self) -> str:
        if self._server is None:
            raise RuntimeError("The provider has no base_url until it is started.")
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}/v1"

    def start(self) -> Provider:
        if self._server is not None:
            raise RuntimeError("The provider is already started.")
        self.stopped.clear()
        self._server = Server((self.host, self.port), self)
        # Polling twice a second, the default, would make stop() take as long.
        threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="provider", daemon=True
        ).start()
        return self

    def stop(self) -> None:
        """Close every connection, also those left hanging. May be called twice."""
        self.stopped.set()
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()
        self._server = None

    def fail_next(self, count: int = 1, status: Fault = 500) -> None:
        """Make the next chat completions fail, whoever asks for them."""
        with self._lock:
            self._faults.extend([status] * count)

    def respond(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes = b""
    ) -> tuple[int, dict[str, str], bytes]:
        """The whole answer, without a socket: what an httpx.MockTransport needs.

        A stream comes as all its events at once. A fault comes as the error a client would see
        on its socket: TimeoutError for `hang`, ConnectionResetError for `cut`.
        """
        answer = self.answer(Request(method, path, headers, body))
        if answer.fault == "hang":
            raise TimeoutError("The provider does not answer.")
        for piece in answer.pieces:
            self.think(piece)
        if answer.fault == "cut":
            raise ConnectionResetError("The provider closed the connection in its answer.")
        return answer.status, dict(answer.headers), answer.body

    def think(self, piece: Piece) -> None:
        if piece.pause > 0:
            self.sleep(piece.pause)

    def answer(self, request: Request) -> Answer:
        headers = {name.lower(): value for name, value in request.headers.items()}
        request = Request(request.method, request.path.partition("?")[0], headers, request.body)
        try:
            answer = self._route(request)
        except Refusal as refusal:
            answer = refusal.answer()
        if request.path == "/v1/chat/completions":
            self.journal.append(self._call(request, answer))
        return answer

    def _route(self, request: Request) -> Answer:
        key = self._authenticated(request)
        match request.method, request.path.removeprefix("/v1/").split("/"):
            case "POST", ["chat", "completions"]:
                return self._chat(request, key)
            case "GET", ["models"]:
                return Answer.json(200, {"object": "list", "data": [model_card()]}, {})
            case "GET", ["models", name]:
                refuse_unknown_model(name)
                return Answer.json(200, model_card(), {})
            case method, ["chat", "completions"] | ["models"] | ["models", _]:
                raise Refusal(
                    405,
                    f"Not allowed to {method} on {request.path}.",
                    code="method_not_supported",
                )
        raise Refusal(404, f"Invalid URL ({request.method} {request.path})")

    def _authenticated(self, request: Request) -> str:
        key = bearer_key(request)
        if not key:
            raise Refusal(
                401,
                "You didn't provide an API key. You need to provide your API key in an "
                "Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY).",
            )
        if self.api_keys is not None and key not in self.api_keys:
            # OpenAI repeats the ends of the key here. We would rather not.
            raise Refusal(401, "Incorrect API key provided.", code="invalid_api_key")
        return fingerprint(key)

    def _chat(self, request: Request, key: str) -> Answer:
        fault = self._fault(request)
        if fault == "hang":
            return Answer(0, {}, fault="hang")
        if isinstance(fault, int):
            raise self._failure(fault)
        question = Question.from_json(request.body)
        refuse_unknown_model(question.model)
        completion = Completion.of(question)
        headers = {"x-request-id": f"req_{uuid.uuid4().hex}", **self._admit(key, completion)}
        answer = self._answer(completion, headers)
        return Answer(answer.status, answer.headers, answer.pieces, fault)

    def _answer(self, completion: Completion, headers: Mapping[str, str]) -> Answer:
        if completion.question.stream:
            events = completion.to_events(first_pause=self.latency, token_pause=self.per_token)
            return Answer(
                200, {"content-type": "text/event-stream; charset=utf-8", **headers}, tuple(events)
            )
        pause = self.latency + self.per_token * completion.output_tokens
        return Answer.json(200, completion.to_json(), headers, pause=pause)

    def _admit(self, key: str, completion: Completion) -> dict[str, str]:
        with self._lock:
            now = self.clock()
            allowance = self._allowances.setdefault(key, Allowance(self._full_buckets(now)))
            allowance.refill(now)
            allowance.take({"requests": 1, "tokens": completion.charge})
            return allowance.headers()

    def _full_buckets(self, now: float) -> dict[str, Bucket]:
        buckets = {}
        if self.rpm:
            buckets["requests"] = Bucket(self.rpm, capacity=self.burst or self.rpm, now=now)
        if self.tpm:
            buckets["tokens"] = Bucket(self.tpm, capacity=self.tpm, now=now)
        return buckets

    def _fault(self, request: Request) -> Fault | None:
        asked = request.headers.get("x-fail")
        if asked is not None:
            return fault_named(asked)
        with self._lock:
            return self._faults.popleft() if self._faults else None

    def _failure(self, status: int) -> Refusal:
        if status == 429:
            limit = self.rpm or 60
            empty = Bucket(limit, capacity=0, now=0)
            return Allowance({"requests": empty}).exhausted(
                "requests", requested=1, wait=60 / limit
            )
        if status == 503:
            message = "The engine is currently overloaded, please try again later."
            return Refusal(503, message, kind="server_error", code="server_is_overloaded")
        if status < 500:
            return Refusal(status, f"The request was told to fail with {status}.")
        message = "The server had an error while processing your request. Sorry about that!"
        return Refusal(status, message, kind="server_error")

    def _call(self, request: Request, answer: Answer) -> Call:
        retried = request.headers.get("upstash-retried", "")
        return Call(
            at=self.clock(),
            key=fingerprint(bearer_key(request)),
            model=model_named(request.body),
            status=None if answer.fault == "hang" else answer.status,
            message_id=request.headers.get("upstash-message-id"),
            retried=int(retried) if retried.isdecimal() else None,
        )


def bearer_key(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def fingerprint(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:12] if key else ""


def model_named(body: bytes) -> str | None:
    try:
        model = json_object(body).get("model")
    except Refusal:
        return None
    return model if isinstance(model, str) else None


def refuse_unknown_model(name: str) -> None:
    if name != MODEL:
        raise Refusal(
            404,
            f"The model `{name}` does not exist or you do not have access to it.",
            code="model_not_found",
        )


def fault_named(name: str) -> Fault:
    if name == "hang":
        return "hang"
    if name == "cut":
        return "cut"
    if re.fullmatch(r"[45]\d\d", name):
        return int(name)
    raise Refusal(
        400, f"X-Fail is a status of 400 to 599, 'hang' or 'cut', not {name!r}.", param="X-Fail"
    )


class Server(ThreadingHTTPServer):
    daemon_threads = True
    # The default of 5 turns away part of a herd before any limit has a say.
    request_queue_size = 512

    def __init__(self, address: tuple[str, int], provider: Provider) -> None:
        self.provider = provider
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        super().__init__(address, Connection)

    def server_bind(self) -> None:
        # HTTPServer's own asks DNS for this host's name, which can take seconds without a network.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._connections_lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._connections_lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """A kept connection would otherwise be served for as long as its client keeps it."""
        with self._connections_lock:
            for connection in self._connections:
                # Its own thread wakes up, finds the end and closes it.
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that went away is its own business.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Connection(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    # Head and body leave in one packet.
    wbufsize = -1
    # A kept connection that says nothing for this long is closed.
    timeout = 120

    def handle_any(self) -> None:
        provider = self.server.provider
        try:
            request = Request(self.command, self.path, dict(self.headers.items()), self._body())
        except Refusal as refusal:
            # Where this body ends and the next request begins is unknown.
            self.close_connection = True
            return self._send(refusal.answer())
        answer = provider.answer(request)
        if answer.fault == "hang":
            provider.stopped.wait()
            self.close_connection = True
            return
        self._send(answer)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

    def _body(self) -> bytes:
        if "transfer-encoding" in self.headers:
            raise Refusal(411, "A request body needs a Content-Length.")
        length = self.headers.get("content-length", "0")
        if not length.isdecimal():
            raise Refusal(400, "Content-Length is not a number.")
        if int(length) > LARGEST_BODY:
            raise Refusal(413, f"A request body has at most {LARGEST_BODY} bytes.")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionAbortedError("The client left in the middle of its request.")
        return body

    def _send(self, answer: Answer) -> None:
        if answer.fault == "cut":
            self.close_connection = True
        if "content-length" in answer.headers:
            self._send_whole(answer)
        else:
            self._send_stream(answer)

    def _send_whole(self, answer: Answer) -> None:
        for piece in answer.pieces:
            self.server.provider.think(piece)
        self._send_head(answer)
        body = answer.body
        self.wfile.write(body[: len(body) // 2] if answer.fault == "cut" else body)

    def _send_stream(self, answer: Answer) -> None:
        pieces = answer.pieces
        if answer.fault == "cut":
            pieces = pieces[: len(pieces) // 2]
        self._send_head(answer, ("transfer-encoding", "chunked"))
        for piece in pieces:
            # What is written so far must reach the client before the model thinks on.
            self.wfile.flush()
            self.server.provider.think(piece)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece.body), piece.body))
        if answer.fault != "cut":
            self.wfile.write(b"0\r\n\r\n")

    def _send_head(self, answer: Answer, *more: tuple[str, str]) -> None:
        self.send_response(answer.status)
        for name, value in (*answer.headers.items(), *more):
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("connection", "close")
        self.end_headers()

    def version_string(self) -> str:
        return MODEL

    def log_message(self, format: str, *args: Any) -> None:
        """The journal has it."""


def main() -> None:
    arguments = parser().parse_args()
    finished = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: finished.set())
    with Provider(**vars(arguments)) as provider:
        print(provider.base_url, flush=True)
        finished.wait()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="An OpenAI-compatible provider that works offline."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--rpm", type=int, help="requests per minute and key")
    parser.add_argument("--tpm", type=int, help="tokens per minute and key")
    parser.add_argument("--burst", type=int, help="requests an idle key may make at once")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds to the first token")
    parser.add_argument("--per-token", type=float, default=0.0, help="seconds for each token")
    return parser


if __name__ == "__main__":
    main()
