"""Why there is no line: what gRPC says in real cases, in words."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from hosfl_client import connection
from hosfl_client.connection import Backoff, Connection, ServerGoneError
from hosfl_client.limits import METHOD, Limits
from hosfl_client.reasons import reason
from hosfl_lightning.link.authority import Authority
from hosfl_lightning.link.credentials import Site, channel_options
from hosfl_lightning.link.reception import Reception


def why(address: str, site: Site | None = None, credentials: Any = None, **options: Any) -> str:
    """What the first try comes to."""
    credentials = credentials or (site.channel_credentials() if site is not None else None)
    settings = [*Limits().channel_options(), ("grpc.use_local_subchannel_pool", 1), *channel_options(**options)]
    channel = (
        grpc.insecure_channel(address, settings)
        if credentials is None
        else grpc.secure_channel(address, credentials, settings)
    )
    outbox: SimpleQueue[bytes] = SimpleQueue()
    outbox.put(b"hello")
    with channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream(METHOD)(iter(outbox.get, None)))
    return reason(caught.value, credentials is not None)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Site]:
    folder = tmp_path_factory.mktemp("certs")
    for name in ("ours", "theirs"):
        Authority.make(folder / name, "hosfl", 10)
        Authority.load(folder / name).server(["localhost", "127.0.0.1"], folder / f"{name}_server", 9)
        Authority.load(folder / name).client("ann", folder / f"{name}_ann", 9)
    Authority.load(folder / "ours").server(["fl.example.org"], folder / "ours_elsewhere", 9)
    uses = {"server": "server", "elsewhere": "server", "ann": "client"}
    return {
        path.name: Site.load(path, uses[path.name.split("_")[1]])  # type: ignore[arg-type]
        for path in folder.iterdir()
        if "_" in path.name
    }


@pytest.fixture
def served(request: Any, sites: dict[str, Site]) -> Iterator[str]:
    site = sites.get(request.param)
    reception = Reception("127.0.0.1:0", None if site is None else site.server_credentials())
    yield f"127.0.0.1:{reception.port}"
    reception.stop()


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert why(f"127.0.0.1:{taken.getsockname()[1]}") == "nobody listens there yet"


@pytest.mark.parametrize("served", ["ours_server"], indirect=True)
def test_a_certificate_of_another_authority(served: str, sites: dict[str, Site]) -> None:
    assert "not signed by this site's ca.crt" in why(served, sites["theirs_ann"])
    mine, other = sites["ours_ann"], sites["theirs_ann"]
    shown = grpc.ssl_channel_credentials(mine.authority, other.key, other.certificate)
    assert "does not accept this site's certificate" in why(served, credentials=shown)


@pytest.mark.parametrize("served", ["ours_elsewhere"], indirect=True)
def test_a_certificate_for_another_address(served: str, sites: dict[str, Site]) -> None:
    assert "--server_name" in why(served, sites["ours_ann"])


@pytest.mark.parametrize("served", ["ours_server"], indirect=True)
def test_plain_text_to_a_server_with_certificates(served: str) -> None:
    assert "give --certs and no --insecure" in why(served)


@pytest.mark.parametrize("served", ["plain"], indirect=True)
def test_certificates_to_a_server_without(served: str, sites: dict[str, Site]) -> None:
    assert "it speaks no TLS" in why(served, sites["ours_ann"])


def test_another_program_answers() -> None:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        port.listen()

        def answer() -> None:
            other, _ = port.accept()
            other.sendall(b"HTTP/1.1 505 not here\r\n\r\n")
            other.recv(1 << 16)
            other.close()

        thread = threading.Thread(target=answer)
        thread.start()
        assert why(f"127.0.0.1:{port.getsockname()[1]}") == "another program listens there"
        thread.join()


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Stream removed (Socket closed)", "the line was cut"),
        ("Stream removed (ping timeout)", "it does not answer any more"),
        ("failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:8470: Failed to connect to remote "
         "host: getsockopt(SO_ERROR): Connection timed out", "is the port open in the firewall"),
        ("errors resolving nowhere.invalid:8470: [field:hostname lookup error:address lookup failed for "
         "nowhere.invalid:8470: Domain name not found]", "no address is known for this name"),
        ("last error: UNAVAILABLE: ipv4:127.0.0.1:1: Handshake read failed (Endpoint closing)", "frozen"),
        ("SERVER: Received\n message larger than max", "UNAVAILABLE: SERVER: Received message larger than max"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried_here(text: str, meant: str) -> None:
    """As grpcio 1.85 has said it; what is not known is passed on, in one line."""
    error = SimpleNamespace(code=lambda: grpc.StatusCode.UNAVAILABLE, details=lambda: text)
    assert meant in reason(error, True)


def test_it_is_said_once_and_then_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    joined: Any = SimpleNamespace(hello=lambda: b"hello", notify=said.append)
    line = Connection("127.0.0.1:1", None, joined, backoff=Backoff(0.01, 0.02, 0.3))
    with pytest.raises(ServerGoneError, match=r"was not to be had for 0\.3 s \(nobody listens there yet\)"):
        line.run()
    assert said == ["not connected to 127.0.0.1:1: nobody listens there yet; trying again"]
    monkeypatch.setattr(connection, "EVERY", 0.05)
    with pytest.raises(ServerGoneError):
        line.run()
    assert len(said) > 2 and set(said[1:]) == {said[0]}


def test_an_address_needs_a_port(tmp_path: Path) -> None:
    from hosfl_lightning.join import join

    with pytest.raises(ValueError, match=r"--server must be HOST:PORT, the port at most 65535, got 'fl\.example\.org'"):
        join("fl.example.org", None, None, str(tmp_path))  # type: ignore[arg-type]
