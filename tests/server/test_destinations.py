from __future__ import annotations

import socket

import pytest
from django.test import override_settings

from django_qstash_llm.server.destinations import allowed_addresses, refuse_literal_address
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
]
PRIVATE = [
    "http://10.0.0.1/",
    "http://192.168.1.1/",
    "http://172.16.0.1/",
    "http://100.64.0.1/",
    "http://[fd00:ec2::254]/",
    "http://[::ffff:10.0.0.1]/",
    "http://[2002:0a00:0001::]/",
]
NEVER = ["http://169.254.169.254/latest/", "http://[fe80::1]/", "http://224.0.0.1/"]
PUBLIC = ["https://api.openai.com/v1", "http://93.184.216.34/", "http://[2606:4700::1111]/"]


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


@pytest.mark.parametrize("url", ["http://[::1", "http://a.test:99999/", "http:///path"])
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
