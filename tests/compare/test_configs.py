from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hosfl_lightning.compare.command import at_edge, parse
from hosfl_lightning.compare.configs import Job, put, schedule, write_config
from hosfl_lightning.compare.settings import Comparison, Limits
from tests.compare.tiny import METHODS, recipe, write


def written(folder: Path, **settings: Any) -> dict[str, Any]:
    comparison = parse(Comparison, "", [f"--config={write(folder, **settings)}", f"--out={folder}"])
    job = Job("HO-SFL", 1, 7, str(folder / "runs"))
    write_config(job, comparison, {**recipe(folder), "seed_everything": False}, 30, 10)
    return yaml.safe_load(job.config.read_text())


def test_a_run_is_the_recipe_with_the_method_the_point_and_the_seed(tmp_path: Path) -> None:
    config = written(tmp_path)
    trainer = config["trainer"]
    assert trainer["algorithm"]["class_path"] == METHODS["HO-SFL"]["algorithm"]["class_path"]
    assert trainer["algorithm"]["init_args"]["client_optimizer"]["init_args"]["lr"] == 0.01
    assert [trainer["seed"], *(config[part]["init_args"]["seed"] for part in ("model", "data"))] == [7, 7, 7]
    assert (trainer["max_rounds"], trainer["val_check_interval"], trainer["controls"]) == (30, 10, [])
    assert trainer["clients_per_round"] == 2
    assert config["data"]["init_args"]["batch_size"] == 2
    assert trainer["callbacks"] == [{"class_path": "hosfl_lightning.callbacks.Budget", "init_args": {}}]
    place = trainer["logger"]["init_args"]
    assert Path(place["save_dir"], place["name"], place["version"]) == tmp_path / "runs" / "HO-SFL" / "1-seed7"


def test_what_lies_over_what(tmp_path: Path) -> None:
    """The comparison's overrides, then the method's, then the point's."""
    keys = ["trainer.gradient_clip_val", "trainer.codec.multiplier", "server_lr"]
    method = {
        **METHODS["HO-SFL"],
        "overrides": dict.fromkeys(keys[1:], 2),
        "grid": [{}, {"server_lr": 3, "trainer.callbacks_of_mine": [1]}],
    }
    config = written(tmp_path, overrides=dict.fromkeys(keys, 1), methods={**METHODS, "HO-SFL": method})
    trainer = config["trainer"]
    assert (trainer["gradient_clip_val"], trainer["codec"]["multiplier"]) == (1, 2)
    assert config["model"]["init_args"]["optimizer"]["init_args"] == {"lr": 3, "weight_decay": 0.0}


def test_a_limit_goes_to_the_callback(tmp_path: Path) -> None:
    config = written(tmp_path, budget={"samples": 99})
    assert config["trainer"]["callbacks"][-1]["init_args"] == {"samples": 99}


def test_put() -> None:
    config: dict[str, Any] = {"a": {"class_path": "A", "init_args": {"x": 1}}, "b": "B"}
    put(config, "a.init_args.y", [2])
    put(config, "b.init_args.z", 3)
    put(config, "c.d", 4)
    assert config == {
        "a": {"class_path": "A", "init_args": {"x": 1, "y": [2]}},
        "b": {"class_path": "B", "init_args": {"z": 3}},
        "c": {"d": 4},
    }


@pytest.mark.parametrize(
    ("limit", "spent", "expected"),
    [
        ({"rounds": 40}, {}, (40, 5)),
        ({"rounds": 41}, {}, (41, 6)),
        ({"samples": 100}, {"samples": 8}, (130, 2)),  # 13 rounds
        ({"bytes": 5}, {"bytes": 8}, (10, 1)),
    ],
)
def test_schedule(tmp_path: Path, limit: dict[str, Any], spent: dict[str, float], expected: tuple[int, int]) -> None:
    comparison = parse(Comparison, "", [f"--config={write(tmp_path, validations=8)}", f"--out={tmp_path}"])
    comparison.budget = Limits(**limit)
    assert schedule(comparison, spent) == expected


@pytest.mark.parametrize(
    ("grid", "edges"),
    [
        ([{"a": 1}, {"a": 3}, {"a": 2}], [True, True, False]),
        ([{"a": 1}, {"a": 1}], [False, False]),
        ([{"a": 1}, {"a": 3}], [False, False]),
        (
            [{"a": 2, "b": 1}, {"a": 1, "b": 2}, {"a": 3, "b": 2}, {"a": 2, "b": 3}, {"a": 2, "b": 2}],
            [True] * 4 + [False],
        ),
        ([{"a": "x"}, {"a": "y"}], [False, False]),
    ],
)
def test_the_edge_of_a_grid(grid: list[dict[str, Any]], edges: list[bool]) -> None:
    assert [at_edge(grid, number) for number in range(len(grid))] == edges
