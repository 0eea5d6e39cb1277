"""A run on several machines, its nodes: whether all were started, find each other, and do the same."""

from __future__ import annotations

import os
import warnings
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from hosfl_lightning.run.checkpoint import CheckpointError
from hosfl_lightning.run.face import TrainerFace
from hosfl_lightning.run.identity import digest

#: What Lightning reads on each node where neither torchrun nor a scheduler starts the processes.
VARIABLES = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


def meet(trainer: TrainerFace) -> None:
    """Let the nodes find each other before anything else can fail on one of them: the others would wait for it.

    On one machine the processes are launched later, when what can be checked is found good.

    Raises:
        ValueError: The settings are not those with which the processes were started.
    """
    num_nodes, devices = trainer.settings.num_nodes, trainer.settings.devices
    started_by = getattr(trainer.fabric.strategy, "cluster_environment", None)  # none of a process that runs alone
    if TorchElasticEnvironment.detect():
        _check_torchrun(num_nodes, devices)
    elif num_nodes > 1 and isinstance(started_by, LightningEnvironment):
        _check_variables(num_nodes, devices)
    if num_nodes > 1:
        trainer.fabric.launch()


def check_same(trainer: TrainerFace) -> None:
    """Whether all processes begin the same rounds from the same bits, before the first one writes anything.

    Raises:
        CheckpointError: They go on from different rounds.
        ValueError: They differ in settings or model.
    """
    if trainer.settings.world_size == 1:
        return
    assert trainer.run.history is not None
    start, weights = trainer.run.history.start, digest(trainer.lightning_module.trained_state())
    told: list[Any] = trainer.processes.share([trainer.global_step, start["run_id"], weights, start["hardware"]])
    rounds, runs, states, machines = map(list, zip(*told))
    if other := _differing(rounds):
        raise CheckpointError(
            f"ckpt_path: process 0 goes on from round {rounds[0]}, process {other} from round {rounds[other]}; give "
            "all nodes the same folder, on a file system that they share"
        )
    if other := _differing(runs):
        raise ValueError(
            f"trainer.num_nodes: process {other} has other settings or another model than process 0; start all nodes "
            "with the same recipe and the same files"
        )
    if other := _differing(states):
        raise ValueError(
            f"trainer.num_nodes: process {other} begins with other weights than process 0; start all nodes with the "
            "same files (with ckpt_path, on a file system that they share)"
        )
    if (other := _differing(machines)) and trainer.is_global_zero:
        warnings.warn(
            f"process {other} runs on {machines[other]}, process 0 on {machines[0]}: what they hold may part by "
            "rounding; for equal bits use machines of one kind, with one OMP_NUM_THREADS",
            stacklevel=2,
        )


def _check_torchrun(num_nodes: int, devices: int) -> None:
    nodes, each = int(os.environ["GROUP_WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if (nodes, each) != (num_nodes, devices):
        raise ValueError(
            f"trainer.num_nodes={num_nodes} and trainer.devices={devices}, but torchrun started --nnodes={nodes} with "
            f"--nproc-per-node={each}; set trainer.num_nodes={nodes} and trainer.devices={each}, or torchrun's to these"
        )


def _check_variables(num_nodes: int, devices: int) -> None:
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"trainer.num_nodes={num_nodes}: on each node start it with torchrun, or set {', '.join(VARIABLES)} (not "
            f"set here: {', '.join(missing)}); on one machine alone set it to 1"
        )
    rank, world = os.environ["NODE_RANK"], os.environ.get("WORLD_SIZE", str(num_nodes * devices))
    if rank not in map(str, range(num_nodes)):
        raise ValueError(
            f"trainer.num_nodes={num_nodes}: NODE_RANK is {rank!r}; number the nodes from 0 to {num_nodes - 1}"
        )
    if world != str(num_nodes * devices):
        raise ValueError(
            f"trainer.num_nodes={num_nodes} x trainer.devices={devices} is not WORLD_SIZE, which is {world!r}; set "
            "them alike, or leave WORLD_SIZE out"
        )


def _differing(said: list[Any]) -> int:
    """The first process that says something else than process 0; 0: none does."""
    return next((rank for rank, value in enumerate(said) if value != said[0]), 0)
