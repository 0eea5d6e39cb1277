"""The run of a split federated method, driven by Fabric, with the face of a Trainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor

from hosfl_client.limits import Limits
from hosfl_lightning.algorithms import HOSFL, Algorithm
from hosfl_lightning.algorithms.base import check_method
from hosfl_lightning.availability import Always, Availability
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.fleet import Processes, RankProcesses
from hosfl_lightning.fleet.member import Membership
from hosfl_lightning.models import SplitModule
from hosfl_lightning.privacy import Privacy
from hosfl_lightning.run import checkpoint as checkpoints
from hosfl_lightning.run import exporting, folder
from hosfl_lightning.run.control import Control
from hosfl_lightning.run.controls import named, run_control
from hosfl_lightning.run.evaluation import Loop, run_evaluation
from hosfl_lightning.run.face import MetricSink, TrainerFace
from hosfl_lightning.run.hooks import complete
from hosfl_lightning.run.nodes import meet
from hosfl_lightning.run.rebuild import replay
from hosfl_lightning.run.result import Evaluation, RunResult
from hosfl_lightning.run.rows import MetricRow
from hosfl_lightning.run.saving import Saving
from hosfl_lightning.run.serve import serve
from hosfl_lightning.run.serving import Serving, default_clients
from hosfl_lightning.run.session import check_model, session
from hosfl_lightning.run.settings import RunSettings
from hosfl_lightning.run.summary import write_summary
from hosfl_lightning.run.table import print_table
from hosfl_lightning.run.training import collect, train
from hosfl_lightning.server import CatchUp
from hosfl_lightning.wire import LIMIT, Codecs


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
        group_size: Clients of a batch at most; a round runs group after group in the memory of one. ``auto``: by size.
        controls: Run the same rounds again with a client that is ``frozen`` and one that backpropagates
            (``first_order``), or with another client (`Control`), from the same start, seeds and batches; the summary
            compares them.
        seed: Of client sampling and of the random directions.
        val_check_interval: Rounds between validations; the first is before round 1, the last after the last.
        log_every_n_steps: Rounds between rows of metrics.
        accelerator: As Trainer's: ``cpu``, ``gpu``, ``auto``.
        devices: Processes over which the clients of a round are spread, each on a device of its own (on ``cpu``, each
            with a share of the cores). Run it as a script or from the command line: the others run the same command.
        num_nodes: Machines of one kind, with ``devices`` processes on each. The same command runs on every one, under
            ``torchrun`` or with ``NODE_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` set; the first one writes the run
            folder. The model's and the data's files are on all; so is the run folder when a run goes on.
        codec: In what z, λ and a client's gradient travel: ``fp32`` (as computed), ``bf16``, ``fp16``, ``int8`` or
            ``int4``, a gradient also ``ternary``; the client keeps its own z as computed.
        availability: Which clients are online in a round; None: all. One that was away replays what it missed.
        catch_up: When a returning client replays records and when it is sent a snapshot.
        min_clients: Valid answers, of clients that have a loss term, that a round needs.
        on_too_few: ``repeat`` the round with clients drawn anew (at most 10 times), or ``stop`` with the state saved.
        replay_log: Write every update into ``updates.log`` of the run folder before it is sent.
        precision: ``32-true``, ``bf16-mixed`` or ``bf16-true`` (which converts the model, adapters included). fp16 with
            a GradScaler is refused.
        gradient_clip_val: Largest 2-norm of the *server's* gradient; a client has scalars only.
        privacy: Clipping and noise on what a client sends; None: it leaves as it is.
        secure_aggregation: The server learns the sum of the answers and no single one; needs the extra ``secure``.
        secure_threshold: The share of a round's clients that open such a sum together, above 0.5.
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
        group_size: int | Literal["auto"] = "auto",
        controls: list[Literal["frozen", "first_order"] | Control] | None = None,
        seed: int = 0,
        val_check_interval: int = 50,
        log_every_n_steps: int = 1,
        accelerator: str = "cpu",
        devices: int = 1,
        num_nodes: int = 1,
        codec: Codecs | None = None,
        availability: Availability | None = None,
        catch_up: CatchUp | None = None,
        min_clients: int = 1,
        on_too_few: Literal["repeat", "stop"] = "stop",
        replay_log: bool = True,
        precision: str = "32-true",
        gradient_clip_val: float | None = None,
        privacy: Privacy | None = None,
        secure_aggregation: bool = False,
        secure_threshold: float = 2 / 3,
        callbacks: list[Callback] | Callback | None = None,
        logger: bool | Logger | list[Logger] | None = True,
        default_root_dir: str = "runs",
        enable_progress_bar: bool = True,
        enable_checkpointing: bool = True,
    ) -> None:
        super().__init__()
        self.algorithm = algorithm if algorithm is not None else HOSFL()
        check_method(self.algorithm)
        self.settings = RunSettings(
            max_rounds, clients_per_round, simulation, group_size, list(controls or []), seed, val_check_interval,
            log_every_n_steps, devices, num_nodes, codec or Codecs(), availability or Always(), catch_up or CatchUp(),
            min_clients, on_too_few, replay_log, precision, gradient_clip_val, privacy, secure_aggregation,
            secure_threshold,
        )  # fmt: skip
        self.default_root_dir = str(default_root_dir)
        self.row = MetricRow(self)
        self.fabric = MetricSink(
            self.row.take, accelerator=accelerator, devices=devices, num_nodes=num_nodes, precision=precision,
            strategy="ddp" if self.settings.world_size > 1 else "auto",
        )  # fmt: skip
        self.processes = RankProcesses(self.fabric) if self.settings.world_size > 1 else Processes()
        self.loggers = folder.make_loggers(logger, self.default_root_dir)
        self._given = folder.given(logger)
        given = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
        self.callbacks = complete(
            list(given), self.algorithm, enable_progress_bar, enable_checkpointing, privacy, secure_aggregation
        )
        self.saving = Saving(self, partial(collect, self))
        self.summary: dict[str, Any] = {}
        self.predictions: list[Tensor] = []

    # ---- the entry points

    def fit(self, model: SplitModule, datamodule: FederatedDataModule, ckpt_path: str | None = None) -> None:
        """Run the rounds, then the controls; the adapter and the summary are written as soon as they are known.

        Args:
            model: The cut model.
            datamodule: The clients' data.
            ckpt_path: A run's folder, or a checkpoint in its folder ``checkpoints``: the run goes on there, and ends as
                if it had never stopped. A checkpoint from elsewhere goes on in a new folder, without an update log.
        """
        check_model(model)
        self.settings.check(self.algorithm, model)
        meet(self)
        resumed = folder.find(ckpt_path) if ckpt_path else None
        self.announces = True
        try:
            self._fit(model, datamodule, resumed)
        except KeyboardInterrupt as interrupt:
            interrupt.args = (f"interrupted; {folder.how_to_go_on(self.log_dir)}",)
            raise

    def _fit(self, model: SplitModule, datamodule: FederatedDataModule, resumed: folder.Resumption | None) -> None:
        start = {name: tensor.clone() for name, tensor in model.trained_state().items()}
        result = train(self, model, datamodule, resumed)
        exporting.after_run(self, model)
        controls: dict[str, RunResult] = {}
        self.summary = write_summary(self, result, controls)
        for control in self.settings.controls:
            controls[named(control)] = run_control(self, self._again, control, start, result.first)
            self.summary = write_summary(self, result, controls)
        if self.is_global_zero:
            print_table(self.summary, self.log_dir)
        self.processes.wait()  # nobody goes on before everything is written

    def serve(
        self,
        model: SplitModule,
        datamodule: FederatedDataModule,
        listen: str = "127.0.0.1:8470",
        certs: str | None = None,
        clients: str | None = None,
        run: str | None = None,
        insecure: bool = False,
        quorum: int | None = None,
        oversample: int = 0,
        deadline: float = 60.0,
        keepalive: float = 10.0,
        validate: Literal["server", "clients", "both"] = "server",
        max_frame_bytes: int = LIMIT,
    ) -> None:
        """Run the rounds with clients on other machines, which ``hosfl join``; start it again and it goes on.

        Args:
            model: The cut model.
            datamodule: What the server validates on; of its clients' examples nothing is used.
            listen: ``HOST:PORT``; port 0: any that is free.
            certs: Folder of this server's certificate, as ``hosfl certs server`` makes it.
            clients: ``clients.yaml``, from client numbers to the names in their certificates, read again when it
                changes; None: the one in ``certs``.
            run: The run's folder. Where a run is in it, it goes on; None: a new one under ``default_root_dir``.
            insecure: Plain text, and a client's name is what it says; on this machine only.
            quorum: Clients that must be there before a round begins; None: as many as a round asks.
            oversample: How many more a round asks than it needs; the first that answer count.
            deadline: Seconds within which an answer must come; who is late leaves the round.
            keepalive: Seconds of silence after which the other side is asked whether it is there.
            validate: On the server's own data, on what the clients hold out, or on both.
            max_frame_bytes: Longest message that is sent or taken.
        """
        serving = Serving(
            listen, clients or default_clients(certs), certs, insecure, Membership(quorum, oversample, deadline),
            Limits(max_frame_bytes, keepalive=keepalive), validate,
        )  # fmt: skip
        serve(self, serving, model, datamodule, run)

    def validate(
        self, model: SplitModule, datamodule: FederatedDataModule, ckpt_path: str | None = None
    ) -> list[dict[str, float]]:
        """One pass over the validation data; ``ckpt_path``: a checkpoint, or a run's folder for the last one in it."""
        return self._evaluate_only(model, datamodule, TrainerFn.VALIDATING, "validation", ckpt_path)

    def test(
        self, model: SplitModule, datamodule: FederatedDataModule, ckpt_path: str | None = None
    ) -> list[dict[str, float]]:
        """One pass over the test data; ``ckpt_path`` as in `validate`."""
        return self._evaluate_only(model, datamodule, TrainerFn.TESTING, "test", ckpt_path)

    def predict(
        self, model: SplitModule, datamodule: FederatedDataModule, ckpt_path: str | None = None
    ) -> list[Tensor]:
        """``predict_step`` of every batch; ``ckpt_path`` as in `validate`."""
        with session(self, model, datamodule, TrainerFn.PREDICTING, ckpt_path):
            self.predictions = run_evaluation(self, "predict")
        return self.predictions

    def export(
        self, model: SplitModule, datamodule: FederatedDataModule | None, ckpt_path: str, out: str,
        client: int | None = None,
    ) -> None:  # fmt: skip
        """Write the adapter of a checkpoint as one standard PEFT folder; of a personal run, ``client_<k>`` for each.

        Args:
            model: As in the recipe that made the checkpoint.
            datamodule: Not used; the recipe has one.
            ckpt_path: The checkpoint, or a run's folder: the last one in it.
            out: The folder to write.
            client: Of a personal run: that client's alone; None: of all that have moved.
        """
        exporting.export(self, model, ckpt_path, out, client)

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
        self.fabric.strategy.precision.convert_module(model)
        replay(model, self.algorithm, Path(run), Path(out), to)

    # ---- rounds

    def rerun(self, model: SplitModule, datamodule: FederatedDataModule, first: Evaluation) -> RunResult:
        """The rounds from a start that was validated already: no controls, summary or announcement."""
        self.announces = False
        return train(self, model, datamodule, None, first)

    def _again(self, algorithm: Algorithm, settings: RunSettings, callbacks: list[Callback], logger: Any) -> Any:
        return type(self)(
            algorithm, **settings.arguments(), accelerator=self.fabric.device.type, callbacks=callbacks, logger=logger,
            enable_progress_bar=False, enable_checkpointing=False,
        )  # fmt: skip

    def _evaluate_only(
        self, model: SplitModule, data: FederatedDataModule, fn: TrainerFn, loop: Loop, ckpt_path: str | None
    ) -> list[dict[str, float]]:
        with folder.only(self, self._given), session(self, model, data, fn, ckpt_path):
            run_evaluation(self, loop)
            self.row.flush()
        metrics = {name: float(value) for name, value in self.callback_metrics.items()}
        folder.leave(ckpt_path, f"{loop}.json", metrics)
        return [metrics]

    # ---- checkpoints

    def save_checkpoint(self, filepath: str, weights_only: bool | None = False) -> None:
        """Everything a resumed run needs, and of the model only what is trained.

        Within a run it is written when the round is over and its row of metrics is: a run that goes on from the file
        must find the row.

        Raises:
            CheckpointError: The run was interrupted, maybe within a round: what it holds is the state of none.
        """
        if self.state.status is TrainerStatus.INTERRUPTED:
            how = folder.how_to_go_on(self.log_dir)
            raise checkpoints.CheckpointError(f"the run was interrupted, so its state may be that of no round; {how}")
        self.saving.later(filepath, bool(weights_only))

    def remove_checkpoint(self, filepath: str) -> None:
        """Delete a file that a callback gave up, after the one that replaces it is written."""
        self.saving.later(filepath, None)
