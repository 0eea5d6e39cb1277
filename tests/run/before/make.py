"""A small run of which two rounds are kept, for later code to be asked to go on with; see the README here."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.availability import Trace
from hosfl_lightning.optim import AdamW
from hosfl_lightning.split import Lora, LoraHalf
from tests.recipe_runs import tiny_pretrained
from tests.small_run import ONLINE, SmallRun, adamw

ROUNDS = 2
#: Where the run is, from the folder in which it is made and gone on with.
FOLDER = Path("runs") / "version_0"


def falling(optimizer: Any) -> Any:
    """Halved after the second round, and after the third."""
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3], gamma=0.5)


def model() -> SplitCausalLM:
    """As in `SmallRun`, with weights that are the same bits wherever they are made, and without dropout."""
    lora = Lora(**{half: LoraHalf(r=2, target_modules=["o_proj"]) for half in ("client", "server")})
    pretrained = str(tiny_pretrained(Path("model"), "llama", 2))
    made = SplitCausalLM(pretrained, cut=1, lora=lora, optimizer=adamw, lr_scheduler=falling)
    generator = torch.Generator().manual_seed(0)
    for _, weight in sorted(made.named_parameters()):
        whole = torch.randint(-64, 65, weight.shape, generator=generator)
        weight.data.copy_(whole / 256 if weight.ndim > 1 else 1 + whole / 1024)  # of norms: about 1
    return made


def data() -> Any:
    return SmallRun(Path()).data()


def trainer(max_rounds: int = 4) -> Orchestrator:
    """AdamW and schedules on both halves; a client is away when the second round is over, and returns."""
    algorithm = HOSFL(probe_batch=1, probes=2, mu=2**-7, client_optimizer=AdamW(lr=1e-2), client_scheduler=falling)
    given: dict[str, Any] = {
        "max_rounds": max_rounds, "clients_per_round": 2, "val_check_interval": 2, "availability": Trace(ONLINE),
        "enable_progress_bar": False, "callbacks": [ModelCheckpoint(filename="{step}", save_top_k=-1)],
    }  # fmt: skip
    return Orchestrator(algorithm, **given)


def main(out: Path) -> None:
    """Make the files of this folder, in a folder of its own that is empty before."""
    torch.set_num_threads(1)
    out.mkdir(parents=True)
    os.chdir(out)
    trainer(ROUNDS).fit(model(), data())
    for name in ("updates.log", "run.json", "metrics.csv", "checkpoints/step=2.ckpt"):
        target = Path("run") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FOLDER / name, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
