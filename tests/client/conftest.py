"""Exported halves of the tiny model, each once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning.device.data import data_of
from hosfl_lightning.device.export import export_client
from tests.fleet.pipe_client import model_of

DATA = {
    "class_path": "hosfl_lightning.data.TextData",
    "init_args": {"files": "", "num_clients": 1, "batch_size": 3, "sequence_length": 12},
}


@pytest.fixture(scope="session")
def exported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``phone.onnx`` of `tests.fleet.pipe_client.model_of` with these arguments."""
    made: dict[str, Path] = {}

    def export(**recipe: Any) -> Path:
        key = str(sorted(recipe.items()))
        if key not in made:
            model = model_of(str(tiny_folder), part="client", **recipe)
            made[key] = tmp_path_factory.mktemp("half") / "phone.onnx"
            export_client(model, str(made[key]), data=data_of(DATA, model))
        return made[key]

    return export
