"""A small run with everything that a resumed run must bring back, and what it leaves behind, without times."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.availability import Trace
from hosfl_lightning.optim import SGD, AdamW
from hosfl_lightning.split import Lora, LoraHalf
from tests.random_tokens import RandomTokens
from tests.recipe_runs import tiny_pretrained

#: Who is online: client 2 misses rounds 1 and 2, client 1 round 3.
ONLINE = [[0, 1, 2], [0, 1], [0, 1], [0, 2]]


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def halved(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


@dataclass
class SmallRun:
    """Four rounds of two clients; server dropout, schedules and optimizer states on both halves, an absent client.

    Args:
        root: Where the model and the run folder are.
        momentum: SGD with momentum at the clients; else AdamW.
        keep: Every checkpoint; else the best and the last.
        settings: Of the orchestrator, in place of those here.
    """

    root: Path
    momentum: bool = False
    keep: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.root / "runs" / "version_0"

    def model(self) -> SplitCausalLM:
        server = LoraHalf(r=2, dropout=0.2, target_modules=["o_proj"])
        lora = Lora(client=LoraHalf(r=2, target_modules=["o_proj"]), server=server)
        pretrained = tiny_pretrained(self.root / "model", "llama", 2)
        return SplitCausalLM(str(pretrained), cut=1, lora=lora, optimizer=adamw, lr_scheduler=halved)

    def data(self) -> RandomTokens:
        return RandomTokens([[9, 12, 7, 12, 5, 8], [6, 10, 10, 4], [12, 11, 3, 9, 12]])

    def trainer(self, *callbacks: Callback, **settings: Any) -> Orchestrator:
        rule = SGD(lr=0.1, momentum=0.9) if self.momentum else AdamW(lr=1e-2)
        # The loss falls, so the file of round 2 gives way to that of round 4.
        kept: dict[str, Any] = {"monitor": "val/loss", "mode": "min", "save_last": True}
        kept = {"save_top_k": -1} if self.keep else kept
        given: dict[str, Any] = {
            "max_rounds": 4, "clients_per_round": 2, "val_check_interval": 2, "availability": Trace(ONLINE),
            "default_root_dir": str(self.root / "runs"), "enable_progress_bar": False,
            "callbacks": [*callbacks, ModelCheckpoint(filename="{step}", **kept)],
        }  # fmt: skip
        algorithm = HOSFL(client_optimizer=rule, client_scheduler=halved)
        return Orchestrator(algorithm, **given | self.settings | settings)

    def fit(self, *callbacks: Callback, ckpt_path: Path | str | None = None, **settings: Any) -> Orchestrator:
        trainer = self.trainer(*callbacks, **settings)
        trainer.fit(self.model(), self.data(), ckpt_path=str(ckpt_path) if ckpt_path else None)
        return trainer


def contents(folder: Path) -> dict[str, Any]:
    """All files of a run folder by name, to be compared: without what is measured, and with the bits of tensors."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: _comparable(Path(name).name, data) for name, data in files.items()}


def _comparable(name: str, data: bytes) -> Any:
    if name == "metrics.csv":
        rows = csv.DictReader(io.StringIO(data.decode(), newline=""))
        return [{key: v for key, v in row.items() if not key.startswith(("time/", "memory/"))} for row in rows]
    if name == "summary.json":
        return unmeasured(json.loads(data))
    if ".ckpt" in name:
        return plain(torch.load(io.BytesIO(data), weights_only=True))
    return data


def unmeasured(summary: Any) -> Any:
    """A summary, or a part of it, without what a clock has measured."""
    if isinstance(summary, dict):
        return {key: unmeasured(value) for key, value in summary.items() if "seconds" not in key}
    return summary


def plain(value: Any) -> Any:
    """With the bits of each tensor in its place, so that ``==`` compares them."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), [*value.shape], value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value
