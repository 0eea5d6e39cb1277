"""What is measured, against autograd through the uncut model, and that measuring changes nothing."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import HOSL, ZOSFL, Algorithm, Frozen, SplitFedSGD, SplitFedV2
from hosfl_lightning.availability import Trace
from hosfl_lightning.callbacks import GradientAlignment
from hosfl_lightning.optim import SGD, RandomProjections, Uncompressed
from hosfl_lightning.split import Lora, LoraHalf, Side
from tests.conftest import RandomTokens
from tests.small_run import adamw, contents

pytestmark = [
    pytest.mark.filterwarnings("ignore:the two sides of a probe"),  # of so small a model is crooked
    pytest.mark.filterwarnings("ignore:probes="),  # few are enough here
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # torch's own, in jvp
]

MakeModel = Callable[..., SplitCausalLM]
MakeOrchestrator = Callable[..., Orchestrator]

#: So that Δθ is large beside its rounding.
RULE = SGD(lr=0.5)
SERVER = LoraHalf(r=4, target_modules="all-linear")
SIDE = {"side": Side(4), "lora": Lora(client=None, server=SERVER)}
BOTH = {"side": Side(4), "lora": Lora(client=LoraHalf(r=2, target_modules=["q_proj"]), server=SERVER)}
#: A method, and how its model differs from the others'.
METHODS: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "forward": (HOSFL(probes=8, client_optimizer=RULE), {}),
    "central": (HOSFL(probes=8, estimator="central", client_optimizer=RULE), {}),
    "jvp": (HOSFL(probes=8, estimator="jvp", client_optimizer=RULE), {}),
    "local": (HOSFL(estimator="local", compression=Uncompressed(), client_optimizer=RULE), SIDE),
    "projections": (HOSFL(estimator="local", compression=RandomProjections(16), client_optimizer=RULE), SIDE),
    "local and probed": (HOSFL(estimator="local", taps="keep", client_optimizer=RULE), BOTH),
    "HOSL": (HOSL(client_optimizer=RULE), {}),
    "first order": (SplitFedSGD(client_optimizer=RULE), {}),
    "frozen": (Frozen(client_optimizer=RULE), {}),
}
EXACT = ("local", "first order")
CASES = [(name, "batched") for name in METHODS] + [(name, "per_client") for name in ("forward", "frozen")]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5)


def measured(trainer: Orchestrator) -> list[dict[str, float]]:
    """What is in each row of the run's metrics, by name."""
    rows = csv.DictReader((Path(trainer.log_dir) / "metrics.csv").read_text().splitlines())
    prefix = "alignment/"
    return [{k.removeprefix(prefix): float(v) for k, v in r.items() if k.startswith(prefix) and v} for r in rows]


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def loss_of(model: SplitCausalLM, batches: list[dict[str, Tensor]]) -> Tensor:
    """``Σ_k w_k ℓ_k`` of the uncut model."""
    counts = [model.count(batch["labels"]) for batch in batches]
    losses = [model.loss(model(b["input_ids"], b["attention_mask"]), b["labels"]) for b in batches]
    return torch.stack([loss * n / sum(counts) for loss, n in zip(losses, counts)]).sum()


def gradients(model: SplitCausalLM, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of the loss, by θ_c and by θ_s."""
    halves = list(model.client_parameters.values()), list(model.server_parameters.values())
    for parameter in chain(*halves):
        parameter.requires_grad_()
    loss = loss_of(model, batches)
    client, server = (torch.autograd.grad(loss, h, retain_graph=True, materialize_grads=True) for h in halves)
    return flat(client), flat(server)


@pytest.fixture
def lively(make_model: MakeModel) -> Callable[..., SplitCausalLM]:
    """A model with a server that moves, and without the zeros with which adapters start, which hide half a gradient."""

    def make(**settings: Any) -> SplitCausalLM:
        model = make_model(**{"optimizer": sgd} | settings)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in [*model.client_parameters.values(), *model.server_parameters.values()]:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        return model

    return make


@pytest.mark.parametrize(("name", "simulation"), CASES)
def test_figures_are_those_of_backprop_through_the_uncut_model(
    lively: Callable[..., SplitCausalLM], make_orchestrator: MakeOrchestrator, data: RandomTokens, name: str,
    simulation: str,
) -> None:  # fmt: skip
    method, settings = METHODS[name]
    model, start = lively(**settings), lively(**settings)
    trainer = make_orchestrator(method, max_rounds=1, simulation=simulation, callbacks=[GradientAlignment(1)])
    trainer.fit(model, data)
    batches = [data.client_batch(k, 0) for k in range(3)]
    client, server = gradients(start, batches)
    moves = [
        flat(getattr(model, half).values()) - flat(getattr(start, half).values())
        for half in ("client_parameters", "server_parameters")
    ]
    direction = -moves[0] / RULE.lr
    counts = [model.count(batch["labels"]) for batch in batches]
    squares = [n / sum(counts) * gradients(start, [b])[0].square().sum() for b, n in zip(batches, counts)]
    decreases = [-float(client @ moves[0]), -float(server @ moves[1])]
    expected = {
        "cosine": float(torch.cosine_similarity(direction, client, dim=0)),
        "relative_norm": float(direction.norm() / client.norm()),
        "noise_scale": float(sum(squares) / client.square().sum()),
        "client_decrease": decreases[0],
        "server_decrease": decreases[1],
        "client_share": decreases[0] / sum(decreases),
    }
    first, after = measured(trainer)
    assert first == {}
    if name == "frozen":
        del expected["cosine"]
        assert (after["relative_norm"], after["client_decrease"], after["client_share"]) == (0, 0, 0)
    assert after == pytest.approx(expected, rel=2e-3, abs=1e-6)
    assert after["noise_scale"] > 1 and after["server_decrease"] > 0
    if name in EXACT:
        assert (after["cosine"], after["relative_norm"]) == (pytest.approx(1, abs=1e-6), pytest.approx(1, rel=1e-5))
    elif name != "frozen":
        assert abs(after["cosine"]) < 0.9


def test_the_decreases_foretell_what_a_small_step_does(
    lively: Callable[..., SplitCausalLM], make_orchestrator: MakeOrchestrator, data: RandomTokens
) -> None:
    model, start = lively(optimizer=lambda params: torch.optim.SGD(params, lr=1e-2)), lively()
    trainer = make_orchestrator(SplitFedSGD(SGD(lr=1e-2)), max_rounds=1, callbacks=[GradientAlignment(1)])
    trainer.fit(model, data)
    batches = [data.client_batch(k, 0) for k in range(3)]
    with torch.no_grad():
        fell = float(loss_of(start, batches) - loss_of(model, batches))
    _, after = measured(trainer)
    assert after["client_decrease"] + after["server_decrease"] == pytest.approx(fell, rel=0.05)


def test_every_nth_round_is_measured(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
) -> None:
    trainer = make_orchestrator(max_rounds=5, callbacks=[GradientAlignment(2)])
    trainer.fit(make_model(), data)
    assert [n for n, row in enumerate(measured(trainer)) if row] == [2, 4]


def unmeasured(folder: Path) -> dict[str, Any]:
    """All files of a run folder, without what the callback logs."""
    files = contents(folder)
    rows = [{k: v for k, v in row.items() if not k.startswith("alignment/")} for row in files["metrics.csv"]]
    return {**files, "metrics.csv": rows}


class Watch(Callback):
    """What a round leaves in the model beside its numbers."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen += [(n, p.requires_grad, p.grad is None) for n, p in pl_module.named_parameters()]
        self.seen += [(n, m.training, len(m._forward_hooks)) for n, m in pl_module.named_modules()]


@pytest.mark.parametrize("name", ["forward", "local and probed", "first order"])
def test_a_run_is_the_same_with_and_without_it(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, name: str
) -> None:
    """Of a run with server dropout, momenta and a client that is away: every file, and what is in memory."""
    method, settings = METHODS[name]
    server = LoraHalf(r=2, dropout=0.2, target_modules=["o_proj"])
    lora = Lora(client=settings["lora"].client if settings else LoraHalf(r=2, target_modules=["q_proj"]), server=server)
    left = []
    for callbacks in ([], [GradientAlignment(1)]):
        watch = Watch()
        trainer = make_orchestrator(
            method, enable_checkpointing=True, availability=Trace([[0, 1, 2], [0, 1], [1, 2]]),
            callbacks=[*callbacks, watch],
        )  # fmt: skip
        random = torch.get_rng_state()
        trainer.fit(make_model(**settings | {"lora": lora, "optimizer": adamw}), data)
        assert torch.equal(torch.get_rng_state(), random)
        assert any(measured(trainer)) == bool(callbacks)
        left.append((unmeasured(Path(trainer.log_dir)), watch.seen))
        shutil.rmtree(trainer.log_dir)
    assert left[0] == left[1]


def test_it_can_be_refused(make_orchestrator: MakeOrchestrator) -> None:
    with pytest.raises(ValueError, match="every_n_rounds must be >= 1, got 0"):
        GradientAlignment(0)
    for method in (ZOSFL(), SplitFedV2()):
        with pytest.raises(ValueError, match=f"{method.name} has no step for GradientAlignment; remove it"):
            make_orchestrator(method, callbacks=[GradientAlignment()])
    alignment, trainer = GradientAlignment(), SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match="measures the rounds of an Orchestrator; remove it from this Trainer"):
        alignment.setup(trainer, None, "fit")
    trainer.processes = None
    with pytest.raises(ValueError, match=r"there are 2; set trainer\.devices: 1 and trainer\.num_nodes: 1, or"):
        alignment.setup(trainer, None, "fit")
    alignment.setup(trainer, None, "test")  # where there are no rounds
