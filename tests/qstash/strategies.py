"""Anything the wire formats can hold, for round trips."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import settings
from hypothesis import strategies as st

from django_qstash_llm.qstash import FlowControl, Message, Options
from django_qstash_llm.qstash.message import JSONText
from django_qstash_llm.qstash.options import METHODS, canonical

fuzz = settings(max_examples=50, deadline=None, database=None)

names = st.from_regex(r"[A-Za-z0-9_.-]{1,20}", fullmatch=True).filter(
    lambda name: name not in {".", ".."}
)
printable = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20).map(
    str.strip
)
headers = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,12}", fullmatch=True).map(canonical),
    printable,
    max_size=3,
)
labels = printable.map(lambda text: text.replace(",", "").strip()).filter(bool)
# On the wire to the nanosecond, and moments to the second.
seconds = st.integers(1, 10**12 - 1).map(lambda milliseconds: milliseconds / 1000)
moments = st.integers(0, 253_402_300_799).map(lambda unix: datetime.fromtimestamp(unix, tz=UTC))
counts = st.integers(1, 2**31 - 1)
flow_controls = st.builds(
    FlowControl,
    key=names,
    parallelism=st.none() | counts,
    rate=counts,
    period=st.integers(1, 7 * 86_400),
) | st.builds(FlowControl, key=names, parallelism=counts, period=st.integers(1, 7 * 86_400))

settings_of_both = {
    "method": st.sampled_from(METHODS),
    "headers": headers,
    "delay": st.none() | seconds,
    "not_before": st.none() | moments,
    "retries": st.none() | st.integers(0, 2**31 - 1),
    "retry_delay": st.sampled_from(["", "1000", "1000 * (1 + retried)", "max(1, pow(2, retried))"]),
    "timeout": st.none() | seconds,
    "content_based_deduplication": st.booleans(),
    "flow_control": st.none() | flow_controls,
    "labels": st.lists(labels, max_size=3).map(tuple),
    "redact": st.lists(
        st.sampled_from(["body", "header", "header[Authorization]", "HEADERS[x-api-key]"]),
        max_size=3,
    ).map(tuple),
}
# Options that say nothing leave no trace on the wire, so "none" is what comes back.
callback_options = st.none() | st.builds(Options, **settings_of_both).filter(
    lambda options: options != Options()
)
options = st.builds(
    Options,
    **settings_of_both,
    content_type=printable,
    callback=callback_options,
    failure_callback=callback_options,
)

urls = st.builds(
    lambda host, path, query: f"https://{host}/{path}{query}",
    st.sampled_from(["example.com", "h", "127.0.0.1:8080", "[::1]:80", "xn--bcher-kva.example"]),
    st.sampled_from(["", "v1/chat/completions", "a//b", "%2e%2e/a", "a/b.c/...", "@x"]),
    st.sampled_from(["", "?", "?a=1&b=%20", "?u=https://x/../y", "?a[]={}"]),
)
json_texts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
).map(JSONText.dump)
messages = st.builds(
    Message,
    urls | names | st.just("group.of-urls"),
    st.text(st.characters(exclude_categories=["Cs"])).map(str.encode) | json_texts,
    options,
    queue=st.just("") | names,
    deduplication_id=st.just("") | names,
    callback=st.just("") | urls,
    failure_callback=st.just("") | urls,
    label=st.just("") | names,
)
