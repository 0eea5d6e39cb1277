"""Small runs that take place in one process or in two, and what they leave.

    python -m tests.fleet.two_ranks MODEL OUT

runs all of them in two processes, and at the end one of which the second process breaks off.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import HOSL, ZOSFL, Algorithm
from hosfl_lightning.availability import Trace
from hosfl_lightning.clients import Anchor, SplitClient
from hosfl_lightning.clients.split_endpoint import SplitEndpoint
from hosfl_lightning.optim import SGD, AdamW
from hosfl_lightning.run.checkpoint import load
from hosfl_lightning.split import Lora, LoraHalf
from hosfl_lightning.wire import Message, Multiplier, StepRequest
from tests.conftest import RandomTokens
from tests.small_run import unmeasured

TARGETS = ["q_proj", "v_proj", "down_proj"]
LENGTHS = [[9, 12, 7, 12, 5, 8], [6, 10, 10, 4], [12, 11, 3, 9, 12]]
#: (round, client): what is not a number there. Client 1 runs in the second process.
BAD_Z, BAD_ANSWERS = {(0, 1), (1, 0), (2, 2)}, {(2, 1), (3, 0)}


class SometimesFrozen(SplitCausalLM):
    """One server weight has no gradient from short batches, and in round 0 from none."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        weight = next(p for n, p in self.server_parameters.items() if "lora_B" in n)
        weight.requires_grad_(batch_idx > 0 and batch["z"].shape[1] > 10)
        try:
            return super().training_step(batch, batch_idx)
        finally:
            weight.requires_grad_(True)


class PoisonedEndpoint(SplitEndpoint):
    """Some clients send what is not a number."""

    def make_client(self, half: nn.Module) -> SplitClient:
        client = super().make_client(half)
        forward = client.forward

        def poisoned(batch: dict[str, Tensor], rows: list[slice]) -> Anchor:
            anchor = forward(batch, rows)
            if self.at in BAD_Z:
                anchor.z[0, 0] = torch.nan
            return anchor

        client.forward = poisoned  # type: ignore[method-assign]
        self.at = (-1, -1)
        return client

    def forward(self, requests: Sequence[StepRequest]) -> list[Message]:
        self.at = (requests[0].round, requests[0].client)
        return super().forward(requests)

    def answer(self, multipliers: Sequence[Multiplier]) -> list[Message]:
        answers: list[Any] = super().answer(multipliers)
        bad = (multipliers[0].round, multipliers[0].client) in BAD_ANSWERS
        return [replace(one, coefficients=one.coefficients * torch.nan) if bad else one for one in answers]


class Poisoned(HOSFL):
    """Whose clients are these."""

    endpoint = PoisonedEndpoint


@dataclass
class Case:
    """A run: which model, and the trainer's settings, made anew each time."""

    rounds: int = 4
    model: type[SplitCausalLM] = SplitCausalLM
    algorithm: Callable[[], Algorithm] = field(default=lambda: HOSFL(probes=3, client_optimizer=AdamW(lr=0.01)))
    settings: Callable[[], dict[str, Any]] = field(default=dict)
    dropout: float = 0.0
    optimizer: Callable[[Any], torch.optim.Optimizer] = field(default=lambda p: torch.optim.AdamW(p, lr=0.01))


def everything() -> dict[str, Any]:
    best = ModelCheckpoint(monitor="val/loss", save_top_k=1, filename="{step}")
    stop = EarlyStopping("val/loss", patience=9)
    last = ModelCheckpoint(filename="last", enable_version_counter=False)
    return {
        "callbacks": [best, stop, last], "gradient_clip_val": 0.05, "controls": ["frozen", "first_order"],
        "val_check_interval": 1, "enable_progress_bar": True,
    }  # fmt: skip


CASES: dict[str, Case] = {
    "everything": Case(2, settings=everything, dropout=0.2),
    "away": Case(  # three, one and two clients; a large μ keeps 1/μ from magnifying the rounding of z
        algorithm=lambda: HOSFL(probes=3, mu=2**-7, client_optimizer=SGD(lr=0.1)),
        settings=lambda: {"availability": Trace([[0, 1, 2], [1], [0, 2]])},
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    ),
    "sometimes frozen": Case(model=SometimesFrozen),
    "poisoned": Case(algorithm=lambda: Poisoned(probes=3, client_optimizer=AdamW(lr=0.01))),
    "two-point": Case(2, algorithm=lambda: HOSL(2, client_optimizer=AdamW(lr=0.01)), dropout=0.2),
    "no backprop": Case(2, algorithm=lambda: ZOSFL(2, client_optimizer=AdamW(lr=0.01))),
    "half": Case(2, dropout=0.2),
    "whole": Case(4, dropout=0.2),
}
#: Those that both places run; "whole" is there to go on with "half".
COMPARED = ["everything", "away", "sometimes frozen", "poisoned", "two-point", "no backprop"]


def run(
    name: str, pretrained: Path, out: Path, ckpt_path: Path | None = None, **place: Any
) -> tuple[Orchestrator, SplitCausalLM]:
    """One case, in ``out/<name>``."""
    case = CASES[name]
    server = LoraHalf(r=4, target_modules="all-linear", dropout=case.dropout)
    lora = Lora(client=LoraHalf(r=2, target_modules=TARGETS), server=server)
    model = case.model(str(pretrained), cut=2, lora=lora, optimizer=case.optimizer)
    trainer = Orchestrator(
        case.algorithm(), max_rounds=case.rounds, default_root_dir=str(out / name),
        **{"val_check_interval": 2, "enable_progress_bar": False, **case.settings(), **place},
    )  # fmt: skip
    trainer.fit(model, RandomTokens(LENGTHS), str(ckpt_path) if ckpt_path else None)
    return trainer, model


def left(folder: Path) -> dict[str, Any]:
    """What a run leaves, but for times, memory, settings and the folder's own name."""
    found: dict[str, Any] = {"files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))}
    for path in folder.rglob("*.ckpt"):
        found[path.name] = plain(load(path), str(folder))
    for path in folder.rglob("metrics.csv"):
        rows = csv.DictReader(path.read_text().splitlines())
        found[str(path.relative_to(folder))] = [
            {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows
        ]
    for name in ("updates.log", "run.json", "adapter/adapter_model.safetensors"):
        found[name] = (folder / name).read_bytes()
    summary = json.loads((folder / "summary.json").read_text())
    return found | {"summary": unmeasured(summary)}


def plain(value: Any, folder: str) -> Any:
    """Tensors as bytes, so that ``==`` compares bits; paths without the run's folder."""
    if isinstance(value, dict):
        return {plain(key, folder): plain(part, folder) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part, folder) for part in value]
    if isinstance(value, Tensor):
        return str(value.dtype), [*value.shape], value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return value.replace(folder, "") if isinstance(value, str) else value


def held(trainer: Orchestrator, model: SplitCausalLM) -> dict[str, Any]:
    """What one process holds at the end."""
    return {
        "model": {name: tensor.tolist() for name, tensor in model.trained_state().items()},
        "server": [state["exp_avg"].tolist() for state in trainer.server.optimizer.state.values()],
        "client": [state["exp_avg"].tolist() for state in trainer.endpoint.client.optimizer.state.values()],
        "refused": {str(client): count for client, count in trainer.run.refused.items()},
        "log_dir": trainer.log_dir,
    }


def main(pretrained: Path, out: Path) -> None:
    ends = {}
    for name in [*COMPARED, "half"]:
        trainer, model = run(name, pretrained, out, devices=2)
        ends[name] = held(trainer, model)
    run("whole", pretrained, out, out.parent / "one" / "half" / "version_0", devices=2)
    (out / f"held_{trainer.global_rank}.json").write_text(json.dumps(ends))

    class FailingEndpoint(SplitEndpoint):
        def forward(self, requests: Sequence[StepRequest]) -> list[Message]:
            if requests[0].round == 1 and trainer.global_rank == 1:
                raise ValueError("the second process ends here")
            return super().forward(requests)

    class Failing(HOSFL):
        endpoint = FailingEndpoint

    CASES["failing"] = Case(algorithm=Failing)
    run("failing", pretrained, out, devices=2)


if __name__ == "__main__":
    pretrained, out = map(Path, sys.argv[1:])
    out.mkdir(exist_ok=True)
    said = (out / f"said_{os.environ.get('LOCAL_RANK', 0)}.txt").open("w")
    with said, redirect_stdout(said), redirect_stderr(said):
        main(pretrained, out)
