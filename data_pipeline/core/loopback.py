"""Addresses that only this machine can reach."""

from __future__ import annotations

import ipaddress
import socket


def is_loopback(host: str) -> bool:
    """Returns whether an address is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT; the host of [HOST]:PORT without its brackets.

    Raises:
        ValueError: the address has another form.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 2**16:
        raise ValueError("write HOST:PORT, such as 127.0.0.1:9092")
    return host.strip("[]"), int(port)


def free_port() -> int:
    """Returns a port of this machine that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
