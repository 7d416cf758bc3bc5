from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.django import TestCase

from django_qstash_llm.cleaning import DEEPEST, clean_json, clean_text
from django_qstash_llm.models import CallbackResponse


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("plain", "plain"),
        ("", ""),
        ("a\x00b\x00", "ab"),
        ("half \ud800 pair", "half � pair"),
        ("\udfff", "�"),
        ("\ud83d\ude00", "\U0001f600"),
        ("tab\tnewline\n", "tab\tnewline\n"),
        ("‮gnirts", "‮gnirts"),
    ],
)
def test_text_is_made_fit_for_every_database(text: str, clean: str) -> None:
    assert clean_text(text) == clean


def test_text_is_cut_to_the_limit() -> None:
    assert clean_text("é" * 300, limit=255) == "é" * 255
    assert clean_text("ab\x00cd", limit=3) == "abc"


@pytest.mark.parametrize(
    ("value", "clean"),
    [
        (None, None),
        (True, True),
        (7, 7),
        (-(2**62), -(2**62)),
        (2**63, str(2**63)),
        (-(2**64), str(-(2**64))),
        (0.5, 0.5),
        (float("nan"), None),
        (float("inf"), None),
        (float("-inf"), None),
        ("a\x00", "a"),
        (["a\x00", {"b\x00": "\ud800"}], ["a", {"b": "�"}]),
        ((1, 2), [1, 2]),
        ({1: "a"}, {"1": "a"}),
        (b"bytes", "b'bytes'"),
    ],
)
def test_json_is_made_fit_for_every_database(value: Any, clean: Any) -> None:
    assert clean_json(value) == clean


def test_deep_json_is_cut_and_not_followed() -> None:
    deep = json.loads("[" * 900 + "]" * 900)
    clean = clean_json(deep)
    for _ in range(DEEPEST - 1):
        [clean] = clean
    assert clean == ["…"]


def test_deep_objects_are_cut_and_not_followed() -> None:
    clean = clean_json(json.loads('{"a":' * 900 + "1" + "}" * 900))
    for _ in range(DEEPEST):
        assert list(clean) == ["a"]
        clean = clean["a"]
    assert clean == "…"


def test_lists_and_objects_count_alike_for_the_depth() -> None:
    clean = clean_json(json.loads('[{"a":' * 100 + "1" + "}]" * 100))
    for _ in range(DEEPEST // 2):
        [inner] = clean
        clean = inner["a"]
    assert clean == "…"


def test_number_of_ten_thousand_digits_is_cut() -> None:
    assert clean_json(10**10_000) == "…"


@pytest.mark.parametrize("sign", [1, -1])
def test_number_of_a_thousand_digits_keeps_the_first_ones(sign: int) -> None:
    widest = 2**4095 - 1
    assert clean_json(sign * widest) == str(sign * widest)[:64]
    assert clean_json(sign * (widest + 1)) == "…"


any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.floats(allow_nan=True)
    | st.integers()
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


class TestOnTheDatabase(TestCase):
    @settings(max_examples=60, deadline=None)
    @given(value=any_json, text=st.text(st.characters(exclude_categories=())))
    def test_whatever_was_cleaned_is_stored_and_comes_back(self, value: Any, text: str) -> None:
        kept = clean_json({"it": value})
        row = CallbackResponse.objects.create(
            uuid="00000000-0000-0000-0000-000000000001",
            kind="callback",
            source_message_id="m",
            header=kept,
            problem=clean_text(text),
        )
        row.refresh_from_db()
        row.delete()
        assert (as_floats(row.header), row.problem) == (as_floats(kept), clean_text(text))


def as_floats(value: Any) -> Any:
    """PostgreSQL keeps 1e16 as a whole number."""
    if isinstance(value, dict):
        return {key: as_floats(each) for key, each in value.items()}
    if isinstance(value, list):
        return [as_floats(each) for each in value]
    return float(value) if type(value) is int else value
