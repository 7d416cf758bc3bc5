"""Where this server may knock: what is refused at publish, and once more at every connect.

At publish only what can be told without asking DNS is refused; a name's addresses are looked at
when it is connected to, and those very addresses are then used, so that a name cannot point
outside when it is checked and inside when it is used.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import unicodedata
from urllib.parse import SplitResult, urlsplit

from . import conf
from .exceptions import AddressRefused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# Where clouds keep their machines' secrets, besides the link-local 169.254.0.0/16: AWS's over IPv6,
# Alibaba's, Oracle's and Azure's. The names are Google's and old AWS's.
METADATA = frozenset(
    map(
        ipaddress.ip_address,
        ("fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"),
    )
)
METADATA_NAMES = {"metadata", "metadata.google.internal", "instance-data", "metadata.goog"}
# The last 32 bits of these are an IPv4 address: NAT64's, and SIIT's translated ones.
_TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::ffff:0:0:0/96"))
EVERY_HOST = "*"
_HOST = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[^\s/:?#@\[\]*]+)(?::(?P<port>[0-9]{1,5}))?", re.I)


def refuse_literal_address(url: str) -> None:
    """Raise ``AddressRefused`` when the URL's host is, or plainly means, an address off limits."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:
        raise AddressRefused("endpoint is not a valid http url") from error
    if not host:
        raise AddressRefused("endpoint has no host")
    if port == 0:
        raise AddressRefused("endpoint has port 0")
    if not host.isascii() and not _is_international_name(host):
        raise AddressRefused("endpoint's host holds what no name does")
    if "%" in host and ":" not in host:
        # To some clients %31 is a 1, and only to them is it one of an address.
        raise AddressRefused("endpoint's host is percent-encoded")
    if host == "localhost" or host.endswith(".localhost"):
        host = "127.0.0.1"
    if host in METADATA_NAMES:
        raise AddressRefused(f"endpoint resolves to a metadata address: {host}")
    address = _literal(host)
    if address is not None:
        _refuse(address)


def _is_international_name(host: str) -> bool:
    """Whether this is a name by its letters alone. Digits, dots and letters of other shapes are
    ASCII's to whoever connects, and together they may be an address."""
    return unicodedata.is_normalized("NFKC", host) and all(
        character in ".-_" or (character.isascii() and character.isalnum()) or _is_letter(character)
        for character in host
    )


def _is_letter(character: str) -> bool:
    # With the marks that stand on letters. What has no width is neither.
    return unicodedata.category(character) in {"Ll", "Lm", "Lo", "Mn", "Mc"}


def allowed_addresses(host: str, port: int) -> list[str]:
    """The addresses of a host that may be connected to. Raises ``OSError`` when it has none at
    all, and ``AddressRefused`` when one of them is off limits."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
    for address in addresses:
        # One bad address spoils the name: round robin would reach it sooner or later.
        _refuse(ipaddress.ip_address(address.partition("%")[0]))
    return addresses


def mapped(url: str) -> str | None:
    """What is called in place of ``url`` where ``HOST_MAP`` says so, else None.

    The most exact host counts: one with a port, then one without, then ``*``.
    """
    host_map = conf.current().host_map
    if not host_map:
        return None
    try:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            return None
        host, port = parts.hostname.rstrip("."), _port(parts)
    except ValueError:
        return None
    bases = {_host_and_port(name): base for name, base in host_map.items()}
    for wanted in ((host, port), (host, None), (EVERY_HOST, None)):
        if wanted in bases:
            return _moved(parts, bases[wanted])
    return None


def problem_with_mapping(host: object, base: object) -> str:
    """What is wrong with an entry of ``HOST_MAP``; empty when nothing is."""
    if not isinstance(host, str) or not (host == EVERY_HOST or _HOST.fullmatch(host)):
        return f"{host!r} is no host: give api.example.com, api.example.com:8443 or {EVERY_HOST}"
    if not isinstance(base, str):
        return f"{base!r} is no URL"
    try:
        parts = urlsplit(base)
        is_url = parts.scheme in {"http", "https"} and bool(parts.hostname) and _port(parts) > 0
    except ValueError:
        is_url = False
    if not is_url or re.search(r"[\s\\]", base):
        # Not repeated: what is no URL may be anything.
        return f"{host} has no http or https URL to go to: give one like http://localhost:8000"
    if parts.username is not None or parts.query or parts.fragment:
        return f"{host} goes to a URL with a name, a query or a fragment: give scheme, host, path"
    return ""


def _host_and_port(name: str) -> tuple[str, int | None]:
    match = _HOST.fullmatch(name)
    if match is None:
        return name, None
    host = match["host"].strip("[]").rstrip(".").lower()
    return host, int(match["port"]) if match["port"] else None


def _port(parts: SplitResult) -> int:
    if parts.port is not None:
        return parts.port
    return 443 if parts.scheme == "https" else 80


def _moved(parts: SplitResult, base: str) -> str:
    to = urlsplit(base)
    path = to.path.rstrip("/") + parts.path
    return parts._replace(scheme=to.scheme, netloc=to.netloc, path=path or "/").geturl()


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    if not host.replace(".", "").replace("x", "0").isalnum() or not host[:1].isdigit():
        return None
    try:
        # 2130706433, 0x7f.1 and 127.1 mean 127.0.0.1 to the C library.
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def _refuse(address: Address) -> None:
    meant = _embedded(address)
    kind = "metadata" if meant in METADATA else _kind(meant)
    settings = conf.current()
    if kind == "loopback" and not settings.allow_loopback:
        raise AddressRefused(f"endpoint resolves to a loopback address: {address}")
    if kind == "private" and not settings.allow_private_destinations:
        raise AddressRefused(f"endpoint resolves to a private address: {address}")
    if kind in {"link-local", "multicast", "metadata"}:
        raise AddressRefused(f"endpoint resolves to a {kind} address: {address}")


def _embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if any(address in network for network in _TRANSLATED):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if int(address) >> 32 == 0 and int(address) > 1:
        # ::127.0.0.1, which nobody should write any more.
        return ipaddress.IPv4Address(int(address))
    return address.ipv4_mapped or address.sixtofour or address


def _kind(address: Address) -> str:
    if address.is_loopback or address.is_unspecified:
        return "loopback"
    if address.is_link_local:
        return "link-local"
    if isinstance(address, ipaddress.IPv6Address) and address.is_site_local:
        # fec0::/10, given up long ago and not yet gone from everywhere.
        return "private"
    if address.is_multicast:
        return "multicast"
    return "public" if address.is_global else "private"
