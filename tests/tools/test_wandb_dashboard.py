"""The view is built and looked at as W&B would get it; what a server makes of it is not tried."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning.callbacks import GradientAlignment, PeakMemoryMonitor
from tests.callbacks.drop_in.plain_modules import LIGHTNING_WARNINGS, fit, hybrid, mlp
from tests.small_run import SmallRun
from tools.wandb_dashboard import ROUNDS, TRAINER, Panel, main

# The last is wandb-workspaces' own, on its import.
pytestmark = [*LIGHTNING_WARNINGS, pytest.mark.filterwarnings("ignore:Pydantic V1:DeprecationWarning")]


def keys(sections: dict[str, list[Panel]]) -> list[str]:
    return [key for panels in sections.values() for panel in panels for key in panel.keys]


def line_plots(section: dict[str, Any]) -> list[dict[str, Any]]:
    assert {panel["view_type"] for panel in section["panels"]} == {"Run History Line Plot"}
    return [panel["config"] for panel in section["panels"]]


def test_every_key_is_a_column_of_a_run(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    run.fit(GradientAlignment(every_n_rounds=1), max_rounds=2)
    [*_, row] = csv.DictReader((run.folder / "metrics.csv").read_text().splitlines())
    assert sorted(set(keys(ROUNDS)) - set(row)) == []
    assert len(set(keys(ROUNDS))) == len(keys(ROUNDS))


def test_every_key_is_logged_by_a_plain_trainer() -> None:
    trainer = fit(mlp(), hybrid(), PeakMemoryMonitor())
    assert sorted(set(keys(TRAINER)) - set(trainer.callback_metrics)) == []


@pytest.mark.parametrize(("words", "sections", "x_axis"), [
    ([], ROUNDS, "round"),
    (["--trainer"], TRAINER, "trainer/global_step"),
])  # fmt: skip
def test_the_view_has_a_plot_a_panel(
    words: list[str], sections: dict[str, list[Panel]], x_axis: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--entity", "me", "--project", "ours", "--dry-run", *words])
    view = json.loads(capsys.readouterr().out)["section"]
    drawn = view["panel_bank_config"]["sections"]
    assert [section["name"] for section in drawn] == list(sections)
    plots = [plot for section in drawn for plot in line_plots(section)]
    assert [key for plot in plots for key in plot["metrics"]] == keys(sections)
    assert {plot["x_axis"] for plot in plots} == {view["settings"]["x_axis"]} == {x_axis}
