"""The round loop, driven by Fabric, with the face of a Trainer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus
from torch import Tensor, nn

from hosfl_lightning import checkpoint as checkpoints
from hosfl_lightning.algorithms import HOSFL, Algorithm
from hosfl_lightning.callbacks import CommunicationMonitor, PeakMemoryMonitor, RoundProgressBar
from hosfl_lightning.clients import Cohort
from hosfl_lightning.controls import CONTROLS, run_control
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.evaluation import Evaluation, Loop, run_evaluation
from hosfl_lightning.hooks import check_hooks, fire
from hosfl_lightning.rng import Domain, permutation
from hosfl_lightning.servers import SplitModule
from hosfl_lightning.servers.server import Server, configured
from hosfl_lightning.summary import RunResult, print_table, write_summary
from hosfl_lightning.trainer_face import MetricSink, TrainerFace
from hosfl_lightning.transport import InProcess

#: No GradScaler among them.
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


class Orchestrator(TrainerFace):
    """Runs the rounds of a split federated method.

    One round samples ``clients_per_round`` of the clients, takes one minibatch of each through the cut, and is one
    ``global_step``. Stock callbacks run through their Trainer hooks; the whole run is one epoch.

    Example::

        Orchestrator(algorithm=HOSFL(probes=8, mu=1e-3), max_rounds=200).fit(model, data)

    Args:
        algorithm: The method.
        max_rounds: Rounds to run.
        clients_per_round: ``K`` of the data's ``N`` clients; None: all.
        simulation: ``batched``: a round's clients run as one batch (fast). ``per_client``: one after the other, every
            message encoded and decoded, as remote clients would. Equal to rounding, but for server dropout's masks.
        controls: Run the same rounds again with a client that is ``frozen`` and one that backpropagates
            (``first_order``), from the same start, seeds and batches; the summary compares them.
        seed: Of client sampling and of the random directions.
        val_check_interval: Rounds between validations; the first is before round 1, the last after the last.
        log_every_n_steps: Rounds between rows of metrics.
        accelerator: As Trainer's: ``cpu``, ``gpu``, ``auto``.
        strategy: As Fabric's; one process for now.
        devices: 1 for now.
        precision: ``32-true``, ``bf16-mixed`` or ``bf16-true`` (which converts the model, adapters included). fp16 with
            a GradScaler is refused.
        gradient_clip_val: Largest 2-norm of the *server's* gradient; a client has scalars only.
        callbacks: Lightning callbacks.
        logger: True: a ``CSVLogger``; False: none; or Lightning loggers, with a ``CSVLogger`` before those that make no
            run folder.
        default_root_dir: Where the run folder is made.
        enable_progress_bar: Show a bar.
        enable_checkpointing: Add a ``ModelCheckpoint`` (``last.ckpt`` at every validation) when there is none.

    Raises:
        ValueError: A setting out of range; the message names it.
    """

    def __init__(
        self,
        algorithm: Algorithm | None = None,
        max_rounds: int = 100,
        clients_per_round: int | None = None,
        simulation: Literal["batched", "per_client"] = "batched",
        controls: list[Literal["frozen", "first_order"]] | None = None,
        seed: int = 0,
        val_check_interval: int = 50,
        log_every_n_steps: int = 1,
        accelerator: str = "cpu",
        strategy: str = "auto",
        devices: int = 1,
        precision: str = "32-true",
        gradient_clip_val: float | None = None,
        callbacks: list[Callback] | Callback | None = None,
        logger: bool | Logger | list[Logger] | None = True,
        default_root_dir: str = "runs",
        enable_progress_bar: bool = True,
        enable_checkpointing: bool = True,
    ) -> None:
        super().__init__()
        self.algorithm = algorithm if algorithm is not None else HOSFL()
        self.max_rounds, self.clients_per_round, self.simulation = max_rounds, clients_per_round, simulation
        self.seed = seed
        self.controls: list[str] = list(controls or [])
        self.val_check_interval, self.log_every_n_steps = val_check_interval, log_every_n_steps
        self.gradient_clip_val, self.default_root_dir = gradient_clip_val, str(default_root_dir)
        self.devices, self.precision = devices, precision
        self._check_settings()
        self.fabric = MetricSink(
            self._take_metrics, accelerator=accelerator, strategy=strategy, devices=devices, precision=precision
        )
        self.loggers = _loggers(logger, self.default_root_dir)
        given = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
        self.callbacks = self._complete(list(given), enable_progress_bar, enable_checkpointing)
        self.transport = InProcess(serialize=simulation == "per_client")
        self.summary: dict[str, Any] = {}
        self.predictions: list[Tensor] = []
        self.first_validation: Evaluation | None = None
        self.announces = True
        self.num_sampled = 0
        self._row: dict[str, Any] = {}

    # ---- the four entry points

    def fit(self, model: SplitModule, datamodule: FederatedDataModule, ckpt_path: str | None = None) -> None:
        """Run the rounds, then the controls; the adapter and the summary are written as soon as they are known."""
        _check_model(model)
        resumed = checkpoints.load(ckpt_path) if ckpt_path else None
        self.announces = True
        start = {name: tensor.clone() for name, tensor in model.trained_state().items()}
        result = self._run(model, datamodule, resumed, None)
        if self.is_global_zero and model.lora is not None:
            model.export(str(Path(self.log_dir) / "adapter"))
        controls: dict[str, RunResult] = {}
        self.summary = write_summary(self, result, controls)
        for name in self.controls:
            controls[name] = run_control(self, name, start, result.first)
            self.summary = write_summary(self, result, controls)
        if self.is_global_zero:
            print_table(self.summary, result, controls, self.log_dir)

    def validate(
        self, model: SplitModule, datamodule: FederatedDataModule, ckpt_path: str | None = None
    ) -> list[dict[str, float]]:
        """One pass over the validation data."""
        return self._evaluate_only(model, datamodule, TrainerFn.VALIDATING, "validation", ckpt_path)

    def test(
        self, model: SplitModule, datamodule: FederatedDataModule, ckpt_path: str | None = None
    ) -> list[dict[str, float]]:
        """One pass over the test data."""
        return self._evaluate_only(model, datamodule, TrainerFn.TESTING, "test", ckpt_path)

    def predict(
        self, model: SplitModule, datamodule: FederatedDataModule, ckpt_path: str | None = None
    ) -> list[Tensor]:
        """``predict_step`` of every batch."""
        with self._session(model, datamodule, TrainerFn.PREDICTING, ckpt_path):
            self.predictions = run_evaluation(self, "predict", datamodule.predict_dataloader())
        return self.predictions

    def export(self, model: SplitModule, datamodule: FederatedDataModule | None, ckpt_path: str, out: str) -> None:
        """Write the adapter of a checkpoint as one standard PEFT folder.

        Args:
            model: As in the recipe that made the checkpoint.
            datamodule: Not used; the recipe has one.
            ckpt_path: The checkpoint.
            out: The folder to write.
        """
        checkpoints.load_model(model, checkpoints.load(ckpt_path))
        model.export(out)
        print(f"adapter written to {out}")

    # ---- hooks

    def call_callbacks(self, hook: str, **kwargs: Any) -> None:
        """Fire a Trainer hook on every callback, with Trainer's positions."""
        for callback in self.callbacks:
            self._asking = type(callback).__name__
            getattr(callback, hook)(self, self.lightning_module, *kwargs.values())
        self._asking = None

    def call(self, hook: str, **kwargs: Any) -> None:
        """Fire a Trainer hook on every callback, then on the module."""
        self.call_callbacks(hook, **kwargs)
        fire(self.lightning_module, hook, **kwargs)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision's context, for the clients' forwards as for the server's."""
        return self.fabric.autocast()

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the device of this process."""
        return self.fabric.to_device(batch)

    # ---- setting up

    def _check_settings(self) -> None:
        for name in ("max_rounds", "val_check_interval", "log_every_n_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} must be >= 1, got {getattr(self, name)}")
        if self.clients_per_round is not None and self.clients_per_round < 1:
            raise ValueError(f"trainer.clients_per_round must be >= 1 or null for all, got {self.clients_per_round}")
        if self.simulation not in ("batched", "per_client"):
            raise ValueError(f"trainer.simulation must be batched or per_client, got {self.simulation!r}")
        if self.devices != 1:
            raise ValueError(f"trainer.devices must be 1, got {self.devices}: clients do not run on several ranks yet")
        if self.precision not in PRECISIONS:
            reason = (
                "fp16 needs a GradScaler, which scales λ and refuses forward-only steps; "
                if str(self.precision).startswith("16")
                else ""
            )
            raise ValueError(f"trainer.precision={self.precision!r}: {reason}use one of {', '.join(PRECISIONS)}")
        for name in self.controls:
            if name not in CONTROLS:
                raise ValueError(f"trainer.controls: {name!r} is not one of {', '.join(CONTROLS)}")
        if self.gradient_clip_val is not None and not self.gradient_clip_val > 0:
            raise ValueError(f"trainer.gradient_clip_val must be > 0, or null for none, got {self.gradient_clip_val}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"trainer.seed must be between 0 and 2**64 - 1, got {self.seed}")

    def _complete(self, given: list[Callback], bar: bool, checkpointing: bool) -> list[Callback]:
        for kind in (PeakMemoryMonitor, CommunicationMonitor):
            if not any(isinstance(c, kind) for c in given):
                given.append(kind())
        given += self.algorithm.configure_callbacks(given)
        if bar and not any(isinstance(c, ProgressBar) for c in given):
            given.append(RoundProgressBar())
        if checkpointing and not any(isinstance(c, ModelCheckpoint) for c in given):
            given.append(ModelCheckpoint(filename="last", enable_version_counter=False))
        # As in Trainer: checkpoints last, so that they hold what the other callbacks did in the same hook.
        return sorted(given, key=lambda c: isinstance(c, ModelCheckpoint))

    @contextmanager
    def _session(
        self, model: SplitModule, data: FederatedDataModule, fn: TrainerFn, ckpt_path: str | None = None
    ) -> Iterator[None]:
        """Model and data are ready inside; whatever happens, loggers are closed and everything is put back."""
        checkpoint = checkpoints.load(ckpt_path) if ckpt_path else None
        _check_model(model)
        check_hooks(self.callbacks, model, data)
        self.lightning_module, self.datamodule, self.ckpt_path = model, data, ckpt_path
        self._enter(fn, RunningStage.TRAINING if fn is TrainerFn.FITTING else RunningStage(fn.value))
        self.global_step, self.should_stop, self._validated, self._row = 0, False, False, {}
        self.callback_metrics.clear()
        self.fabric.launch()
        self._prepare_data(model, data, fn)
        found = [(m, m.training) for m in model.modules()], [(p, p.requires_grad) for p in model.parameters()]
        fabric_before = model._fabric
        model.fabric = self.fabric  # self.log and self.manual_backward go through Fabric
        try:
            self.fabric.setup_module(model)
            model.eval()
            if checkpoint is not None:
                checkpoints.load_model(model, checkpoint)
            for logger in self.loggers:
                _open(logger)
            self.call("setup", stage=fn.value)
            yield
        except BaseException as error:
            self.state.status = TrainerStatus.INTERRUPTED
            self.call("on_exception", exception=error)
            raise
        finally:
            self._finish(fn.value, *found)
            model._fabric = fabric_before

    def _prepare_data(self, model: SplitModule, data: FederatedDataModule, fn: TrainerFn) -> None:
        """Set up and check the data before a run folder is made."""
        if data.tokenizer is None:
            data.tokenizer, data.tokenizer_of = model.tokenizer(), model.pretrained
        elif data.tokenizer_of not in (None, model.pretrained):
            raise ValueError(f"the data was tokenized for {data.tokenizer_of!r}; make it anew for {model.pretrained!r}")
        data.prepare_data()
        data.setup(fn.value)
        if fn is TrainerFn.FITTING:
            self.num_sampled = _checked_sample(self.clients_per_round, data.num_clients)
            for name, examples in zip(data.client_names, data.clients):
                model.check_examples(examples, f"client {name!r}")
        model.check_examples(data.validation_set, "validation")
        model.check_examples(data.test_set, "test")

    def _setup_training(self, model: SplitModule) -> None:
        self.num_val_batches = [len(self.datamodule.val_dataloader())]
        self.algorithm.setup(model, self.seed, self.callbacks)
        optimizer, scheduler = configured(model)
        wrapped: Any = self.fabric.setup_optimizers(optimizer)
        self.server = Server(model, self.fabric, wrapped, scheduler, self.gradient_clip_val, self.seed, self.call)

    def _finish(self, stage: str, modes: list[tuple[nn.Module, bool]], wanted: list[tuple[nn.Parameter, bool]]) -> None:
        self.call("teardown", stage=stage)
        self.datamodule.teardown(stage)
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        for logger in self.loggers:
            logger.finalize("failed" if self.state.status is TrainerStatus.INTERRUPTED else "success")

    # ---- training

    def _run(
        self, model: SplitModule, data: FederatedDataModule, resumed: dict[str, Any] | None, first: Evaluation | None
    ) -> RunResult:
        """The rounds alone; ``first`` is the validation at the start where it is known."""
        with self._session(model, data, TrainerFn.FITTING):
            self.first_validation = first
            self._setup_training(model)
            if resumed is not None:
                checkpoints.restore(self, resumed)
            return self._train()

    def _train(self) -> RunResult:
        if self.announces and self.is_global_zero:
            print(self.lightning_module.labels_notice, flush=True)
        self.call("on_fit_start")
        self.call("on_train_start")
        self.first_validation = self.first_validation or self._validate()
        result = RunResult(self.first_validation, self.first_validation)
        self._flush()
        self.call("on_train_epoch_start")
        while self.global_step < self.max_rounds and not self.should_stop:
            result.seconds.append(self._round(self.global_step))
            if self.global_step % self.val_check_interval == 0 or self.is_last_batch or self.should_stop:
                result.last = self._validate()
            self._flush()
        if not result.seconds:  # resumed at its end
            result.last = self._validate()
        self.state.status = TrainerStatus.FINISHED
        self.call("on_train_epoch_end")
        self.call("on_train_end")
        self.call("on_fit_end")
        return result

    def _round(self, round: int) -> float:
        began = time.perf_counter()
        self.state.stage = RunningStage.TRAINING
        self.transport.clear()
        cohorts = self.cohorts(round)
        self.call("on_train_batch_start", batch=cohorts, batch_idx=round)
        loss = self.algorithm.training_round(self, round, cohorts)
        self.global_step = round + 1
        self.lightning_module.log("train/loss", loss)
        seconds = time.perf_counter() - began
        self.lightning_module.log("time/round_seconds", seconds)
        self.call("on_train_batch_end", outputs={"loss": loss}, batch=cohorts, batch_idx=round)
        return seconds

    def sample(self, round: int) -> list[int]:
        """The clients of a round, ascending: the first ``K`` of a permutation under ``(seed, round)``."""
        order = permutation(self.datamodule.num_clients, self.seed, Domain.CLIENT_SAMPLING, round=round)
        return sorted(order[: self.num_sampled].tolist())

    def cohorts(self, round: int) -> list[Cohort]:
        """The sampled clients' minibatches: one cohort when batched, one a client otherwise."""
        clients = self.sample(round)
        groups = [clients] if self.simulation == "batched" else [[k] for k in clients]
        count = self.lightning_module.count
        return [Cohort.join(g, [self.datamodule.client_batch(k, round) for k in g], count) for g in groups]

    def rerun(self, model: SplitModule, datamodule: FederatedDataModule, first: Evaluation) -> RunResult:
        """The rounds from a start that was validated already: no controls, no summary, no announcement."""
        self.announces = False
        return self._run(model, datamodule, None, first)

    # ---- evaluation

    def _validate(self) -> Evaluation:
        losses = run_evaluation(self, "validation", self.datamodule.val_dataloader())
        self._validated = True
        self.state.stage = RunningStage.TRAINING
        metrics = {n: float(v) for n, v in self.callback_metrics.items() if n.startswith("val/")}
        if "val/loss" not in metrics:
            raise ValueError(f"{type(self.lightning_module).__name__} must log 'val/loss' in its validation")
        return Evaluation(metrics, [float(loss) for loss in losses if isinstance(loss, Tensor)])

    def _evaluate_only(
        self, model: SplitModule, data: FederatedDataModule, fn: TrainerFn, loop: Loop, ckpt_path: str | None
    ) -> list[dict[str, float]]:
        with self._session(model, data, fn, ckpt_path):
            run_evaluation(self, loop, data.test_dataloader() if loop == "test" else data.val_dataloader())
            self._flush()
        return [{name: float(value) for name, value in self.callback_metrics.items()}]

    # ---- metrics

    def _take_metrics(self, metrics: dict[str, Any]) -> None:
        # fp64: a count of bytes is exact only to 2**24 in fp32.
        values = {
            name: value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            for name, value in metrics.items()
        }
        self._row.update(values)
        self.callback_metrics.update(values)

    def _flush(self) -> None:
        """Write the round's row; the only place where metrics leave the device."""
        if self._row and (self.should_log or any(name.startswith(("val/", "test/")) for name in self._row)):
            row = {name: float(value) for name, value in self._row.items()}
            self.logged_metrics = dict(self._row)
            self.progress_bar_metrics = {n: row[n] for n in ("train/loss", "val/loss") if n in row}
            for logger in self.loggers:
                logger.log_metrics({**row, "round": self.global_step}, step=self.global_step)
                logger.save()
        self._row = {}

    # ---- checkpoints

    def save_checkpoint(self, filepath: str, weights_only: bool | None = False) -> None:
        """Everything a resumed run needs, and of the model only what is trained."""
        checkpoint = checkpoints.collect(self, bool(weights_only))
        self.call("on_save_checkpoint", checkpoint=checkpoint)
        checkpoints.save(checkpoint, filepath)


def _check_model(model: SplitModule) -> None:
    if not isinstance(model, SplitModule):
        raise TypeError(f"model must be a hosfl_lightning.servers.SplitModule, got {type(model).__name__}")


def _loggers(logger: bool | Logger | Iterable[Logger] | None, root: str) -> list[Logger]:
    """The loggers; beside those that make no run folder (W&B) a ``CSVLogger`` that does."""
    if not logger:
        return []
    given = [] if logger is True else [logger] if isinstance(logger, Logger) else list(logger)
    return given if any(one.log_dir for one in given) else [CSVLogger(root, name=""), *given]


def _open(logger: Logger) -> None:
    """Make the run folder before anything is written into it; W&B's curves go over rounds."""
    experiment: Any = getattr(logger, "experiment", None)
    if isinstance(logger, WandbLogger):
        experiment.define_metric("round")
        experiment.define_metric("*", step_metric="round", step_sync=True)


def _checked_sample(wanted: int | None, clients: int) -> int:
    if wanted is not None and wanted > clients:
        raise ValueError(f"trainer.clients_per_round is {wanted}, but the data has {clients} clients; lower it")
    return wanted if wanted is not None else clients
