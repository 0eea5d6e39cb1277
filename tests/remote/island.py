"""A network of its own: nothing is in it but the loopback, on which every packet to anywhere is seen (Linux).

``unshare(CLONE_NEWNET)`` gives processes a network without any other interface. The default route leads to the
loopback, from an address that is not 127.0.0.1, so that a packet to the world is sent, and read here, where without a
route there would be only an error. gRPC's C core is seen as well as Python. Not seen: IPv6 but to ::1, since Linux
makes no such route over the loopback, and sockets of the family AF_UNIX, which are files. Of these `audit` sees
Python's.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCADDRT, SIOCSIFADDR, SIOCSIFFLAGS = 0x890B, 0x8916, 0x8914
IFF_UP, RTF_UP = 1, 1
#: What would lead gRPC elsewhere, if it heeded it.
TEMPTATION = {f"{kind}_proxy": "http://203.0.113.7:3128" for kind in ("grpc", "http", "https")}
ETH_P_ALL, ETH_P_IP, ETH_P_IPV6 = 3, 0x0800, 0x86DD


def call(name: str, *args: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def island(spec: dict[str, Any]) -> None:
    """Make one, and say what is sent in it: ``tcp 127.0.0.1:80`` for each packet, by its destination, once."""
    try:
        call("unshare", CLONE_NEWNET | (CLONE_NEWUSER if os.geteuid() else 0))
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        furnish()
    except OSError as error:
        print(f"no island: {error}", flush=True)
        return
    print("ready", flush=True)
    seen = set()
    while True:
        data, address = packets.recvfrom(1 << 16)
        what = destination(data, address[1])
        if what not in seen:
            seen.add(what)
            print(what, flush=True)


def enter(process: int) -> None:
    """Move to the island of another process; this one must have a single thread."""
    for kind, name in ((CLONE_NEWUSER, "user"), (CLONE_NEWNET, "net")):
        if os.readlink(f"/proc/{process}/ns/{name}") == os.readlink(f"/proc/self/ns/{name}"):
            continue
        file = os.open(f"/proc/{process}/ns/{name}", os.O_RDONLY)
        call("setns", file, kind)
        os.close(file)


def furnish() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as four:
        fcntl.ioctl(four, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
        fcntl.ioctl(four, SIOCSIFADDR, struct.pack("16s16s8x", b"lo:1", inet("192.0.2.1")))
        name = ctypes.create_string_buffer(b"lo")
        route = (inet("0.0.0.0"), inet("0.0.0.0"), inet("0.0.0.0"), RTF_UP, 0, 0, 0, 0, ctypes.addressof(name), 0, 0, 0)
        fcntl.ioctl(four, SIOCADDRT, struct.pack("@L16s16s16sHhLPhPLLH", 0, *route))


def inet(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


def destination(data: bytes, kind: int) -> str:
    if kind == ETH_P_IP:
        header, protocol, to = 4 * (data[0] & 15), data[9], socket.inet_ntop(socket.AF_INET, data[16:20])
    elif kind == ETH_P_IPV6:
        header, protocol, to = 40, data[6], socket.inet_ntop(socket.AF_INET6, data[24:40])
    else:
        return f"ethernet {kind:#x}"
    name = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}.get(protocol)
    if name is None:
        return f"protocol {protocol} to {to}"
    source, port = struct.unpack_from("!HH", data, header)
    return f"{name} {to}:{port} from {source}"


def stray(spec: dict[str, Any]) -> None:
    """One that does what it should not."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as end:
            end.settimeout(0.1)
            try:
                end.connect(("203.0.113.5", 9))
                end.send(b"hello")
            except OSError as error:
                print(error, file=sys.stderr)


def audit() -> None:
    """Say every address that Python is asked to look up or to connect to."""

    def hook(event: str, args: Any) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            print(f"audit: {event} {args[1:]}", flush=True)

    sys.addaudithook(hook)
