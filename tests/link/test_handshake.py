"""Real connections on this machine: who gets through to a server, and who the server says it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from hosfl_lightning.link.authority import Authority
from hosfl_lightning.link.credentials import Peer, Site, channel_options, peer_name
from tests.link.sites import Foreign, key_pem, make, unchecked

TIMEOUT_S = 5


@dataclass
class Server:
    port: int
    peers: list[Peer]


@contextmanager
def serving(site: Site) -> Iterator[Server]:
    """A server that notes who calls."""
    served = Server(0, [])

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        served.peers.append(peer_name(context.auth_context()))
        return request

    handlers = grpc.method_handlers_generic_handler("hosfl", {"echo": grpc.unary_unary_rpc_method_handler(answer)})
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((handlers,))
    served.port = server.add_secure_port("localhost:0", site.server_credentials())
    server.start()
    try:
        yield served
    finally:
        server.stop(None).wait(TIMEOUT_S)


def call(
    server: Server,
    credentials: grpc.ChannelCredentials,
    host: str = "localhost",
    options: Sequence[tuple[str, str]] = (),
) -> bytes:
    with grpc.secure_channel(f"{host}:{server.port}", credentials, options=options) as channel:
        return channel.unary_unary("/hosfl/echo")(b"1", timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sites")
    authority = Authority.make(root / "ca")
    make(authority, root / "server")
    make(authority, root / "a", "a")
    return root


@pytest.fixture(scope="module")
def running(root: Path) -> Iterator[Server]:
    with serving(Site.load(root / "server", "server")) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    running.peers.clear()
    return running


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_client_gets_through_and_is_known(root: Path, server: Server, host: str) -> None:
    site = Site.load(root / "a", "client")
    assert call(server, site.channel_credentials(), host) == b"1"
    assert server.peers == [Peer("a", site.serial)]


async def _through_aio(site: Site, client: Site) -> tuple[bytes, Peer]:
    peers = []

    async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        peers.append(peer_name(context.auth_context()))
        return request

    handlers = grpc.method_handlers_generic_handler("hosfl", {"echo": grpc.unary_unary_rpc_method_handler(answer)})
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_secure_port("localhost:0", site.server_credentials())
    await server.start()
    try:
        async with grpc.aio.secure_channel(f"localhost:{port}", client.channel_credentials()) as channel:
            return await channel.unary_unary("/hosfl/echo")(b"1", timeout=TIMEOUT_S), peers[0]
    finally:
        await server.stop(None)


def test_the_same_with_asyncio(root: Path) -> None:
    client = Site.load(root / "a")
    assert asyncio.run(_through_aio(Site.load(root / "server"), client)) == (b"1", Peer("a", client.serial))


def no_certificate(root: Path, tmp: Path) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(Site.load(root / "a").authority)


def self_signed(root: Path, tmp: Path) -> grpc.ChannelCredentials:
    own = Foreign("a")
    certificate = own.certificate.public_bytes(Encoding.PEM)
    return replace(Site.load(root / "a"), certificate=certificate, key=key_pem(own.key)).channel_credentials()


def of_another_ca(root: Path, tmp: Path) -> grpc.ChannelCredentials:
    """Of the same name as ours, and it trusts ours."""
    site = Site.load(make(Authority.make(tmp / "other"), tmp / "b", "a"))
    return replace(site, authority=Site.load(root / "a").authority).channel_credentials()


def expired(root: Path, tmp: Path) -> grpc.ChannelCredentials:
    return unchecked(make(Authority.load(root / "ca"), tmp / "b", "a", days=-1)).channel_credentials()


def of_a_server(root: Path, tmp: Path) -> grpc.ChannelCredentials:
    return Site.load(root / "server").channel_credentials()


def signed_by_a_client(root: Path, tmp: Path) -> grpc.ChannelCredentials:
    """Client a makes itself a certificate in the name of b."""
    client = Site.load(root / "a")
    forger = Foreign()
    forger.key = load_pem_private_key(client.key, None)
    forger.certificate = x509.load_pem_x509_certificate(client.certificate)
    site = Site.load(forger.folder(tmp / "b", "client", "b"))
    return replace(
        site, certificate=site.certificate + client.certificate, authority=client.authority
    ).channel_credentials()


STRANGERS = [no_certificate, self_signed, of_another_ca, expired, of_a_server, signed_by_a_client]


@pytest.mark.parametrize("credentials", STRANGERS)
def test_nobody_else_gets_through(
    root: Path, server: Server, tmp_path: Path, credentials: Callable[[Path, Path], grpc.ChannelCredentials]
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        call(server, credentials(root, tmp_path))
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert server.peers == []
    call(server, Site.load(root / "a").channel_credentials())
    assert [peer.name for peer in server.peers] == ["a"], "and the server still serves"


def test_nobody_gets_through_in_the_clear(server: Server) -> None:
    with grpc.insecure_channel(f"localhost:{server.port}") as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/hosfl/echo")(b"1", timeout=TIMEOUT_S)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert server.peers == []


def test_no_client_can_play_the_server(root: Path, tmp_path: Path) -> None:
    site = Site.load(make(Authority.load(root / "ca"), tmp_path / "b", "localhost"))
    with serving(site) as server, pytest.raises(grpc.RpcError):
        call(server, Site.load(root / "a").channel_credentials())
    assert server.peers == []


def test_no_server_of_another_ca_is_believed(root: Path, tmp_path: Path) -> None:
    other = Site.load(make(Authority.make(tmp_path / "other"), tmp_path / "server"))
    ours = Site.load(root / "a")
    with serving(replace(other, authority=ours.authority)) as server, pytest.raises(grpc.RpcError):
        call(server, ours.channel_credentials())
    assert server.peers == []


def test_no_server_of_another_name_is_believed(root: Path, tmp_path: Path) -> None:
    Authority.load(root / "ca").server(["elsewhere"], tmp_path / "server")
    client = Site.load(root / "a").channel_credentials()
    with serving(Site.load(tmp_path / "server")) as server:
        with pytest.raises(grpc.RpcError):
            call(server, client)
        assert call(server, client, options=channel_options("elsewhere")) == b"1"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of another tool: no alternative names, no usages; the common name is all there is."""
    root, tool = tmp_path_factory.mktemp("foreign"), Foreign()
    tool.folder(root / "server", "server", "localhost")
    tool.folder(root / "elsewhere", "server", "fl.example.org")
    tool.folder(root / "site-1", "client", "site-1")
    return root


def test_a_host_name_is_compared_with_a_common_name(foreign: Path) -> None:
    client = Site.load(foreign / "site-1", "client")
    with serving(Site.load(foreign / "server", "server")) as server:
        assert call(server, client.channel_credentials()) == b"1"
    assert server.peers == [Peer("site-1", client.serial)]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_an_address_that_the_common_name_is_not_needs_the_name(foreign: Path, host: str) -> None:
    client = Site.load(foreign / "site-1", "client").channel_credentials()
    with serving(Site.load(foreign / "elsewhere", "server")) as server:
        with pytest.raises(grpc.RpcError):
            call(server, client, host)
        assert call(server, client, host, channel_options("fl.example.org")) == b"1"
