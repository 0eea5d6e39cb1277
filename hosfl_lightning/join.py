"""A client on a machine of its own: `join` takes part in a run that is served elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from hosfl_client.addresses import check_address, check_plain
from hosfl_client.limits import Limits
from hosfl_client.privacy import NoiseKey
from hosfl_lightning import __version__
from hosfl_lightning.clients import Endpoint, Minibatches, TermsError
from hosfl_lightning.clients.joined import Joined
from hosfl_lightning.clients.own_state import OwnState
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.data.contract import DataContractError, check_clients, check_examples, check_held_out
from hosfl_lightning.link.credentials import Site, channel_options
from hosfl_lightning.link.extra import remote_extra
from hosfl_lightning.models import SplitModule
from hosfl_lightning.models.checks import check_padding
from hosfl_lightning.wire import Terms

with remote_extra():
    from hosfl_client.connection import Backoff, Connection, ServerGoneError, TurnedAwayError

__all__ = ["ServerGoneError", "TurnedAwayError", "join"]

MakeModel = Callable[[str], SplitModule]
"""The client's model, of which it builds ``part``: ``client``, its half alone, or ``both``."""


def say(text: str) -> None:
    """A line with the time, at once: a log that is read while the client runs has it."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def join(
    server: str,
    model: SplitModule | MakeModel,
    data: FederatedDataModule,
    certs: str | None = None,
    *,
    name: str | None = None,
    insecure: bool = False,
    server_name: str | None = None,
    state: str | None = None,
    index: int | None = None,
    accelerator: str = "cpu",
    save_every: int = 10,
    give_up: float = 600.0,
    backoff: Backoff | None = None,
    limits: Limits | None = None,
    notify: Callable[[str], None] = say,
) -> str:
    """Take part in the run of a server until it is over.

    The server is connected to, and nothing else. The line may be cut, either side may be killed: start the client again
    and it goes on where it was, to the bits of a run that was never disturbed.

    Example::

        join("server.example:8470", lambda part: SplitCausalLM("tiny_lm", cut=3, lora=lora, part=part), data, "site")

    Args:
        server: ``HOST:PORT``.
        model: The client's, with the server's cut, adapters and dtype; a function of ``part``, so that only what this
            client holds is built, once the run's terms are known.
        data: Its own data. With one client it is this one's, whatever its number; with several, the one that has its
            number, or ``index``.
        certs: Folder of this site: ``ca.crt``, ``site.crt``, ``site.key``, as ``hosfl certs client`` makes it.
        name: Without certificates: who this is. With them it is the certificate's common name.
        insecure: Plain text; on this machine only.
        server_name: What the server's certificate says, where it is not the address that it is called by.
        state: Folder for what the client keeps; None: ``hosfl_client_<name>``.
        index: Of the client in the data that is this one.
        accelerator: As Trainer's.
        save_every: Updates from one write of the shared state to the next.
        give_up: Seconds without the server after which the client ends.
        backoff: Between tries to connect, in the place of the usual one.
        limits: Of the line.
        notify: Takes what people should hear of.

    Returns:
        What the server said at the end.

    Raises:
        ValueError: A setting that cannot be; a certificate that is not good.
        TermsError: This client's model is not that of the run.
        TurnedAwayError: The server does not take this client.
        ServerGoneError: The server was not to be had.
    """
    check_address(server, "--server")
    site = None if insecure else Site.load(_required(certs), "client")
    if site is None:
        check_plain(server, "--server")
    who = name or (site.name if site is not None else "")
    if not who:
        raise ValueError("--name: without certificates a client must say who it is")
    kept = OwnState(Path(state or f"hosfl_client_{who}"))
    joined = Joined(
        who, __version__, lambda terms: _keyed(_endpoint(terms, model, data, index, accelerator), kept), kept,
        save_every, notify,
    )  # fmt: skip
    credentials = None if site is None else site.channel_credentials()
    return Connection(
        server, credentials, joined, limits, backoff or Backoff(give_up=give_up), channel_options(server_name)
    ).run()


def _required(certs: str | None) -> str:
    if not certs:
        raise ValueError(
            "--certs: give the folder of this site's certificate (hosfl certs client --help), or --insecure on one "
            "machine"
        )
    return certs


def _endpoint(
    terms: Terms, model: SplitModule | MakeModel, data: FederatedDataModule, index: int | None, accelerator: str
) -> Endpoint:
    """This client's part of the run, as its terms say."""
    kind = Endpoint.known.get(terms.endpoint)
    part = "client" if kind is not None and kind.needs == "half" else "both"
    fabric = Fabric(accelerator=accelerator, devices=1, precision=terms.precision)  # type: ignore[arg-type]
    module = model if isinstance(model, SplitModule) else model(part)
    if part == "both" and module.part != "both":
        raise TermsError(
            f"a {terms.endpoint} holds more than the layers before the cut; build the model with part=both"
        )
    if terms.backbone not in ("", module.client_fingerprint()):
        raise TermsError("the model's frozen weights are not those of the run: is model.init_args.pretrained the same?")
    fabric.to_device(fabric.strategy.precision.convert_module(module))
    module.eval()
    batches = _own_data(terms, module, data, index)
    endpoint = Endpoint.of(module, batches, terms, fabric)
    if endpoint.privacy is not None:
        assert batches.index is not None
        if (reason := endpoint.privacy.objection(len(data.clients[batches.index]))) is not None:
            raise TermsError(reason)
    if data.validation_set and module.labels == "server":
        endpoint.held_out, endpoint.held_out_batches = batches.held_out, batches.held_out_batches
    return endpoint


def _keyed(endpoint: Endpoint, kept: OwnState) -> Endpoint:
    """Its noise is the same when the client comes back: to the same question it gives the same answer."""
    if endpoint.privacy is not None:
        endpoint.privacy.key = NoiseKey.kept(kept.folder)
    return endpoint


def _own_data(terms: Terms, module: SplitModule, data: FederatedDataModule, index: int | None) -> Minibatches:
    if data.tokenizer is None:
        data.tokenizer, data.tokenizer_of = module.tokenizer(), module.pretrained
    data.prepare_data()
    data.setup("fit")
    check_clients(data)
    if data.label_names is not None:
        module.name_labels(data.label_names)
    number: Any = terms.client
    own = index if index is not None else 0 if data.num_clients == 1 else number
    if not 0 <= own < data.num_clients:
        raise ValueError(
            f"data: it has {data.num_clients} clients, and this is client {own} of the run; give --index, the "
            "number of the one that is this machine's"
        )
    if own not in data.holders:
        raise DataContractError(
            f"data: client {own}, which is this machine's, holds no example, so it has no part in the run"
        )
    check_held_out(data)
    for examples, owner in ((data.clients[own], "this client"), (data.validation_set, "validation")):
        check_examples(data, examples, owner)
        module.check_examples(examples, owner)
    check_padding(data.tokenizer, [data.clients[own]], module.client_half, module.pretrained)
    return Minibatches(data, module, own)
