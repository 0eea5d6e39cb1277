"""The script for a GPU runs on the CPU, every case of it; what fails or takes too long stands in the file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_bench
from hosfl_lightning.rng import directions
from hosfl_lightning.split import compiled
from tests.callbacks.drop_in.plain_modules import LIGHTNING_WARNINGS

pytestmark = LIGHTNING_WARNINGS


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One pair of each, one dtype, and no kernel is compiled."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(gpu, "TINY", gpu_bench.TINY._replace(pairs=1))
    monkeypatch.setattr(gpu_bench, "DTYPES", {"bf16": torch.bfloat16})
    return tmp_path / "gpu.json"


def test_every_case_gives_finite_figures(out: Path) -> None:
    with torch.random.fork_rng():
        assert gpu.main(["--device", "cpu", "--tiny", "--out", str(out)]) == 0
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == list(gpu.PARTS)
    assert {name: len(part["rows"]) for name, part in parts.items()} == {
        "directions": 6, "step": 2, "mezo": 4, "batch": 4, "compiled": 2,
    }  # fmt: skip
    for part in parts.values():
        assert part["failed"] == {} and part["left_out"] == []
        assert all(value is not None and value >= 0 for row in part["rows"].values() for value in row.values())


def test_a_case_that_fails_or_is_out_of_time_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def cases() -> Iterator[tuple[str, object]]:
        yield "a", lambda: {"ratio": 1.25}
        yield "b", lambda: {"ratio": 1 / 0}
        yield "c", lambda: time.sleep(10)
        yield "d", lambda: {"ratio": 2.0}

    found = gpu.measure(cases(), 0.5)  # type: ignore[arg-type]
    assert found == {
        "rows": {"a": {"ratio": 1.25}}, "failed": {"b": "ZeroDivisionError: division by zero"}, "left_out": ["c", "d"],
    }  # fmt: skip
    assert "| a | 1.25 |" in capsys.readouterr().out


def test_other_bits_are_an_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(stream: object, tensor: int, start: int, stop: int, device: object = None) -> torch.Tensor:
        u = directions.direction(stream, tensor, start, stop)  # type: ignore[arg-type]
        return u if device is None else u.neg()

    monkeypatch.setattr(gpu, "direction", other)
    assert gpu.main(["--device", "cpu", "--tiny", "--parts", "directions", "--out", str(out)]) == 1


def test_without_a_gpu_it_says_so(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(out)])
    assert "there is no CUDA device" in capsys.readouterr().err
