"""Where this server may knock: what is refused at publish, and once more at every connect.

At publish only what can be told without asking DNS is refused; a name's addresses are looked at
when it is connected to, and those very addresses are then used, so that a name cannot point
outside when it is checked and inside when it is used.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from . import conf
from .exceptions import AddressRefused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def refuse_literal_address(url: str) -> None:
    """Raise ``AddressRefused`` when the URL's host is, or plainly means, an address off limits."""
    try:
        parts = urlsplit(url)
        host, _ = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:
        raise AddressRefused("endpoint is not a valid http url") from error
    if not host:
        raise AddressRefused("endpoint has no host")
    if host == "localhost" or host.endswith(".localhost"):
        host = "127.0.0.1"
    address = _literal(host)
    if address is not None:
        _refuse(address)


def allowed_addresses(host: str, port: int) -> list[str]:
    """The addresses of a host that may be connected to. Raises ``OSError`` when it has none at
    all, and ``AddressRefused`` when one of them is off limits."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
    for address in addresses:
        # One bad address spoils the name: round robin would reach it sooner or later.
        _refuse(ipaddress.ip_address(address.partition("%")[0]))
    return addresses


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
    kind = _kind(_embedded(address))
    settings = conf.current()
    if kind == "loopback" and not settings.allow_loopback:
        raise AddressRefused(f"endpoint resolves to a loopback address: {address}")
    if kind == "private" and not settings.allow_private_destinations:
        raise AddressRefused(f"endpoint resolves to a private address: {address}")
    if kind in {"link-local", "multicast"}:
        raise AddressRefused(f"endpoint resolves to a {kind} address: {address}")


def _embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _kind(address: Address) -> str:
    if address.is_loopback or address.is_unspecified:
        return "loopback"
    if address.is_link_local:
        return "link-local"
    if address.is_multicast:
        return "multicast"
    return "public" if address.is_global else "private"
