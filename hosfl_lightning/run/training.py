"""The rounds of a run, begun or gone on with: the clients, the server and the log are made here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from hosfl_client.privacy import NoiseKey
from hosfl_lightning.availability import Always
from hosfl_lightning.clients.cohort import Minibatches
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.fleet import Channel, LocalFleet, Ranks
from hosfl_lightning.models import SplitModule
from hosfl_lightning.optim import Dense
from hosfl_lightning.run import checkpoint as checkpoints
from hosfl_lightning.run import folder
from hosfl_lightning.run.face import TrainerFace
from hosfl_lightning.run.grouping import group_size
from hosfl_lightning.run.history import History
from hosfl_lightning.run.identity import digest, starts
from hosfl_lightning.run.loop import RoundLoop
from hosfl_lightning.run.nodes import check_same
from hosfl_lightning.run.privacy import notice
from hosfl_lightning.run.record import compare, record_of
from hosfl_lightning.run.result import Evaluation, RunResult
from hosfl_lightning.run.session import session
from hosfl_lightning.run.wandb_controls import join_group
from hosfl_lightning.server import Replica, RoundWatcher, Server
from hosfl_lightning.server.configured import check_length, configured
from hosfl_lightning.wire import decode, encode


def train(
    trainer: TrainerFace,
    model: SplitModule,
    data: FederatedDataModule,
    resumed: folder.Resumption | None,
    first: Evaluation | None = None,
) -> RunResult:
    """The rounds alone.

    Args:
        trainer: Its settings say what is run.
        model: The cut model.
        data: The clients' data.
        resumed: Where the run goes on; None: it begins.
        first: The validation at the start, where it is known.
    """
    initial, started = digest(model.trained_state()), starts(model.trained_state())
    if resumed is not None:
        folder.adopt(trainer.loggers, resumed)
    if trainer.announces and all(logger.log_dir is None for logger in trainer.loggers):
        if resumed is not None and resumed.folder is not None:
            trainer.default_root_dir = str(resumed.folder)
        else:
            folder.tell_of_another(trainer.log_dir)
    if trainer.settings.controls:
        join_group(trainer.loggers)
    with session(trainer, model, data, TrainerFn.FITTING):
        trainer.run.result = RunResult(first, first) if first is not None else None
        set_up(trainer, model)
        if resumed is not None:
            _compare(trainer, resumed)
        if resumed is not None and resumed.checkpoint is not None:
            _restore(trainer, resumed.checkpoint)
        if resumed is not None and trainer.settings.controls:
            folder.check_start(resumed, initial)
        check_same(trainer)
        _open_log(trainer, resumed)
        first_of_all = trainer.announces and trainer.is_global_zero
        if first_of_all:  # only now that nothing can refuse it
            folder.set_aside(trainer.log_dir, resumed)
        if resumed is not None and resumed.folder is not None:
            folder.rewind(trainer.loggers, resumed)
            trainer.saving.write(resumed.files)
        trainer.saving.pending = {}
        try:
            if first_of_all and trainer.algorithm.client_holds == "half":
                print(model.labels_notice, flush=True)
            if first_of_all and model.compiles:
                beside = sum(tensor.nbytes for tensor in trainer.endpoint.trained.values())
                print("Halves are compiled at the first batch of each shape; probes, if any, move all that a client "
                      f"trains at once, beside a copy of it ({beside / 1e6:.1f} MB).", flush=True)  # fmt: skip
            if first_of_all and trainer.privacy is not None:
                print(notice(trainer.privacy, trainer.algorithm, model, trainer.serving is None), flush=True)
            trainer.call("on_fit_start")
            if first_of_all:
                folder.write_labels(trainer.log_dir, model.label_names)
                folder.remember(trainer.log_dir, {
                    "run_id": trainer.fleet.channel.run_id.hex(), "start": initial, "starts": started,
                    "settings": _agreed(trainer), "record": trainer.run.record,
                }, trainer.loggers)  # fmt: skip
            return RoundLoop(trainer).train()
        finally:
            trainer.saving.pending = None


def set_up(trainer: TrainerFace, model: SplitModule) -> None:
    """The clients, the way to them, and the server."""
    settings, method = trainer.settings, trainer.algorithm
    own = trainer.serving is None or trainer.serving.validate != "clients"
    trainer.num_val_batches = [len(trainer.datamodule.val_dataloader()) if own else 1]
    terms: Any = method.terms(model, settings.seed, settings.codec, trainer.datamodule.num_clients)
    if trainer.privacy is not None:
        terms = replace(terms, privacy=trainer.privacy.terms())
    terms = replace(terms, secure_aggregation=settings.secure_aggregation)
    terms = decode(encode(terms), "terms")  # as a client elsewhere would have them
    if trainer.serving is not None:
        terms = replace(terms, precision=settings.precision, backbone=model.client_fingerprint())
    data = Minibatches(trainer.datamodule, model)
    trainer.endpoint = endpoint = method.endpoint(model, data, terms, trainer.fabric)
    if endpoint.privacy is not None and trainer.serving is None:
        endpoint.privacy.key = NoiseKey.of_seed(settings.seed)
    endpoint.checks = trainer.is_global_zero  # one process looks at μ, so that a warning comes once
    channel = Channel(serialize=settings.simulation == "per_client")
    joint = method.joint and settings.simulation == "batched"
    kind = Ranks if settings.world_size > 1 else LocalFleet
    if trainer.serving is not None:
        trainer.fleet = trainer.serving.fleet(endpoint, channel, terms)
    else:
        trainer.fleet = kind(endpoint, channel, joint, trainer.processes)
    optimizer, scheduler = configured(model)
    check_length(scheduler, settings.max_rounds, "model.init_args.lr_scheduler")
    wrapped: Any = trainer.fabric.setup_optimizers(optimizer)
    replica = Replica(endpoint.shared, endpoint.shared_rule)
    size = group_size(trainer)
    agreed = _agreed_of(trainer, scheduler is not None, size)
    trainer.run.history = history = History.of(agreed, model, replica, channel, trainer.fabric.device)
    trainer.server = Server(
        model, trainer.fabric, wrapped, scheduler, fleet=trainer.fleet, replica=replica,
        basis=lambda round: method.basis_with_head(model, settings.seed, round, replica.trained),
        publish=history.publish, fire=trainer.call,
        terms=terms, joint=joint, group_size=size, min_clients=settings.min_clients,
        gradient_clip_val=settings.gradient_clip_val, seed=settings.seed, codec=settings.codec.multiplier,
        watchers=[callback for callback in trainer.callbacks if isinstance(callback, RoundWatcher)],
        secure_threshold=settings.secure_threshold if settings.secure_aggregation else None,
    )  # fmt: skip
    method.setup(trainer.server)
    check_length(
        getattr(method, "client_schedule", None), settings.max_rounds, "trainer.algorithm.init_args.client_scheduler"
    )
    if trainer.announces:  # a control is compared with nothing
        trainer.run.record = record_of(trainer, agreed, optimizer, scheduler)


def collect(trainer: TrainerFace, weights_only: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, but for the hooks' part."""
    method, rounds = trainer.algorithm, trainer.settings.max_rounds
    held = trainer.run.collect(method, trainer.endpoint, trainer.server, _agreed(trainer), rounds, weights_only)
    return held if weights_only else {**held, "fleet": trainer.fleet.state_dict()}


def _compare(trainer: TrainerFace, resumed: folder.Resumption) -> None:
    """Refuse to go on with another run."""
    made = resumed.made
    if made is None or compare(trainer.run.record, made.record, _agreed(trainer), made.settings, trainer.algorithm):
        return
    if trainer.announces and trainer.is_global_zero:
        print("ckpt_path: the run is of an earlier version, which kept no record of its model, data and server; of "
              "these, only what the weights show is compared", flush=True)  # fmt: skip


def _restore(trainer: TrainerFace, checkpoint: dict[str, Any]) -> None:
    method, rounds = trainer.algorithm, trainer.settings.max_rounds
    trainer.run.restore(checkpoint, method, trainer.endpoint, trainer.server, rounds)
    if checkpoint.get("fleet"):
        trainer.fleet.load_state_dict(checkpoint["fleet"])
    trainer.call("on_load_checkpoint", checkpoint=checkpoint)
    checkpoints.restore_callbacks(trainer.callbacks, checkpoint["callbacks"])


def _agreed(trainer: TrainerFace) -> dict[str, Any]:
    return _agreed_of(trainer, trainer.server.scheduler is not None, trainer.server.group_size)


def _agreed_of(trainer: TrainerFace, scheduled: bool, size: int | None) -> dict[str, Any]:
    clients, sampled = trainer.datamodule.num_clients, trainer.sample_size
    return trainer.settings.agreed(trainer.algorithm, clients, scheduled, sampled, trainer.privacy, size)


def _open_log(trainer: TrainerFace, resumed: folder.Resumption | None) -> None:
    """Of a new run, or of the one that goes on."""
    history, settings, log = trainer.run.history, trainer.settings, Path(trainer.log_dir) / folder.LOG
    assert history is not None
    # Where all of θ_c is personal the record is of who counted, in no coefficients.
    basis = Dense([]) if trainer.algorithm.personal is True else trainer.server.basis(0)
    always = isinstance(settings.availability, Always)
    if basis is not None:
        basis.of_clients(range(trainer.sample_size))  # refuses more directions of their own than a round may have
    if resumed is not None and not settings.replay_log and log.exists():
        raise checkpoints.CheckpointError(
            f"ckpt_path: the run wrote {log}, which would lack the rounds to come; set trainer.replay_log: true"
        )
    if not trainer.fleet.simulated and resumed is not None and resumed.round and not log.exists():
        return  # who comes back is sent a snapshot
    if not settings.replay_log or not trainer.is_global_zero or basis is None:
        return  # a control, a process that does not write, or a method without updates
    if resumed is None or not resumed.round or log.exists():
        sampled = trainer.sample_size
        history.open(log, resumed, basis, sampled, settings.catch_up, None if always else trainer.clients_online,
                     trainer.fleet)  # fmt: skip
    elif always:
        print(f"Going on in {trainer.log_dir} without an update log: rounds 0 to {resumed.round - 1} are not in it.")
    else:
        raise checkpoints.CheckpointError(
            f"ckpt_path: clients that were away replay the update log, and there is none in {trainer.log_dir}; give "
            "the folder of the run that made the checkpoint"
        )
