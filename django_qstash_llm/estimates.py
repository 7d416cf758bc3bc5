"""How many tokens a request has, before anybody has counted them.

No tokenizer: each is one model's, weighs megabytes, and most fetch their words from somewhere when first
used. Text is counted by what it is made of instead, at about what the tokenizers of 2026 make of it; how
far that is off is measured in ``tests/test_estimates.py`` on answers of real providers.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

LEAST_SHARE = 0.6
"""Of the text that is counted: fewer it hardly ever is."""
PER_MESSAGE = 4
MOST_PER_MESSAGE = 10
"""Tokens around each message: who speaks, where it begins and ends."""
PER_REQUEST = 3
MOST_PER_REQUEST = 100
"""Some models are told the date and more before anything else."""
PER_TOOL = 12
MOST_FOR_TOOLS = 600
"""What models are told about tools at all, where there are any."""
MOST_PER_OWN_TOOL = 3000
"""And about each that the provider itself runs."""
SLICES, SLICE = 16, 1000
"""How many places of a long text are looked at, and how many letters of each."""
IMAGE_TOKENS = 800
MOST_IMAGE_TOKENS = 3000
"""Of one image. What it really takes depends on its size, which its URL does not say."""
AUDIO_BYTES_PER_TOKEN = 1000
LEAST_AUDIO_BYTES_PER_TOKEN = 125
"""Of sound: 10 to 32 tokens a second, of 4 to 48 kB."""
FILE_BYTES_PER_TOKEN = 20
LEAST_FILE_BYTES_PER_TOKEN = 3

_PIECES = re.compile(
    r"(?P<word>[A-Z]?[a-z]+)|(?P<capitals>[A-Z]+)|(?P<number>[0-9]+)|(?P<lines>\s*\n\s*)"
    r"|(?P<space>[^\S\n]+)|(?P<sign>[!-/:-@\[-`{-~]+)"
    r"|(?P<wide>[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff])"
    r"|(?P<picture>[\u2000-\u2e7f\ufe00-\ufe0f\U0001f000-\U0001ffff])"
    r"|(?P<unspaced>[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])"
    # The letters of other scripts, with what is written above and below them.
    r"|(?P<letters>[^\x00-\x7f\s]+?(?=[\x00-\x7f\s\u2000-\u9fff\uac00-\ud7af\U0001f000-\U0003ffff]|\Z))"
    r"|(?P<rest>.)",
    re.DOTALL,
)
_LONG = re.compile(rb"[a-z]{8,}")
_CAPITALS = re.compile(rb"[A-Z]{2,}")
_HUMPS = re.compile(rb"[a-z][A-Z]")
_GAPS = re.compile(rb"\s{2,}|\n")


def _kind(kept: str) -> tuple[bytes, bytes]:
    """All other bytes, and a table that makes spaces of them."""
    others = bytes(each for each in range(256) if chr(each) not in kept)
    return others, bytes(each if chr(each) in kept else 32 for each in range(256))


_LETTERS, _LARGE = _kind(string.ascii_letters), _kind(string.ascii_uppercase)
_DIGITS, _SIGNS = _kind(string.digits), _kind(string.punctuation)
_SIGNS_OF_JSON = re.compile(r'[{}\[\]":,\s]+')
_COUNTS: dict[str, Callable[[int], float]] = {
    "word": lambda length: 1 + max(0, length - 7) / 4.5,
    "capitals": lambda length: max(1, length / 2.5),
    "number": lambda length: math.ceil(length / 3),
    "lines": lambda _: 1,
    "space": lambda length: 0 if length == 1 else 1,
    "sign": lambda length: 0.4 + length / 2.2,
    "wide": lambda _: 0.85,
    "unspaced": lambda _: 0.5,
    "picture": lambda _: 1.4,
    "letters": lambda length: 1 + max(0, length - 3) / 3.5,
    "rest": lambda _: 1.5,
}
"""Tokens of a piece, by its length."""
_TIMES = {"wide": 1.8, "unspaced": 2.5, "picture": 3.0, "letters": 3.8}
"""How many times as many it may be: older tokenizers know few letters but the Latin ones."""
_MOST_TIMES = 1.6
"""Of the others."""


@dataclass(frozen=True)
class Counted:
    """Tokens of an input."""

    likely: int
    least: int
    most: int
    has_audio: bool = False
    is_kept_for_an_hour: bool = False
    """Whether it asks that some of it be kept in a cache for so long."""


@dataclass
class Weight:
    """Of something, about how many tokens and how many at the most."""

    likely: float = 0.0
    most: float = 0.0

    def add(self, other: Weight) -> None:
        self.likely += other.likely
        self.most += other.most


def weigh(text: str) -> Weight:
    """Of a long text some places say what all of it weighs: a megabyte would take a third of a second."""
    if len(text) <= SLICES * SLICE:
        return _weigh(text)
    weight, step = Weight(), len(text) // SLICES
    for start in range(0, step * SLICES, step):
        weight.add(_weigh(text[start : start + SLICE]))
    share = len(text) / (SLICES * SLICE)
    return Weight(weight.likely * share, weight.most * share)


@lru_cache(maxsize=64)
def _weigh(text: str) -> Weight:
    """Kept, because the same instructions stand before many questions. Not to be added to."""
    if text.isascii():
        likely = _of_ascii(text.encode())
        return Weight(likely, likely * _MOST_TIMES)
    likely = most = 0.0
    for match in _PIECES.finditer(text):
        kind = match.lastgroup or "rest"
        tokens = _COUNTS[kind](match.end() - match.start())
        likely += tokens
        most += tokens * _TIMES.get(kind, _MOST_TIMES)
    return Weight(likely, most)


def _of_ascii(text: bytes) -> float:
    """The same as ``_COUNTS`` of its pieces, by how many bytes of each kind there are, and in how many
    runs: budgets weigh every request, and looking at each piece takes longer than to submit it."""
    words, letters = _runs(text, _LETTERS)
    _, large = _runs(text, _LARGE)
    is_written = large * 8 > letters  # and not only at the beginning of sentences
    long, capitals = _LONG.findall(text), _CAPITALS.findall(text) if is_written else []
    numbers, digits = _runs(text, _DIGITS)
    groups, signs = _runs(text, _SIGNS)
    return (
        words
        + (len(_HUMPS.findall(text)) if is_written else 0)
        + (len(b"".join(long)) - 7 * len(long)) / 4.5
        + sum(max(0, len(each) / 2.5 - 1) for each in capitals)
        + max(numbers, math.ceil(digits / 3))
        + 0.4 * groups
        + signs / 2.2
        + (len(_GAPS.findall(text)) if b"\n" in text or b"  " in text else 0)
    )


def _runs(text: bytes, kind: tuple[bytes, bytes]) -> tuple[int, int]:
    """How many runs of the bytes of a kind there are, and how many of these."""
    others, as_spaces = kind
    return len(text.translate(as_spaces).split()), len(text.translate(None, others))


def count_input(messages: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any]) -> Counted:
    """Of chat messages, tools and a schema for the answer, in OpenAI's shape or Anthropic's."""
    reader = _Reader()
    for message in messages:
        for name, value in message.items():
            reader.read(name, value)
    if parameters.get("system"):
        reader.read("content", parameters["system"])
    told, around = reader.text, Weight()
    around.add(Weight(PER_MESSAGE * len(messages), MOST_PER_MESSAGE * len(messages)))
    around.add(Weight(PER_REQUEST, MOST_PER_REQUEST))
    tools = [*_items(parameters.get("tools")), *_items(parameters.get("functions"))]
    for tool in tools:
        around.add(_of_json(tool))
        is_own = isinstance(tool, Mapping) and tool.get("type", "function") not in _DESCRIBED
        around.add(Weight(PER_TOOL, MOST_PER_OWN_TOOL if is_own else 2 * PER_TOOL))
    around.add(Weight(0, MOST_FOR_TOOLS if tools else 0))
    for name in ("response_format", "output_config"):
        if parameters.get(name):
            around.add(_of_json(parameters[name]))
    return Counted(
        likely=math.ceil(told.likely + around.likely + reader.other.likely),
        # What stands around the text some do not count, nor say what an image takes.
        least=math.floor(told.likely * LEAST_SHARE),
        most=math.ceil(told.most + around.most + reader.other.most),
        has_audio=reader.has_audio,
        is_kept_for_an_hour=reader.is_kept_for_an_hour,
    )


_DESCRIBED = {"function", "custom"}
"""Types of tools that the request itself tells all about."""


class _Reader:
    """Adds up what there is in messages."""

    def __init__(self) -> None:
        self.text = Weight()
        self.other = Weight()
        """Images, sound and files, of which no text tells the tokens."""
        self.has_audio = False
        self.is_kept_for_an_hour = False

    def read(self, name: str, value: Any) -> None:
        """A field of a message."""
        if name == "role" or name.endswith("_id"):
            return
        if isinstance(value, str):
            self.text.add(weigh(value))
        elif name == "content":
            for part in _items(value):
                self._read_part(part)
        elif value is not None:
            self.text.add(_of_json(value))

    def _read_part(self, part: Any) -> None:
        if not isinstance(part, Mapping):
            self.text.add(weigh(str(part)))
            return
        if isinstance(part.get("cache_control"), Mapping):
            self.is_kept_for_an_hour |= part["cache_control"].get("ttl") == "1h"
        kind = str(part.get("type"))
        if isinstance(part.get("text"), str):
            self.text.add(weigh(part["text"]))
        elif "image" in kind:
            self.other.add(Weight(IMAGE_TOKENS, MOST_IMAGE_TOKENS))
        elif "audio" in kind:
            self.has_audio = True
            size = _bytes(part)
            self.other.add(Weight(size / AUDIO_BYTES_PER_TOKEN, size / LEAST_AUDIO_BYTES_PER_TOKEN))
        elif kind in {"file", "document"}:
            size = _bytes(part)
            self.other.add(Weight(size / FILE_BYTES_PER_TOKEN, size / LEAST_FILE_BYTES_PER_TOKEN))
        elif kind == "tool_result":
            self.read("content", part.get("content"))
        else:
            self.text.add(_of_json(part))


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _of_json(value: Any) -> Weight:
    """A description is shown to models in fewer signs than JSON is written in, or as it is written."""
    written = weigh(json.dumps(value, ensure_ascii=False, default=str))
    words = weigh(_SIGNS_OF_JSON.sub(" ", json.dumps(value, ensure_ascii=False, default=str)))
    return Weight(words.likely, written.most)


def _bytes(part: Mapping[str, Any]) -> float:
    """Of what is encoded in it as base64."""
    return len(json.dumps(part, default=str)) * 3 / 4
