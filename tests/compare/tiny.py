"""A comparison of a few methods on a tiny random model, small enough to be run in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.recipe_runs import text_file, tiny_pretrained

ADAMW, SGD = "hosfl_lightning.optim.AdamW", "hosfl_lightning.optim.SGD"


def rule(name: str) -> dict[str, Any]:
    return {"client_optimizer": {"class_path": name, "init_args": {"lr": 0.01}}}


def method(name: str, init_args: dict[str, Any], rates: tuple[float, float]) -> dict[str, Any]:
    grid = [{"client_lr": rate} if init_args else {"server_lr": rate} for rate in rates]
    return {"algorithm": {"class_path": f"hosfl_lightning.algorithms.{name}", "init_args": init_args}, "grid": grid}


#: One whose every point diverges is among them.
METHODS = {
    "HO-SFL": method("HOSFL", {"probes": 2, **rule(ADAMW)}, (0.003, 0.01)),
    "frozen": method("Frozen", {}, (0.01, 0.03)),
    "first order": method("SplitFedSGD", rule(ADAMW), (0.01, 0.03)),
    "wild": method("HOSFL", {"probes": 2, **rule(SGD)}, (1e38, 1e37)),
}


def write(folder: Path, **settings: Any) -> Path:
    """The comparison's file, and beside it what it needs; ``settings`` in place of those here."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder), sort_keys=False))
    comparison: dict[str, Any] = {
        "recipe": "recipe.yaml", "budget": {"rounds": 4}, "seeds": [0, 1], "metric": "perplexity", "mode": "min",
        "validations": 2, "methods": METHODS,
    }  # fmt: skip
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump({**comparison, **settings}, sort_keys=False))
    return path


def recipe(folder: Path) -> dict[str, Any]:
    lora = {"r": 2, "target_modules": ["q_proj", "o_proj"]}
    text = str(text_file(folder / "text.txt"))
    return {
        "trainer": {"max_rounds": 3, "clients_per_round": 2, "accelerator": "cpu"},
        "model": {
            "class_path": "hosfl_lightning.models.SplitCausalLM",
            "init_args": {
                "pretrained": str(tiny_pretrained(folder / "model", "llama", 2)),
                "cut": 1,
                "lora": {"client": lora, "server": lora},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.0}},
            },
        },
        "data": {
            "class_path": "hosfl_lightning.data.TextData",
            "init_args": {
                "files": [text], "test_files": [text], "num_clients": 3, "sequence_length": 32, "batch_size": 2,
                "max_validation_examples": 8,
            },
        },
    }  # fmt: skip
