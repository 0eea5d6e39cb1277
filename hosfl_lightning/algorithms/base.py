"""What a run needs of a method: the server's part of a round, and which endpoint its clients are."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

from lightning.pytorch.cli import LRSchedulerCallable
from torch import nn

from hosfl_client.wire.checks import check_settings
from hosfl_lightning.aggregation import MEAN, AggregationRule
from hosfl_lightning.clients.endpoint import Endpoint
from hosfl_lightning.clients.head import of_head
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.models import SplitModule
from hosfl_lightning.optim import SGD, Basis, Beside, Dense, UpdateRule, check_rule
from hosfl_lightning.parts import PartError, check_part
from hosfl_lightning.server import Call, Outcome, Server
from hosfl_lightning.split.personal import PersonalPart, divide
from hosfl_lightning.wire import Codecs, FieldError, Terms, manifest


class Algorithm(ABC):
    """A method: what the server does in a round, as a conversation with its clients, and what the clients answer.

    Sampling, hooks, logging, checkpoints, and where the clients are, are not its matter. An argument that a subclass
    adds belongs into `settings`, which a resumed run must repeat, and into `client_settings` if its endpoint needs it.

    Args:
        client_optimizer: The update rule on what the clients train.
        client_scheduler: The schedule of its learning rate, stepped once a round; every message that moves a client
            carries the rate.
        aggregation: The server's mean over the clients' answers; None: the weighted mean.
    """

    #: What a client of the method runs.
    endpoint: type[Endpoint]
    #: What a client holds of the model: the layers before the cut, or all of it.
    client_holds: ClassVar[Literal["half", "whole"]] = "half"
    #: How the server trains its half: by backprop, by forwards alone, or not at all.
    server_order: ClassVar[Literal["first", "zeroth", "none"]] = "first"
    #: Whether it needs something to train at the clients.
    client_trains: ClassVar[bool] = True
    #: Whether the clients of a round do not depend on each other's steps, so that they may run as one batch.
    joint: bool = True
    #: Whether its `server_round` runs clients in groups, as `Descent` does; a class with one of its own says it anew.
    grouped: ClassVar[bool] = False
    #: Whether `Codecs.gradient` applies to what a client sends.
    codes_gradient: bool = False
    #: Whether an update is made of the sum of its clients' answers, all in one basis, as secure aggregation needs it.
    sums: bool = False
    #: What a `RoundCallback` can be told of its rounds: ``multipliers``, ``answers``, ``update``.
    tells: frozenset[str] = frozenset()
    #: Whether a round makes an update record, which a client that was away replays.
    records: bool = True
    #: Whether the clients keep what they train from round to round; else a round begins with the server's weights.
    keeps: bool = True
    #: Whether its rounds can do without labels at the server, where ``model.init_args.labels`` is ``client``.
    labels_may_stay: ClassVar[bool] = False
    #: Minibatches, and steps, of a client in a round.
    local_steps: int = 1
    #: What each client keeps of what it trains: nothing, all (True), or the part that a word names.
    personal: bool | PersonalPart = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "server_round" in vars(cls) and "grouped" not in vars(cls):
            cls.grouped = False

    def __init__(
        self,
        client_optimizer: UpdateRule | None = None,
        client_scheduler: LRSchedulerCallable | None = None,
        aggregation: AggregationRule | None = None,
    ) -> None:
        self.client_optimizer = client_optimizer if client_optimizer is not None else SGD()
        self.make_scheduler = client_scheduler
        self.aggregation = aggregation if aggregation is not None else MEAN
        check_rule(self.client_optimizer, "trainer.algorithm.client_optimizer")
        check_part(self.aggregation, AggregationRule, "trainer.algorithm.aggregation")

    @property
    def name(self) -> str:
        """As reported in the summary."""
        return type(self).__name__

    # ---- what it is

    @abstractmethod
    def server_round(self, server: Server, fleet: Fleet, call: Call) -> Outcome:
        """The server's part of a round, of one attempt of it.

        What it knows of a client it has from messages. One that fails leaves no trace in the server. It also runs
        before round 0, to see what a client needs; what that did to the server and to `state_dict` is undone.

        Raises:
            TooFewClientsError: Too few clients sent something valid.
        """

    def client_settings(self) -> dict[str, Any]:
        """What its clients must know, as `Terms.settings`; plain values."""
        return {}

    def basis(self, seed: int, round: int, sizes: Sequence[int]) -> Basis | None:
        """In what a round's update record is expressed; None: the method makes none.

        Args:
            seed: The run's.
            round: Counted from 0.
            sizes: Elements of each trained tensor, in manifest order; a head at the client is not among them.
        """
        return None

    def basis_with_head(
        self, module: SplitModule, seed: int, round: int, trained: Mapping[str, nn.Parameter]
    ) -> Basis | None:
        """`basis`, and beside it the gradient itself of a head that is trained at the client, in ``trained``, the last.

        Args:
            module: Whose head it is.
            seed: As of `basis`.
            round: As of `basis`.
            trained: `parameters`, or `shared`.
        """
        sizes, last = [p.numel() for p in trained.values()], len(of_head(module).keys() & trained.keys())
        if last == len(sizes) > 0:
            return Dense(sizes)
        first = self.basis(seed, round, sizes[: len(sizes) - last])
        return Beside(first, sizes, last) if last and first is not None else first

    def kinds_of_round(self) -> list[tuple[int, float]]:
        """A round of each kind that the method has, and the share of its rounds; the shares add up to 1."""
        return [(0, 1.0)]

    # ---- what a run asks before it begins

    def parameters(self, module: SplitModule) -> dict[str, nn.Parameter]:
        """What the clients train, by name, in manifest order: the order numbers the random directions."""
        return self.endpoint.hold(module, self.client_settings())[1]

    def shared(self, module: SplitModule) -> dict[str, nn.Parameter]:
        """Of `parameters`, what all clients hold alike; in manifest order it comes first."""
        return divide(module.client_half, self.parameters(module), self.personal)[0]

    @property
    def step_by_step(self) -> bool:
        """Whether a round is one minibatch a client, and one step of a server that backpropagates, as a control's."""
        return self.local_steps == 1 and self.joint and self.server_order == "first"

    def terms(self, module: SplitModule, seed: int, codecs: Codecs, clients: int) -> Terms:
        """The contract of a run with so many clients, from its first round on."""
        trained = self.parameters(module)
        basis = self.basis_with_head(module, seed, 0, trained)
        rule = self.client_optimizer
        return Terms(
            round=0, client=None, endpoint=self.endpoint.__name__, settings=self.client_settings(), seed=seed,
            manifest=manifest(trained), rule={"name": type(rule).__name__, **rule.hyper_parameters()},
            basis=basis.describe() if basis is not None else {}, codecs=asdict(codecs), keeps=self.keeps,
        )  # fmt: skip

    def check(self, module: SplitModule) -> None:
        """Refuse a model with which the method cannot do what it is for; called before anything is built or written.

        Raises:
            ValueError: Names the setting and the fix.
        """
        if self.client_holds == "whole" and module.client_holds != "whole":
            raise ValueError(
                f"{self.name} trains the whole model at the clients, but model.init_args.client_holds is half (the "
                f"{module.cut} layer(s) before the cut); set it to whole, which gives the server's half to the clients"
            )
        if module.labels == "client" and not self.labels_may_stay:
            raise ValueError(
                f"model.init_args.labels: client keeps labels and loss at the clients, and {self.name} has no round "
                "for that; set it to server, or take HOSFL, SplitFedSGD or Frozen"
            )
        if self.client_trains and not self.parameters(module):
            raise ValueError(
                f"{self.name} trains the clients, but with model.init_args.lora.client: null and no side adapter at "
                "them they have nothing to train; set lora.client, side or client_parameters, or take Frozen"
            )

    def check_codecs(self, codecs: Codecs, sizes: Sequence[int]) -> None:
        """Refuse codecs that do nothing here, or harm.

        Raises:
            ValueError: Names the setting and the fix.
        """
        if codecs.gradient != "fp32" and not self.codes_gradient:
            raise ValueError(
                f"trainer.codec.gradient: what the clients of {self.name} send is no gradient in coefficients that "
                "a codec could make smaller; leave it out"
            )
        if self.client_holds == "whole" and codecs != Codecs():
            raise ValueError(
                f"trainer.codec: {self.name} has the whole model at the clients, so no smashed data travel "
                "that a codec could make smaller; leave it out"
            )

    def settings(self) -> dict[str, Any]:
        """What a resumed run must agree on; plain values."""
        rule, mean = self.client_optimizer, self.aggregation
        return {
            "client_optimizer": type(rule).__name__,
            **{k: plain(v) for k, v in asdict(rule).items()},
            "client_schedule": self.make_scheduler is not None,
            "aggregation": type(mean).__name__,
            **{f"aggregation.{k}": plain(v) for k, v in asdict(mean).items()},
            **({"local_steps": self.local_steps} if self.local_steps != 1 else {}),
        }

    # ---- what it keeps at the server from round to round

    def setup(self, server: Server) -> None:
        """Begin a run; called once the server and the clients are there."""
        self.client_schedule: Any | None = None
        if self.make_scheduler is not None:
            self.client_schedule = self.make_scheduler(server.client_rule)

    def end_round(self, server: Server) -> None:
        """The schedules take their step; the server's belongs to the optimizer that its backprop needs."""
        if self.server_order == "first":
            server.end_round()
        if self.client_schedule is not None:
            with warnings.catch_warnings():
                # The clients have stepped, wherever they are; the replica may have been given their weights.
                warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step", UserWarning)
                self.client_schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """The schedule of the clients' rule."""
        return {"client_schedule": self.client_schedule.state_dict() if self.client_schedule is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        if self.client_schedule is not None:
            self.client_schedule.load_state_dict(state["client_schedule"])


def check_method(algorithm: Any) -> None:
    """Refuse what is no method, or does not say what a run asks of it.

    Raises:
        PartError: Names the class and the contract.
    """
    kind = algorithm if isinstance(algorithm, type) else type(algorithm)
    what = f"trainer.algorithm: {kind.__name__}"
    if not isinstance(algorithm, Algorithm):
        raise PartError(f"{what} is no hosfl_lightning.algorithms.Algorithm; give an instance of a subclass")
    if not hasattr(algorithm, "aggregation"):
        raise PartError(f"{what}.__init__ must call super().__init__(**kwargs), which takes what every method has")
    if not issubclass(getattr(kind, "endpoint", None) or type, Endpoint):
        raise PartError(f"{what}.endpoint must be what its clients run, a subclass of hosfl_lightning.clients.Endpoint")
    for name in ("settings", "client_settings"):
        given = getattr(algorithm, name)()
        try:
            check_settings(what, name, given)
        except FieldError as error:
            raise PartError(f"{error}; it is saved, compared and sent as it is") from error


def plain(value: Any) -> Any:
    """A setting as JSON would give it back."""
    return list(value) if isinstance(value, tuple) else value
