"""Every recipe and overlay runs, leaves a whole run folder, and an adapter that is the model it trained."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from hosfl_lightning.checkpoint import load as load_checkpoint
from hosfl_lightning.cli import HOSFLCommand
from tests.recipe_runs import OVERLAYS, QUICKSTART, RECIPES, header_commands, hosfl, load, name_of, small

SUMMARY_KEYS = {
    "algorithm", "rounds", "clients", "clients_per_round", "probes", "d_client", "val_loss_first", "val_loss_last",
    "controls", "gap_closed", "client_peak_bytes", "client_forward_bytes", "bytes_per_client_round",
    "seconds_per_round", "seed", "versions",
}  # fmt: skip
KINDS = {"smashed_data", "multiplier", "projected_gradients", "update"}
PAPERS = {"opt/125m_hosfl_lora.yaml": 3, "gemma3/270m_hosfl_lora.yaml": 5, "llama3_2/1b_hosfl_lora.yaml": 8}


@dataclass
class Run:
    """A recipe after its two rounds."""

    recipe: dict[str, Any]
    command: HOSFLCommand

    @property
    def folder(self) -> Path:
        return Path(self.command.trainer.log_dir)

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())


@pytest.fixture(scope="module", params=RECIPES, ids=name_of)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The command of the recipe's header, word for word, then what makes it small."""
    recipe: Path = request.param
    _, *words = header_commands(recipe)[0]
    return Run(load(recipe), hosfl(*words, *small(recipe, tmp_path_factory.mktemp("recipe"))))


class TestEveryRecipe:
    def test_leaves_a_whole_run_folder(self, run: Run) -> None:
        assert {p.name for p in run.folder.iterdir()} >= {"config.yaml", "metrics.csv", "checkpoints", "adapter"}
        checkpoint = load_checkpoint(run.folder / "checkpoints" / "last.ckpt")
        assert checkpoint["global_step"] == 2
        rows = list(csv.DictReader((run.folder / "metrics.csv").read_text().splitlines()))
        assert [row["round"] for row in rows] == ["0", "1", "2"]
        assert all(math.isfinite(float(row["train/loss"])) for row in rows[1:])

    def test_its_summary_says_what_ran(self, run: Run) -> None:
        summary, trainer = run.summary, run.recipe["trainer"]
        assert set(summary) >= SUMMARY_KEYS
        assert set(summary["bytes_per_client_round"]) >= KINDS
        assert (summary["algorithm"], summary["rounds"]) == (trainer["algorithm"]["class_path"].split(".")[-1], 2)
        assert summary["probes"] == trainer["algorithm"]["init_args"].get("probes")
        assert summary["clients_per_round"] == (trainer["clients_per_round"] or summary["clients"])
        expected = {"frozen", "first_order"} if summary["algorithm"] == "HOSFL" else set()
        assert set(summary["controls"]) == set(trainer["controls"]) == expected
        assert all(math.isfinite(control["val_loss_last"]) for control in summary["controls"].values())
        assert summary["val_loss_first"] != summary["val_loss_last"]
        assert summary["client_peak_bytes"] >= summary["client_forward_bytes"] > 0

    def test_its_settings_are_saved(self, run: Run) -> None:
        saved = load(run.folder / "config.yaml")
        assert saved["model"]["init_args"]["cut"] == run.recipe["model"]["init_args"]["cut"]
        assert_contains(saved["trainer"]["algorithm"], run.recipe["trainer"]["algorithm"])
        assert_contains(saved["model"]["init_args"]["lora"], run.recipe["model"]["init_args"]["lora"])

    def test_its_adapter_gives_the_split_models_logits(self, run: Run) -> None:
        model, data, adapter = run.command.model, run.command.datamodule, run.folder / "adapter"
        settings = run.command.config["fit"]["model"]["init_args"]
        sizes = {"num_labels": settings["num_labels"]} if "num_labels" in settings else {}
        base = type(model).auto_class.from_pretrained(settings["pretrained"], **sizes).eval()
        batch = data.client_batch(0, 0)
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            untrained = base(**batch).logits
            exported = PeftModel.from_pretrained(base, adapter).eval()(**batch).logits
            trained = model(**batch)
        assert torch.equal(exported, trained)
        assert not torch.equal(exported, untrained)
        named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == settings["pretrained"]


@pytest.mark.parametrize("path", [*RECIPES, *OVERLAYS], ids=name_of)
def test_the_header_names_the_file_itself(path: Path) -> None:
    configs = [word for word in header_commands(path)[0] if word.endswith(".yaml")]
    assert header_commands(path)[0][:2] == ["hosfl", "fit"]
    assert configs[-1] == name_of(path)


@pytest.mark.parametrize(("name", "cut"), PAPERS.items())
def test_the_papers_settings(name: str, cut: int) -> None:
    recipe = load(QUICKSTART.parent / name)
    trainer, model, data = recipe["trainer"], recipe["model"]["init_args"], recipe["data"]["init_args"]
    method = trainer["algorithm"]["init_args"]
    assert_contains(method, {"probes": 2, "mu": 1e-3, "estimator": "forward", "distribution": "gauss16"})
    lora = {"r": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    assert (model["cut"], model["lora"]) == (cut, {"client": lora, "server": lora})
    for optimizer in (method["client_optimizer"], model["optimizer"]):
        assert optimizer["class_path"].endswith(".AdamW")
        assert optimizer["init_args"] == {"lr": 1e-5}
    assert_contains(trainer, {"clients_per_round": 3, "max_rounds": math.ceil(80_000 / (3 * 32))})
    assert_contains(data, {"num_clients": 10, "batch_size": 32, "max_length": 128})


@pytest.mark.parametrize("overlay", [o for o in OVERLAYS if o.stem != "wandb"], ids=name_of)  # that: test_wandb.py
def test_every_overlay_on_the_quickstart(overlay: Path, tmp_path: Path) -> None:
    """By the command in its header: its settings are saved, the run folder is whole."""
    _, *words = header_commands(overlay)[0]
    run = Run(load(overlay), hosfl(*words, *small(QUICKSTART, tmp_path)))
    assert_contains(load(run.folder / "config.yaml"), run.recipe)
    assert (run.folder / "metrics.csv").is_file()
    assert run.summary["rounds"] == 2
    assert math.isfinite(run.summary["val_loss_last"])
    assert list(run.summary["controls"]) == run.recipe["trainer"].get("controls", ["frozen", "first_order"])


def assert_contains(whole: Any, part: Any) -> None:
    """Every leaf of ``part`` is in ``whole``."""
    if isinstance(part, dict):
        for name, value in part.items():
            assert_contains(whole[name], value)
    else:
        assert whole == part
