"""What may be set of a run, checked in one place before anything is built."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from hosfl_lightning.algorithms import Algorithm
from hosfl_lightning.availability import Always, Availability
from hosfl_lightning.clients.head import of_head
from hosfl_lightning.models import SplitModule
from hosfl_lightning.privacy import Privacy
from hosfl_lightning.run.control import Control
from hosfl_lightning.run.privacy import check_method
from hosfl_lightning.run.secure import check_sample, check_secure
from hosfl_lightning.server import CatchUp
from hosfl_lightning.wire import Codecs

#: No GradScaler among them.
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
#: The client does nothing; the client backpropagates and its gradient is averaged every step.
CONTROLS = ("frozen", "first_order")


@dataclass(frozen=True)
class RunSettings:
    """The arguments of an `hosfl_lightning.Orchestrator` that say what is run; see there.

    Raises:
        ValueError: Names the setting and what it may be.
    """

    max_rounds: int = 100
    clients_per_round: int | None = None
    simulation: Literal["batched", "per_client"] | None = None
    group_size: int | Literal["auto"] = "auto"
    controls: list[str | Control] = field(default_factory=list)
    seed: int = 0
    val_check_interval: int = 50
    log_every_n_steps: int = 1
    devices: int = 1
    num_nodes: int = 1
    codec: Codecs = field(default_factory=Codecs)
    availability: Availability = field(default_factory=Always)
    catch_up: CatchUp = field(default_factory=CatchUp)
    min_clients: int = 1
    on_too_few: Literal["repeat", "stop"] = "stop"
    replay_log: bool = True
    precision: str = "32-true"
    gradient_clip_val: float | None = None
    privacy: Privacy | None = None
    secure_aggregation: bool = False
    secure_threshold: float = 2 / 3

    def __post_init__(self) -> None:
        self._check_processes()
        if self.simulation is None:
            object.__setattr__(self, "simulation", "batched" if self.world_size == 1 else "per_client")
        for name in ("max_rounds", "val_check_interval", "log_every_n_steps", "min_clients"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} must be >= 1, got {getattr(self, name)}")
        if self.clients_per_round is not None and self.clients_per_round < 1:
            raise ValueError(f"trainer.clients_per_round must be >= 1 or null for all, got {self.clients_per_round}")
        if self.simulation not in ("batched", "per_client"):
            raise ValueError(f"trainer.simulation must be batched or per_client, got {self.simulation!r}")
        self._check_group()
        if self.on_too_few not in ("repeat", "stop"):
            raise ValueError(f"trainer.on_too_few must be repeat or stop, got {self.on_too_few!r}")
        self._check_precision()
        self._check_controls()
        if self.gradient_clip_val is not None and not self.gradient_clip_val > 0:
            raise ValueError(f"trainer.gradient_clip_val must be > 0, or null for none, got {self.gradient_clip_val}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"trainer.seed must be between 0 and 2**64 - 1, got {self.seed}")

    @property
    def world_size(self) -> int:
        """Processes over which the clients of a round are spread."""
        return self.num_nodes * self.devices

    def _check_processes(self) -> None:
        for name, what in (("devices", "processes"), ("num_nodes", "machines")):
            count = getattr(self, name)
            if type(count) is not int or count < 1:
                raise ValueError(f"trainer.{name} must be a number of {what} >= 1, got {count!r}")
            if count > 1 and self.simulation == "batched":
                raise ValueError(
                    f"trainer.simulation=batched is one batch in one process; with trainer.{name} > 1 leave it out"
                )

    def _check_group(self) -> None:
        size = self.group_size
        if size == "auto":
            return
        if type(size) is not int or size < 1:
            raise ValueError(f"trainer.group_size must be auto, or a number of clients >= 1, got {size!r}")
        if self.simulation != "batched":
            raise ValueError(
                f"trainer.group_size={size} is of clients that run as one batch, and with trainer.simulation="
                f"{self.simulation} (as of several processes, and of clients elsewhere) each runs alone; leave it out"
            )

    def _check_controls(self) -> None:
        names = [one.name if isinstance(one, Control) else one for one in self.controls]
        for name, one in zip(names, self.controls):
            if not isinstance(one, Control) and name not in CONTROLS:
                raise ValueError(f"trainer.controls: {name!r} is not one of {', '.join(CONTROLS)}, nor a Control")
            if names.count(name) > 1:
                raise ValueError(f"trainer.controls: {name} is there twice")
            if isinstance(one, Control) and not one.algorithm.step_by_step:
                raise ValueError(
                    f"trainer.controls: a round of {one.algorithm.name} ({name}) is not a control's (one minibatch a "
                    "client, one step of a server that backpropagates); compare it with hosfl compare"
                )

    def _check_precision(self) -> None:
        if self.precision in PRECISIONS:
            return
        reason = (
            "fp16 needs a GradScaler, which scales λ and refuses forward-only steps; "
            if str(self.precision).startswith("16")
            else ""
        )
        raise ValueError(f"trainer.precision={self.precision!r}: {reason}use one of {', '.join(PRECISIONS)}")

    def arguments(self) -> dict[str, Any]:
        """Of an Orchestrator with the same settings."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def check(self, algorithm: Algorithm, model: SplitModule) -> None:
        """Whether the method can run with this model, where and beside what the settings say.

        Raises:
            ValueError: Names the setting and the fix.
        """
        if (algorithm.records or of_head(model)) and not self.replay_log and not isinstance(self.availability, Always):
            raise ValueError(
                "trainer.availability: a client that was away replays the log; set trainer.replay_log: true"
            )
        algorithm.check(model)
        if self.secure_aggregation:
            check_secure(self, algorithm)
        own = [one.name for one in self.controls if isinstance(one, Control) and one.algorithm.personal]
        if own and not algorithm.personal:
            raise ValueError(
                f"trainer.controls: {own[0]} is personal, and the run is not, so they are not evaluated alike; set "
                "trainer.algorithm.init_args.personal, or compare them with hosfl compare"
            )
        if self.controls and not algorithm.step_by_step:
            raise ValueError(
                f"trainer.controls: a round of {algorithm.name} is not a round of theirs (one minibatch a client, one "
                "step of a server that backpropagates); set it to [], and compare with hosfl compare"
            )
        if self.world_size > 1 and not algorithm.joint:
            name = "devices" if self.devices > 1 else "num_nodes"
            raise ValueError(f"trainer.{name}: the clients of {algorithm.name} run one after the other; set it to 1")
        if self.group_size != "auto" and not (algorithm.joint and algorithm.grouped):
            raise ValueError(
                f"trainer.group_size={self.group_size}: the clients of {algorithm.name} do not run in groups; leave it "
                "out, or take HOSFL, SplitFedSGD or Frozen, none of whose clients are personal"
            )
        if self.privacy is not None:
            check_method(self.privacy, algorithm, model, self.codec)
        algorithm.check_codecs(self.codec, [p.numel() for p in algorithm.shared(model).values()])

    def sample_size(self, clients: int, empty: int = 0) -> int:
        """How many clients a round samples.

        Args:
            clients: Of the data.
            empty: Those of them that hold no example, and are never sampled.

        Raises:
            ValueError: More than there are, or fewer than needed.
        """
        able = clients - empty
        if not able:
            raise ValueError(f"data: none of its {clients} clients holds an example")
        if self.clients_per_round is not None and self.clients_per_round > able:
            what = f"the data has {clients} clients; lower it"
            if empty:
                what = (
                    f"only {able} of the data's {clients} clients hold an example; lower it to {able}, or give every "
                    "client one (min_examples_per_client: 1)"
                )
            raise ValueError(f"trainer.clients_per_round is {self.clients_per_round}, but {what}")
        sampled = self.clients_per_round if self.clients_per_round is not None else able
        if self.min_clients > sampled:
            raise ValueError(f"trainer.min_clients is {self.min_clients}, but a round has {sampled} clients; lower it")
        if self.secure_aggregation:
            check_sample(sampled)
        return sampled

    def agreed(
        self,
        algorithm: Algorithm,
        clients: int,
        server_schedule: bool,
        sampled: int,
        privacy: Privacy | None,
        group_size: int | None = None,
    ) -> dict[str, Any]:
        """What a resumed run must agree on with the run that made the checkpoint; plain values.

        Args:
            algorithm: The method.
            clients: Of the data.
            server_schedule: Whether the server's learning rate has one.
            sampled: Clients of a round.
            privacy: With the noise that ε and the data make.
            group_size: Clients that run as one batch, where a round has several.
        """
        return {
            "algorithm": algorithm.name,
            **algorithm.settings(),
            "seed": self.seed,
            "clients": clients,
            "clients_per_round": sampled,
            "simulation": self.simulation,
            "precision": self.precision,
            "server_schedule": server_schedule,
            "codec": asdict(self.codec),
            "availability": self.availability.settings(),
            "catch_up": asdict(self.catch_up),
            **({"group_size": group_size} if group_size is not None else {}),
            **({"privacy": asdict(privacy)} if privacy is not None else {}),
            **({"secure_aggregation": True} if self.secure_aggregation else {}),  # not in runs of before
        }
