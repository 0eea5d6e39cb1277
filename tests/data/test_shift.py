from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hosfl_lightning.data import FederatedDataModule, ImageData, ImageExample, TextData
from hosfl_lightning.data.labels import LabelSet
from hosfl_lightning.data.shift import (
    Blur,
    Cipher,
    ColourCast,
    Contrast,
    Noise,
    Sensor,
    SensorPattern,
    Shift,
    TextShift,
    TypingNoise,
    heard,
    seen,
)

CLIENTS = 3
TEXT = "The quick brown fox jumps over the lazy dog. "


class Grey(ImageData):
    """Images of one value each, ten for each client and seven held out."""

    def __init__(self, size: int = 4, **settings: Any) -> None:
        super().__init__(**{"num_clients": CLIENTS, "channels": 1, "mean": 0.0, "std": 1.0, **settings})
        self.size = size

    def read(self, split: str) -> list[ImageExample]:
        self.label_set = LabelSet(2)
        count = {"train": 30, "validation": 7, "test": 7}[split]
        shape = (1, self.size, self.size)
        return [ImageExample(torch.full(shape, 20 * (i % 10), dtype=torch.uint8), i % 2) for i in range(count)]


def made(**settings: Any) -> Grey:
    data = Grey(**settings)
    data.setup("fit")
    return data


def first(data: ImageData) -> list[list[int]]:
    """The first pixel of every image of every client, then of what is held out."""
    groups = [*data.clients, data.validation_set, data.test_set]
    return [[int(example.pixel_values[0, 0, 0]) for example in group] for group in groups]


def sensor(client: int = 0, seed: int = 0, examples: tuple[int, ...] = (0,)) -> Sensor:
    return Sensor(client, seed, examples)


def test_inverted_contrast_is_the_negative_of_the_same_images() -> None:
    plain, shifted = first(made()), first(made(shift=Contrast()))
    assert shifted == [[255 - value for value in group] for group in plain]


def test_a_shift_leaves_who_holds_what_and_the_labels() -> None:
    plain, shifted = made(), made(shift=Noise(each_client=True))
    for before, after in zip([*plain.clients, plain.test_set], [*shifted.clients, shifted.test_set]):
        assert [example.labels for example in before] == [example.labels for example in after]
    assert shifted.clients[0][0].pixel_values.dtype is torch.uint8


def test_contrast_has_gain_and_offset_and_stays_in_the_range_of_a_pixel() -> None:
    pixels = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    assert Contrast(0.5, 0.1)(pixels, sensor()).flatten().tolist() == pytest.approx([0.35, 0.6, 0.85])
    [stored] = seen(Contrast(1.0, 0.5), [(pixels[0] * 255).round().to(torch.uint8)], [0], 0, "train")
    assert stored.flatten().tolist() == [128, 255, 255]


def test_held_out_example_i_is_seen_through_the_sensor_of_client_i_mod_n() -> None:
    data = made(shift=Contrast(each_client=True, offset=0.2))
    assert [data.client_of_held_out(i) for i in range(5)] == [0, 1, 2, 0, 1]
    plain = made()
    for split in ("validation", "test"):
        for number, (before, after) in enumerate(
            zip(getattr(plain, f"{split}_set"), getattr(data, f"{split}_set"), strict=True)
        ):
            [expected] = seen(data.shift, [before.pixel_values], [number % CLIENTS], data.seed, split)
            assert torch.equal(after.pixel_values, expected)
    own = [data.shift(torch.zeros(1, 1, 1, 1), data.shift.sensor(k, 0, [0])).item() for k in range(CLIENTS)]
    assert len(set(own)) == CLIENTS


@pytest.mark.parametrize("shift", [Contrast, Noise, SensorPattern, Blur, ColourCast])
def test_each_client_has_a_sensor_of_its_own_or_all_have_one(shift: Any) -> None:
    pixels = torch.linspace(0, 1, 3 * 5 * 5).view(1, 3, 5, 5) ** 2
    shared = [shift()(pixels, shift().sensor(k, 0, [7])) for k in range(2)]
    own = [shift(each_client=True)(pixels, shift(each_client=True).sensor(k, 0, [7])) for k in range(2)]
    again = shift(each_client=True)(pixels, shift(each_client=True).sensor(1, 0, [7]))
    other_seed = shift(each_client=True)(pixels, shift(each_client=True).sensor(1, 1, [7]))
    assert torch.equal(*shared) and not torch.equal(shared[0], pixels)
    assert not torch.equal(*own) and torch.equal(own[1], again) and not torch.equal(own[1], other_seed)


def test_noise_differs_from_image_to_image_and_a_pattern_does_not() -> None:
    pixels = torch.full((2, 1, 40, 40), 0.5)
    noise, pattern = (shift(pixels, sensor(examples=(0, 1))) - 0.5 for shift in (Noise(0.1), SensorPattern(0.1)))
    assert not torch.equal(*noise) and torch.equal(*pattern)
    for added in (noise, pattern):
        assert added.std().item() == pytest.approx(0.1, rel=0.05) and abs(added.mean().item()) < 0.005


def test_no_two_images_of_the_data_share_their_noise() -> None:
    data = made(shift=Noise(0.1), size=8)
    white = [example.pixel_values for group in (*data.clients, data.validation_set, data.test_set) for example in group]
    bright = [image for image in white if image.float().mean() > 100]
    patterns = {tuple((image > image.float().mean()).flatten().tolist()) for image in bright}
    assert len(patterns) == len(bright) > 10


def test_blur_keeps_a_flat_image_and_spreads_a_point() -> None:
    flat, point = torch.full((1, 2, 9, 9), 0.3), torch.zeros(1, 1, 31, 31)
    point[0, 0, 15, 15] = 1
    assert torch.allclose(Blur(2.0)(flat, sensor()), flat)
    spread = Blur(2.0)(point, sensor())[0, 0]
    assert spread.sum().item() == pytest.approx(1, abs=1e-5) and torch.allclose(spread, spread.T)
    offsets = torch.arange(31) - 15
    assert (spread.sum(0) * offsets**2).sum().item() == pytest.approx(4, rel=0.03)


def test_colour_cast_treats_the_channels_of_a_repeated_grey_image_unequally() -> None:
    data = made(channels=3, shift=ColourCast((1.0, 0.5, 0.0), (0.0, 0.0, 0.2)))
    image = next(one.pixel_values for one in data.clients[0] if one.pixel_values[0, 0, 0] == 100)
    assert image[:, 0, 0].tolist() == [100, 50, 51]
    with pytest.raises(ValueError, match=r"ColourCast needs three channels; set data\.init_args\.channels"):
        made(shift=ColourCast())


def test_images_of_several_sizes_each_keep_theirs() -> None:
    images = [torch.full((1, 2 + i % 2, 3), 10 * i, dtype=torch.uint8) for i in range(5)]
    found = seen(Contrast(), images, [0, 1, 0, 1, 0], 0, "train")
    assert all(torch.equal(after, 255 - before) for before, after in zip(images, found))


@dataclass(frozen=True)
class Bad(Shift):
    """What it returns breaks the contract in one of three ways."""

    how: str = "shape"

    def __call__(self, pixels: Tensor, sensor: Sensor) -> Any:
        return {"shape": pixels[:, :, :2], "nan": pixels / 0, "list": [1], "integers": pixels.long()}[self.how]


@dataclass(frozen=True)
class BadText(TextShift):
    """Gives words, no text."""

    def __call__(self, text: str, sensor: Sensor) -> Any:
        return text.split()


class NoDataclass(Shift):
    """Its setting is told to nobody."""

    def __init__(self, strength: float) -> None:
        object.__setattr__(self, "each_client", False)

    def __call__(self, pixels: Tensor, sensor: Sensor) -> Tensor:
        return pixels


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        (Bad("shape"), r"shift: Bad turns \(10, 1, 4, 4\) into torch.float32 of shape \(10, 1, 2, 4\); a Shift turns"),
        (Bad("nan"), "shift: Bad returns pixels that are no numbers"),
        (Bad("list"), "into list; a Shift turns"),
        (Bad("integers"), "into torch.int64 of shape"),
        (NoDataclass(1.0), r"data\.init_args\.shift: NoDataclass takes strength"),
        (Cipher(), r"data\.init_args\.shift: Cipher is no hosfl_lightning\.data\.shift\.Shift"),
    ],
)
def test_a_shift_that_breaks_the_contract_is_named(shift: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(shift=shift)


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: Contrast(0.0), "gain=0.0"), (lambda: Contrast(float("nan")), "gain=nan"),
        (lambda: Contrast(offset=2.0), "offset=2.0"), (lambda: Noise(0.0), "std=0.0"),
        (lambda: SensorPattern(-1.0), "strength=-1.0"), (lambda: Blur(0.0), "sigma=0.0"),
        (lambda: Blur(21.0), "sigma=21.0"), (lambda: ColourCast((1.0, 2.0)), "gains="),  # type: ignore[arg-type]
        (lambda: ColourCast(offsets=(0.0, 0.0, 1.5)), "offsets="), (lambda: Cipher(26), "rotation=26"),
        (lambda: TypingNoise(1.0), "rate=1.0"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(make: Any, setting: str) -> None:
    with pytest.raises(ValueError, match=f"shift: {setting}"):
        make()


def test_a_recipe_names_a_shift_by_its_class_path() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(FederatedDataModule, "data")
    shift = {"class_path": "hosfl_lightning.data.shift.Contrast", "init_args": {"gain": 0.5, "each_client": True}}
    config = parser.parse_object({"data": {"class_path": "DigitsData", "init_args": {"shift": shift}}})
    assert parser.instantiate(config).data.shift == Contrast(0.5, each_client=True)


class TestText:
    def test_rot13_keeps_case_and_what_is_no_letter(self) -> None:
        assert heard(Cipher(13), "Hello, Wörld 42!", 0, 0, "train", 0) == "Uryyb, Jöeyq 42!"

    def test_a_drawn_cipher_is_a_permutation_that_the_seed_and_the_client_choose(self) -> None:
        alphabet = "abcdefghijklmnopqrstuvwxyz"
        drawn = [heard(Cipher(each_client=True), alphabet, k, seed, "train", 0) for k, seed in ((0, 0), (1, 0), (0, 1))]
        assert all(sorted(one) == list(alphabet) for one in drawn) and len({*drawn, alphabet}) == 4
        assert heard(Cipher(), alphabet, 1, 0, "train", 0) == heard(Cipher(), alphabet, 0, 0, "train", 5)
        turned = [heard(Cipher(3, each_client=True), "abc", k, 0, "train", 0) for k in range(2)]
        assert turned == ["def", "ghi"]

    def test_slips_come_at_their_rate_and_letters_alone_slip(self) -> None:
        text = TEXT * 200
        found = heard(TypingNoise(0.2), text, 0, 0, "train", 0)
        assert found != heard(TypingNoise(0.2), text, 0, 0, "train", 1)
        assert found == heard(TypingNoise(0.2), text, 1, 0, "train", 0)
        letters = [one for one in text if one.isalpha()]
        assert text.count(".") == found.count(".") and abs(len(found) - len(text)) < 0.02 * len(text)
        kept = sum(word in TEXT.split() for word in found.split()) / len(text.split())
        assert kept == pytest.approx(0.8 ** (len(letters) / len(text.split())), abs=0.1)

    def test_a_letter_slips_in_four_ways(self) -> None:
        found = {heard(TypingNoise(0.999), "Qx", 0, 0, "train", n) for n in range(200)}
        assert {"xQ", "QQ", "", "W"} <= found
        assert all(one.lower() in _slips() for one in found)

    def test_one_for_all_changes_the_text_before_it_is_cut(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        path = tmp_path / "a.txt"
        path.write_text(TEXT * 20)
        plain, shifted = (text_data(path, tokenizer, shift=shift) for shift in (None, Cipher(13)))
        for before, after in zip([*plain.clients, plain.validation_set], [*shifted.clients, shifted.validation_set]):
            turned = [heard(Cipher(13), tokenizer.decode(block.input_ids), 0, 0, "train", 0) for block in before]
            assert turned == [tokenizer.decode(block.input_ids) for block in after]

    def test_each_its_own_changes_blocks_and_held_out_block_i_is_client_i_mod_n_s(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        path = tmp_path / "a.txt"
        path.write_text(TEXT * 20)
        shift = Cipher(1, each_client=True)
        plain, shifted = (text_data(path, tokenizer, shift=one, seed=5) for one in (None, shift))
        owners = [[k] * len(blocks) for k, blocks in enumerate(plain.clients)]
        owners.append([i % CLIENTS for i in range(len(plain.validation_set))])
        groups = zip([*plain.clients, plain.validation_set], [*shifted.clients, shifted.validation_set], owners)
        for before, after, of in groups:
            for one, other, client in zip(before, after, of, strict=True):
                turned = heard(shift, tokenizer.decode(one.input_ids), client, 5, "train", 0)
                assert tokenizer.decode(other.input_ids) == turned and len(other.input_ids) <= 16

    def test_a_block_that_becomes_longer_is_cut(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        path = tmp_path / "a.txt"
        path.write_text(TEXT * 20)
        data = text_data(path, tokenizer, shift=Thrice(each_client=True))
        assert {len(block.input_ids) for client in data.clients for block in client} == {16}

    def test_what_breaks_the_contract_is_named(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        path = tmp_path / "a.txt"
        path.write_text(TEXT * 20)
        for shift, message in (
            (BadText(), "shift: BadText returns a list; a TextShift turns"),
            (
                Nothing(each_client=True),
                r"shift: Nothing leaves 0 token\(s\) of a block; raise sequence_length from 16",
            ),
            (Contrast(), r"Contrast is no hosfl_lightning\.data\.shift\.TextShift"),
        ):
            with pytest.raises(ValueError, match=message):
                text_data(path, tokenizer, shift=shift)


@dataclass(frozen=True)
class Thrice(TextShift):
    def __call__(self, text: str, sensor: Sensor) -> str:
        return text * 3


@dataclass(frozen=True)
class Nothing(TextShift):
    def __call__(self, text: str, sensor: Sensor) -> str:
        return ""


def text_data(path: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> TextData:
    data = TextData(str(path), num_clients=CLIENTS, sequence_length=16, tokenizer=tokenizer, **settings)
    data.setup("fit")
    return data


def _slips() -> set[str]:
    """All that two letters q and x can become when each slips, or the second does not come to it."""
    one, two = {"w", "qq", ""}, {"z", "c", "xx", "", "x"}
    return {a + b for a in one for b in two} | {"xq"}


def test_every_shift_is_in_the_page() -> None:
    text = (Path(__file__).parents[2] / "docs" / "shift.md").read_text()
    kinds = {kind for base in (Shift, TextShift) for kind in base.__subclasses__()}
    shipped = {kind.__name__ for kind in kinds if kind.__module__.startswith("hosfl_lightning.")}
    assert shipped == set(re.findall(r"^\| `(\w+)\(", text, flags=re.MULTILINE))


def test_the_shift_of_the_page_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "shift.md").read_text()
    [code] = re.findall(r"```python\n(# my_shift\.py\n.*?)```", text, flags=re.DOTALL)
    (tmp_path / "my_shift.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("my_shift").DeadPixels(0.5, each_client=True)
    black = [[image.pixel_values == 0 for image in client] for client in made(shift=own, size=8).clients]
    assert all(torch.equal(black[0][0] | one, one) for one in black[0])  # and the image of value 0 is black all over
    assert not torch.equal(black[0][1], black[1][1])
