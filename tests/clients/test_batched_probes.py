"""How many probes a client runs at once: by shape alone, within its memory, to the coefficients of one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hosfl_lightning import HOSFL, SplitCausalLM
from hosfl_lightning.clients import ForwardOnlyClient, LocalGradientClient
from hosfl_lightning.clients.batched_probes import SHARE, BatchedProbes, ProbeBatchError
from hosfl_lightning.memory import MemoryMeter, plain_forward_peak, storage_bytes
from hosfl_lightning.optim import ForwardDifference, ZerothOrder
from hosfl_lightning.optim.probe_batch import ProbeBatch, UnbatchedError
from hosfl_lightning.split import Side
from tests.clients.test_local_gradient import BESIDE, batch, model_of, multiplier_of

MakeModel = Callable[..., SplitCausalLM]
ROWS = [slice(0, 1), slice(1, 4), slice(4, 6)]


@pytest.fixture
def model(make_model: MakeModel) -> SplitCausalLM:
    """LoRA moved away from its start, where half of the probes do nothing."""
    made = make_model()
    for number, parameter in enumerate(made.client_parameters.values()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 5
    return made


def client(model: SplitCausalLM, size: Any, **settings: Any) -> ForwardOnlyClient:
    half = model.client_half
    given = {"probes": 5, "mu": 2**-7, **settings}
    return ForwardOnlyClient(half, ZerothOrder(model.client_parameters.values(), module=half, **given), size)


def answer(who: ForwardOnlyClient, rows: list[slice] = ROWS) -> Tensor:
    anchor = who.forward(batch(), rows)
    return who.answer(batch(), anchor, multiplier_of(anchor.z), rows, who.optimizer.basis(2))


@pytest.mark.parametrize(("estimator", "size"), [("forward", 2), ("forward", 9), ("central", 4)])
def test_it_answers_as_one_by_one(model: SplitCausalLM, estimator: str, size: int) -> None:
    """To rounding: a product of more rows may be summed in another order."""
    expected = answer(client(model, 1, estimator=estimator))
    state, before = torch.get_rng_state(), [p.clone() for p in model.client_parameters.values()]
    who = client(model, size, estimator=estimator)
    ran = list[int]()
    who.half.register_forward_pre_hook(lambda half, given: ran.append(len(given[0])))
    torch.testing.assert_close(answer(who), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    # z, the forward on ones, and the probes in groups of one size or nearly: 6 examples each.
    assert ran[2:] == {2: [12, 12, 6], 9: [30], 4: [24, 24, 12]}[size]
    assert torch.equal(answer(who), answer(who))
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, before, model.client_parameters.values()))


def test_lora_beside_a_side_adapter_is_probed_at_once(make_model: MakeModel) -> None:
    model = model_of(make_model, Side(4), lora=BESIDE)
    answers = []
    for size in (1, 3):
        optimizer = ZerothOrder(model.client_parameters.values(), module=model.client_half, probes=3, mu=2**-7)
        answers.append(answer(LocalGradientClient(model.client_half, optimizer, probe_batch=size)))
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-2)


class Table(nn.Module):
    """``f_c``: a large table that is frozen, and a small layer that is trained."""

    inputs = ("input_ids",)

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind, self.table, self.leaf = kind, nn.Embedding(4096, 64), nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        if self.kind == "by the data" and ids.max() > 1:
            h = torch.cat([h] * 9)[: len(h)]  # as a mask that is made where there is padding
        if self.kind == "random":
            h = h + torch.rand(len(ids), 1, 1)
        if self.kind == "positions first":
            return self.leaf(h.transpose(0, 1)).transpose(0, 1)
        return h + torch.tanh(self.leaf(h))


def table_client(size: Any, kind: str = "plain", **settings: Any) -> ForwardOnlyClient:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        half = Table(kind)
    given = {"probes": 4, "mu": 2**-7, **settings}
    return ForwardOnlyClient(half, ZerothOrder(half.leaf.parameters(), module=half, **given), size)


def known(who: ForwardOnlyClient) -> BatchedProbes:
    assert who.batched is not None
    return who.batched


def step(who: ForwardOnlyClient, examples: int) -> Tensor:
    ids = {"input_ids": torch.arange(examples * 16).view(examples, 16)}
    rows = [slice(0, examples)]
    anchor = who.forward(ids, rows)
    multiplier = anchor.z.clone()
    return who.answer(ids, anchor, multiplier, rows, who.optimizer.basis(0))


@pytest.mark.parametrize(("examples", "at_once"), [(1, 5), (2, 3), (6, 2), (32, 1)])
def test_auto_goes_by_the_shape_and_keeps_the_memory_of_inference(examples: int, at_once: int) -> None:
    """Its peak is a plain forward's, z (λ in its place), and an eighth of all that the client holds meanwhile."""
    who = table_client("auto")
    step(who, examples)
    assert [plain.at_once for plain in known(who).plain.values()] == [at_once]
    ids = {"input_ids": torch.arange(examples * 16).view(examples, 16)}
    forward, held = plain_forward_peak(lambda: who.evaluate(ids)), storage_bytes(who.half.parameters())
    z = examples * 16 * 64 * 4
    with MemoryMeter() as meter, meter.role("client"):
        step(who, examples)
    assert meter.peak("client") <= forward + z + SHARE * (held + forward)


def test_auto_asks_neither_the_data_nor_what_ran_before() -> None:
    """Else a client on a machine of its own could run other probes together than the same one in a simulation."""
    first, second = table_client("auto"), table_client("auto", "by the data")
    for examples in (6, 1, 2):
        step(first, examples)
    for examples in (2, 6, 1):
        step(second, examples)
    found = [{shapes: p.at_once for shapes, p in known(who).plain.items()} for who in (first, second)]
    assert found[0] == found[1]
    assert len(found[0]) == 3
    assert torch.equal(step(first, 2), step(second, 2))


def test_who_counts_a_round_does_not_see_how_it_is_found_out() -> None:
    counts = []
    for size in (1, "auto"):
        with FlopCounterMode(display=False) as counter:
            step(table_client(size), 1)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("kind", ["random", "positions first"])
def test_what_cannot_be_batched_runs_one_by_one_or_is_an_error(kind: str) -> None:
    torch.manual_seed(0)
    expected = step(table_client(1, kind), 1)
    torch.manual_seed(0)
    auto = table_client("auto", kind)
    assert torch.equal(step(auto, 1), expected)
    assert [plain.at_once for plain in known(auto).plain.values()] == [1]
    with pytest.raises(ProbeBatchError, match=r"probe_batch=2: the probes of a Table .* set probe_batch: 1"):
        step(table_client(2, kind), 1)


def test_a_shape_that_cannot_be_batched_does_not_decide_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run that goes on, and meets it later or never, would have other bits."""
    whole = ProbeBatch.__call__

    def but_of_two(self: ProbeBatch, forward: Any, batch: dict[str, Tensor], *given: Any) -> Tensor:
        if len(next(iter(batch.values()))) == 2:
            raise UnbatchedError("two")
        return whole(self, forward, batch, *given)

    monkeypatch.setattr(ProbeBatch, "__call__", but_of_two)
    who = table_client("auto")
    for examples in (2, 1):
        step(who, examples)
    assert [plain.at_once > 1 for plain in known(who).plain.values()] == [False, True]


def test_a_compiled_half_is_one_graph() -> None:
    one = table_client(1)
    one.half.compile(backend="eager")
    assert BatchedProbes(one.half, one.optimizer, "auto").refused
    with pytest.raises(ProbeBatchError, match="probe_batch=2: a compiled Table is one graph"):
        BatchedProbes(one.half, one.optimizer, 2)


class Own(ForwardDifference):
    """An estimator of somebody's own: where it evaluates is not known beforehand."""


def test_an_estimator_of_ones_own_goes_one_by_one() -> None:
    assert torch.equal(step(table_client("auto", estimator=Own()), 1), step(table_client(1), 1))


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "many", None])
def test_another_size_is_refused(size: Any) -> None:
    with pytest.raises(ProbeBatchError, match="probe_batch must be auto, or a number of probes from 1 on"):
        HOSFL(probe_batch=size)
    with pytest.raises(ProbeBatchError, match="probe_batch must be auto"):
        table_client(size)


def test_the_setting_is_what_clients_and_checkpoints_are_told() -> None:
    for size in ("auto", 3):
        method = HOSFL(probe_batch=size)
        assert method.settings()["probe_batch"] == method.client_settings()["probe_batch"] == size
    before = HOSFL(probe_batch=1)  # a run of before, which went one by one, can be gone on with
    assert "probe_batch" not in before.settings() | before.client_settings()
    with pytest.raises(ValueError, match=r"probe_batch=2: .* set estimator: forward or central"):
        HOSFL(probe_batch=2, estimator="jvp")
