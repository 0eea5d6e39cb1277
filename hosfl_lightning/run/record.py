"""What a run is made of: kept in its checkpoints and its folder, and compared before it goes on.

What is in no record may change. Of the Orchestrator's arguments that is `MAY_CHANGE`; of the data, where files lie and
how many examples a batch of an evaluation has; of the model, where its weights lie.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch

from hosfl_lightning.algorithms import Algorithm
from hosfl_lightning.arguments import plain
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.data.content import content, digest
from hosfl_lightning.models import SplitModule
from hosfl_lightning.run.checkpoint import CheckpointError
from hosfl_lightning.run.settings import RunSettings
from hosfl_lightning.server.watching import alters_answers

#: Arguments of the Orchestrator on which no bit of the rounds depends.
MAY_CHANGE = (
    "max_rounds", "controls", "val_check_interval", "log_every_n_steps", "accelerator", "devices", "num_nodes",
    "min_clients", "on_too_few", "secure_threshold", "replay_log", "callbacks", "logger", "default_root_dir",
    "enable_progress_bar", "enable_checkpointing",
)  # fmt: skip
#: Arguments of a model that say where it lies, how it is trained (recorded apart), or which part of it is here.
NOT_OF_THE_MODEL = ("pretrained", "network", "weights", "optimizer", "lr_scheduler", "part", "client_holds")
#: What of the model matters to a run alone: its weights mean the same in any precision and from any start.
OF_THE_RUN = ("seed", "dtype", "compile")
#: Digests of the data, by name; and its arguments that have no part in them.
CLIENTS, HELD_OUT, BATCH = "clients' examples", "held-out examples", "first batch"
OF_BATCHES = ("batch_size", "eval_batch_size", "seed")
#: Where a schedule is, which changes; the rest of its state is how it was made.
PROGRESS = ("last_epoch", "verbose", "optimizer", "base_lrs")
#: Steps at which a schedule that is a function is looked at.
SAMPLED = (0, 1, 2, 10, 100, 1000)
#: Of these a difference is told alone.
CLASSES = ("model.class_path", "data.class_path", "trainer.algorithm.class_path")
#: Differences that a message names.
NAMED = 4
WHICH = "docs/resume.md says what may change"

Record = dict[str, Any]


def record_of(trainer: Any, agreed: Record, optimizer: torch.optim.Optimizer, scheduler: Any | None) -> Record:
    """Of a run that is set up and has not begun; plain values by the names of the settings.

    Args:
        trainer: A `hosfl_lightning.run.face.TrainerFace` with its server.
        agreed: `RunSettings.agreed`.
        optimizer: The server's, fresh.
        scheduler: Of its learning rate, fresh.
    """
    record = of_settings(agreed, trainer.algorithm)
    record["trainer"] |= {
        "gradient_clip_val": trainer.settings.gradient_clip_val,
        "callbacks": {type(one).__qualname__: _own(one) for one in trainer.callbacks if alters_answers(one)},
    }
    record["trainer"]["algorithm"]["init_args"]["client_scheduler"] = schedule(trainer.algorithm.client_schedule)
    record["model"] = of_model(trainer.lightning_module)
    record["model"]["init_args"] |= {"optimizer": _optimizer(optimizer), "lr_scheduler": schedule(scheduler)}
    record["data"] = of_data(trainer.datamodule)
    return json.loads(json.dumps(record))  # as a file gives it back


def of_settings(agreed: Record, algorithm: Algorithm) -> Record:
    """`RunSettings.agreed`, sorted by the settings' names; of an older checkpoint as well."""
    own, rule = {one.name for one in fields(RunSettings)}, {one.name for one in fields(algorithm.client_optimizer)}
    trainer = {name: value for name, value in agreed.items() if name in own}
    method: Record = {"class_path": agreed.get("algorithm")}
    for name in agreed.keys() - own - {"algorithm", "clients", "server_schedule", "client_schedule"}:
        method[f"client_optimizer.{name}" if name in rule else name] = agreed[name]
    method = {"class_path": method.pop("class_path"), "init_args": dict(sorted(method.items()))}
    return {"trainer": {**trainer, "algorithm": method}, "the number of clients": agreed.get("clients")}


def of_model(model: SplitModule) -> Record:
    """What it computes, from its constructors' arguments; the backbone's weights have a fingerprint of their own."""
    init_args = {name: plain(value) for name, value in model.made_with.items() if name not in NOT_OF_THE_MODEL}
    if not init_args.get("compile"):
        init_args.pop("compile", None)  # as before there was such a setting
    if model.made_with.get("network") is not None:
        init_args["network"] = model.pretrained
    return {"class_path": type(model).__qualname__, "init_args": init_args}


def of_data(data: FederatedDataModule) -> Record:
    """What the rounds and validations see of it, and the arguments, which say why other examples are others."""
    own = getattr(data, "own", data)  # clients on other machines have theirs
    arguments = {name: plain(value) for name, value in own.made_with.items()}
    kept: Record = {"class_path": type(own).__qualname__, "arguments": arguments}
    if own is not data:
        return kept | {HELD_OUT: digest([own.validation_set, own.test_set])}
    clients, held_out, batch = content(data)
    return kept | {
        "init_args": {"batch_size": data.batch_size, "seed": data.seed},
        CLIENTS: clients, HELD_OUT: held_out, BATCH: batch,
    }  # fmt: skip


def schedule(scheduler: Any | None) -> Record | None:
    """A fresh schedule: its class and how it was made; functions by some of their values."""
    if scheduler is None:
        return None
    state = scheduler.state_dict() if hasattr(scheduler, "state_dict") else {}
    found = {k: plain(v) for k, v in state.items() if k not in PROGRESS and (k[0] != "_" or k == "_milestones")}
    if "_schedulers" in state:
        found["schedulers"] = [schedule(one) for one in scheduler._schedulers]
    if "lr_lambdas" in state:
        found["lr_lambdas"] = [[plain(one), _values(one)] for one in scheduler.lr_lambdas]
    return {"class_path": type(scheduler).__qualname__, **found}


def compare(mine: Record, theirs: Record, agreed: Record, settings: Record, algorithm: Algorithm) -> bool:
    """Whether a run may go on.

    Args:
        mine: Its record.
        theirs: Of the run that is to go on; empty: an earlier version made it.
        agreed: Its `RunSettings.agreed`.
        settings: The same of the run that is to go on.
        algorithm: Its method.

    Returns:
        Whether all was compared; of a run of an earlier version not the model, the data, the server.

    Raises:
        CheckpointError: Names what differs, with both values.
    """
    if not theirs:
        mine, theirs = of_settings(agreed, algorithm), of_settings(settings, algorithm)
        refuse(list(differences(mine, theirs)), "the run was made with", "a run that goes on keeps its settings")
        return False
    found = list(differences(_without_arguments(mine), _without_arguments(theirs)))
    if any(name in (f"data.{CLIENTS}", f"data.{HELD_OUT}", f"data.{BATCH}") for name, *_ in found):
        # Why they are others, where it can be told; files that were moved are none.
        reasons = differences(mine["data"]["arguments"], theirs["data"]["arguments"], "data.init_args")
        found = [*(one for one in reasons if one[0].rpartition(".")[2] not in OF_BATCHES), *found]
    refuse(found, "the run was made with", "a run that goes on keeps its settings")
    return True


def compare_model(model: SplitModule, theirs: Record | None) -> bool:
    """Whether weights mean in this model what they meant where they were trained; False: nothing is known of that.

    Raises:
        CheckpointError: Names what differs, with both values.
    """
    if not theirs:
        return False
    found = list(differences(_meaning(of_model(model)), _meaning(theirs["model"]), "model.init_args"))
    refuse(found, "the weights were trained with", "use the run's config.yaml")
    return True


def differences(mine: Any, theirs: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted names, and both values; what is in one alone is null in the other."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in [*mine, *sorted(theirs.keys() - mine.keys())]:
            yield from differences(mine.get(key), theirs.get(key), f"{name}.{key}" if name else key)
    elif mine != theirs:
        yield name, mine, theirs


def refuse(found: list[tuple[str, Any, Any]], theirs: str, remedy: str) -> None:
    """Name what differs.

    Raises:
        CheckpointError: Something does.
    """
    if not found:
        return
    classes = [one for one in found if one[0] in CLASSES]
    if classes:  # what is in another class differs anyway
        found = [(name.removesuffix(".class_path"), mine, other) for name, mine, other in classes]
    told = [f"{name} is {_short(mine)}, {theirs} {_short(other)}" for name, mine, other in found[:NAMED]]
    more = f" (and {len(found) - NAMED} more)" if len(found) > NAMED else ""
    raise CheckpointError(f"ckpt_path: {'; '.join(told)}{more}; {remedy} ({WHICH})")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _meaning(model: Record) -> Record:
    left_out = (*OF_THE_RUN, "optimizer", "lr_scheduler")
    return {name: value for name, value in model["init_args"].items() if name not in left_out}


def _without_arguments(record: Record) -> Record:
    return record | {"data": {name: value for name, value in record["data"].items() if name != "arguments"}}


def _optimizer(optimizer: torch.optim.Optimizer) -> Record:
    """By class and parameter groups; of a rate that has a schedule, what that starts from."""
    groups = []
    for group in optimizer.param_groups:
        held = {name: plain(value) for name, value in group.items() if name not in ("params", "initial_lr")}
        groups.append(held | {"lr": plain(group.get("initial_lr", group.get("lr")))})
    named = groups[0] if len(groups) == 1 else {"param_groups": {str(i): group for i, group in enumerate(groups)}}
    return {"class_path": type(optimizer).__qualname__, **named}


def _own(callback: Any) -> Record:
    return {k: v for k, v in vars(callback).items() if k[0] != "_" and (v is None or isinstance(v, int | float | str))}


def _values(function: Any) -> list[float]:
    try:
        return [float(function(step)) for step in SAMPLED]
    except Exception:  # a function of something else than the step
        return []
