from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import pytest
import torch

from hosfl_lightning.rng import (
    DirectionBatch,
    Domain,
    Stream,
    add_direction_,
    direction,
    direction_rows,
    directions,
    round_coefficient,
)
from hosfl_lightning.rng.philox import WordGenerator

LOG2_BLOCK = {Domain.RADEMACHER: 7, Domain.GAUSS16: 3}
LARGE = {Domain.RADEMACHER: 2 * 16384 * 128 + 1000, Domain.GAUSS16: 2 * 16384 * 8 + 1000}


@pytest.fixture(params=list(LOG2_BLOCK), ids=lambda domain: domain.name.lower())
def stream(request: pytest.FixtureRequest) -> Stream:
    return Stream(2**63 + 12345, request.param, round=8, client=2, probe=5)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def element(block_bits: Callable[..., int], stream: Stream, tensor: int, e: int) -> float:
    log2 = LOG2_BLOCK[stream.domain]
    width = 128 >> log2
    assert stream.client is not None
    fields: dict[str, Any] = {"round": stream.round, "field": stream.client + 1, "probe": stream.probe}
    bits = block_bits(stream.seed, stream.domain, tensor, e >> log2, **fields)
    value = bits >> width * (e % 2**log2) & 2**width - 1
    if stream.domain == Domain.RADEMACHER:
        return 1.0 - 2.0 * value
    return torch.tensor(NormalDist().inv_cdf((value + 0.5) / 65536)).to(torch.bfloat16).item()


@pytest.mark.parametrize("first_block", [0, 16383, 2**32 - 1, 2**40 - 2])
def test_elements_equal_integer_arithmetic(stream: Stream, first_block: int, block_bits: Callable[..., int]) -> None:
    log2 = LOG2_BLOCK[stream.domain]
    start, stop = (first_block << log2) + 5, (first_block + 2) << log2
    expected = [element(block_bits, stream, 9, e) for e in range(start, stop)]
    u = direction(stream, 9, start, stop)
    assert u.dtype == torch.float32
    assert u.tolist() == expected


def test_a_tensor_can_be_cut_anywhere(stream: Stream) -> None:
    n = LARGE[stream.domain]
    whole = direction(stream, 1, 0, n)
    draw = random.Random(2)
    cuts = sorted({0, n, 1, 31, 32, 127, 128, 129, *(draw.randrange(n) for _ in range(12))})
    parts = torch.zeros(n)
    for start, stop in pairwise(cuts):
        add_direction_(parts[start:stop], 1.0, stream, 1, start)
    assert torch.equal(parts, whole)


def test_chunks_and_slices_do_not_matter(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    n, start = 20_000, 100_003
    expected = direction(stream, 1, start, start + n)
    for chunk, size in [(1, 1), (2, 64), (64, 2), (128, 128), (2**20, 3)]:
        monkeypatch.setattr(directions, "CHUNK_BLOCKS", chunk)
        monkeypatch.setattr(directions, "SLICE_BLOCKS", {stream.domain: size})
        assert torch.equal(direction(stream, 1, start, start + n), expected)


def test_one_thread_equals_two(stream: Stream, restored_threads: None) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = torch.ones(LARGE[stream.domain])
        add_direction_(out, 1e-3, stream, 0)
        results.append(out)
    assert torch.equal(*results)


def test_it_adds_alpha_times_u(stream: Stream) -> None:
    u = direction(stream, 4, 77, 5077)
    parameters = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for alpha in (round_coefficient(1 / 3, stream.domain), round_coefficient(-1e-3, stream.domain), 0.0):
        expected = parameters + alpha * u
        by_float, by_tensor = parameters.clone(), parameters.clone()
        add_direction_(by_float, alpha, stream, 4, 77)
        add_direction_(by_tensor, torch.tensor(alpha), stream, 4, 77)
        assert torch.equal(by_float, expected)
        assert torch.equal(by_tensor, expected)


def test_a_float_is_rounded_inside(stream: Stream) -> None:
    out = torch.zeros(64)
    add_direction_(out, 1 / 3, stream, 0)
    significant_bits = 24 if stream.domain == Domain.RADEMACHER else 16
    rounded = round(2 ** (significant_bits + 1) / 3) / 2 ** (significant_bits + 1)
    assert torch.equal(out.double(), direction(stream, 0, 0, 64).double() * rounded)


def test_scratch_is_bounded_whatever_the_size(stream: Stream, memory_meter: Any) -> None:
    out = torch.zeros(3 * LARGE[stream.domain])
    add_direction_(out[:10], 1.0, stream, 0)
    with memory_meter:
        add_direction_(out, 1e-3, stream, 0, 5)
    assert 0 < memory_meter.peak <= 4 * 2**20
    assert memory_meter.now == 0


def test_the_global_generator_is_neither_used_nor_moved(stream: Stream) -> None:
    rows = torch.tensor([1, 2])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = direction(stream, 0, 0, 1000), direction_rows(stream, 0, rows, 10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    second = direction(stream, 0, 0, 1000), direction_rows(stream, 0, rows, 10)
    assert all(map(torch.equal, first, second))


def test_the_default_dtype_does_not_matter(stream: Stream) -> None:
    rows = torch.tensor([1, 2])
    expected = direction(stream, 0, 0, 1000), direction_rows(stream, 0, rows, 10)
    torch.set_default_dtype(torch.float64)
    try:
        result = direction(stream, 0, 0, 1000), direction_rows(stream, 0, rows, 10)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [u.dtype for u in result] == [torch.float32] * 2
    assert all(map(torch.equal, result, expected))


def test_first_used_in_inference_mode(stream: Stream) -> None:
    other_key = Stream(stream.round + 99, stream.domain)
    with torch.inference_mode():
        inside = direction(other_key, 0, 0, 1000).clone()
    parameter = torch.nn.Parameter(torch.zeros(1000))
    add_direction_(parameter.view(-1), 1.0, other_key, 0)
    assert torch.equal(parameter.data, inside)
    assert parameter.grad_fn is None


@pytest.mark.parametrize("width", [1, 2, 3, 5, 32, 48, 64, 96, 100, 128, 257, 384])
def test_rows_are_slices(stream: Stream, width: int) -> None:
    table = direction(stream, 6, 0, 300 * width).view(300, width)
    rows = torch.randint(300, (150,), generator=torch.Generator().manual_seed(width))
    assert torch.equal(direction_rows(stream, 6, rows, width), table[rows])
    assert direction_rows(stream, 6, rows[:0], width).shape == (0, width)


@pytest.mark.parametrize("width", [96, 100])
def test_rows_in_several_chunks_and_far_out(stream: Stream, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    elements = 1 << 40 + LOG2_BLOCK[stream.domain]
    last = elements // width - 1
    rows = torch.tensor([0, last, (elements >> 8) // width, 7, last - 1])
    expected = [direction(stream, 6, row * width, (row + 1) * width) for row in rows.tolist()]
    for size in (1, 30, 4096):
        monkeypatch.setattr(directions, "SLICE_BLOCKS", {stream.domain: size})
        assert torch.equal(direction_rows(stream, 6, rows, width), torch.stack(expected))
    with pytest.raises(ValueError, match="rows"):
        direction_rows(stream, 6, rows + 1, width)


@pytest.mark.parametrize("width", [1, 64, 65, 1000])
def test_rows_cost_what_they_hold(stream: Stream, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    call = WordGenerator.__call__

    def count(self: WordGenerator, c0: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal made
        made += len(c0)
        return call(self, c0, *args, **kwargs)

    monkeypatch.setattr(WordGenerator, "__call__", count)
    direction_rows(stream, 0, torch.arange(20) * 10**6, width)
    blocks_in_a_row = -(-width // (1 << LOG2_BLOCK[stream.domain]))
    assert 0 < made <= 20 * (blocks_in_a_row + 1)


def test_out_of_range_is_refused_by_name(stream: Stream) -> None:
    elements = 1 << 40 + LOG2_BLOCK[stream.domain]
    out = torch.zeros(10)
    add_direction_(out, 1.0, stream, 2**16 - 1, elements - 10)
    for start in (-1, elements - 9):
        with pytest.raises(ValueError, match="start"):
            add_direction_(out, 1.0, stream, 0, start)
    with pytest.raises(ValueError, match="start"):
        direction(stream, 0, 5, 4)
    with pytest.raises(ValueError, match="tensor"):
        add_direction_(out, 1.0, stream, 2**16)
    with pytest.raises(ValueError, match="tensor"):
        direction_rows(stream, 2**16, torch.tensor([0]), 3)
    with pytest.raises(ValueError, match="width"):
        direction_rows(stream, 0, torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="rows"):
        direction_rows(stream, 0, torch.tensor([-1]), 3)
    with pytest.raises(TypeError, match="int64"):
        direction_rows(stream, 0, torch.tensor([1], dtype=torch.int32), 3)


def test_a_domain_without_directions_is_refused() -> None:
    order = Stream(0, Domain.DATA_ORDER)
    with pytest.raises(ValueError, match="domain"):
        direction(order, 0, 0, 1)
    with pytest.raises(ValueError, match="domain"):
        direction_rows(order, 0, torch.tensor([0]), 1)


@pytest.mark.parametrize(
    "out",
    [torch.zeros(4, dtype=torch.bfloat16), torch.zeros(2, 2), torch.zeros(8)[::2]],
    ids=["bfloat16", "matrix", "strided"],
)
def test_what_cannot_be_added_to_is_refused(stream: Stream, out: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="contiguous 1-D fp32"):
        add_direction_(out, 1.0, stream, 0)


@pytest.mark.parametrize("start", [0, 5, 1024])
def test_nothing_to_add(stream: Stream, start: int) -> None:
    assert direction(stream, 0, start, start).shape == (0,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bits(stream: Stream) -> None:
    before = torch.cuda.get_rng_state()
    n, rows = LARGE[stream.domain], torch.tensor([5, 0, 3])
    alpha = torch.tensor(round_coefficient(1 / 3, stream.domain))
    out, out_cuda = torch.ones(n), torch.ones(n, device="cuda")
    add_direction_(out, alpha, stream, 0, 13)
    add_direction_(out_cuda, alpha.cuda(), stream, 0, 13)
    assert torch.equal(out_cuda.cpu(), out)
    assert torch.equal(direction_rows(stream, 0, rows.cuda(), 100).cpu(), direction_rows(stream, 0, rows, 100))
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_tensors_may_be_numbered_from_any_number_on(stream: Stream) -> None:
    later = replace(stream, first_tensor=300)
    expected = direction(stream, 302, 5, 1005)
    assert torch.equal(direction(later, 2, 5, 1005), expected)
    assert torch.equal(DirectionBatch(later, [(1, 10), (2, 1005)]).get(1)[5:], expected)
    rows = torch.tensor([3, 1])
    assert torch.equal(direction_rows(later, 2, rows, 40), direction_rows(stream, 302, rows, 40))
    with pytest.raises(ValueError, match=r"tensor must be .* 65536"):
        direction(replace(stream, first_tensor=65535), 1, 0, 8)
