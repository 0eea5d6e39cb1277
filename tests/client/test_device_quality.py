"""The benchmark of training on exported halves: its clients beside PyTorch's, and its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import device_quality
from benchmarks.device_fleet import Devices
from benchmarks.device_quality_page import page
from benchmarks.device_quality_rows import QUICK, ROWS
from hosfl_lightning import HOSFL, Orchestrator
from hosfl_lightning.optim import AdamW, Uncompressed
from hosfl_lightning.server.replay_log import ReplayLog
from hosfl_lightning.wire import decode
from tests.fleet.pipe_client import LENGTHS, model_of
from tests.random_tokens import RandomTokens

METHODS: dict[str, Callable[[], HOSFL]] = {
    "probes": lambda: HOSFL(probes=3, client_optimizer=AdamW(lr=0.01)),
    "side": lambda: HOSFL(estimator="local", compression=Uncompressed(), client_optimizer=AdamW(lr=0.01)),
}


def ended(method: str, half: Path | None, tiny_folder: Path, folder: Path) -> tuple[Any, list[Any]]:
    """A run from another θ_c than the exported half has: its orchestrator, and its updates."""
    model = model_of(str(tiny_folder), side=method == "side")
    with torch.no_grad():
        for parameter in model.client_parameters.values():
            parameter += 0.05
    trainer = Orchestrator(
        METHODS[method](), max_rounds=2, val_check_interval=2, default_root_dir=str(folder),
        enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    if half is not None:
        trainer.serving = Devices(half, trainer)  # type: ignore[assignment]
    trainer.fit(model, RandomTokens(LENGTHS))
    log = ReplayLog.read(Path(trainer.log_dir) / "updates.log")
    return trainer, [decode(frame) for frame in log.frames()]


@pytest.mark.filterwarnings("ignore:the two sides of a probe")
@pytest.mark.parametrize("method", METHODS)
def test_devices_send_what_clients_in_pytorch_send(
    method: str, exported: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    half = exported(side=True) if method == "side" else exported()
    here, records = ended(method, None, tiny_folder, tmp_path / "here")
    there, others = ended(method, half, tiny_folder, tmp_path / "there")
    there.fleet.check_same()
    for record, other in zip(records, others, strict=True):
        assert (record.participants, record.basis) == (other.participants, other.basis)
        largest = float(record.coefficients.abs().max())
        assert float((record.coefficients - other.coefficients).abs().max()) < 2e-2 * largest
        assert record.weights == pytest.approx(other.weights)
    assert there.summary["val_loss_last"] == pytest.approx(here.summary["val_loss_last"], rel=1e-3)
    assert float(there.callback_metrics["val_clients/loss"]) == pytest.approx(there.summary["val_loss_last"], rel=1e-5)
    assert len(there.fleet.scalars) == (6 if method == "probes" else 0)
    there.fleet.devices[0].half.parameters()[next(iter(there.endpoint.trained))][0, 0] += 1
    with pytest.raises(RuntimeError, match="do not hold the same weights"):
        there.fleet.check_same()


def test_the_quick_table_is_written_and_nothing_is_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls what jsonargparse renamed
    device_quality.main(["--out", str(tmp_path), "--quick"])
    found = json.loads((tmp_path / "quick" / "device_quality.json").read_text())
    assert [one["row"] for one in found["runs"]] == [row.name for row in QUICK]
    assert len({one["server_start"] for one in found["runs"]}) == 1
    table = (tmp_path / "quick" / "table.md").read_text()
    assert table.count("| norms, 8 probes | ONNX, int8 |") == 2 and str(tmp_path) not in table
    monkeypatch.setattr(device_quality, "run", None)
    device_quality.main(["--out", str(tmp_path), "--quick"])


def test_the_page_pairs_seeds_with_the_half_in_fp32_and_the_controls() -> None:
    losses = {"frozen/torch": [2, 2.1, 2.2], "first_order/torch": [1, 1.1, 1.2], "side/fp32": [1.2, 1.3, 1.4],
              "side/int4": [1.3, 1.41, 1.5]}  # fmt: skip
    runs = [
        {"row": f"tiny_lm/{name}", "seed": seed, "rounds": 1, "before": 2.5, "after": loss,
         "on_devices": None if "torch" in name else [2.5, loss], "scalars": f"1 2 {4 if name == 'side/fp32' else 3}"}
        for name, values in losses.items() for seed, loss in enumerate(values)
    ]  # fmt: skip
    halves = {f"tiny_lm/side/{name}": {"bytes": 2048, "probes": 0.99, "cosine": 0.5} for name in ("fp32", "int4")}
    text = page({"command": "COMMAND", "date": "", "machine": "", "halves": halves, "runs": runs})
    row = "| side adapter | ONNX, int4 | 2 | 0.5000 | 1.4033 ± 0.1002 | +0.1033 [+0.0890, +0.1177] | 69.7 % ["
    assert row in text
    assert "| frozen | PyTorch, fp32 | – | – | 2.1000 ± 0.1000 | – | 0.0 % [0.0 %, 0.0 %] |" in text
    assert "| 1.4033 ± 0.1002 | 1.4033 ± 0.1002 | 0.9820 |" in text


def test_every_row_has_a_recipe_whose_rates_are_its_own(tmp_path: Path) -> None:
    found = {row.name: row.recipe(1, False, tmp_path)["trainer"]["algorithm"] for row in ROWS}
    rates = {
        name.rpartition("/")[0]: one["init_args"]["client_optimizer"]["init_args"]["lr"]
        for name, one in found.items() if not one["class_path"].endswith("Frozen")
    }  # fmt: skip
    assert rates == {
        "tiny_lm/first_order": 0.007, "tiny_lm/side": 0.015, "tiny_lm/lora": 0.001, "digits/first_order": 0.01,
        "digits/norm": 0.01,
    }  # fmt: skip
