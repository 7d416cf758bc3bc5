from __future__ import annotations

import socket

import pytest
from django.test import override_settings

from django_qstash_llm.server.destinations import (
    allowed_addresses,
    mapped,
    problem_with_mapping,
    refuse_literal_address,
)
from django_qstash_llm.server.exceptions import AddressRefused

LOOPBACK = [
    "http://127.0.0.1/",
    "http://127.8.9.1:8000/",
    "http://localhost/",
    "http://LOCALHOST./",
    "http://api.localhost/",
    "http://0.0.0.0/",
    "http://[::1]/",
    "http://[::]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.1/",
    "http://127.1/",
    "http://017700000001/",
    "http://[::ffff:0:7f00:1]/",
]
PRIVATE = [
    "http://10.0.0.1/",
    "http://192.168.1.1/",
    "http://172.16.0.1/",
    "http://100.64.0.1/",
    "http://[fd00::1]/",
    "http://[::ffff:10.0.0.1]/",
    "http://[2002:0a00:0001::]/",
    "http://[fec0::1]/",
    "http://[feff::1]/",
    "http://[::ffff:0:10.0.0.1]/",
]
NEVER = [
    "http://169.254.169.254/latest/",
    "http://[fe80::1]/",
    "http://[fd00:ec2::254]/",
    "http://[::ffff:169.254.169.254]/",
    "http://[::169.254.169.254]/",
    "http://100.100.100.200/",
    "http://192.0.0.192/",
    "http://168.63.129.16/",
    "http://metadata.google.internal/computeMetadata/v1/",
    "http://METADATA.google.internal./",
    "http://224.0.0.1/",
    "http://[::ffff:0:a9fe:a9fe]/",
]
PUBLIC = [
    *("https://api.openai.com/v1", "http://93.184.216.34/", "http://[2606:4700::1111]/"),
    *("http://[::ffff:0:93.184.216.34]/", "https://xn--mller-kva.example/", "https://a_b.test:1/"),
    *(
        "https://m\xfcller.example/",
        "https://M\xdcLLER.example/",
        "https://\u4f8b\u3048.\u30c6\u30b9\u30c8/",
    ),
    "https://\u0939\u093f\u0928\u094d\u0926\u0940.example/",
]


@pytest.mark.parametrize("url", [*LOOPBACK, *PRIVATE, *NEVER])
def test_addresses_inside_are_refused(url: str) -> None:
    with pytest.raises(AddressRefused, match=r"endpoint resolves to a .* address"):
        refuse_literal_address(url)


@pytest.mark.parametrize("url", PUBLIC)
def test_addresses_outside_are_not(url: str) -> None:
    refuse_literal_address(url)


def test_the_refusal_reads_like_qstashs() -> None:
    with pytest.raises(
        AddressRefused, match=r"^endpoint resolves to a loopback address: 127.0.0.1$"
    ):
        refuse_literal_address("http://localhost:8000/")


@pytest.mark.parametrize("url", LOOPBACK)
@override_settings(QSTASH_SERVER={"ALLOW_LOOPBACK": True})
def test_loopback_may_be_allowed(url: str) -> None:
    refuse_literal_address(url)


@pytest.mark.parametrize("url", PRIVATE)
@override_settings(QSTASH_SERVER={"ALLOW_PRIVATE_DESTINATIONS": True})
def test_private_networks_may_be_allowed(url: str) -> None:
    refuse_literal_address(url)


@pytest.mark.parametrize("url", NEVER)
@override_settings(QSTASH_SERVER={"ALLOW_PRIVATE_DESTINATIONS": True, "ALLOW_LOOPBACK": True})
def test_the_clouds_metadata_never_is(url: str) -> None:
    with pytest.raises(AddressRefused):
        refuse_literal_address(url)


@pytest.mark.parametrize(
    "host",
    [
        *("127\u30020\u30020\u30021", "127\uff0e0\uff0e0\uff0e1", "\uff11\uff12\uff17.0.0.1"),
        *("localhost\u3002", "\u24dbocalhost", "metadata.google.internal\uff61", "loca\u017fhost"),
        *(
            "a\u200b.test",
            "a\u200d.test",
            "a\u00ad.test",
            "\u2179.test",
            "\u0661\u0662\u0667.0.0.1",
        ),
        "a\ufe00.test\u2024",
    ],
    ids=ascii,
)
def test_a_host_that_would_be_another_to_whoever_connects_is_refused(host: str) -> None:
    with pytest.raises(AddressRefused, match="endpoint's host holds what no name does"):
        refuse_literal_address(f"http://{host}/")


@pytest.mark.parametrize(
    "url",
    ["http://[::1", "http://a.test:99999/", "http:///path", "http://a.test:0/", "http://a.test:00"],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(AddressRefused, match="endpoint"):
        refuse_literal_address(url)


def test_a_name_is_looked_at_when_it_is_connected_to() -> None:
    with pytest.raises(AddressRefused, match="loopback"):
        allowed_addresses("localhost", 80)


@override_settings(QSTASH_SERVER={"ALLOW_LOOPBACK": True})
def test_the_addresses_that_were_looked_at_are_the_ones_to_use() -> None:
    addresses = allowed_addresses("localhost", 80)
    assert set(addresses) <= {"127.0.0.1", "::1"}
    assert addresses


def test_a_name_that_does_not_resolve_is_no_refusal() -> None:
    with pytest.raises(socket.gaierror):
        allowed_addresses("nowhere.invalid", 80)


# --- what is called in its place -----------------------------------------------------------------

MAP = {
    "Api.Example.com": "http://localhost:8000",
    "api.example.com:8443": "https://127.0.0.1:9000/base/",
    "[2606:4700::1111]": "http://[::1]:8000",
    "trailing.test.": "http://localhost:8001/",
}


@pytest.mark.parametrize(
    ("url", "called"),
    [
        ("https://api.example.com/v1/x?y=%20&z", "http://localhost:8000/v1/x?y=%20&z"),
        ("https://API.example.COM./v1", "http://localhost:8000/v1"),
        ("http://api.example.com:81/a%2Fb//c", "http://localhost:8000/a%2Fb//c"),
        ("https://api.example.com:8443/v1", "https://127.0.0.1:9000/base/v1"),
        ("https://api.example.com", "http://localhost:8000/"),
        ("https://api.example.com?x=1", "http://localhost:8000/?x=1"),
        ("http://[2606:4700:0::1111]/a", None),
        ("http://[2606:4700::1111]/a", "http://[::1]:8000/a"),
        ("https://trailing.test/a", "http://localhost:8001/a"),
        ("https://other.test/a", None),
        ("https://sub.api.example.com/a", None),
        ("https://api.example.com.evil.test/a", None),
        ("https://evil.test/api.example.com", None),
        ("https://api.example.com@evil.test/", None),
        ("api/llm", None),
        ("summaries", None),
        ("http://[::1", None),
        ("http://api.example.com:99999/", None),
    ],
)
@override_settings(QSTASH_SERVER={"HOST_MAP": MAP})
def test_a_mapped_host_is_called_elsewhere_by_the_same_path_and_query(
    url: str, called: str | None
) -> None:
    assert mapped(url) == called


@override_settings(QSTASH_SERVER={})
def test_without_a_map_nothing_is_called_elsewhere() -> None:
    assert mapped("https://api.example.com/a") is None


@pytest.mark.parametrize(
    ("url", "called"),
    [
        ("https://other.test/a", "http://localhost:1/a"),
        ("http://127.0.0.1:8000/a", "http://localhost:1/a"),
        ("https://known.test/a", "http://localhost:2/a"),
    ],
)
@override_settings(
    QSTASH_SERVER={"HOST_MAP": {"*": "http://localhost:1", "known.test": "http://localhost:2"}}
)
def test_a_star_is_every_host_that_is_not_named(url: str, called: str) -> None:
    assert mapped(url) == called


@pytest.mark.parametrize(
    ("host", "base", "problem"),
    [
        ("", "http://localhost", "'' is no host"),
        ("https://a.test", "http://localhost", "is no host"),
        ("a.test/path", "http://localhost", "is no host"),
        ("*.a.test", "http://localhost", "is no host"),
        (5, "http://localhost", "5 is no host"),
        ("a.test", 5, "5 is no URL"),
        ("a.test", "localhost:8000", "no http or https URL"),
        ("a.test", "ftp://localhost", "no http or https URL"),
        ("a.test", "http://", "no http or https URL"),
        ("a.test", "http://localhost:99999", "no http or https URL"),
        ("a.test", "http://local host", "no http or https URL"),
        ("a.test", "http://[::1", "no http or https URL"),
        ("a.test", "http://u:p@localhost", "give scheme, host, path"),
        ("a.test", "http://localhost/?x=1", "give scheme, host, path"),
    ],
)
def test_a_mapping_that_cannot_be_used_says_why(host: object, base: object, problem: str) -> None:
    assert problem in problem_with_mapping(host, base)


@pytest.mark.parametrize(
    ("host", "base"), [*MAP.items(), ("*", "http://host.docker.internal:8000/x")]
)
def test_a_mapping_that_can_has_no_problem(host: str, base: str) -> None:
    assert problem_with_mapping(host, base) == ""
