"""Nothing passes outside messages: clients in an interpreter of their own give the bits of `per_client` in one."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from hosfl_lightning import Orchestrator
from hosfl_lightning.algorithms import (
    CSEFSL,
    FSLSAGE,
    HERONSFL,
    HOSFL,
    HOSL,
    ZOFL,
    ZOSFL,
    Algorithm,
    ClientKind,
    FedAvg,
    Frozen,
    MixedHOSFL,
    MUSplitFed,
    SplitFedSGD,
    SplitFedV1,
    SplitFedV2,
    SplitLearning,
)
from hosfl_lightning.fleet import Channel, Fleet, Processes
from hosfl_lightning.optim import SGD, AdamW, RandomSubset, Uncompressed
from hosfl_lightning.run import training
from hosfl_lightning.server.replay_log import ReplayLog
from hosfl_lightning.wire import Codecs, Message, Update, decode, encode
from tests.fleet.pipe_client import LENGTHS, model_of, read, write
from tests.random_tokens import RandomTokens
from tests.test_structure import LAYERS, RANK, room


class Pipe:
    """The other interpreter."""

    def __init__(self, pretrained: Path) -> None:
        command = [sys.executable, "-m", "tests.fleet.pipe_client", str(pretrained)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def order(self, letter: bytes, data: bytes = b"") -> list[bytes]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(letter)
        write(stdin, data)
        stdin.flush()
        count = stdout.read(1)
        assert count, "the other interpreter has ended"
        return [read(stdout) for _ in range(count[0])]

    def close(self) -> None:
        with self.process:  # which closes both ends
            pass
        assert self.process.returncode == 0


class PipeFleet(Fleet):
    """Clients of which this process has no object: what it holds of them is the server's replica."""

    def __init__(
        self, pipe: Pipe, recipe: dict[str, Any], endpoint: Any, channel: Channel, processes: Processes
    ) -> None:
        super().__init__(channel, processes)
        self.pipe, self.endpoint = pipe, endpoint
        self.pipe.order(b"T", json.dumps(recipe).encode() + b"\n" + encode(endpoint.terms))

    @override
    def ask(self, requests: Mapping[int, Message], *expected: type[Message]) -> list[Any]:
        answers: list[Any] = []
        for client in self.own:
            if client in requests:
                [frame] = self.pipe.order(b"R", self.sent(requests[client], 1))
                answers += self.take(requests[client], decode(frame, run_id=self.channel.run_id), expected)
        return answers

    @override
    def tell(self, message: Any, clients: Sequence[int]) -> None:
        assert self.pipe.order(b"R", self.sent(message, len(clients))) == []
        if isinstance(message, Update):
            self.endpoint.handle([message])

    @override
    def abandon(self) -> None:
        """Nothing of theirs is here."""

    def sent(self, message: Message, receivers: int) -> bytes:
        frame = encode(message, self.channel.run_id)
        self.channel.count(message, "down", len(frame), receivers)
        return frame


def halved(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


@dataclass
class Case:
    """A method, with a schedule, so that a client that guesses its learning rate is found out."""

    algorithm: Callable[[], Algorithm]
    recipe: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def common(rule: Any = None) -> dict[str, Any]:
    return {"client_optimizer": rule or AdamW(lr=0.01), "client_scheduler": halved}


WHOLE = {"whole": True}
SIDE_KINDS = [
    ClientKind("side", clients=[1]),
    ClientKind("first_order", clients=[0]),
    ClientKind("forward_only", share=1),
]
KINDS = [ClientKind("forward_only", clients=[0]), ClientKind("frozen", clients=[2]), ClientKind("first_order", share=1)]
CASES: dict[str, Case] = {
    "hosfl": Case(lambda: HOSFL(probes=3, **common()), settings={"codec": Codecs("int8", "int4")}),
    "hosfl central": Case(lambda: HOSFL(probes=2, estimator="central", distribution="gauss16", **common(SGD(lr=0.1)))),
    "own directions": Case(lambda: HOSFL(probes=3, directions="client", **common())),
    "side adapter": Case(
        lambda: HOSFL(estimator="local", compression=Uncompressed(), **common()), {"side": True},
        {"codec": Codecs(gradient="int4")},
    ),
    "coordinates": Case(
        lambda: HOSFL(estimator="local", compression=RandomSubset(64), taps="keep", **common()), {"side": True}
    ),
    "labels stay": Case(
        lambda: HOSFL(2, **common()), {"labels": "client", "head": 2}, {"codec": Codecs("int8", "int4")}
    ),
    "hosl": Case(lambda: HOSL(2, **common())),
    "zosfl": Case(lambda: ZOSFL(2, **common())),
    "zofl": Case(lambda: ZOFL(2, local_steps=2, **common(SGD(lr=0.01))), WHOLE),
    "heronsfl": Case(lambda: HERONSFL(2, local_steps=2, upload_every=2, auxiliary_blocks=1, **common())),
    "heronsfl scalars": Case(
        lambda: HERONSFL(2, local_steps=2, scalars=True, auxiliary_blocks=1, **common(SGD(lr=0.01)))
    ),
    "csefsl": Case(lambda: CSEFSL(local_steps=2, auxiliary_blocks=1, **common())),
    "fslsage": Case(lambda: FSLSAGE(local_steps=2, align_every=2, auxiliary_blocks=1, **common())),
    "fedavg": Case(lambda: FedAvg(local_steps=2, **common()), WHOLE),
    "mixed": Case(lambda: MixedHOSFL(KINDS, **common())),
    "mixed, side": Case(lambda: MixedHOSFL(SIDE_KINDS, **common()), {"side": True}),
    "mu-splitfed": Case(lambda: MUSplitFed(2, server_optimizer=AdamW(lr=0.01), **common())),
    "splitfed v1": Case(lambda: SplitFedV1(local_steps=2, **common())),
    "splitfed v2": Case(lambda: SplitFedV2(local_steps=2, **common())),
    "split learning": Case(lambda: SplitLearning(**common())),
    "splitfed sgd": Case(lambda: SplitFedSGD(**common())),
    "frozen": Case(lambda: Frozen(**common())),
    "secure sum": Case(
        lambda: HOSFL(probes=3, **common()), settings={"secure_aggregation": True, "clients_per_round": 3}
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> Iterator[Pipe]:
    pipe = Pipe(tiny_folder)
    yield pipe
    pipe.close()


def run(
    case: Case, pretrained: Path, folder: Path, lengths: Sequence[Sequence[int]] = LENGTHS, **settings: Any
) -> dict[str, Any]:
    """What a run of three rounds, two clients each, leaves."""
    usual: dict[str, Any] = {
        "max_rounds": 3,
        "clients_per_round": 2,
        "val_check_interval": 2,
        "enable_progress_bar": False,
    }
    trainer = Orchestrator(
        case.algorithm(), simulation="per_client", default_root_dir=str(folder),
        **(usual | case.settings | settings),
    )  # fmt: skip
    model = model_of(str(pretrained), **case.recipe)
    trainer.fit(model, RandomTokens(lengths))
    rows = csv.DictReader((Path(trainer.log_dir) / "metrics.csv").read_text().splitlines())
    log = Path(trainer.log_dir) / "updates.log"
    return {
        "state": {name: tensor.tolist() for name, tensor in model.trained_state().items()},
        "metrics": [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows],
        "log": [*ReplayLog.read(log).frames()] if log.exists() else None,
    }


@pytest.mark.parametrize("name", CASES)
def test_clients_behind_a_pipe_give_the_bits_of_clients_in_the_process(
    name: str, pipe: Pipe, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    here = run(case, tiny_folder, tmp_path / "here")

    def fleet(endpoint: Any, channel: Channel, joint: bool, processes: Processes) -> PipeFleet:
        assert not joint
        return PipeFleet(pipe, case.recipe, endpoint, channel, processes)

    monkeypatch.setattr(training, "LocalFleet", fleet)
    there = run(case, tiny_folder, tmp_path / "there")
    for part in here:
        assert here[part] == there[part], part
    assert here["log"] is None or len(here["log"]) == 3


def test_the_other_interpreter_knows_no_server(pipe: Pipe) -> None:
    """After whatever it was asked above."""
    [told] = pipe.order(b"M")
    above = {name for names in LAYERS[: RANK["clients"]] for name in names}
    assert not {room(module) for module in json.loads(told)} & above
