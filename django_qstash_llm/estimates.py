"""How many tokens a request has, before anybody has counted them.

No tokenizer: each is one model's, weighs megabytes, and most fetch their words from somewhere when first
used. Text is counted by what it is made of instead, at about what the tokenizers of 2026 make of it; how
far that is off is measured in ``tests/test_estimates.py`` on answers of real providers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEAST_SHARE = 0.6
MOST_SHARE = 1.6
"""Of what is counted, between which the provider's count is to be expected."""
PER_MESSAGE = 4
"""Tokens around each message: who speaks, where it begins and ends."""
PER_REQUEST = 3
PER_TOOL = 12
IMAGE_TOKENS = 800
MOST_IMAGE_TOKENS = 3000
"""Of one image. What it really takes depends on its size, which its URL does not say."""
AUDIO_BYTES_PER_TOKEN = 1000
LEAST_AUDIO_BYTES_PER_TOKEN = 125
"""Of sound: 10 to 32 tokens a second, of 4 to 48 kB."""
FILE_BYTES_PER_TOKEN = 20
LEAST_FILE_BYTES_PER_TOKEN = 3

_PIECES = re.compile(
    r"(?P<word>[A-Za-z]+)|(?P<number>[0-9]+)|(?P<lines>\s*\n\s*)|(?P<space>[^\S\n]+)"
    r"|(?P<wide>[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff])"
    r"|(?P<letters>[^\W\d_]+)|(?P<sign>[!-/:-@\[-`{-~]+)|(?P<rest>.)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Counted:
    """Tokens of an input."""

    likely: int
    least: int
    most: int
    has_audio: bool = False
    is_kept_for_an_hour: bool = False
    """Whether it asks that some of it be kept in a cache for so long."""


def count_input(messages: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any]) -> Counted:
    """Of chat messages, tools and a schema for the answer, in OpenAI's shape or Anthropic's."""
    reader = _Reader()
    for message in messages:
        reader.text += PER_MESSAGE
        for name, value in message.items():
            reader.read(name, value)
    for name in ("tools", "functions"):
        for tool in _items(parameters.get(name)):
            reader.text += PER_TOOL + _of_json(tool)
    for name in ("response_format", "output_config", "system"):
        if parameters.get(name):
            reader.text += _of_json(parameters[name])
    likely = PER_REQUEST + reader.text
    least, most = math.floor(likely * LEAST_SHARE), math.ceil(likely * MOST_SHARE)
    return Counted(
        likely=math.ceil(likely + reader.other),
        least=least,
        most=math.ceil(most + reader.most_other),
        has_audio=reader.has_audio,
        is_kept_for_an_hour=reader.is_kept_for_an_hour,
    )


def count_text(text: str) -> float:
    """Tokens of a text, about."""
    pieces = _PIECES.finditer(text)
    return math.fsum(_COUNTS[match.lastgroup or "rest"](match.group()) for match in pieces)


def _of_word(word: str) -> float:
    return 1 + max(0, len(word) - 7) / 5


_COUNTS: dict[str, Any] = {
    "word": _of_word,
    "number": lambda digits: math.ceil(len(digits) / 3),
    "lines": lambda _: 1,
    "space": lambda space: 0 if len(space) == 1 else 1,
    "wide": lambda _: 0.9,
    "letters": lambda letters: 1 + max(0, len(letters) - 3) / 3,
    "sign": lambda signs: 0.5 + len(signs) / 2,
    "rest": lambda _: 1.5,
}


class _Reader:
    """Adds up what there is in messages."""

    def __init__(self) -> None:
        self.text = 0.0
        self.other = 0.0
        """Images, sound and files, of which no text tells the tokens."""
        self.most_other = 0.0
        self.has_audio = False
        self.is_kept_for_an_hour = False

    def read(self, name: str, value: Any) -> None:
        """A field of a message."""
        if name == "role":
            return
        if isinstance(value, str):
            self.text += count_text(value)
        elif name == "content":
            for part in _items(value):
                self._read_part(part)
        elif value is not None:
            self.text += _of_json(value)

    def _read_part(self, part: Any) -> None:
        if not isinstance(part, Mapping):
            self.text += count_text(str(part))
            return
        if isinstance(part.get("cache_control"), Mapping):
            self.is_kept_for_an_hour |= part["cache_control"].get("ttl") == "1h"
        kind = str(part.get("type"))
        if isinstance(part.get("text"), str):
            self.text += count_text(part["text"])
        elif "image" in kind:
            self._add(IMAGE_TOKENS, MOST_IMAGE_TOKENS)
        elif "audio" in kind:
            self.has_audio = True
            size = _weight(part)
            self._add(size / AUDIO_BYTES_PER_TOKEN, size / LEAST_AUDIO_BYTES_PER_TOKEN)
        elif kind in {"file", "document"}:
            size = _weight(part)
            self._add(size / FILE_BYTES_PER_TOKEN, size / LEAST_FILE_BYTES_PER_TOKEN)
        elif kind == "tool_result":
            self.read("content", part.get("content"))
        else:
            self.text += _of_json(part)

    def _add(self, tokens: float, most: float) -> None:
        self.other += tokens
        self.most_other += most


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _of_json(value: Any) -> float:
    """JSON is shown to models in fewer signs than it is written in."""
    return count_text(json.dumps(value, ensure_ascii=False, default=str).replace('"', ""))


def _weight(part: Mapping[str, Any]) -> float:
    """Bytes of what is encoded in it as base64."""
    return len(json.dumps(part, default=str)) * 3 / 4
