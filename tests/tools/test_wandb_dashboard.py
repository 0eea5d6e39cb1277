"""The view is built and looked at as W&B would get it; what a server makes of it is not tried."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning.callbacks import GradientAlignment
from tests.small_run import SmallRun
from tools.wandb_dashboard import SECTIONS, main, workspace

# wandb-workspaces' own, on its import.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1:DeprecationWarning")
KEYS = [key for panels in SECTIONS.values() for panel in panels for key in panel.keys]


def line_plots(section: dict[str, Any]) -> list[dict[str, Any]]:
    assert {panel["view_type"] for panel in section["panels"]} == {"Run History Line Plot"}
    return [panel["config"] for panel in section["panels"]]


def test_every_key_is_a_column_of_a_run(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    run.fit(GradientAlignment(every_n_rounds=1), max_rounds=2)
    [*_, row] = csv.DictReader((run.folder / "metrics.csv").read_text().splitlines())
    assert sorted(set(KEYS) - set(row)) == []
    assert len(set(KEYS)) == len(KEYS)


def test_the_view_has_a_plot_a_panel(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--entity", "me", "--project", "ours", "--dry-run"])
    view = json.loads(capsys.readouterr().out)["section"]
    sections = view["panel_bank_config"]["sections"]
    assert [section["name"] for section in sections] == list(SECTIONS)
    plots = [plot for section in sections for plot in line_plots(section)]
    assert [key for plot in plots for key in plot["metrics"]] == KEYS
    assert {plot["x_axis"] for plot in plots} == {view["settings"]["x_axis"]} == {"round"}


def test_a_plain_trainer_has_its_own_axis() -> None:
    view = workspace("me", "ours", "trainer/global_step")
    assert (view.entity, view.project) == ("me", "ours")
    assert {panel.x for section in view.sections for panel in section.panels} == {"trainer/global_step"}
