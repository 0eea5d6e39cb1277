"""What stands in the terminal of a server."""

from __future__ import annotations

import io
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hosfl_lightning.callbacks import ServeConsole, serve_console


@pytest.fixture
def trainer() -> Any:
    fleet = SimpleNamespace(connected=[0], figures=lambda: {"late": 1.0, "missed": 2.0, "received_bytes": 3 * 2**20})
    return SimpleNamespace(
        callback_metrics={"train/loss": 1.25, "time/round_seconds": 0.5}, fleet=fleet, global_step=4, max_steps=40,
        datamodule=SimpleNamespace(num_clients=3), run=SimpleNamespace(refused=Counter({1: 2})),
        algorithm=SimpleNamespace(name="HOSFL"), log_dir="runs/mine",
    )  # fmt: skip


def on_screen(terminal: bool) -> tuple[ServeConsole, io.StringIO]:
    screen = io.StringIO()
    return ServeConsole(Console(file=screen, force_terminal=terminal, width=120, highlight=False)), screen


def test_the_table_follows_who_is_there(trainer: Any) -> None:
    console, screen = on_screen(terminal=True)
    console.on_train_start(trainer, None)
    assert all(words in screen.getvalue() for words in ("HOSFL, run folder runs/mine", "4 of 40", "1 of 3", "1.2500"))
    trainer.fleet.connected = [0, 2]
    console.notify("lab-c is in")
    assert screen.getvalue().rindex("2 of 3") > screen.getvalue().index("lab-c is in")
    trainer.global_step = 5
    console.on_train_batch_end(trainer, None, None, None, 4)
    assert "5 of 40" in screen.getvalue()
    console.teardown(trainer, None, "fit")
    shown = screen.getvalue()
    console.notify("the end")
    assert "5 of 40" not in screen.getvalue()[len(shown) :]


def test_without_a_terminal_there_is_a_line_a_minute(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    console, screen = on_screen(terminal=False)
    console.on_train_start(trainer, None)
    for batch in range(3):
        console.on_train_batch_end(trainer, None, None, None, batch)
    [line] = screen.getvalue().splitlines()
    assert "clients 1 of 3" in line and "MiB so far 3.0, refused 2, late 3" in line
    monkeypatch.setattr(serve_console, "EVERY", 0.0)
    console.on_train_batch_end(trainer, None, None, None, 3)
    assert len(screen.getvalue().splitlines()) == 2
