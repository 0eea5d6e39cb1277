"""The round loop, driven by Fabric, with the face of a Trainer."""

from __future__ import annotations

import os.path
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus
from torch import Tensor, nn

from hosfl_lightning import checkpoint as checkpoints
from hosfl_lightning import run_folder
from hosfl_lightning.algorithms import HOSFL, Algorithm, TooFewClientsError
from hosfl_lightning.algorithms.split_round import SplitRound
from hosfl_lightning.availability import Always, Availability
from hosfl_lightning.callbacks import CommunicationMonitor, PeakMemoryMonitor, RoundProgressBar
from hosfl_lightning.catch_up import CatchUp
from hosfl_lightning.clients import Cohort
from hosfl_lightning.controls import run_control
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.evaluation import Evaluation, Loop, RunResult, run_evaluation
from hosfl_lightning.files import discard
from hosfl_lightning.history import History
from hosfl_lightning.hooks import check_hooks, fire
from hosfl_lightning.identity import digest, starts
from hosfl_lightning.rebuild import RebuildError, rebuild, write_client
from hosfl_lightning.replay import ReplayLog
from hosfl_lightning.rng import Domain, permutation
from hosfl_lightning.servers import SplitModule
from hosfl_lightning.servers.server import Server, configured
from hosfl_lightning.settings import check_settings, checked_sample
from hosfl_lightning.summary import print_table, write_summary
from hosfl_lightning.trainer_face import MetricSink, TrainerFace
from hosfl_lightning.transport import InProcess, Ranks
from hosfl_lightning.wire import Codecs, Update

#: How often a round is tried before the run stops.
MAX_ATTEMPTS = 10


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
        simulation: ``batched``: a round's clients run as one batch (fast, and the default in one process).
            ``per_client``: one after the other, every message encoded and decoded, as remote clients would; the same
            bits on any number of processes. Equal to rounding, but for server dropout's masks.
        controls: Run the same rounds again with a client that is ``frozen`` and one that backpropagates
            (``first_order``), from the same start, seeds and batches; the summary compares them.
        seed: Of client sampling and of the random directions.
        val_check_interval: Rounds between validations; the first is before round 1, the last after the last.
        log_every_n_steps: Rounds between rows of metrics.
        accelerator: As Trainer's: ``cpu``, ``gpu``, ``auto``.
        devices: Processes over which the clients of a round are spread, each on a device of its own (on ``cpu``, each
            with a share of the cores). Run it as a script or from the command line: the others run the same command.
        codec: In what z, λ and a client's gradient travel: ``fp32`` (as computed), ``bf16``, ``fp16``, ``int8`` or
            ``int4``, a gradient also ``ternary``; the client keeps its own z as computed.
        availability: Which clients are online in a round; None: all. One that was away replays what it missed.
        catch_up: When a returning client replays records and when it is sent a snapshot.
        min_clients: Valid answers, of clients that have a loss term, that a round needs.
        on_too_few: ``repeat`` the round with clients drawn anew (it is tried at most `MAX_ATTEMPTS` times), or ``stop``
            with the state saved.
        replay_log: Write every update into ``updates.log`` of the run folder before it is sent.
        precision: ``32-true``, ``bf16-mixed`` or ``bf16-true`` (which converts the model, adapters included). fp16 with
            a GradScaler is refused.
        gradient_clip_val: Largest 2-norm of the *server's* gradient; a client has scalars only.
        callbacks: Lightning callbacks.
        logger: True: a ``CSVLogger``; False: none; or Lightning loggers, with a ``CSVLogger`` before them if none is
            among them. Its folder is the run's.
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
        simulation: Literal["batched", "per_client"] | None = None,
        controls: list[Literal["frozen", "first_order"]] | None = None,
        seed: int = 0,
        val_check_interval: int = 50,
        log_every_n_steps: int = 1,
        accelerator: str = "cpu",
        devices: int = 1,
        codec: Codecs | None = None,
        availability: Availability | None = None,
        catch_up: CatchUp | None = None,
        min_clients: int = 1,
        on_too_few: Literal["repeat", "stop"] = "stop",
        replay_log: bool = True,
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
        self.max_rounds, self.clients_per_round = max_rounds, clients_per_round
        self.simulation = simulation or ("batched" if devices == 1 else "per_client")
        self.seed = seed
        self.controls: list[str] = list(controls or [])
        self.val_check_interval, self.log_every_n_steps = val_check_interval, log_every_n_steps
        self.gradient_clip_val, self.default_root_dir = gradient_clip_val, str(default_root_dir)
        self.devices, self.precision = devices, precision
        self.codec = codec if codec is not None else Codecs()
        self.availability = availability if availability is not None else Always()
        self.catch_up = catch_up if catch_up is not None else CatchUp()
        self.min_clients, self.on_too_few, self.replay_log = min_clients, on_too_few, replay_log
        check_settings(self)
        self.fabric = MetricSink(
            self._take_metrics, accelerator=accelerator, devices=devices, precision=precision,
            strategy="ddp" if devices > 1 else "auto",
        )  # fmt: skip
        self.loggers = run_folder.make_loggers(logger, self.default_root_dir)
        given = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
        self.callbacks = self._complete(list(given), enable_progress_bar, enable_checkpointing)
        self.transport = Ranks(self.fabric) if devices > 1 else InProcess(serialize=self.simulation == "per_client")
        self.summary: dict[str, Any] = {}
        self.predictions: list[Tensor] = []
        self.result: RunResult | None = None
        self.announces = True
        self.num_sampled = 0
        self.refused: Counter[int] = Counter()
        self._refused_now: dict[int, str] = {}
        self._initial = ""
        self.attempts: list[int] = []
        self.follows: list[int] | None = None  # a control's: at which attempt each round of the run succeeded
        self.history: History
        self._row: dict[str, Any] = {}
        self._pending: dict[str, bool | None] | None = None

    # ---- the four entry points

    def fit(self, model: SplitModule, datamodule: FederatedDataModule, ckpt_path: str | None = None) -> None:
        """Run the rounds, then the controls; the adapter and the summary are written as soon as they are known.

        Args:
            model: The cut model.
            datamodule: The clients' data.
            ckpt_path: A run's folder, or a checkpoint in its folder ``checkpoints``: the run goes on there, and ends as
                if it had never stopped. A checkpoint from elsewhere goes on in a new folder, without an update log.
        """
        _check_model(model)
        if self.algorithm.records and not self.replay_log and not isinstance(self.availability, Always):
            raise ValueError(
                "trainer.availability: a client that was away replays the log; set trainer.replay_log: true"
            )
        resumed = run_folder.find(ckpt_path) if ckpt_path else None
        self.algorithm.check(model)
        self._check_method()
        self.announces = True
        try:
            self._fit(model, datamodule, resumed)
        except KeyboardInterrupt as interrupt:
            interrupt.args = (f"interrupted; {run_folder.how_to_go_on(self.log_dir)}",)
            raise

    def _fit(self, model: SplitModule, datamodule: FederatedDataModule, resumed: run_folder.Resumption | None) -> None:
        start = {name: tensor.clone() for name, tensor in model.trained_state().items()}
        self._initial = digest(start)
        self._starts = starts(start)
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
        self.transport.wait()  # nobody goes on before everything is written

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

    def replay(
        self, model: SplitModule, datamodule: FederatedDataModule | None, run: str, out: str, to: int | None = None
    ) -> None:
        """Rebuild what the clients hold at any round from the base model and the update log of a run alone.

        Where the run has a checkpoint of that round, the two are compared bit for bit.

        Args:
            model: As in the run's recipe.
            datamodule: Not used; the recipe has one.
            run: The run's folder.
            out: The folder to write: ``client_half.safetensors`` (``client_whole.safetensors`` for a method whose
                clients hold the whole model) and ``replay.json``.
            to: Rounds to replay; None: all that the log holds.

        Raises:
            ReplayLogError: The log is damaged, or there is none.
            RebuildError: It is not of this model, ends before the round, or gives other bits than the checkpoint holds.
        """
        log = ReplayLog.read(Path(run) / run_folder.LOG)
        rounds = log.rounds if to is None else to
        self.fabric.strategy.precision.convert_module(model)
        rebuild(model, log, rounds, self.algorithm)
        report = write_client(model, self.algorithm, log, rounds, Path(run), Path(out))
        holds = f"client {self.algorithm.client_holds}"
        print(f"{holds} after {rounds} rounds, from {report['log_bytes']:,} bytes of log, written to {out}")
        for name in report["equal_to"]:
            print(f"equal to {name}, bit for bit")
        if report["differs_from"]:
            others = ", ".join(report["differs_from"])
            raise RebuildError(f"the {holds} that the log of {run} gives differs from {others}")

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

    def _complete(self, given: list[Callback], bar: bool, checkpointing: bool) -> list[Callback]:
        for kind in (PeakMemoryMonitor, CommunicationMonitor):
            if not any(isinstance(c, kind) for c in given):
                given.append(kind())
        given += self.algorithm.configure_callbacks(given)
        if bar and not any(isinstance(c, ProgressBar) for c in given):
            given.append(RoundProgressBar())
        if checkpointing and not any(isinstance(c, ModelCheckpoint) for c in given):
            given.append(ModelCheckpoint(filename="last", enable_version_counter=False))
        if any(isinstance(c, OnExceptionCheckpoint) or getattr(c, "save_on_exception", False) for c in given):
            raise ValueError(
                "trainer.callbacks: OnExceptionCheckpoint and save_on_exception would save the middle of a round; "
                "leave them out, a run goes on from its last checkpoint (every_n_train_steps=1: from the last round)"
            )
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
        self._prepare_data(model, data, fn)
        self.fabric.launch()  # when settings, model and data have been found good: what is wrong is said once
        run_folder.agree(self.loggers, self.transport)
        found = [(m, m.training) for m in model.modules()], [(p, p.requires_grad) for p in model.parameters()]
        fabric_before = model._fabric
        model.fabric = self.fabric  # self.log and self.manual_backward go through Fabric
        try:
            # Not `setup_module`: under several processes it would wrap the server for DDP, whose sums know no order.
            self.fabric.to_device(self.fabric.strategy.precision.convert_module(model))
            model.eval()
            if checkpoint is not None:
                checkpoints.load_model(model, checkpoint)
            run_folder.open_loggers(self.loggers)
            with run_folder.may_hold_checkpoints(self.log_dir):
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
            self.num_sampled = checked_sample(self.clients_per_round, data.num_clients, self.min_clients)
            for name, examples in zip(data.client_names, data.clients):
                model.check_examples(examples, f"client {name!r}")
        model.check_examples(data.validation_set, "validation")
        model.check_examples(data.test_set, "test")

    def _check_method(self) -> None:
        """Whether the method can run where, and beside what, the settings say."""
        method = self.algorithm
        if self.controls and (method.local_steps > 1 or not method.joint or method.server_order != "first"):
            raise ValueError(
                f"trainer.controls: a round of {method.name} is not a round of theirs (one minibatch a client, one "
                "step of a server that backpropagates); set it to [], and compare with hosfl compare"
            )
        if self.devices > 1 and not self.algorithm.joint:
            raise ValueError(
                f"trainer.devices: the clients of {self.algorithm.name} run one after the other; set it to 1"
            )
        if self.codec.gradient != "fp32" and not method.codes_gradient:
            raise ValueError(
                f"trainer.codec.gradient: what the clients of {method.name} send is no gradient in coefficients that "
                "a codec could make smaller; leave it out"
            )
        if self.algorithm.client_holds == "whole" and self.codec != Codecs():
            raise ValueError(
                f"trainer.codec: {self.algorithm.name} has the whole model at the clients, so no smashed data travel "
                "that a codec could make smaller; leave it out"
            )

    def _setup_training(self, model: SplitModule) -> None:
        self.num_val_batches = [len(self.datamodule.val_dataloader())]
        self.algorithm.setup(model, self.seed, self.callbacks)
        if self.codec.gradient == "ternary" and isinstance(self.algorithm, SplitRound):
            self.algorithm.check_ternary()
        optimizer, scheduler = configured(model)
        wrapped: Any = self.fabric.setup_optimizers(optimizer)
        self.server = Server(
            model, self.fabric, wrapped, scheduler, self.gradient_clip_val, self.seed, self.call,
            self.transport.sums, self.codec.multiplier,
        )  # fmt: skip

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
        self, model: SplitModule, data: FederatedDataModule, resumed: run_folder.Resumption | None,
        first: Evaluation | None,
    ) -> RunResult:  # fmt: skip
        """The rounds alone; ``first`` is the validation at the start where it is known."""
        if resumed is not None:
            run_folder.adopt(self.loggers, resumed)
        with self._session(model, data, TrainerFn.FITTING):
            self.result = RunResult(first, first) if first is not None else None
            self.refused.clear()
            self.attempts.clear()
            self._setup_training(model)
            if resumed is not None and resumed.checkpoint is not None:
                checkpoints.restore(self, resumed.checkpoint)
            if resumed is not None and self.controls:
                run_folder.check_start(resumed, self._initial)
            self._open_history(resumed)
            if self.announces and self.is_global_zero:  # only now that nothing can refuse it
                run_folder.set_aside(self.log_dir, resumed)
            if resumed is not None and resumed.folder is not None:
                run_folder.rewind(self.loggers, resumed)
                self._write_checkpoints(resumed.files)
            self._pending = {}
            try:
                return self._train()
            finally:
                self._pending = None

    def _open_history(self, resumed: run_folder.Resumption | None) -> None:
        """The past of a new run, or of the one that goes on."""
        self.history = History.of(self)
        log = Path(self.log_dir) / run_folder.LOG
        if resumed is not None and not self.replay_log and log.exists():
            raise checkpoints.CheckpointError(
                f"ckpt_path: the run wrote {log}, which would lack the rounds to come; set trainer.replay_log: true"
            )
        if not self.replay_log or not self.is_global_zero or self.algorithm.basis(0) is None:
            return  # a control, a process that does not write, or a method without updates
        if resumed is None or not resumed.round or log.exists():
            self.history.open(log, resumed, self)
        elif isinstance(self.availability, Always):
            print(f"Going on in {self.log_dir} without an update log: rounds 0 to {resumed.round - 1} are not in it.")
        else:
            raise checkpoints.CheckpointError(
                f"ckpt_path: clients that were away replay the update log, and there is none in {self.log_dir}; give "
                "the folder of the run that made the checkpoint"
            )

    def _train(self) -> RunResult:
        if self.announces and self.is_global_zero and self.algorithm.client_holds == "half":
            print(self.lightning_module.labels_notice, flush=True)
        self.call("on_fit_start")
        if self.announces and self.is_global_zero:
            run_folder.remember(self.log_dir, self.transport.run_id, self._initial, self._starts, self.loggers)
        self.call("on_train_start")
        if self.global_step:
            self._row = {}  # what is measured at a start stands in the run's first row
        if self.result is None:
            first = self._validate()
            self.result = RunResult(first, first)
        result = self.result
        self._end_round()
        self.call("on_train_epoch_start")
        while self.global_step < self.max_rounds and not self.should_stop:
            result.seconds.append(self._round(self.global_step))
            if self.global_step % self.val_check_interval == 0 or self.is_last_batch or self.should_stop:
                result.last = self._validate()
            self._end_round()
        if result.last.round < self.global_step:  # resumed at its end by a recipe with fewer rounds
            result.last = self._validate()
            self._row = {}
        self.state.status = TrainerStatus.FINISHED
        self.call("on_train_epoch_end")
        self.call("on_train_end")
        self.call("on_fit_end")
        self._end_round()
        return result

    def _round(self, round: int) -> float:
        began = time.perf_counter()
        self.state.stage = RunningStage.TRAINING
        self.transport.clear()
        self._refused_now.clear()
        refused = self.refused.total()
        cohorts = self.cohorts(round)
        self.call("on_train_batch_start", batch=cohorts, batch_idx=round)
        loss = self._attempt(round, cohorts)
        self.global_step = round + 1
        self.lightning_module.log("train/loss", loss)
        self.lightning_module.log("client/refused", self.refused.total() - refused)
        seconds = time.perf_counter() - began
        self.lightning_module.log("time/round_seconds", seconds)
        self.call("on_train_batch_end", outputs={"loss": loss}, batch=cohorts, batch_idx=round)
        return seconds

    def _attempt(self, round: int, cohorts: list[Cohort]) -> Tensor:
        """The round's loss; a round that too few answer is repeated, or ends the run."""
        attempts = range(MAX_ATTEMPTS if self.on_too_few == "repeat" else 1)
        if self.follows is not None:
            attempts = range(self.follows[round], self.follows[round] + 1)
        for attempt in attempts:
            try:
                if attempt:
                    cohorts[:] = self.cohorts(round, attempt)
                self.check_attendance(self.transport.count(sum(len(cohort.clients) for cohort in cohorts)))
                loss = self.algorithm.training_round(self, round, cohorts)
            except TooFewClientsError as error:
                loss, reason = None, str(error)
                self.algorithm.give_up()
            self._count_refused()
            if loss is not None:
                self.attempts.append(attempt)
                return loss
        path = Path(self.log_dir) / "checkpoints" / "stopped.ckpt"
        self._save(str(path), {})
        remedy = "lower trainer.min_clients" + (" or set trainer.on_too_few: repeat" if len(attempts) == 1 else "")
        raise TooFewClientsError(
            f"round {round}: {reason}, tried {len(attempts)} time(s); {remedy}, and go on from the state before the "
            f"round with --ckpt_path {path}"
        )

    def clients_online(self, round: int, attempt: int = 0) -> list[int]:
        """Ascending ids of the clients that can take part."""
        return self.availability.online(self.datamodule.num_clients, self.seed, round, attempt)

    def sample(self, round: int, attempt: int = 0) -> list[int]:
        """The clients of a round, ascending: the first ``K`` online of a permutation under ``(seed, round)``."""
        clients, online = self.datamodule.num_clients, set(self.clients_online(round, attempt))
        again = attempt - 1 if attempt else None  # in the counter's place for a client, which sampling has no use for
        order = permutation(clients, self.seed, Domain.CLIENT_SAMPLING, round=round, client=again)
        return sorted([k for k in order.tolist() if k in online][: self.num_sampled])

    def cohorts(self, round: int, attempt: int = 0) -> list[Cohort]:
        """The sampled clients' first minibatches: one cohort when they run as one batch, one a client otherwise."""
        self.history.attend(round, self.clients_online(round, attempt), self.datamodule.num_clients, attempt)
        clients = self.transport.own(self.sample(round, attempt))
        if not clients:
            return []
        together = self.algorithm.joint and self.simulation == "batched"
        groups = [clients] if together else [[k] for k in clients]
        return [self._cohort(group, round * self.algorithm.local_steps) for group in groups]

    def minibatch(self, client: int, step: int) -> Cohort:
        """As in `Runner`."""
        return self._cohort([client], step)

    def _cohort(self, clients: list[int], step: int) -> Cohort:
        model = self.lightning_module
        batches = [model.prepare(self.datamodule.client_batch(k, step)) for k in clients]
        return Cohort.join(clients, batches, model.count)

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
        return Evaluation(metrics, [float(loss) for loss in losses if isinstance(loss, Tensor)], self.global_step)

    def _evaluate_only(
        self, model: SplitModule, data: FederatedDataModule, fn: TrainerFn, loop: Loop, ckpt_path: str | None
    ) -> list[dict[str, float]]:
        with self._session(model, data, fn, ckpt_path):
            run_evaluation(self, loop, data.test_dataloader() if loop == "test" else data.val_dataloader())
            self._flush()
        return [{name: float(value) for name, value in self.callback_metrics.items()}]

    # ---- what a round asks of its runner

    def refuse(self, client: int, reason: str) -> None:
        """As in `Runner`."""
        self._refused_now[client] = reason

    def _count_refused(self) -> None:
        """Some refusals only the process of the client knows, others all do."""
        told = dict(sorted(entry for part in self.transport.share([*self._refused_now.items()]) for entry in part))
        self._refused_now.clear()
        self.refused.update(told.keys())
        for client, reason in told.items() if self.is_global_zero else ():
            warnings.warn(f"round {self.global_step}: client {client} is refused: {reason}", stacklevel=2)

    def check_attendance(self, answers: int) -> None:
        """As in `Runner`."""
        if answers < self.min_clients:
            raise TooFewClientsError(
                f"{answers} valid answer(s) of clients with a loss term, trainer.min_clients is {self.min_clients}"
            )

    def publish(self, update: Update) -> Update:
        """As in `Runner`."""
        return self.history.publish(update)

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
        """Everything a resumed run needs, and of the model only what is trained.

        Within a run it is written when the round is over and its row of metrics is: a run that goes on from the file
        must find the row.

        Raises:
            CheckpointError: The run was interrupted, maybe within a round: what it holds is the state of none.
        """
        if self.state.status is TrainerStatus.INTERRUPTED:
            how = run_folder.how_to_go_on(self.log_dir)
            raise checkpoints.CheckpointError(f"the run was interrupted, so its state may be that of no round; {how}")
        self._at_end_of_round(filepath, bool(weights_only))

    def remove_checkpoint(self, filepath: str) -> None:
        """Delete a file that a callback gave up, after the one that replaces it is written."""
        self._at_end_of_round(filepath, None)

    def _at_end_of_round(self, filepath: str, weights_only: bool | None) -> None:
        name = os.path.relpath(filepath, self.log_dir)
        if self._pending is None:
            self._write_checkpoints({name: weights_only})
        else:
            self._pending[name] = weights_only

    def _end_round(self) -> None:
        """The row of metrics, then the files."""
        self._flush()
        files, self._pending = self._pending or {}, {}
        self._write_checkpoints(files)

    def _write_checkpoints(self, files: Mapping[str, bool | None]) -> None:
        """Write the files of a round, with weights only or not, or delete them (None), in this order.

        Each knows of all, so that a run which was killed between them does what it had not done.
        """
        for name, weights_only in files.items():
            path = os.path.join(self.log_dir, name)
            if weights_only is not None:
                self._save(path, files, weights_only)
            elif self.is_global_zero:
                discard(path)

    def _save(self, filepath: str, files: Mapping[str, bool | None], weights_only: bool = False) -> None:
        checkpoint = {**checkpoints.collect(self, weights_only), "files": dict(files)}
        self.call("on_save_checkpoint", checkpoint=checkpoint)
        if self.is_global_zero:
            checkpoints.save(checkpoint, filepath)
        self.transport.wait()


def _check_model(model: SplitModule) -> None:
    if not isinstance(model, SplitModule):
        raise TypeError(f"model must be a hosfl_lightning.servers.SplitModule, got {type(model).__name__}")
