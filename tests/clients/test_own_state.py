"""A client's own disk: each file whole or not at all, of this run or not taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hosfl_lightning.clients.catch_up import CatchUpError, client_state, load_state, state_digest
from hosfl_lightning.clients.own_state import KEPT, OwnState
from hosfl_lightning.optim import AdamW, ZerothOrder
from hosfl_lightning.optim.moments import Moments
from tests.faults import Killed, count_writes, killed_at, points

RUN, OTHER = bytes(16), bytes([1]) * 16


def moved(steps: int, seed: int = 0) -> ZerothOrder:
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]
    optimizer = ZerothOrder(parameters, AdamW(lr=0.1), probes=2)
    for _ in range(steps):
        optimizer.record(torch.tensor([0.5, -1.0]))
        optimizer.step()
    return optimizer


def test_a_shared_state_comes_back_as_it_was(tmp_path: Path) -> None:
    there, here, disk = moved(3), moved(0, seed=1), OwnState(tmp_path / "new" / "folder")
    disk.save_shared(client_state(there), RUN, 3, "0-abc")
    found = disk.shared(RUN)
    assert found is not None and found[1:] == (3, "0-abc")
    assert state_digest(here) != state_digest(there)
    load_state(here, found[0], found[1])
    assert state_digest(here) == state_digest(there)
    assert disk.shared(OTHER) is None
    assert OwnState(tmp_path / "empty").shared(RUN) is None


def test_the_digest_is_of_moments_and_steps_too() -> None:
    one, other = moved(2), moved(2)
    other.state[other.parameters[0]]["exp_avg"][0] += 1e-7
    assert state_digest(one) != state_digest(other)
    other = moved(2)
    other.param_groups[0]["step"] = 3
    assert state_digest(one) != state_digest(other)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("0.theta"),
        lambda state: state.update({"2.theta": torch.zeros(1)}),
        lambda state: state.update({"0.theta": torch.zeros(4, 3)}),
        lambda state: state.update({"1.theta": torch.zeros(5, dtype=torch.bfloat16)}),
        lambda state: state.update({"1.exp_avg": torch.zeros(4)}),
    ],
)
def test_a_state_of_another_model_is_refused_and_nothing_moves(change: object) -> None:
    here, state = moved(1), {name: tensor.clone() for name, tensor in client_state(moved(2)).items()}
    before = state_digest(here)
    change(state)  # type: ignore[operator]
    with pytest.raises(CatchUpError):
        load_state(here, state, 2)
    assert state_digest(here) == before


def test_a_kill_at_any_write_leaves_the_old_state_or_the_new(tmp_path: Path) -> None:
    def write(folder: Path) -> OwnState:
        disk = OwnState(folder)
        disk.save_shared(client_state(moved(1)), RUN, 1, "a")
        return disk

    def again(disk: OwnState) -> None:
        disk.save_shared(client_state(moved(2)), RUN, 2, "b")

    disk = write(tmp_path / "counted")
    with count_writes() as calls:
        again(disk)
    for n, torn in points(calls):
        disk = write(tmp_path / f"{n}{torn}")
        with pytest.raises(Killed), killed_at(n, torn):
            again(disk)
        found = disk.shared(RUN)
        assert found is not None and found[1:] in ((1, "a"), (2, "b"))
        assert state_digest(moved(found[1])) == digest_of(found[0], found[1])


def digest_of(state: dict[str, torch.Tensor], steps: int) -> str:
    optimizer = moved(0, seed=7)
    load_state(optimizer, state, steps)
    return state_digest(optimizer)


@pytest.mark.parametrize("damage", [lambda data: data[:50], lambda data: b"", lambda data: b"\xff" * 20 + data])
def test_a_damaged_file_is_named_and_passed_over(damage: object, tmp_path: Path) -> None:
    disk = OwnState(tmp_path)
    disk.save_shared(client_state(moved(1)), RUN, 1, "a")
    file = tmp_path / "shared.safetensors"
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    with pytest.warns(UserWarning, match="no state that can be read"):
        assert disk.shared(RUN) is None


def test_own_states_are_kept_by_round_and_attempt_and_only_so_many(tmp_path: Path) -> None:
    disk = OwnState(tmp_path)
    for round in range(KEPT + 3):
        disk.save_own({"steps": torch.tensor(round)}, RUN, (round, 0))
    disk.save_own({"steps": torch.tensor(99)}, RUN, (KEPT + 2, 1))
    assert disk.own(RUN, (3, 0)) is None
    assert disk.own(OTHER, (KEPT, 0)) is None
    for place, steps in (((KEPT + 2, 0), KEPT + 2), ((KEPT + 2, 1), 99), ((4, 0), 4)):
        found = disk.own(RUN, place)
        assert found is not None and int(found["steps"]) == steps


def test_what_another_run_has_left_does_not_push_out_what_this_one_keeps(tmp_path: Path) -> None:
    """Its rounds may be later ones."""
    disk, state = OwnState(tmp_path), {"steps": torch.tensor(1)}
    for run, first in ((OTHER, 100), (RUN, 0)):
        for round in range(first, first + KEPT):
            disk.save_own(state, run, (round, 0))
            assert disk.own(run, (round, 0)) is not None
    assert disk.own(RUN, (0, 0)) is not None
    assert disk.own(OTHER, (100, 0)) is None


def test_moments_that_do_not_count_yet_are_put_back() -> None:
    optimizer = moved(0)
    moments, elsewhere = Moments(optimizer), Moments(moved(0))
    with moments.of(4):
        optimizer.record(torch.tensor([1.0, 2.0]))
        optimizer.step()
    kept = moments.moved(4)
    assert kept is not None and moments.moved(3) is None
    moments.commit([4])
    assert moments.moved(4) is None
    elsewhere.put_back(4, kept)
    assert elsewhere.held[4][0] == 1
    for a, b in zip(moments.tensors(4), elsewhere.tensors(4), strict=True):
        assert torch.equal(a, b)
    for bad in ({"9.exp_avg": torch.zeros(12)}, {"0.exp_avg": torch.zeros(3)}, {"0.other": torch.zeros(12)}):
        with pytest.raises(ValueError, match="not those of this run"):
            elsewhere.put_back(4, {"steps": torch.tensor(1), **bad})
