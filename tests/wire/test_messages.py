from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hosfl_lightning.wire import CodedGradient, FieldError, Multiplier, ProbedData, SmashedData

LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
MASKS = {"left": LEFT, "right": LEFT.flip(1), "none": torch.ones(3, 4, dtype=torch.bool), "holes": LEFT ^ LEFT.flip(1)}


def _inputs(mask: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(*mask.shape, 5, generator=generator)
    return z, torch.randint(0, 100, mask.shape, generator=generator)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_pack_keeps_valid_tokens_in_row_major_order(mask: Tensor) -> None:
    z, labels = _inputs(mask)
    message = SmashedData.pack(3, 1, z, labels, mask)
    positions = [(b, s) for b in range(3) for s in range(4) if mask[b, s]]
    assert torch.equal(message.z.values, torch.stack([z[b, s] for b, s in positions]))
    assert message.labels.tolist() == [int(labels[b, s]) for b, s in positions]
    assert message.kind == "smashed_data"
    assert (message.round, message.client) == (3, 1)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_unpack_puts_zeros_and_ignored_labels_at_padding(mask: Tensor) -> None:
    z, labels = _inputs(mask)
    z_back, labels_back, mask_back = SmashedData.pack(0, 0, z, labels, mask).unpack()
    assert torch.equal(z_back, torch.where(mask[..., None], z, torch.zeros_like(z)))
    assert torch.equal(labels_back, torch.where(mask, labels, torch.full_like(labels, -100)))
    assert torch.equal(mask_back, mask)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_multiplier_comes_back_where_it_was(mask: Tensor) -> None:
    multiplier, _ = _inputs(mask)
    message = Multiplier.pack(0, 2, multiplier, mask)
    assert message.multiplier.values.shape == (int(mask.sum()), 5)
    assert torch.equal(message.unpack(mask), multiplier * mask[..., None])


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_the_z_of_a_probe_comes_back_where_it_was(mask: Tensor) -> None:
    z, _ = _inputs(mask)
    message = ProbedData.pack(3, 2, 1, 0, z, mask)
    assert (message.round, message.client, message.probe, message.side) == (3, 2, 1, 0)
    assert message.z.values.shape == (int(mask.sum()), 5)
    assert torch.equal(message.unpack(mask), z * mask[..., None])


def test_pack_says_in_which_attempt_and_at_which_local_step() -> None:
    z, labels = _inputs(LEFT)
    first, later = SmashedData.pack(0, 0, z, labels, LEFT), SmashedData.pack(0, 0, z, labels, LEFT, step=4, attempt=2)
    assert (first.attempt, first.step, later.attempt, later.step) == (0, 0, 2, 4)
    back = Multiplier.pack(0, 0, z, LEFT, step=4, attempt=2)
    assert (back.attempt, back.step) == (2, 4)
    assert ProbedData.pack(0, 0, 1, 0, z, LEFT, step=4, attempt=2).attempt == 2
    assert CodedGradient.pack(0, 0, {}, z.flatten(), 1, "int8", 0, attempt=2).attempt == 2


def test_one_label_per_sequence_even_when_there_are_as_many_tokens_as_sequences() -> None:
    mask = torch.tensor([[0, 1], [0, 1]], dtype=torch.bool)
    z, token_labels = _inputs(mask)
    _, labels, _ = SmashedData.pack(0, 0, z, torch.tensor([7, 8]), mask).unpack()
    assert labels.tolist() == [7, 8]
    _, labels, _ = SmashedData.pack(0, 0, z, token_labels, mask).unpack()
    assert labels.shape == (2, 2)


@pytest.mark.parametrize(
    ("label", "dtype"),
    [
        (-100, torch.int8),
        (127, torch.int8),
        (128, torch.int16),
        (-129, torch.int16),
        (2**15, torch.int32),
        (2**31 - 1, torch.int32),
    ],
)
def test_labels_travel_in_the_narrowest_integer_and_come_back_as_int64(label: int, dtype: torch.dtype) -> None:
    z, labels = _inputs(LEFT)
    labels[1, 1] = label
    message = SmashedData.pack(0, 0, z, labels, LEFT)
    assert message.labels.dtype == dtype
    back = message.unpack()[1]
    assert back.dtype == torch.int64
    assert back[1, 1] == label


def test_a_label_beyond_32_bits_is_refused() -> None:
    z, labels = _inputs(LEFT)
    labels[1, 1] = 2**31
    with pytest.raises(FieldError, match="2147483648 are beyond 32 bits"):
        SmashedData.pack(0, 0, z, labels, LEFT)
    labels[1, 1], labels[0, 0] = 0, 2**31  # padding
    assert SmashedData.pack(0, 0, z, labels, LEFT).labels.dtype == torch.int8


def test_no_valid_token_at_all() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    z, labels, _ = SmashedData.pack(0, 0, torch.ones(2, 3, 4), torch.ones(2, 3), mask).unpack()
    assert not z.any() and z.shape == (2, 3, 4)
    assert (labels == -100).all()


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    z, labels = _inputs(LEFT)
    with pytest.raises(FieldError, match=r"attention_mask\.bool\(\)"):
        SmashedData.pack(0, 0, z, labels, LEFT.long())
    with pytest.raises(FieldError, match="z must be"):
        SmashedData.pack(0, 0, z[:, :3], labels, LEFT)
    with pytest.raises(FieldError, match="labels must be"):
        SmashedData.pack(0, 0, z, labels[:, :3], LEFT)
    with pytest.raises(FieldError, match="multiplier must be"):
        Multiplier.pack(0, 0, z[0], LEFT)
    with pytest.raises(FieldError, match="rows for a mask"):
        Multiplier.pack(0, 0, z, LEFT).unpack(~LEFT)
    with pytest.raises(FieldError, match="probed_data: z must be"):
        ProbedData.pack(0, 0, 0, 0, z[0], LEFT)
    with pytest.raises(FieldError, match="probed_data: 7 rows for a mask of 5"):
        ProbedData.pack(0, 0, 0, 0, z, LEFT).unpack(~LEFT)
