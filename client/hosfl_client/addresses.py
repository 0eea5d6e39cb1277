"""Addresses; plain text stays on one machine."""

from __future__ import annotations

import ipaddress

LARGEST_PORT = 65535


def check_address(address: str, setting: str) -> str:
    """The host of ``HOST:PORT``.

    Args:
        address: What is given.
        setting: Its name, for the error.

    Raises:
        ValueError: It is no such address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > LARGEST_PORT:
        raise ValueError(f"{setting} must be HOST:PORT, the port at most {LARGEST_PORT}, got {address!r}")
    return host.strip("[]")


def check_plain(address: str, setting: str) -> None:
    """Refuse plain text to or from another machine.

    Args:
        address: ``HOST:PORT``.
        setting: Its name, for the error.

    Raises:
        ValueError: It is not an address, or not this machine's own.
    """
    host = check_address(address, setting)
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        raise ValueError(
            f"{setting}: --insecure sends everything in plain text, so only 127.0.0.1 will do, got {host!r}; for other "
            "machines make certificates (hosfl certs --help)"
        )
