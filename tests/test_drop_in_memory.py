"""The memory benchmark on a toy model: every row, the page and the picture, and that its meter sees everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from benchmarks.drop_in_memory import METHODS, Shape, main
from benchmarks.drop_in_memory_report import by_length, page, picture, ratio
from tests.callbacks.drop_in.plain_modules import LIGHTNING_WARNINGS

pytestmark = LIGHTNING_WARNINGS
NAMES = [method.name for method in METHODS]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("memory") / "results"
    threads = torch.get_num_threads()
    main([f"--out={out}", "--quick", "--repeats=1"])
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def found(written: Path) -> dict[str, Any]:
    return json.loads((written / "drop_in_memory.json").read_text())


def test_every_method_has_bytes_and_seconds_at_every_length(found: dict[str, Any]) -> None:
    assert [(row["length"], row["method"]) for row in found["rows"]] == [(128, name) for name in NAMES]
    assert all(row["peak_bytes"] > row["held_bytes"] > 0 < row["seconds"] for row in found["rows"])
    assert found["command"] == "python -m benchmarks.drop_in_memory --out OUT --quick --repeats 1 --threads 1"
    assert found["machine"].startswith("torch ")


def test_what_is_held_between_steps_is_what_each_method_must_hold(found: dict[str, Any]) -> None:
    rows, parameters = by_length(found)[128], 4 * found["model"]["parameters"]
    held = [rows[name]["held_bytes"] / parameters for name in NAMES]
    lower = 4 * sum(p.numel() for p in lower_parameters()) / parameters
    # Parameters; with AdamW's two moments and the gradient; the same above the cut only.
    expected = [1.0, 4.0, 4.0, 4 - 3 * lower, 4 - 3 * lower, 4 - 3 * lower, 1.0]
    assert held == pytest.approx(expected, rel=0.01)


def lower_parameters() -> list[torch.nn.Parameter]:
    shape = Shape(hidden=32, layers=4, vocabulary=16, positions=128)
    model = shape.model()
    return [p for name in shape.below for p in model.get_submodule(name.removeprefix("model.")).parameters()]


def test_on_sequences_the_methods_are_in_their_order(found: dict[str, Any]) -> None:
    rows = by_length(found)[128]
    forward, backprop, checkpointed, frozen, hybrid, both, zeroth = (rows[name]["peak_bytes"] for name in NAMES)
    assert forward < zeroth < both < hybrid < 0.65 * backprop
    z = 4 * 2 * 128 * 32
    assert hybrid < frozen + z / 2  # z is held once
    assert both < checkpointed < backprop
    assert zeroth < 1.5 * forward
    assert 1 <= ratio(rows, "HybridOrder", "lower_working_bytes", NAMES[0]) < 1.4
    assert ratio(rows, "backprop", "lower_working_bytes", NAMES[0]) > 2


def test_larger_vocabularies_leave_less_to_save(found: dict[str, Any]) -> None:
    shares = [row["peak_bytes"]["HybridOrder"] / row["peak_bytes"]["backprop"] for row in found["vocabularies"]]
    assert [row["vocabulary"] for row in found["vocabularies"]] == [64, 512]
    assert ratio(by_length(found)[128], "HybridOrder") < shares[1] < 1


def test_the_page_and_the_picture_show_them(found: dict[str, Any], written: Path) -> None:
    text = (written / "drop_in_memory.md").read_text()
    assert text == page(found)
    assert all(text.count(f"\n| {name} |") == 1 for name in NAMES)
    rows = by_length(found)[128]
    assert f"`HybridOrder` takes {ratio(rows, 'HybridOrder'):.3f} of backprop's peak" in text
    assert "(drop_in_memory.png)" in text
    assert matplotlib.image.imread(written / "drop_in_memory.png").std() > 0
    longer = [{**row, "length": 2048} for row in found["rows"]]
    panels = picture({**found, "rows": [*found["rows"], *longer]}).axes
    assert [panel.get_title() for panel in panels] == ["128 tokens", "2,048 tokens"]
    assert [bar.get_width() for bar in panels[1].patches] == [ratio(rows, name) for name in reversed(NAMES)]
    assert all(" s" in label.get_text() and "iB, " in label.get_text() for label in panels[1].texts)
