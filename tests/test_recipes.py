"""Every recipe and overlay runs and leaves a whole run folder; what was trained is compared with the model before."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from hosfl_lightning.recipe import HOSFLCommand
from hosfl_lightning.run.checkpoint import load as load_checkpoint
from tests.recipe_runs import (
    OVERLAYS,
    QUICKSTART,
    RECIPES,
    ROOT,
    header_commands,
    hosfl,
    load,
    name_of,
    small,
    stand_in_hub,
)

SUMMARY_KEYS = {
    "algorithm", "rounds", "clients", "clients_per_round", "probes", "d_client", "val_loss_first", "val_loss_last",
    "controls", "gap_closed", "client_peak_bytes", "client_forward_bytes", "bytes_per_client_round",
    "seconds_per_round", "seed", "versions",
}  # fmt: skip
KINDS = {"smashed_data", "multiplier", "projected_gradients", "update"}
PAPERS = {"opt/125m_hosfl_lora.yaml": 3, "gemma3/270m_hosfl_lora.yaml": 5, "llama3_2/1b_hosfl_lora.yaml": 8}
HERON = ("resnet18/cifar10_heronsfl.yaml", "gpt2/e2e_heronsfl_lora.yaml")


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

    @property
    def lora(self) -> dict[str, Any] | None:
        return self.recipe["model"]["init_args"].get("lora")

    def base(self) -> Any:
        """The model that the run has begun with, in eval mode."""
        settings = self.command.config["fit"]["model"]["init_args"]
        sizes = {"num_labels": settings["num_labels"]} if "num_labels" in settings else {}
        auto_class = type(self.command.model).auto_class
        return auto_class.from_pretrained(settings["pretrained"], **sizes, ignore_mismatched_sizes=True).eval()


@pytest.fixture(scope="module", params=RECIPES, ids=name_of)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The command of the recipe's header, word for word, then what makes it small."""
    recipe: Path = request.param
    _, *words = header_commands(recipe)[0]
    with stand_in_hub():
        return Run(load(recipe), hosfl(*words, *small(recipe, tmp_path_factory.mktemp("recipe"))))


class TestEveryRecipe:
    def test_leaves_a_whole_run_folder(self, run: Run) -> None:
        names = {p.name for p in run.folder.iterdir()}
        assert names >= {"config.yaml", "metrics.csv", "checkpoints"}
        assert ("adapter" in names) == (run.lora is not None)
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
        default = 2 if summary["algorithm"] == "HOSFL" else None
        assert summary["probes"] == trainer["algorithm"]["init_args"].get("probes", default)
        assert summary["clients_per_round"] == (trainer["clients_per_round"] or summary["clients"])
        assert list(summary["controls"]) == names_of(trainer["controls"])
        if summary["algorithm"].endswith("HOSFL"):
            assert {"frozen", "first_order"} <= set(summary["controls"])
        assert all(math.isfinite(control["val_loss_last"]) for control in summary["controls"].values())
        assert summary["val_loss_first"] != summary["val_loss_last"]
        assert summary["client_peak_bytes"] >= summary["client_forward_bytes"] > 0

    def test_its_settings_are_saved(self, run: Run) -> None:
        saved = load(run.folder / "config.yaml")
        assert_contains(saved["trainer"]["algorithm"], run.recipe["trainer"]["algorithm"])
        model = {name: value for name, value in run.recipe["model"]["init_args"].items() if name != "pretrained"}
        assert_contains(saved["model"]["init_args"], model)

    def test_its_trained_weights(self, run: Run) -> None:
        if run.lora is not None:
            check_adapter(run)
        elif "network" not in run.recipe["model"]["init_args"]:
            check_weights(run)


def check_adapter(run: Run) -> None:
    """On the base it gives the split model's logits."""
    base, adapter = run.base(), run.folder / "adapter"
    batch = run.command.datamodule.client_batch(0, 0)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        untrained = base(**batch).logits
        exported = PeftModel.from_pretrained(base, adapter).eval()(**batch).logits
        trained = run.command.model(**batch)
    assert torch.equal(exported, trained)
    assert not torch.equal(exported, untrained)
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == run.command.config["fit"]["model"]["init_args"]["pretrained"]


def check_weights(run: Run) -> None:
    """All were trained but the norms, whose statistics did not move either."""
    before, after = run.base().state_dict(), run.command.model.whole.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "normalization" in name}
    assert any(name.endswith("running_var") for name in same)


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


@pytest.mark.parametrize(
    ("name", "hub", "label", "classes"),
    [("cifar10", "uoft-cs/cifar10", "label", 10), ("cifar100", "uoft-cs/cifar100", "fine_label", 100)],
)
def test_the_papers_settings_on_images(name: str, hub: str, label: str, classes: int) -> None:
    recipe = load(QUICKSTART.parent / "resnet18" / f"{name}_hosfl.yaml")
    trainer, model, data = recipe["trainer"], recipe["model"]["init_args"], recipe["data"]["init_args"]
    method = trainer["algorithm"]["init_args"]
    assert_contains(method, {"probes": 5, "mu": 1e-3, "estimator": "forward", "distribution": "gauss16"})
    assert_contains(model, {"pretrained": "microsoft/resnet-18", "cut": 2, "frozen": ["normalization"]})
    assert_contains(trainer, {"clients_per_round": 3, "max_rounds": math.ceil(160_000 / (3 * 32))})
    assert_contains(data, {"num_clients": 10, "batch_size": 32, "partition": "iid", "alpha": 1.0})
    assert_contains(data, {"hub": hub, "label_field": label, "image_size": model["image_size"]})
    assert model["num_labels"] == classes


def test_the_papers_settings_of_heron() -> None:
    images, text = (load(QUICKSTART.parent / name) for name in HERON)
    for recipe, clients in ((images, 5), (text, 3)):
        assert recipe["trainer"]["algorithm"]["class_path"].endswith(".HERONSFL")
        assert recipe["trainer"]["clients_per_round"] is None
        assert recipe["data"]["init_args"]["num_clients"] == clients
    steps = images["trainer"]["max_rounds"] * images["trainer"]["algorithm"]["init_args"]["local_steps"]
    assert steps * 5 * images["data"]["init_args"]["batch_size"] == 160_000
    assert images["trainer"]["algorithm"]["init_args"]["auxiliary_blocks"] == 0
    assert images["model"] == load(QUICKSTART.parent / "resnet18" / "cifar10_hosfl.yaml")["model"]
    assert text["trainer"]["algorithm"]["init_args"]["auxiliary_blocks"] in range(4)
    assert text["model"]["init_args"]["pretrained"].endswith("gpt2-medium")
    assert [half["r"] for half in text["model"]["init_args"]["lora"].values()] == [8, 8]


@pytest.mark.parametrize("overlay", [o for o in OVERLAYS if o.stem != "wandb"], ids=name_of)  # that: test_wandb.py
def test_every_overlay_on_the_quickstart(overlay: Path, tmp_path: Path) -> None:
    """By the command in its header: its settings are saved, the run folder is whole."""
    _, *words = header_commands(overlay)[0]
    run = Run(load(overlay), hosfl(*words, *small(QUICKSTART, tmp_path)))
    assert_contains(load(run.folder / "config.yaml"), run.recipe)
    assert (run.folder / "metrics.csv").is_file()
    assert run.summary["rounds"] == 2
    assert math.isfinite(run.summary["val_loss_last"])
    base = next(load(ROOT / word) for before, word in pairwise(words) if before == "--config")
    beside = run.recipe.get("trainer", {}).get("controls", base["trainer"]["controls"])
    assert list(run.summary["controls"]) == names_of(beside)


def names_of(controls: list[Any]) -> list[str]:
    return [one if isinstance(one, str) else one["name"] for one in controls]


def assert_contains(whole: Any, part: Any) -> None:
    """Every leaf of ``part`` is in ``whole``."""
    if isinstance(part, dict):
        for name, value in part.items():
            assert_contains(whole[name], value)
    elif isinstance(part, list):
        assert len(whole) == len(part)
        for one, other in zip(whole, part):
            assert_contains(one, other)
    else:
        assert whole == part
