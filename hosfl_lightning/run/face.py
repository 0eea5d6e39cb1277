"""The attributes of ``lightning.Trainer`` that stock callbacks read, served by the orchestrator's own state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerState, TrainerStatus
from torch import Tensor

from hosfl_lightning.algorithms import Algorithm
from hosfl_lightning.availability import among
from hosfl_lightning.clients.endpoint import Endpoint
from hosfl_lightning.data.notice import say
from hosfl_lightning.fleet import Fleet, Processes
from hosfl_lightning.privacy import Privacy
from hosfl_lightning.rng import Domain, permutation
from hosfl_lightning.run.hooks import fire
from hosfl_lightning.run.rows import MetricRow
from hosfl_lightning.run.saving import Saving
from hosfl_lightning.run.serving import Serving
from hosfl_lightning.run.settings import RunSettings
from hosfl_lightning.run.state import RunState
from hosfl_lightning.server import Server


class MetricSink(L.Fabric):
    """Fabric whose ``log_dict`` hands ``self.log`` of modules and callbacks to the orchestrator."""

    def __init__(self, sink: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sink = sink

    def log_dict(self, metrics: Any, step: int | None = None) -> None:
        """Collect; the orchestrator writes one row a round."""
        self._sink(metrics)


class StrategyFace:
    """Fabric's strategy with the two methods that only Trainer's has, and no pickle."""

    def __init__(self, fabric: L.Fabric, processes: Processes, remove: Callable[[str], None]) -> None:
        self._strategy, self._processes = fabric.strategy, processes
        self.remove_checkpoint = remove

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """What all processes, or any of them, decide."""
        decisions = self._processes.share(bool(decision))
        return False not in decisions if all else True in decisions

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """What process ``src`` says, a plain value."""
        return self._processes.share(obj)[src]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)


class TrainerFace:
    """What stock callbacks may ask of a Trainer. One round is one step; the whole run is one epoch.

    An attribute that is not here raises an `AttributeError` that names it and the callback that asked.
    """

    fabric: L.Fabric
    processes: Processes
    algorithm: Algorithm
    settings: RunSettings
    callbacks: list[Callback]
    loggers: list[Logger]
    default_root_dir: str
    row: MetricRow
    saving: Saving
    #: Once training is set up.
    server: Server
    endpoint: Endpoint
    fleet: Fleet
    #: Of the run, with the noise that is added.
    privacy: Privacy | None
    #: Where the clients come in, if they are on other machines.
    serving: Serving | None = None

    fast_dev_run = False
    sanity_checking = False
    current_epoch = 0
    max_epochs = 1
    check_val_every_n_epoch = None
    num_sanity_val_batches: list[int] = []

    def __init__(self) -> None:
        self.state = TrainerState()
        self.run = RunState()
        self.announces = True  # a control does not
        self.narrates = False
        self.follows: list[int] | None = None  # a control's: at which attempt each round of the run succeeded
        self.callback_metrics: dict[str, Tensor] = {}
        self.logged_metrics: dict[str, Tensor] = {}
        self.progress_bar_metrics: dict[str, float] = {}
        self.num_val_batches: list[int] = []
        self.num_test_batches: list[int] = []
        self.num_predict_batches: list[int] = []
        self.lightning_module: Any = None
        self.datamodule: Any = None
        self.ckpt_path: str | None = None
        self.has_validated = False
        #: Whether each client's held-out examples are evaluated by themselves; of a control, as its run's are.
        self.by_client = False
        #: Of the checkpoint that is evaluated: what its clients have for themselves, by client and name.
        self.own_halves: Mapping[int, Mapping[str, Tensor]] = {}
        self._asking: str | None = None
        self._holding: Tensor | None = None

    def narrate(self, line: str) -> None:
        """Say what a run is at before its first round, where bars are wanted and a command line asked for it."""
        if self.narrates:
            say(line)

    def __getattr__(self, name: str) -> Any:
        # Only for what was not found. Private names and `copy`'s probes keep Python's own message.
        if name.startswith("__"):
            raise AttributeError(name)
        settings = self.__dict__.get("settings")
        if hasattr(settings, name):
            return getattr(settings, name)
        who = self.__dict__.get("_asking")
        asker = f" (asked for by {who})" if who else ""
        raise AttributeError(
            f"the Orchestrator has no Trainer attribute {name!r}{asker}; a callback that needs it cannot run here"
        )

    @property
    def global_step(self) -> int:
        """Rounds that are done."""
        return self.run.global_step

    @property
    def should_stop(self) -> bool:
        """Whether the round under way is the last one."""
        return self.run.should_stop

    @should_stop.setter
    def should_stop(self, stop: bool) -> None:
        self.run.should_stop = stop

    # ---- where it runs

    @property
    def strategy(self) -> StrategyFace:
        return StrategyFace(self.fabric, self.processes, self.remove_checkpoint)

    @property
    def precision_plugin(self) -> Any:
        return self.fabric.strategy.precision

    @property
    def accelerator(self) -> Any:
        """Trainer's, which `DeviceStatsMonitor` asks; Fabric's has no figures."""
        kind = self.fabric.device.type
        return {"cpu": CPUAccelerator, "mps": MPSAccelerator}.get(kind, CUDAAccelerator)()

    @property
    def is_global_zero(self) -> bool:
        return self.fabric.is_global_zero

    @property
    def global_rank(self) -> int:
        return self.fabric.global_rank

    @property
    def local_rank(self) -> int:
        return self.fabric.local_rank

    @property
    def world_size(self) -> int:
        return self.fabric.world_size

    # ---- how far it is

    @property
    def max_steps(self) -> int:
        return self.settings.max_rounds

    @property
    def num_training_batches(self) -> int:
        return self.settings.max_rounds

    @property
    def enable_validation(self) -> bool:
        return bool(self.num_val_batches)

    @property
    def training(self) -> bool:
        return self.state.stage is RunningStage.TRAINING

    @property
    def validating(self) -> bool:
        return self.state.stage is RunningStage.VALIDATING

    @property
    def is_last_batch(self) -> bool:
        return self.global_step >= self.settings.max_rounds

    @property
    def should_log(self) -> bool:
        """Whether this round writes a row."""
        return self.global_step % self.settings.log_every_n_steps == 0 or self.is_last_batch

    @property
    def fit_loop(self) -> SimpleNamespace:
        """The corners of Trainer's loops that ModelCheckpoint and LearningRateMonitor look into."""
        epoch_loop = SimpleNamespace(
            _batches_that_stepped=self.global_step,
            _should_check_val_epoch=lambda: True,
            batch_progress=SimpleNamespace(is_last_batch=self.is_last_batch),
            val_loop=SimpleNamespace(_has_run=self.has_validated),
        )
        return SimpleNamespace(epoch_loop=epoch_loop, total_batch_idx=self.global_step)

    @property
    def _logger_connector(self) -> SimpleNamespace:
        return SimpleNamespace(should_update_logs=self.should_log)

    # ---- who takes part

    @property
    def model(self) -> Any:
        return self.lightning_module

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.server.optimizer] if "server" in vars(self) else []

    @property
    def lr_scheduler_configs(self) -> list[SimpleNamespace]:
        scheduler = self.server.scheduler if "server" in vars(self) else None
        return [] if scheduler is None else [SimpleNamespace(scheduler=scheduler, name=None, interval="step")]

    @property
    def logger(self) -> Logger | None:
        return self.loggers[0] if self.loggers else None

    @property
    def log_dir(self) -> str:
        """The run folder: the first logger's folder of this run, or ``default_root_dir``."""
        for logger in self.loggers:
            if logger.log_dir is not None:
                return logger.log_dir
        return self.default_root_dir

    @property
    def checkpoint_callbacks(self) -> list[Checkpoint]:
        return [c for c in self.callbacks if isinstance(c, Checkpoint)]

    @property
    def checkpoint_callback(self) -> Checkpoint | None:
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callback(self) -> EarlyStopping | None:
        return next((c for c in self.callbacks if isinstance(c, EarlyStopping)), None)

    @property
    def progress_bar_callback(self) -> ProgressBar | None:
        return next((c for c in self.callbacks if isinstance(c, ProgressBar)), None)

    def remove_checkpoint(self, filepath: str) -> None:
        raise NotImplementedError

    def call(self, hook: str, **kwargs: Any) -> None:
        """Fire a Trainer hook on every callback, with Trainer's positions, then on the module."""
        self.call_callbacks(hook, **kwargs)
        fire(self.lightning_module, hook, **kwargs)

    def call_callbacks(self, hook: str, **kwargs: Any) -> None:
        """Fire it on the callbacks alone."""
        for callback in self.callbacks:
            self._asking = type(callback).__name__
            getattr(callback, hook)(self, self.lightning_module, *kwargs.values())
        self._asking = None

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the device of this process."""
        return self.fabric.to_device(batch)

    def sample(self, round: int, attempt: int = 0) -> list[int]:
        """The clients of a round, ascending: the first ``K`` of a permutation under ``(seed, round)``.

        Of those that are online and hold an example.
        """
        holding = self.holding
        able = among(self.clients_online(round, attempt), len(holding)) & holding
        again = attempt - 1 if attempt else None  # in the counter's place for a client, which sampling has no use for
        order = permutation(len(holding), self.settings.seed, Domain.CLIENT_SAMPLING, round=round, client=again)
        size = self.sample_size + (self.serving.membership.oversample if self.serving else 0)
        return order[able[order]][:size].sort().values.tolist()

    def forget_holding(self) -> None:
        """Other data may be in its place."""
        self._holding = None

    @property
    def holding(self) -> Tensor:
        """Which clients hold an example, ``(N,)`` bool; as they did at first in a session."""
        if self._holding is None:
            self._holding = among(self.datamodule.holders, self.datamodule.num_clients)
        return self._holding

    @property
    def sample_size(self) -> int:
        """How many clients a round asks."""
        return self.settings.sample_size(len(self.holding), int((~self.holding).sum()))

    def clients_online(self, round: int, attempt: int = 0) -> Sequence[int]:
        """Ascending ids of the clients that can take part."""
        if not self.fleet.simulated:
            return self.fleet.connected
        return self.settings.availability.online(self.datamodule.num_clients, self.settings.seed, round, attempt)

    def set_num_batches(self, loop: str, count: int) -> None:
        """How long the evaluation is, for progress bars."""
        setattr(self, {"validation": "num_val_batches"}.get(loop, f"num_{loop}_batches"), [count])

    def enter(self, fn: TrainerFn, stage: RunningStage) -> None:
        """What is done now."""
        self.state = TrainerState(TrainerStatus.RUNNING, fn, stage)
