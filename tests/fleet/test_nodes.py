"""Runs on two nodes leave what runs in one process leave, bit for bit; the nodes are processes on loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from hosfl_lightning import Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import SplitFedV2
from hosfl_lightning.fleet import RankProcesses
from hosfl_lightning.run.checkpoint import CheckpointError
from hosfl_lightning.run.nodes import check_same, meet
from tests.algorithms.two_layers import TwoLayers
from tests.conftest import RandomTokens
from tests.fleet.test_processes import TwoProcesses
from tests.fleet.test_ranks import ENVIRONMENT
from tests.fleet.two_ranks import left, run
from tests.recipe_runs import QUICKSTART, ROOT, small

TIMEOUT = 300
LOOPBACK = "127.0.0.1"

pytestmark = [
    pytest.mark.filterwarnings("ignore:the two sides of a probe"),  # μ is large on purpose, see `two_ranks.CASES`
]


@dataclass
class Node:
    """How one of them ended."""

    code: int
    said: str
    errors: str


def free_port() -> int:
    with socket.socket() as one:
        one.bind((LOOPBACK, 0))
        return int(one.getsockname()[1])


def torchrun(rank: int, port: int) -> list[str]:
    place = [f"--node-rank={rank}", f"--master-addr={LOOPBACK}", f"--master-port={port}"]
    return ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *place]


def together(commands: list[list[str]], variables: list[dict[str, str]]) -> list[Node]:
    """Both nodes at once; one that hangs fails the test, and none outlives it."""
    until = time.monotonic() + TIMEOUT
    with ExitStack() as stack:
        nodes = []
        for command, own in zip(commands, variables, strict=True):
            node = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env={**ENVIRONMENT, **own},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            stack.callback(node.wait, TIMEOUT)
            stack.callback(node.terminate)  # torchrun ends what it started
            nodes.append(node)
        said = [node.communicate(timeout=until - time.monotonic()) for node in nodes]
        return [Node(node.returncode, *told) for node, told in zip(nodes, said)]


@dataclass
class Runs:
    """What one process left, and the nodes' two parts."""

    root: Path
    died: list[Node]
    went_on: list[Node]

    def folder(self, place: str, name: str) -> Path:
        return self.root / place / name / "version_0"


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("nodes")
    folders = [[str(tiny_folder), str(root / "shared"), str(root / f"own_{rank}")] for rank in (0, 1)]
    parts = [[["-m", "tests.fleet.two_nodes", part, *own] for own in folders] for part in ("die", "go_on")]
    port = free_port()
    died = together([torchrun(rank, port) + parts[0][rank] for rank in (0, 1)], [{}, {}])
    address = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
    went_on = together(parts[1], [{"NODE_RANK": str(rank), **address} for rank in (0, 1)])
    for name in ("everything", "whole"):
        run(name, tiny_folder, root / "one", simulation="per_client")
    return Runs(root, died, went_on)


def test_two_nodes_leave_what_one_process_leaves(runs: Runs) -> None:
    assert runs.folder("own_0", "everything").exists(), runs.died[0].errors
    one, two = left(runs.folder("one", "everything")), left(runs.folder("own_0", "everything"))
    assert [key for key in one if one[key] != two.get(key)] == []
    assert one.keys() == two.keys()


def test_only_the_first_node_writes_and_speaks(runs: Runs) -> None:
    assert not (runs.root / "own_1").exists()
    assert [node.said.count("run folder") for node in runs.died] == [1, 0]


def test_a_killed_node_ends_the_other(runs: Runs) -> None:
    assert [node.code != 0 for node in runs.died] == [True, True]
    assert "LostProcessError: another process of this run has ended" in runs.died[0].errors
    assert "Signal 9" in runs.died[1].errors


def test_a_run_whose_node_was_killed_goes_on_to_the_bits_of_one_process(runs: Runs) -> None:
    """The nodes were started with torchrun, and again with the variables that Lightning reads."""
    one, two = left(runs.folder("one", "whole")), left(runs.folder("shared", "whole"))
    assert [key for key in one if one[key] != two.get(key)] == []


def test_a_run_folder_that_a_node_does_not_see_ends_both(runs: Runs) -> None:
    assert [node.code for node in runs.went_on] == [1, 1]
    assert "CheckpointError: ckpt_path: no file" in runs.went_on[1].errors
    assert "LostProcessError: another process of this run has ended" in runs.went_on[0].errors


def test_the_command_line_says_what_torchrun_should_have_started(tmp_path: Path) -> None:
    recipe = ["-m", "hosfl_lightning.cli", "fit", f"--config={QUICKSTART}", *small(QUICKSTART, tmp_path)]
    command = ["-m", "torch.distributed.run", "--nproc-per-node=1", f"--master-port={free_port()}", *recipe]
    (node,) = together([[*command, "--trainer.num_nodes=2"]], [{}])
    assert node.code != 0
    (line,) = [line for line in node.errors.splitlines() if line.startswith("hosfl: error")]
    assert line == (
        "hosfl: error: trainer.num_nodes=2 and trainer.devices=1, but torchrun started --nnodes=1 with "
        "--nproc-per-node=1; set trainer.num_nodes=1 and trainer.devices=1, or torchrun's to these"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("num_nodes", [0, "2", True])
def test_nodes_are_counted(make_orchestrator: Callable[..., Orchestrator], num_nodes: Any) -> None:
    with pytest.raises(ValueError, match=r"trainer\.num_nodes must be a number of machines >= 1, got"):
        make_orchestrator(num_nodes=num_nodes)


def test_several_nodes_are_several_processes(make_orchestrator: Callable[..., Orchestrator]) -> None:
    trainer = make_orchestrator(num_nodes=2, devices=3)
    assert (trainer.world_size, trainer.num_nodes, trainer.simulation) == (6, 2, "per_client")
    assert isinstance(trainer.processes, RankProcesses)
    with pytest.raises(ValueError, match=r"one process; with trainer\.num_nodes > 1 leave it out"):
        make_orchestrator(num_nodes=2, simulation="batched")


def test_clients_that_run_one_after_the_other_need_one_node(make_orchestrator: Callable[..., Orchestrator]) -> None:
    trainer = make_orchestrator(SplitFedV2(), num_nodes=2)
    with pytest.raises(ValueError, match=r"trainer\.num_nodes: the clients of SplitFedV2 .*; set it to 1"):
        trainer.settings.check(trainer.algorithm, TwoLayers())


@pytest.fixture
def nodes_alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of whoever runs the tests; the rank that Lightning takes from those of a test is forgotten again."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ("", r"start it with torchrun, or set .* \(not set here: NODE_RANK, MASTER_ADDR, MASTER_PORT\)"),
        ("NODE_RANK=0 MASTER_ADDR=here", r"not set here: MASTER_PORT\); on one machine alone set it to 1"),
        ("NODE_RANK=2 MASTER_ADDR=here MASTER_PORT=1", "NODE_RANK is '2'; number the nodes from 0 to 1"),
        ("NODE_RANK=0 MASTER_ADDR=here MASTER_PORT=1 WORLD_SIZE=4", "is not WORLD_SIZE, which is '4'; set them alike"),
        (
            "TORCHELASTIC_RUN_ID=a GROUP_WORLD_SIZE=1 LOCAL_WORLD_SIZE=2 WORLD_SIZE=2",
            "set trainer.num_nodes=1 and trainer.devices=2",
        ),
    ],
)
def test_nodes_that_would_wait_for_ever_are_refused(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator], data: RandomTokens,
    nodes_alone: pytest.MonkeyPatch, variables: str, reason: str,
) -> None:  # fmt: skip
    for variable in ["RANK=0", "LOCAL_RANK=0", *variables.split()]:
        nodes_alone.setenv(*variable.split("="))
    trainer = make_orchestrator(num_nodes=2)
    nodes_alone.setattr(trainer.fabric, "launch", lambda: pytest.fail("launched"))
    for entry in (trainer.fit, trainer.validate):
        with pytest.raises(ValueError, match=rf"^trainer\.num_nodes=2\b.*{reason}"):
            entry(make_model(), data)


def test_torchrun_with_settings_of_one_process_is_refused(
    make_orchestrator: Callable[..., Orchestrator], nodes_alone: pytest.MonkeyPatch
) -> None:
    """Each of its processes would do the whole run, into the same folder."""
    trainer = make_orchestrator()
    meet(trainer)
    for variable in ("TORCHELASTIC_RUN_ID=a", "GROUP_WORLD_SIZE=2", "LOCAL_WORLD_SIZE=1"):
        nodes_alone.setenv(*variable.split("="))
    with pytest.raises(ValueError, match=r"--nnodes=2 with --nproc-per-node=1; set trainer\.num_nodes=2 and"):
        meet(trainer)


def test_several_nodes_meet_before_anything_is_read(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator], data: RandomTokens,
    nodes_alone: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Met(Exception):
        pass

    def launch() -> None:
        raise Met

    for variable in ("NODE_RANK=1", "MASTER_ADDR=here", "MASTER_PORT=1", "WORLD_SIZE=2"):
        nodes_alone.setenv(*variable.split("="))
    trainer = make_orchestrator(num_nodes=2)
    nodes_alone.setattr(trainer.fabric, "launch", launch)
    for entry in (trainer.fit, trainer.validate):
        with pytest.raises(Met):
            entry(make_model(), data, "no/such.ckpt")


def test_processes_are_compared_before_one_of_them_writes(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator], data: RandomTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(trainer: Any) -> None:
        raise CheckpointError("another round")

    trainer = make_orchestrator()
    monkeypatch.setattr("hosfl_lightning.run.training.check_same", refuse)
    with pytest.raises(CheckpointError, match="another round"):
        trainer.fit(make_model(), data)
    assert [path.name for path in Path(trainer.log_dir).iterdir() if path.name != "checkpoints"] == []


class Weightless:
    """A model that trains nothing."""

    def trained_state(self) -> dict[str, Any]:
        return {}


NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of no tensors


def same_as(other: list[Any], first: bool = True) -> None:
    history = SimpleNamespace(start={"run_id": "a run", "hardware": "a processor"})
    trainer = SimpleNamespace(
        settings=SimpleNamespace(world_size=2), run=SimpleNamespace(history=history), global_step=4,
        lightning_module=Weightless(), processes=TwoProcesses(other), is_global_zero=first,
    )  # fmt: skip
    check_same(cast(Any, trainer))


def test_processes_that_would_not_do_the_same_are_refused() -> None:
    same_as([4, "a run", NOTHING, "a processor"])
    with pytest.raises(
        CheckpointError, match=r"process 0 goes on from round 4, process 1 from round 2; give all nodes"
    ):
        same_as([2, "a run", NOTHING, "a processor"])
    with pytest.raises(ValueError, match=r"trainer\.num_nodes: process 1 has other settings or another model"):
        same_as([4, "another", NOTHING, "a processor"])
    with pytest.raises(ValueError, match=r"trainer\.num_nodes: process 1 begins with other weights than process 0"):
        same_as([4, "a run", "others", "a processor"])


def test_processes_on_other_hardware_are_named_once() -> None:
    with pytest.warns(UserWarning, match=r"process 1 runs on another, process 0 on a processor"):
        same_as([4, "a run", NOTHING, "another"])
    same_as([4, "a run", NOTHING, "another"], first=False)
