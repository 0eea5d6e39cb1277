"""A run whose clients are on other machines: where it listens, who may come in, and its fleet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

from hosfl_client.addresses import check_plain
from hosfl_client.limits import Limits
from hosfl_lightning.clients.endpoint import Endpoint
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.fleet import Channel, Fleet
from hosfl_lightning.fleet.member import Membership
from hosfl_lightning.wire import Terms


@dataclass
class Serving:
    """What `hosfl_lightning.Orchestrator.serve` is told, beside the run's own settings; see there."""

    listen: str
    clients: str
    certs: str | None = None
    insecure: bool = False
    membership: Membership = field(default_factory=Membership)
    limits: Limits = field(default_factory=Limits)
    validate: Literal["server", "clients", "both"] = "server"
    notify: Callable[[str], None] = print

    def __post_init__(self) -> None:
        if self.validate not in ("server", "clients", "both"):
            raise ValueError(f"--validate must be server, clients or both, got {self.validate!r}")
        if not self.insecure and not self.certs:
            raise ValueError(
                "--certs: give the folder of this server's certificate (hosfl certs server --help), or --insecure on "
                "one machine"
            )
        if self.insecure:
            check_plain(self.listen, "--listen")
        self.gate: Any = None

    def open(self) -> None:
        """Listen. Nobody is let in before the run is set up."""
        from hosfl_lightning.link.gate import Gate  # what only a server needs
        from hosfl_lightning.link.reception import Reception

        self.gate = Gate(self.clients, None if self.insecure else self.certs)
        quorum, total = self.membership.quorum, self.gate.total
        if quorum is not None and quorum > total:
            raise ValueError(f"--quorum is {quorum}, but {self.clients} lists {total} clients; lower it")
        self.reception = Reception(self.listen, self.gate.server_credentials(), self.limits)
        host = self.listen.rpartition(":")[0]
        how = "in plain text, without certificates" if self.insecure else "with mutual TLS"
        self.notify(f"listening at {host}:{self.reception.port} {how}; {self.gate.total} clients may come")

    def close(self) -> None:
        """Listen no longer."""
        self.reception.stop()

    def fleet(self, endpoint: Endpoint, channel: Channel, terms: Terms) -> Fleet:
        """The clients."""
        from hosfl_lightning.fleet.admission import Admission
        from hosfl_lightning.fleet.remote import RemoteFleet

        admission = Admission(
            self.reception, self.gate, terms, channel, endpoint.shared_rule, self.notify,
            self.membership.bad_frames, self.limits.frame_bytes,
        )  # fmt: skip
        return RemoteFleet(endpoint, channel, admission, self.membership)


class ServedData(FederatedDataModule):
    """The server's side of the data: what it validates on. The clients' own never is here.

    Args:
        own: Whose validation and test sets are used; of its clients' examples nothing is.
        names: Of the clients.
    """

    def __init__(self, own: FederatedDataModule, names: list[str]) -> None:
        super().__init__(batch_size=own.batch_size, eval_batch_size=own.eval_batch_size, seed=own.seed)
        self.own = own
        self.tokenizer, self.tokenizer_of = own.tokenizer, own.tokenizer_of
        self.clients = [[] for _ in names]
        self.client_names = names

    @property
    @override
    def holders(self) -> list[int]:
        """All: which of them have examples only they know."""
        return list(range(len(self.clients)))

    @property
    @override
    def label_names(self) -> Sequence[str] | None:
        return self.own.label_names

    @override
    def prepare_data(self) -> None:
        self.own.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        self.own.tokenizer, self.own.tokenizer_of = self.tokenizer, self.tokenizer_of
        self.own.setup(stage)
        self.validation_set, self.test_set = self.own.validation_set, self.own.test_set

    @override
    def collate(self, examples: Any) -> dict[str, Any]:
        return self.own.collate(examples)

    @override
    def client_batch(self, client: int, round: int) -> dict[str, Any]:
        raise RuntimeError("the server has no client's data")


def default_clients(certs: str | None) -> str:
    """Where the list of clients is looked for."""
    return str(Path(certs or ".") / "clients.yaml")
