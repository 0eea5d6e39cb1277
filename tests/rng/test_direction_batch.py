from __future__ import annotations

from typing import Any

import pytest
import torch

from hosfl_client.rng.distributions import LOG2_BLOCK
from hosfl_lightning.rng import DirectionBatch, Domain, Stream, add_direction_, batch, direction, round_coefficient
from hosfl_lightning.rng.philox import WordGenerator

TENSORS = [(3, 4096), (9, 1), (0, 0), (65535, 129), (4, 700), (5, 128), (12, 2500)]


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    batch._kept_words.cache_clear()


@pytest.fixture(params=[Domain.RADEMACHER, Domain.GAUSS16], ids=lambda domain: domain.name.lower())
def stream(request: pytest.FixtureRequest) -> Stream:
    return Stream(42, request.param, round=1, probe=7)


@pytest.mark.parametrize(
    ("chunk", "size", "window", "kept"),
    [(16384, 4096, 1 << 16, 4096), (5, 3, 40, 0), (1, 1, 2, 0), (64, 20, 64, 0), (5, 3, 7, 4096)],
)
def test_it_equals_the_tensors_one_by_one(
    stream: Stream, chunk: int, size: int, window: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "CHUNK_BLOCKS", chunk)
    monkeypatch.setattr(batch, "RUN", size << LOG2_BLOCK[stream.domain])
    monkeypatch.setattr(batch, "WINDOW", window)
    monkeypatch.setattr(batch, "KEPT", kept)
    together = DirectionBatch(stream, TENSORS)
    for i in [*range(len(TENSORS)), 4, 0, 6, 1]:
        tensor, numel = TENSORS[i]
        assert torch.equal(together.get(i), direction(stream, tensor, 0, numel))
        one, other = torch.ones(numel), torch.ones(numel)
        together.add_(i, one, 1 / 3)
        add_direction_(other, 1 / 3, stream, tensor)
        assert torch.equal(one, other)


def test_alpha_may_be_a_tensor(stream: Stream) -> None:
    together = DirectionBatch(stream, TENSORS)
    one, other = torch.ones(4096), torch.ones(4096)
    together.add_(0, one, 1 / 3)
    together.add_(0, other, torch.tensor(round_coefficient(1 / 3, stream.domain)))
    assert torch.equal(one, other)


def test_small_tensors_share_one_generator_call(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    call = WordGenerator.__call__

    def count(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return call(*args, **kwargs)

    monkeypatch.setattr(WordGenerator, "__call__", count)
    together = DirectionBatch(stream, [(i, 512) for i in range(32)])
    for i in range(32):
        together.get(i)
    assert calls == 1


def test_it_holds_a_window_of_words_and_a_run_of_elements_until_each_had_its_turn(
    stream: Stream, memory_meter: Any
) -> None:
    sizes = [500_000] * 20 if stream.domain == Domain.RADEMACHER else [50_000] * 20
    DirectionBatch(stream, [(0, 50_000)]).get(0)
    out, alpha = torch.zeros(sizes[0]), torch.ones(())
    with memory_meter:
        together = DirectionBatch(stream, list(enumerate(sizes)))
        for i in range(20):
            together.add_(i, out, alpha)
            held = 0 if i == 19 else 1.25 * 2**20  # of 20 tensors' words 1 MiB
            assert held * 0.3 <= memory_meter.now <= held * 1.01
        together.add_(3, out, alpha)
        assert memory_meter.now > 0
    assert memory_meter.peak < 4 * 2**20


def test_a_batch_alike_finds_the_words_of_small_ones(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    one = DirectionBatch(stream, TENSORS).get(0)
    monkeypatch.setattr(batch, "WordGenerator", None)
    assert torch.equal(DirectionBatch(stream, TENSORS).get(0), one)
    for other in (Stream(42, stream.domain, round=1, probe=8), Stream(43, stream.domain, round=1, probe=7)):
        with pytest.raises(TypeError):
            DirectionBatch(other, TENSORS).get(0)
    with pytest.raises(TypeError):
        DirectionBatch(stream, TENSORS[1:]).get(0)


def test_a_parameter_is_changed_unseen_by_autograd(stream: Stream) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4096))
    DirectionBatch(stream, TENSORS).add_(0, parameter, 1.0)
    assert torch.equal(parameter.data, direction(stream, 3, 0, 4096))


def test_no_tensors(stream: Stream) -> None:
    assert DirectionBatch(stream, []).tensors == []


def test_bad_arguments_are_refused(stream: Stream) -> None:
    with pytest.raises(ValueError, match="tensor"):
        DirectionBatch(stream, [(2**16, 4)])
    with pytest.raises(ValueError, match="numel"):
        DirectionBatch(stream, [(0, -1)])
    with pytest.raises(ValueError, match="domain"):
        DirectionBatch(Stream(0, Domain.ROUNDING), [(0, 4)])
    together = DirectionBatch(stream, TENSORS)
    with pytest.raises(ValueError, match="4096"):
        together.add_(0, torch.zeros(4095), 1.0)
    with pytest.raises(TypeError, match="fp32"):
        together.add_(0, torch.zeros(4096, dtype=torch.float64), 1.0)
