"""Counting without a tokenizer, against what real providers counted.

``RECORDED`` are requests and the tokens that their providers answered with, as recorded in the tests of
pydantic-ai (MIT; github.com/pydantic/pydantic-ai, tests/models/cassettes, named here by their file).
``TEXTS`` is the first article of the Universal Declaration of Human Rights, and what OpenAI's tokenizers
``o200k_base`` (of today's models) and ``cl100k_base`` (of former ones) make of it.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from django_qstash_llm.estimates import SLICE, SLICES, Weight, count_input, weigh


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def function(name: str, description: str = "", **properties: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = {"additionalProperties": False, "properties": properties}
    parameters |= {"type": "object"} | ({"required": list(properties)} if properties else {})
    of = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": of}


def called(name: str, arguments: str, answer: str) -> list[dict[str, Any]]:
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
    tool = {"role": "tool", "tool_call_id": "call_1", "content": answer}
    return [{"role": "assistant", "content": None, "tool_calls": [call]}, tool]


CITY = {
    "type": "json_schema",
    "json_schema": {
        "name": "CityLocation",
        "description": "A city and its country.",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "country": {"type": "string"}},
            "required": ["city", "country"],
            "additionalProperties": False,
        },
    },
}
AS_JSON = (
    "\nAlways respond with a JSON object that's compatible with this schema:\n\n"
    '{"properties": {"city": {"type": "string"}, "country": {"type": "string"}}, "required": ["city", '
    '"country"], "type": "object", "additionalProperties": false, "title": "CityLocation"}\n\n'
    "Don't include any text or Markdown fencing before or after.\n"
)
KINDS_AS_JSON = (
    "Always respond with a JSON object that's compatible with this schema:\n\n"
    '{"type": "object", "properties": {"result": {"anyOf": [{"type": "object", "properties": {"kind": '
    '{"type": "string", "const": "CityLocation"}, "data": {"properties": {"city": {"type": "string"}, '
    '"country": {"type": "string"}}, "required": ["city", "country"], "type": "object"}}, "required": '
    '["kind", "data"], "additionalProperties": false, "title": "CityLocation"}, {"type": "object", '
    '"properties": {"kind": {"type": "string", "const": "CountryLanguage"}, "data": {"properties": '
    '{"country": {"type": "string"}, "language": {"type": "string"}}, "required": ["country", '
    '"language"], "type": "object"}}, "required": ["kind", "data"], "additionalProperties": false, '
    '"title": "CountryLanguage"}]}}, "required": ["result"], "additionalProperties": false}\n\n'
    "Don't include any text or Markdown fencing before or after.\n"
)
COUNTRY = function("get_user_country")
TEMPERATURE = function("get_temperature", city={"type": "string"})
DIVIDE = function(
    "divide",
    "Divide two numbers.",
    denominator={"type": "number"},
    numerator={"type": "number"},
    on_inf={"default": "infinity", "enum": ["error", "infinity"], "type": "string"},
)
ASK_COUNTRY = user("What is the largest city in the user country?")
HELPFUL = system("You are a helpful assistant.")
TOKYO = user("What is the temperature in Tokyo?")
PYTHON = user("Please explain what Python is and its main use cases. " * 100)
DOCUMENT = (
    'What is the main content on this document?-----BEGIN FILE id="f58746" type="text/plain"-----\n'
    'Dummy TXT file\n\n-----END FILE id="f58746"-----'
)

# file, messages, parameters, tokens of the input
RECORDED: list[tuple[str, list[dict[str, Any]], dict[str, Any], int]] = [
    ("anthropic_model_instructions", [HELPFUL, user("What is the capital of France?")], {}, 20),
    ("anthropic_cache_real_api", [HELPFUL, PYTHON], {}, 1114),
    (
        "anthropic_prompted_output_multiple",
        [system(KINDS_AS_JSON), user("What is the largest city in Mexico?")],
        {},
        265,
    ),
    (
        "anthropic_prompted_output",
        [
            system(AS_JSON),
            user(
                "What is the largest city in the user country? Use the get_user_country tool and then "
                "your own world knowledge."
            ),
        ],
        {"tools": [COUNTRY]},
        459,
    ),
    (
        "anthropic_unsupported_model_uses_previous_web_tools",
        [user("Reply with exactly: ok")],
        {
            "tools": [
                {"type": "web_search_20250305", "name": "web_search"},
                {"type": "web_fetch_20250910", "name": "web_fetch"},
            ]
        },
        2743,
    ),
    ("openai_native_output", [ASK_COUNTRY], {"tools": [COUNTRY], "response_format": CITY}, 79),
    (
        "openai_native_output, second",
        [ASK_COUNTRY, *called("get_user_country", "{}", "Mexico")],
        {"tools": [COUNTRY], "response_format": CITY},
        100,
    ),
    ("openai_prompted_output", [system(AS_JSON), ASK_COUNTRY], {"tools": [COUNTRY]}, 116),
    (
        "openai_prompted_output, second",
        [system(AS_JSON), ASK_COUNTRY, *called("get_user_country", "{}", "Mexico")],
        {"tools": [COUNTRY]},
        137,
    ),
    ("openai_instructions_with_tool_calls", [HELPFUL, TOKYO], {"tools": [TEMPERATURE]}, 50),
    (
        "openai_instructions_with_tool_calls, second",
        [HELPFUL, TOKYO, *called("get_temperature", '{"city":"Tokyo"}', "20.0")],
        {"tools": [TEMPERATURE]},
        75,
    ),
    ("openai_model_cerebras_provider", [user("What is the capital of France?")], {}, 42),
    ("groq_native_output", [user("What is the largest city in Mexico?")], {"response_format": CITY}, 178),
    ("deepseek_model_thinking_part", [user("How do I cross the street?")], {}, 12),
    ("mistral_forwards_penalties", [user("hello")], {}, 4),
    ("mistral text_document_as_binary_content_input", [user(DOCUMENT)], {}, 49),
    (
        "google_model_thinking_config",
        [system("You are a helpful chatbot."), user("What is the capital of France?")],
        {},
        15,
    ),
    (
        "google_native_output_multiple",
        [user("What is the primarily language spoken in Mexico?")],
        {"response_format": {"json_schema": KINDS_AS_JSON}},
        9,
    ),
    ("openrouter_usage", [system("Be helpful."), user("Tell me about Venus")], {}, 17),
    ("openrouter_kimi_k2_5", [user("What is 2+2? Answer with just the number.")], {}, 20),
    ("openrouter_tool_calling", [user("What is 123 / 456?")], {"tools": [DIVIDE]}, 134),
]  # fmt: skip

# language, text, tokens of o200k_base, of cl100k_base
TEXTS = [
    (
        "English",
        "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and should act towards one another in a spirit of brotherhood.",
        33,
        33,
    ),
    (
        "German",
        "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und sollen einander im Geist der Brüderlichkeit begegnen.",
        38,
        44,
    ),
    (
        "Finnish",
        "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on annettu järki ja omatunto, ja heidän on toimittava toisiaan kohtaan veljeyden hengessä.",
        54,
        68,
    ),
    (
        "Russian",
        "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны поступать в отношении друг друга в духе братства.",
        41,
        74,
    ),
    (
        "Greek",
        "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι προικισμένοι με λογική και συνείδηση, και οφείλουν να συμπεριφέρονται μεταξύ τους με πνεύμα αδελφοσύνης.",
        71,
        172,
    ),
    (
        "Arabic",
        "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميراً وعليهم أن يعامل بعضهم بعضاً بروح الإخاء.",
        43,
        88,
    ),
    (
        "Hindi",
        "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।",
        54,
        180,
    ),
    ("Chinese", "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。", 35, 50),
    (
        "Japanese",
        "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない。",
        72,
        93,
    ),
    (
        "Korean",
        "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다.",
        51,
        85,
    ),
    (
        "Thai",
        "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ",
        63,
        135,
    ),
    ("emoji", "🎉👍😀 👩‍👩‍👧 🇩🇪 ok 🚀🚀", 21, 33),
    ("digits", "3.14159265358979323846 2026-11-27T07:16:49.123456+00:00 1,234,567,890", 37, 37),
    (
        "base64",
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkM9QDwADhgGAWjR9awAAAABJRU5ErkJggg==",
        53,
        54,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "parameters", "tokens"),
    [pytest.param(*recorded[1:], id=recorded[0]) for recorded in RECORDED],
)
def test_what_a_provider_counted_is_between_the_least_and_the_most(
    messages: list[dict[str, Any]], parameters: dict[str, Any], tokens: int
) -> None:
    counted = count_input(messages, parameters)
    assert counted.least <= tokens <= counted.most


@pytest.mark.parametrize(
    ("text", "today", "formerly"), [pytest.param(*text[1:], id=text[0]) for text in TEXTS]
)
def test_text_of_any_script_is_about_what_todays_tokenizer_makes_of_it(
    text: str, today: int, formerly: int
) -> None:
    weight = weigh(text)
    assert 0.65 <= weight.likely / today <= 1.35
    assert weight.most >= max(today, 0.9 * formerly)


def test_how_far_the_count_is_off_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Requests by a quarter: what is further off is what providers add themselves, to tools above all."""
    lines, errors = [], []
    for name, messages, parameters, tokens in RECORDED:
        counted = count_input(messages, parameters)
        errors.append(counted.likely / tokens - 1)
        lines.append(
            f"{tokens:6} counted {counted.likely:6} {errors[-1]:+5.0%} "
            f"({counted.least}-{counted.most}) {name}"
        )
    for name, text, today, _ in TEXTS:
        likely = weigh(text).likely
        lines.append(f"{today:6} counted {likely:6.0f} {likely / today - 1:+5.0%} {name}")
    text_errors = [abs(weigh(text).likely / today - 1) for _, text, today, _ in TEXTS]
    with capsys.disabled():
        print("\nTokens of an input, and how far they are off:", *lines, sep="\n")
        print(
            f"median error of requests {statistics.median(map(abs, errors)):.0%}, "
            f"of texts {statistics.median(text_errors):.0%}, worst text {max(text_errors):.0%}"
        )
    assert statistics.median(map(abs, errors)) <= 0.35
    assert statistics.median(text_errors) <= 0.2


def test_long_text_is_weighed_by_some_places_of_it() -> None:
    line = "The quick brown fox jumps over the lazy dog, twice in 2026: “naïve” 你好.\n"
    text = line * 2000
    assert len(text) > SLICES * SLICE
    exact = weigh(line).likely * 2000
    assert weigh(text).likely == pytest.approx(exact, rel=0.03)


def test_nothing_weighs_nothing() -> None:
    assert weigh("") == Weight()
    assert count_input([], {}).least == 0


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "A" * 40_000, "format": "mp3"}}
FILE = {"type": "file", "file": {"file_data": "A" * 40_000}}


def test_images_sound_and_files_are_in_the_most() -> None:
    plain = count_input([user("hi")], {})
    for part, least_most in ((IMAGE, 1105), (SOUND, 240), (FILE, 1500)):
        with_it = count_input([{"role": "user", "content": [part, {"text": "hi"}]}], {})
        assert with_it.likely > plain.likely
        assert with_it.most - plain.most >= least_most
        assert with_it.has_audio is (part is SOUND)


def test_cache_that_is_kept_for_an_hour_is_seen() -> None:
    def kept(ttl: str) -> bool:
        part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral", "ttl": ttl}}
        return count_input([{"role": "user", "content": [part]}], {}).is_kept_for_an_hour

    assert (kept("5m"), kept("1h")) == (False, True)


def test_any_shape_of_a_message_is_counted() -> None:
    odd = [
        {"role": "user", "content": None, "name": "ada"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "x"}], "refusal": None},
        {"role": "user", "content": ["text", 7, {"type": "tool_result", "content": "answer"}]},
        {"role": "user", "content": [{"type": "thinking", "thinking": "…"}]},
    ]
    assert count_input(odd, {"tools": "none", "functions": [{}], "system": "Be brief."}).likely > 10
