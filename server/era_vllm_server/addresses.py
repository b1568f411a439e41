"""Which hosts pictures may be fetched from; addresses are checked where the connection is made.

A name is resolved by the same call whose answer is connected to, so that a name that changes its
address between a check and the connection (DNS rebinding) gains nothing.
"""

import ipaddress
import socket
from collections.abc import Sequence
from typing import Final

import yarl
from aiohappyeyeballs import AddrInfoType

from era_vllm.errors import ConfigError

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST: Final = ipaddress.ip_network("2000::/3")
_NOT_PUBLIC: Final = (  # global by the registry's flag, and yet nobody's web server
    ipaddress.ip_network("192.0.0.0/24"),  # IETF protocol assignments
    ipaddress.ip_network("192.88.99.0/24"),  # relays of 6to4, RFC 7526
)


class NotPublicError(OSError):
    """An address that may not be connected to."""

    def __init__(self) -> None:
        super().__init__("not a public address")  # never which: it may be an internal one


def allowed_hosts(domains: Sequence[str]) -> frozenset[str]:
    """Return ``--allowed-media-domains`` as a URL's ``raw_host`` spells them.

    Raises:
        ConfigError: one that no URL's host can equal: an address with scheme, port or path.
    """
    hosts = set[str]()
    for domain in domains:
        try:
            host = None if "*" in domain else yarl.URL.build(host=domain).raw_host
        except ValueError:
            host = None
        if not host:
            raise ConfigError(
                f"--allowed-media-domains: got {domain!r}, needed a name alone, as images.example."
                "org; without scheme, port, path or *, each subdomain by itself"
            )
        hosts.add(host)
    return frozenset(hosts)


def is_public(address: str) -> bool:
    """Tell whether an address is somebody's on the public internet.

    No private, loopback, link-local (cloud metadata), shared, multicast, reserved or
    documentation address, in no IPv6 form of it either (mapped, 6to4, NAT64; Teredo not at all).
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 4:
        special = ip.is_multicast or ip.is_reserved or any(ip in net for net in _NOT_PUBLIC)
        return ip.is_global and not special
    inside = ip.ipv4_mapped or ip.sixtofour
    if ip in _NAT64:
        inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if inside is not None:
        return is_public(str(inside))
    return ip in _GLOBAL_UNICAST and ip.is_global and not ip.is_reserved


def public_socket(info: AddrInfoType) -> socket.socket:
    """Make the socket of a connection to an address; aiohttp's ``socket_factory``.

    Raises:
        NotPublicError: the address is not public.
    """
    family, kind, protocol, _, address = info
    if not is_public(str(address[0])):
        raise NotPublicError
    return socket.socket(family, kind, protocol)
