from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from hosfl_lightning.algorithms import SplitFedSGD, SplitFedV1, SplitFedV2
from hosfl_lightning.optim import SGD
from tests.algorithms.plain_rounds import Reference, average_, method, two_layers
from tests.algorithms.two_layers import Points, TwoLayers, assert_equal, orchestrator, plain, sgd


def splitfed(
    model: TwoLayers, data: Points, sampled: list[list[int]], steps: int, rule: str, shared: bool
) -> tuple[nn.Module, nn.Module]:
    """``shared``: the second variant's one server half; else the first's, one a client."""
    reference, (first, second) = Reference(data, rule), plain(model)
    for r, clients in enumerate(sampled):
        halves, heads, seen = [], [], []
        for k in clients:
            half, head = deepcopy(first), second if shared else deepcopy(second)
            own = reference.optimizer(("client", k), half.parameters(), r)
            servers = reference.optimizer("server" if shared else ("server", k), head.parameters(), r)
            seen.append(reference.train(nn.Sequential(half, head), k, r, steps, own, servers))
            halves.append(half)
            heads.append(head)
        average_(first, halves, seen)
        if not shared:
            average_(second, heads, seen)
    return first, second


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", [SplitFedV1, SplitFedV2])
def test_equals_an_independent_implementation(
    kind: type[SplitFedV1 | SplitFedV2], steps: int, rule: str, tmp_path: Path
) -> None:
    model, data, trainer = two_layers(rule), Points(), orchestrator(method(kind, rule, local_steps=steps), tmp_path)
    start = two_layers(rule)
    trainer.fit(model, data)
    sampled = [trainer.sample(r) for r in range(5)]
    assert len({tuple(clients) for clients in sampled}) > 1, "no client is away and comes back"
    expected = splitfed(start, data, sampled, steps, rule, shared=kind is SplitFedV2)
    assert_equal(model, *expected)
    assert (start.client_half.layer[0].weight - model.client_half.layer[0].weight).abs().max() > 1e-2


def test_the_variants_differ_and_one_client_alone_is_the_same_in_both(tmp_path: Path) -> None:
    def trained(kind: type[SplitFedV1 | SplitFedV2], sizes: list[int]) -> TwoLayers:
        model = two_layers("sgd")
        orchestrator(method(kind, "sgd"), tmp_path, clients_per_round=None).fit(model, Points(sizes))
        return model

    alone = trained(SplitFedV1, [5])
    assert_equal(trained(SplitFedV2, [5]), *plain(alone))
    with pytest.raises(AssertionError):
        assert_equal(trained(SplitFedV2, [5, 4]), *plain(trained(SplitFedV1, [5, 4])))


def test_one_sgd_step_of_the_first_variant_is_gradient_averaging(tmp_path: Path) -> None:
    averaged, stepped = TwoLayers(sgd(0.3)), TwoLayers(sgd(0.3))
    orchestrator(SplitFedV1(SGD(lr=0.2)), tmp_path).fit(averaged, Points())
    orchestrator(SplitFedSGD(SGD(lr=0.2)), tmp_path).fit(stepped, Points())
    assert_equal(averaged, *plain(stepped))


def test_every_clients_server_half_keeps_its_own_moments(tmp_path: Path) -> None:
    algorithm = method(SplitFedV1)
    trainer = orchestrator(algorithm, tmp_path, max_rounds=2, clients_per_round=2)
    trainer.fit(two_layers(), Points())
    assert isinstance(algorithm, SplitFedV1)
    took_part = [trainer.sample(r) for r in range(2)]
    for k, moments in algorithm.server_moments.items():
        rounds = sum(k in clients for clients in took_part)
        assert torch.equal(moments[0]["step"], torch.tensor(float(rounds)))
    assert set(algorithm.server_moments) == {k for clients in took_part for k in clients}
    assert not trainer.server.optimizer.state_dict()["state"]
