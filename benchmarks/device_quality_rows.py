"""What ``benchmarks.device_quality`` runs: shipped recipes, each with another client."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).parent.parent / "recipes"
#: Of the quickstart's controls.
PUBLISHED, FIRST_ORDER = "HO-SFL as published", "first_order"
#: Engines and bits of the half; PyTorch's clients are in fp32.
ENGINES = ("torch", "fp32", "int8", "int4")
#: Who is compared, in the order of the table. Convolutions are exported in 8 bits at least.
CLIENTS = {
    "tiny_lm": {"frozen": ENGINES[:1], "first_order": ENGINES[:1], "side": ENGINES, "lora": ENGINES},
    "digits": {"frozen": ENGINES[:1], "first_order": ENGINES[:1], "norm": ENGINES[:3]},
}
#: Of the digits' network at the client, of 4 children, so that the server is its head alone; and rounds.
DIGITS_CUT, DIGITS_ROUNDS = 3, 100


@dataclass(frozen=True)
class Row:
    """A task, what its clients train and how, and what runs their half."""

    task: str
    client: str
    engine: str

    @classmethod
    def of(cls, name: str) -> Row:
        """From its `name`."""
        return cls(*name.split("/"))

    @property
    def name(self) -> str:
        """In the table's file."""
        return f"{self.task}/{self.client}/{self.engine}"

    def recipe(self, seed: int, quick: bool, folder: Path) -> dict[str, Any]:
        """The task's recipe with this client; its runs go into ``folder``."""
        found = tiny_lm(self.client) if self.task == "tiny_lm" else digits(self.client)
        trainer, model, data = found["trainer"], found["model"]["init_args"], found["data"]["init_args"]
        del trainer["controls"]
        if quick:
            trainer["max_rounds"] = 2
        if quick and self.task == "tiny_lm":
            data |= {"packages": ["jsonargparse", "peft"], "batch_size": 1, "validation_bytes_per_client": 600,
                     "test_bytes_per_client": 600, "max_bytes_per_client": 2000}  # fmt: skip
        trainer |= {
            "seed": seed, "val_check_interval": trainer["max_rounds"], "default_root_dir": str(folder),
            "enable_progress_bar": False, "enable_checkpointing": False, "replay_log": False,
        }  # fmt: skip
        model["seed"] = data["seed"] = seed
        return found


ROWS = [Row(task, client, one) for task, clients in CLIENTS.items() for client, all in clients.items() for one in all]
QUICK = [Row.of(name) for name in ("digits/frozen/torch", "digits/norm/torch", "digits/norm/int8")]


def tiny_lm(client: str) -> dict[str, Any]:
    """The quickstart: its own client, or that of one of its controls."""
    found: dict[str, Any] = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    trainer, model = found["trainer"], found["model"]["init_args"]
    controls = {one["name"]: one for one in trainer["controls"] if isinstance(one, dict)}
    if client == "frozen":
        trainer["algorithm"] = {"class_path": "hosfl_lightning.algorithms.Frozen"}
    elif client != "side":
        control = deepcopy(controls[FIRST_ORDER if client == "first_order" else PUBLISHED])
        trainer["algorithm"], model["lora"]["client"] = control["algorithm"], control["lora"]
        model["side"]["client"] = 0
    return found


def digits(client: str) -> dict[str, Any]:
    """The norms of a network on digits, which 8 probes train; the server has its head alone."""
    found: dict[str, Any] = yaml.safe_load((RECIPES / "vision" / "digits_hosfl_norm.yaml").read_text())
    trainer, model = found["trainer"], found["model"]["init_args"]
    model["cut"], trainer["max_rounds"] = DIGITS_CUT, DIGITS_ROUNDS
    if client == "norm":
        return found
    exact = {"client_optimizer": trainer["algorithm"]["init_args"]["first_order_optimizer"]}
    names = {"frozen": ("Frozen", {}), "first_order": ("SplitFedSGD", exact)}
    kind, arguments = names[client]
    trainer["algorithm"] = {"class_path": f"hosfl_lightning.algorithms.{kind}", "init_args": arguments}
    return found
