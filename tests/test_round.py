"""One round against independent references: λ, projected gradients, weights, and the places a round can run in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import SplitFedSGD
from hosfl_lightning.clients import Anchor, ForwardOnlyClient
from hosfl_lightning.optim import SGD
from hosfl_lightning.padding import FILL, drop_unpredictable, stack_rows
from hosfl_lightning.rng import Domain, Stream, direction
from hosfl_lightning.server import Inbox, Server
from hosfl_lightning.wire import Message, SmashedData, Update
from tests.conftest import Joined
from tests.random_tokens import RandomTokens

pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe")  # μ is large on purpose, see `fit`

MakeModel = Callable[..., SplitCausalLM]
MakeOrchestrator = Callable[..., Orchestrator]


def fit(make: MakeOrchestrator, model: SplitCausalLM, data: RandomTokens, **kwargs: Any) -> dict[str, Tensor]:
    """Train; the equalities below hold for any μ, and a large one keeps 1/μ from magnifying the rounding of z."""
    make(**kwargs).fit(model, data)
    return {name: tensor.clone() for name, tensor in model.trained_state().items()}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def reference(model: SplitCausalLM, data: RandomTokens, rounds: int, probes: int, mu: float, lr: float) -> None:
    """HO-SFL in plain PyTorch: autograd λ, whole-vector perturbation, one client after the other, Σ w by hand."""
    theta = list(model.client_parameters.values())
    server = torch.optim.SGD(model.server_parameters.values(), lr=0.1)
    for r in range(rounds):
        batches = [data.client_batch(k, r) for k in range(data.num_clients)]
        counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
        server.zero_grad()
        v = torch.zeros(probes, dtype=torch.float64)
        anchors = []
        for batch, n in zip(batches, counts):
            with torch.no_grad():
                z = model.client_half(batch["input_ids"], batch["attention_mask"])
            z.requires_grad_()
            loss = model.loss(model.server_half(z, batch["attention_mask"]), batch["labels"])
            (loss * n / sum(counts)).backward()
            anchors.append((z.detach(), z.grad / (n / sum(counts))))
        for p in range(probes):
            directions = [
                direction(Stream(0, Domain.RADEMACHER, round=r, probe=p), i, 0, t.numel()).view_as(t)
                for i, t in enumerate(theta)
            ]
            saved = [t.detach().clone() for t in theta]
            with torch.no_grad():
                for t, u in zip(theta, directions):
                    t.add_(u, alpha=mu)
                for batch, n, (z, multiplier) in zip(batches, counts, anchors):
                    moved = model.client_half(batch["input_ids"], batch["attention_mask"])
                    v[p] += n / sum(counts) * ((moved - z) * multiplier).double().sum() / mu
                for t, bits in zip(theta, saved):
                    t.copy_(bits)
        server.step()
        with torch.no_grad():
            for p in range(probes):
                for i, t in enumerate(theta):
                    u = direction(Stream(0, Domain.RADEMACHER, round=r, probe=p), i, 0, t.numel()).view_as(t)
                    t.sub_(lr * v[p].float() / probes * u)


def test_hosfl_equals_an_independent_implementation(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
) -> None:
    ours, theirs = make_model(), make_model()
    start = {name: tensor.clone() for name, tensor in ours.trained_state().items()}
    algorithm = HOSFL(probes=3, mu=2**-7, client_optimizer=SGD(lr=0.1))
    trained = fit(make_orchestrator, ours, data, algorithm=algorithm, max_rounds=3)
    reference(theirs, data, rounds=3, probes=3, mu=2**-7, lr=0.1)
    assert_close(trained, theirs.trained_state(), 5e-5)
    moved = [name for name in start if (start[name] - trained[name]).abs().max() > 1e-3]
    assert any(n.startswith("client_half") for n in moved)
    assert any(n.startswith("server_half") for n in moved)


def test_multiplier_is_the_unweighted_gradient_of_each_clients_own_mean_loss(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
) -> None:
    model, trainer = make_model(), make_orchestrator()
    seen: list[Any] = []
    step = Server.backward

    def keeping(self: Server, inbox: Inbox, *more: Any) -> Any:
        out = step(self, inbox, *more)
        if self is trainer.server:  # not its copy in a rehearsal
            seen.append((inbox, out))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "backward", keeping)
        trainer.fit(model, data)
    fresh = make_model()
    inbox, (_, multipliers) = seen[0]
    assert [message.client for message in inbox.messages] == [*multipliers] == [0, 1, 2]
    for message in inbox.messages:
        multiplier = multipliers[message.client]
        z, labels, mask = message.unpack()
        z.requires_grad_()
        fresh.loss(fresh.server_half(z, mask.long()), labels).backward()
        torch.testing.assert_close(multiplier.unpack(mask), z.grad, rtol=1e-4, atol=1e-7)


def test_projected_gradients_are_the_true_client_gradient_along_the_directions(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, sent: list[tuple[Message, int]]
) -> None:
    model, trainer = make_model(), make_orchestrator(HOSFL(probes=4, estimator="central", client_optimizer=SGD(lr=0.0)))
    trainer.fit(model, data)  # lr 0: θ_c stays at its start, the last round's answers are at it
    *_, update = (message for message, _ in sent if isinstance(message, Update))
    fresh = make_model()
    theta = list(fresh.client_parameters.values())
    last = trainer.max_rounds - 1
    for name, tensor in fresh.server_parameters.items():  # the server as it was before the last round
        tensor.data.copy_(SERVER_BEFORE[name])
    batches = [data.client_batch(k, last) for k in range(3)]
    batch = {name: stack_rows([b[name] for b in batches], fill) for name, fill in FILL.items()}
    loss = fresh.loss(fresh(batch["input_ids"], batch["attention_mask"]), batch["labels"])
    gradient = torch.autograd.grad(loss, theta)
    basis = trainer.server.basis(last)
    assert basis is not None and update.round == last
    expected = basis.project(gradient)
    torch.testing.assert_close(update.coefficients, expected, rtol=5e-2, atol=2e-3)


SERVER_BEFORE: dict[str, Tensor] = {}


@pytest.fixture(autouse=True)
def _keep_the_server_before_its_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Server.step

    def keeping(self: Server) -> None:
        SERVER_BEFORE.update({n: p.detach().clone() for n, p in self.module.server_parameters.items()})
        step(self)

    monkeypatch.setattr(Server, "step", keeping)


@pytest.mark.parametrize("simulation", ["batched", "per_client"])
def test_copies_of_one_client_give_that_clients_update(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, simulation: str
) -> None:
    class Copies(RandomTokens):
        def client_batch(self, client: int, round: int) -> dict[str, Tensor]:
            return super().client_batch(0, round)

    one, three = Copies([[9, 12, 7, 5]]), Copies([[9, 12, 7, 5]] * 3)
    for algorithm in (HOSFL(probes=2, mu=2**-7, client_optimizer=SGD(lr=0.1)), SplitFedSGD(SGD(lr=0.1))):
        single = fit(make_orchestrator, make_model(), one, algorithm=algorithm, simulation=simulation)
        triple = fit(make_orchestrator, make_model(), three, algorithm=algorithm, simulation=simulation)
        assert_close(single, triple, 5e-5)


@pytest.mark.parametrize("simulation", ["batched", "per_client"])
def test_unequal_clients_give_the_update_of_their_concatenated_batch(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, simulation: str
) -> None:
    algorithm = HOSFL(probes=2, mu=2**-7, client_optimizer=SGD(lr=0.1))
    apart = fit(make_orchestrator, make_model(), data, algorithm=algorithm, simulation=simulation)
    joined = fit(make_orchestrator, make_model(), Joined(data), algorithm=algorithm)
    assert_close(apart, joined, 5e-5)


def test_batched_equals_per_client_to_rounding(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
) -> None:
    algorithm = HOSFL(probes=2, mu=2**-7, client_optimizer=SGD(lr=0.1))
    settings = {"algorithm": algorithm, "clients_per_round": 2}
    batched = fit(make_orchestrator, make_model(), data, simulation="batched", **settings)
    per_client = fit(make_orchestrator, make_model(), data, simulation="per_client", **settings)
    assert_close(batched, per_client, 5e-5)


def test_encoding_every_message_changes_no_bit(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
) -> None:
    class Serializes(Callback):
        def __init__(self, serialize: bool) -> None:
            self.serialize = serialize

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.fleet.channel.serialize = self.serialize

    states = []
    for serialize in (True, False):
        trainer = make_orchestrator(simulation="per_client", callbacks=[Serializes(serialize)])
        model = make_model()
        trainer.fit(model, data)
        assert trainer.fleet.channel.serialize is serialize
        states.append({n: t.clone() for n, t in model.trained_state().items()})
    assert same_bits(*states)


def test_the_client_holds_nothing_of_the_server_and_the_server_no_inputs(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, monkeypatch: pytest.MonkeyPatch,
    sent: list[tuple[Message, int]],
) -> None:  # fmt: skip
    model, trainer = make_model(), make_orchestrator()
    asked: list[set[str]] = []
    checked = []

    def training_step(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        asked.append(set(batch))
        client = trainer.endpoint.client
        checked.append(all(p.grad is None and not p.requires_grad for p in client.half.parameters()))
        return SplitCausalLM.training_step(model, batch, batch_idx)

    model.training_step = training_step  # type: ignore[method-assign]
    kept: list[Any] = []
    forward = ForwardOnlyClient.forward

    def keeping(self: ForwardOnlyClient, batch: Any, rows: Any) -> Anchor:
        anchor = forward(self, batch, rows)
        kept.append((anchor.graphs, anchor.z.grad_fn))
        return anchor

    monkeypatch.setattr(ForwardOnlyClient, "forward", keeping)
    trainer.fit(model, data)
    assert len(asked) == 8  # five to measure memory and arithmetic, then three rounds
    assert all(keys == {"z", "attention_mask", "labels"} for keys in asked)
    assert all(checked)
    smashed = [m for m, _ in sent if isinstance(m, SmashedData)]
    assert len(smashed) == 9
    assert len(kept) == 7  # four to measure memory and arithmetic, then three rounds
    assert set(kept) == {((), None)}  # no graph hangs on what the client keeps
    client_ids = {id(p) for p in trainer.endpoint.client.half.parameters()}
    assert not client_ids & {id(p) for p in model.server_half.parameters()}  # this model's head is not tied
    assert {id(p) for p in trainer.endpoint.client.optimizer.parameters} == {
        id(p) for p in model.client_parameters.values()
    }
    assert all(p.grad is None for p in model.client_half.parameters())


def test_a_label_without_a_predecessor_is_dropped() -> None:
    labels = torch.tensor([[7, 8, 9, 4], [7, 8, 9, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert drop_unpredictable(labels, mask).tolist() == [[7, -100, -100, 4], [7, 8, 9, 4]]
    assert drop_unpredictable(torch.tensor([1, 2]), mask).tolist() == [1, 2]
