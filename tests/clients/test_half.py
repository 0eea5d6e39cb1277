"""Another engine under an endpoint: a half in numpy takes part in a round like one in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from hosfl_lightning import HOSFL
from hosfl_lightning.aggregation import combine
from hosfl_lightning.clients import Anchor, Half, Minibatches, SplitEndpoint
from hosfl_lightning.clients.endpoint import Endpoint, EndpointError
from hosfl_lightning.optim import SGD, basis_of
from hosfl_lightning.rng import direction
from hosfl_lightning.wire import Codecs, Multiplier, SmashedData, StepRequest, Update
from tests.algorithms.two_layers import WIDTH, Points, TwoLayers

MU, PROBES = 2**-7, 2


class NumpyHalf:
    """``tanh(W x + b)`` without PyTorch's modules, autograd or optimizers; plain SGD."""

    def __init__(self, parameters: Sequence[Tensor], seed: int) -> None:
        self.weight, self.bias = (p.detach().numpy().astype(np.float64) for p in parameters)
        self.seed, self.shapes = seed, [p.shape for p in parameters]

    def z(self, batch: dict[str, Tensor], moves: Sequence[np.ndarray] | None = None) -> np.ndarray:
        weight, bias = (self.weight, self.bias) if moves is None else (self.weight + moves[0], self.bias + moves[1])
        return np.tanh(batch["points"].numpy() @ weight.T + bias)[:, None]

    def along(self, basis: Any, probe: int) -> list[np.ndarray]:
        sizes = [shape.numel() for shape in self.shapes]
        flat = [direction(basis.streams[probe], i, 0, size).numpy() for i, size in enumerate(sizes)]
        return [part.reshape(shape) for part, shape in zip(flat, self.shapes)]

    def forward(self, batch: dict[str, Tensor], rows: list[slice]) -> Anchor:
        return Anchor(torch.from_numpy(self.z(batch).astype(np.float32)))

    def probe(self, batch: dict[str, Tensor], basis: Any, probe: int, scale: float) -> Tensor:
        return torch.from_numpy(self.z(batch, [scale * u for u in self.along(basis, probe)]).astype(np.float32))

    def answer(self, batch: Any, anchor: Anchor, multiplier: Tensor, rows: list[slice], basis: Any) -> Tensor:
        changes = [self.z(batch, [MU * u for u in self.along(basis, p)]) - self.z(batch) for p in range(basis.size)]
        factor = multiplier.numpy()
        values = [[(change[r] * factor[r]).sum() / MU for change in changes] for r in rows]
        return torch.tensor(values, dtype=torch.float32)

    def apply(self, update: Update) -> None:
        basis = basis_of(update.basis, self.seed, update.round, [shape.numel() for shape in self.shapes])
        for p, v in enumerate(update.coefficients.tolist()):
            for held, u in zip((self.weight, self.bias), self.along(basis, p)):
                held -= update.rule["lr"] * v / len(update.coefficients) * u


class NumpyEndpoint(SplitEndpoint):
    """The conversation is `SplitEndpoint`'s; the engine is its own."""

    def make_client(self, half: Any) -> Any:
        engine: Half = NumpyHalf(list(self.trained.values()), self.terms.seed)
        return engine


def endpoint(kind: type[SplitEndpoint]) -> SplitEndpoint:
    """A client of a HO-SFL run."""
    model, data = TwoLayers(), Points()
    data.setup("fit")
    model.eval()
    algorithm = HOSFL(PROBES, MU, client_optimizer=SGD(lr=0.1))
    terms = algorithm.terms(model, 7, Codecs(), data.num_clients)
    return kind(model, Minibatches(data, model), terms, Fabric(accelerator="cpu"))


@pytest.mark.filterwarnings("ignore:the two sides of a probe")
@pytest.mark.parametrize("clients", [[1], [0, 2, 3]])
def test_a_half_in_numpy_answers_as_one_in_pytorch(clients: list[int]) -> None:
    """Round after round, alone and as a joint batch; what differs is rounding."""
    ours, theirs = endpoint(SplitEndpoint), endpoint(NumpyEndpoint)
    generator = torch.Generator().manual_seed(0)
    for round in range(3):
        sent = [one.handle([StepRequest(round, k) for k in clients]) for one in (ours, theirs)]
        smashed: list[Any] = [message for messages in sent for message in messages]
        for a, b in zip(smashed[: len(clients)], smashed[len(clients) :], strict=True):
            torch.testing.assert_close(a.unpack()[0], b.unpack()[0], rtol=1e-5, atol=1e-6)
            assert torch.equal(a.labels, b.labels)
        multipliers = [
            Multiplier.pack(round, m.client, torch.randn(len(m.mask), 1, WIDTH, generator=generator), m.mask)
            for m in smashed[: len(clients)]
        ]
        answered: list[Any] = [one.handle(multipliers) for one in (ours, theirs)]
        for a, b in zip(*answered, strict=True):
            torch.testing.assert_close(a.coefficients, b.coefficients, rtol=1e-3, atol=1e-4)
            assert (a.client, a.num_terms, a.basis) == (b.client, b.num_terms, b.basis)
        update = combine(answered[0], ours.client.optimizer, mu=MU)
        for one in (ours, theirs):
            assert one.handle([update]) == []
    weight = next(iter(ours.trained.values()))
    moved: Any = theirs.client
    torch.testing.assert_close(weight.detach().double(), torch.from_numpy(moved.weight), rtol=1e-4, atol=1e-5)


def test_a_multiplier_that_nobody_waits_for_is_an_error_by_name() -> None:
    """Of another round, or twice: the fleet is at fault, and says what it did."""
    client, request = endpoint(SplitEndpoint), StepRequest(0, 1)
    [smashed] = client.handle([request])
    assert isinstance(smashed, SmashedData)
    multiplier = Multiplier.pack(0, 1, torch.zeros(smashed.unpack()[0].shape), smashed.unpack()[2])
    client.handle([multiplier])
    with pytest.raises(EndpointError, match="client 1 is sent a multiplier, and waits for none"):
        client.handle([multiplier])


def test_an_endpoint_needs_a_name_of_its_own() -> None:
    """The terms say which it is, by its name."""
    with pytest.raises(TypeError, match=r"an endpoint SplitEndpoint is in hosfl_lightning.* already"):
        type("SplitEndpoint", (SplitEndpoint,), {"__module__": "elsewhere"})
    assert Endpoint.known["SplitEndpoint"] is SplitEndpoint
