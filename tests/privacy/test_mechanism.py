"""Clipping, noise and grid, of numbers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hosfl_client.privacy import GRID_BITS, Mechanism, NoiseKey, clipped, normal, on_grid

SETTINGS: dict[str, Any] = {
    "level": "example", "clip": 2.0, "noise_multiplier": 0.5, "delta": 1e-5, "token_clip": 3.0,
    "token_noise_multiplier": 0.25, "multiplier_clip": None, "multiplier_noise_multiplier": None,
}  # fmt: skip
SEEDED = NoiseKey.of_seed(3)


def rows(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_long_rows_are_cut_to_the_clip_and_short_ones_left() -> None:
    values = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [np.inf, 1.0], [np.nan, 0.0], [1e30, 0.0]], np.float32)
    expected = [[1.2, 1.6], [0.3, 0.4], [0, 0], [0, 0], [0, 0], [2, 0]]
    np.testing.assert_allclose(clipped(values, 2.0), expected, rtol=1e-7)


def test_an_answer_is_the_clipped_mean_and_noise_of_its_size() -> None:
    values, mechanism = 10 * rows(5, 20_000), Mechanism(SETTINGS, SEEDED)
    noise = mechanism.answer(values, 1, 0, 2) - clipped(values, 2.0).mean(0)
    assert np.std(noise) == pytest.approx(0.5 * 2.0 / 5, rel=0.02)
    assert abs(np.mean(noise)) < 4 * 0.2 / math.sqrt(20_000)


def test_a_token_is_clipped_and_noised_by_itself() -> None:
    z, mechanism = 10 * rows(40, 500), Mechanism(SETTINGS, SEEDED)
    sent = mechanism.tokens(z, "smashed_data", ("step_request", 1, 0, 0, 2))
    assert sent.dtype == np.float32
    assert np.std(sent - clipped(z, 3.0)) == pytest.approx(0.75, rel=0.02)
    assert Mechanism({**SETTINGS, "token_clip": None}, SEEDED).tokens(z, "smashed_data", (1,)) is z


def test_the_noise_is_normal_and_has_its_golden_bits() -> None:
    noise = normal(b"k" * 32, "place", 400_001)
    powers = [np.mean(noise**power) for power in (1, 2, 3, 4)]
    np.testing.assert_allclose(powers, [0, 1, 0, 3], atol=0.03)
    assert abs(np.corrcoef(noise[:200_000], noise[200_000:400_000])[0, 1]) < 0.01  # a pair's two halves
    np.testing.assert_allclose(noise[:3], GOLDEN, rtol=1e-14)


GOLDEN = [0.35266446749732433, -0.44758072561818546, -1.1832213227422994]


def test_what_is_released_lies_on_a_grid_and_survives_fp32() -> None:
    values, mechanism = rows(1, 4000), Mechanism({**SETTINGS, "level": "client", "clip": 0.7}, SEEDED)
    step = 2.0 ** (math.floor(math.log2(0.35)) - GRID_BITS)
    released = mechanism.answer(values, 0, 0, 0).astype(np.float64) / step
    assert np.array_equal(released, np.rint(released)) and len(np.unique(released)) > 2000
    assert np.abs(on_grid(values, 0.35) - values).max() <= step / 2


def test_noise_of_another_round_attempt_client_or_message_is_another() -> None:
    value, mechanism = np.zeros((1, 8), np.float32), Mechanism(SETTINGS, SEEDED)
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    released = [mechanism.answer(value, *place) for place in places]
    tokens = [mechanism.tokens(value, "smashed_data", (kind, 0, 0, step, 0)) for kind in ("a", "b") for step in (0, 1)]
    assert len({one.tobytes() for one in released}) == len({one.tobytes() for one in tokens}) == 4
    assert np.array_equal(mechanism.answer(value, 0, 0, 0), released[0])


def test_a_secret_gives_a_value_noise_of_its_own() -> None:
    """Who asks again gets the same bits; two values never share noise, which their difference would show."""
    mechanism, value = Mechanism(SETTINGS, NoiseKey()), rows(4, 6)
    first, again, other = (mechanism.answer(one, 3, 0, 0) for one in (value, value, value + np.float32(1e-3)))
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    assert not np.array_equal(Mechanism(SETTINGS, NoiseKey()).answer(value, 3, 0, 0), first)


def test_a_clients_key_is_kept_to_itself(tmp_path: Path) -> None:
    key = NoiseKey.kept(tmp_path)
    assert NoiseKey.kept(tmp_path) == key and not key.simulated
    [file] = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and key.secret.hex() not in repr(key)
    file.write_bytes(b"short")
    with pytest.raises(ValueError, match="has 5 bytes"):
        NoiseKey.kept(tmp_path)


def test_a_client_refuses_a_delta_that_loses_an_example() -> None:
    mechanism = Mechanism({**SETTINGS, "delta": 0.01}, SEEDED)
    assert mechanism.objection(100) is None
    assert "above 1/101 of this client's examples" in (mechanism.objection(101) or "")
