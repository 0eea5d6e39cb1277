"""Who is let in, and with what: certificates, names, versions and models, at a server that goes on serving."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hosfl_client.limits import METHOD
from hosfl_lightning.link.authority import Authority
from hosfl_lightning.wire import PROTOCOL, Hello, encode
from tests.link.sites import make
from tests.link.test_handshake import STRANGERS

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a server, and clients, of whom d is on no list."""
    root = tmp_path_factory.mktemp("sites")
    authority = Authority.make(root / "ca")
    for name in ("server", *NAMES, "d"):
        make(authority, root / name, "" if name == "server" else name)
    return root


@pytest.fixture
def sites(issued: Path, tmp_path: Path) -> Path:
    """Copies, which a test may change."""
    return Path(shutil.copytree(issued, tmp_path / "sites"))


def finishes(run: Any, *actors: Any, like: dict[str, Any]) -> None:
    for actor in actors:
        assert actor.wait() == 0, actor.said
    left = run.left()
    for part in like:
        assert like[part] == left[part], part


def ends(client: Any, words: str) -> None:
    """A client that is turned away ends, and says why; what it said before is forgotten."""
    assert client.wait() == 1, client.said
    assert words in client.said, client.said
    client.log.unlink()


# ---- certificates


def hello(name: str) -> bytes:
    return encode(Hello(0, name, "0", "session", ["SplitEndpoint"]))


def refused(run: Any, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    """How a stream ends that begins like any other."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = (
        grpc.insecure_channel(run.address, options)
        if credentials is None
        else grpc.secure_channel(run.address, credentials, options)
    )
    with channel, pytest.raises(grpc.RpcError) as error:
        next(channel.stream_stream(METHOD)(iter([hello("a")]), timeout=10))
    return error.value.code()


def test_strangers_stay_outside_and_the_run_goes_on(stage: Any, undisturbed: Any, sites: Path, tmp_path: Path) -> None:
    run = stage(names=NAMES, sites=sites)
    server, inside = run.server().start(), run.client("b").start()
    server.wait_to_say("b is in")
    for number, stranger in enumerate(STRANGERS):
        (tmp_path / str(number)).mkdir()
        assert refused(run, stranger(sites, tmp_path / str(number))) == grpc.StatusCode.UNAVAILABLE, stranger.__name__
    assert refused(run, None) == grpc.StatusCode.UNAVAILABLE

    other = Authority.make(tmp_path / "other")
    expired = make(Authority.load(sites / "ca"), tmp_path / "expired", "c", days=-1)
    elsewhere = make(other, tmp_path / "elsewhere", "c")
    ends(run.client("c", certs=str(expired)).start(), "site.crt expired on")
    ends(
        run.client("c", certs=str(elsewhere), give_up=0.5).start(),
        "the server's certificate is not signed by this site's ca.crt",
    )
    ends(run.client("b", certs=str(sites / "a")).start(), "the certificate is that of a, not of b")
    ends(run.client("d").start(), "d is not among the clients of this run")
    assert "b is gone" not in server.said, "who is inside is not put out by who takes its name"

    finishes(run, server, inside, run.client("a").start(), run.client("c").start(), like=undisturbed("hosfl"))
    assert run.figures()["turned_away"] == 2
    assert run.figures()["malformed"] == 0


def revoke(sites: Path, name: str) -> None:
    Authority.load(sites / "ca").revoke(name)
    shutil.copy(sites / "ca" / "revoked.txt", sites / "server" / "revoked.txt")


def test_who_is_shut_out_in_a_round_leaves_and_may_come_back(
    stage: Any, undisturbed: Any, sites: Path, tmp_path: Path
) -> None:
    """A round waits for c, which has died in it. Meanwhile b's certificate is revoked, and a is taken off the list."""
    settings = {"clients_per_round": 3}
    die = {"round": 1, "kind": "multiplier", "when": "before", "flag": str(tmp_path / "flag")}
    run = stage(names=NAMES, sites=sites)
    server = run.server(settings=settings).start()
    a, b, c = (run.client(name, **({"die": die} if name == "c" else {})).start() for name in NAMES)
    assert c.wait() == -9

    revoke(sites, "b")
    ends(b, "the certificate of b is revoked")
    ends(b.start(), "the certificate of b is revoked")
    shutil.rmtree(sites / "b")
    make(Authority.load(sites / "ca"), sites / "b", "b")
    b.start()

    run.allow([None, "b", "c"])
    ends(a, "a is not among the clients of this run")
    ends(a.start(), "a is not among the clients of this run")
    run.allow(NAMES)
    a.start()

    finishes(run, server, a, b, c.start(), like=undisturbed("hosfl", **settings))
    for name in ("a", "b"):
        assert f"{name} must leave: " in server.said


# ---- what a client brings


@pytest.fixture
def other_weights(tiny_folder: Path, tmp_path: Path) -> Path:
    """The same model from another start."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "other_weights"))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def test_who_cannot_take_part_is_told_what_differs(stage: Any, undisturbed: Any, other_weights: Path) -> None:
    run = stage()
    server, others = run.server().start(), [run.client(name).start() for name in ("ann", "bob")]
    ends(run.client("cid", protocol=99).start(), f"of protocol version {PROTOCOL}, this side speaks 99")
    ends(run.client("cid", pretrained=str(other_weights)).start(), "frozen weights are not those of the run")
    ends(run.client("cid", recipe={"rank": 3}).start(), "q_proj.lora_A.default.weight [3, 32] float32 here, ")
    server.wait_to_say("it cannot go on: the model's frozen weights")
    server.wait_to_say(f"is not let in: the frame is of protocol version 99, this side speaks {PROTOCOL}")
    finishes(run, server, *others, run.client("cid").start(), like=undisturbed("hosfl"))
