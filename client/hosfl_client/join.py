"""A device in a run: `join` takes part until the run is over."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hosfl_client import __version__
from hosfl_client.addresses import check_address, check_plain
from hosfl_client.apart import read_apart
from hosfl_client.connection import Backoff, Connection
from hosfl_client.credentials import Site
from hosfl_client.endpoint import Endpoint
from hosfl_client.examples import DataSettings, check_examples
from hosfl_client.half import Half, OnnxHalf
from hosfl_client.joined import Joined
from hosfl_client.limits import Limits
from hosfl_client.manifest import Manifest
from hosfl_client.messages import FRAMES
from hosfl_client.minibatches import Minibatches
from hosfl_client.own_state import OwnState
from hosfl_client.privacy import NoiseKey
from hosfl_client.refusals import TermsError
from hosfl_client.state import NumpyStorage
from hosfl_client.terms import ENDPOINTS
from hosfl_client.wire import Terms


def join(
    server: str,
    half: str | os.PathLike[str],
    data: str | os.PathLike[str],
    certs: str | None = None,
    *,
    name: str | None = None,
    insecure: bool = False,
    server_name: str | None = None,
    state: str | None = None,
    threads: int | None = None,
    save_every: int = 10,
    give_up: float = 600.0,
    batch_size: int | None = None,
    text_field: str | None = None,
    label_field: str | None = None,
    engine: Callable[[Path, int | None], Half] = OnnxHalf,
    backoff: Backoff | None = None,
    notify: Callable[[str], None] = print,
) -> str:
    """Take part in the run of a server until it is over.

    Args:
        server: ``HOST:PORT``; nothing else is connected to.
        half: ``phone.onnx``, as ``hosfl export-client`` wrote it.
        data: This device's own file; see `read_examples`.
        certs: Folder of this site: ``ca.crt``, ``site.crt``, ``site.key``.
        name: Without certificates: who this is.
        insecure: Plain text; on this machine only.
        server_name: What the server's certificate says, where it is not the address that it is called by.
        state: Folder for what the client keeps; None: ``hosfl_client_<name>``.
        threads: That compute; None: one a core.
        save_every: Updates from one write of the shared state to the next.
        give_up: Seconds without the server after which the client ends.
        batch_size: Examples a round, in the place of the exported recipe's.
        text_field: Likewise, of a record.
        label_field: Likewise.
        engine: Makes the half of its path and ``threads``.
        backoff: Between tries to connect, in the place of the usual one.
        notify: Takes what people should hear of.

    Returns:
        What the server said at the end.

    Raises:
        ValueError: A setting that cannot be; a half or data that cannot be used; a half that is not that of the run.
        TurnedAwayError: The server does not take this client.
        ServerGoneError: The server was not to be had.
    """
    check_address(server, "--server")
    if insecure == (certs is not None):
        raise ValueError("--certs: give the folder of this site's certificate, or --insecure on one machine")
    site = None if certs is None else Site.load(certs)
    if site is None:
        check_plain(server, "--server")
    who = name or (site.name if site is not None else "")
    if not who:
        raise ValueError("--name: without certificates a client must say who it is")
    path = Path(half)
    manifest = Manifest.load(path)
    settings = DataSettings.of(manifest.data, batch_size=batch_size, text_field=text_field, label_field=label_field)
    tokenizer = None if manifest.tokenizer is None else path.parent / manifest.tokenizer
    examples = read_apart(Path(data), settings, tokenizer)
    check_examples(examples, manifest, settings)
    made = engine(path, threads)
    batches = Minibatches(examples, settings)
    kept = OwnState(state or f"hosfl_client_{who}", NumpyStorage())

    def build(terms: Terms) -> Endpoint:
        return keyed(Endpoint(made, manifest, batches, terms), kept.folder, len(examples))

    joined = Joined(who, f"hosfl-client {__version__}", build, ENDPOINTS, FRAMES, kept, save_every, notify)
    credentials = None if site is None else site.channel_credentials()
    options = [] if server_name is None else [("grpc.ssl_target_name_override", server_name)]
    return Connection(server, credentials, joined, Limits(), backoff or Backoff(give_up=give_up), options).run()


def keyed(endpoint: Endpoint, folder: Path, examples: int) -> Endpoint:
    """Its noise is the same when the client comes back: to the same question it gives the same answer.

    Raises:
        TermsError: δ may lose one of so many examples.
    """
    if endpoint.privacy is not None:
        if (reason := endpoint.privacy.objection(examples)) is not None:
            raise TermsError(reason)
        endpoint.privacy.key = NoiseKey.kept(folder)
    return endpoint
