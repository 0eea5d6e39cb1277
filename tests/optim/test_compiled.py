from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning.optim import SGD, ZerothOrder, together
from hosfl_lightning.optim.compiled import compiled_around

X = torch.linspace(-1, 1, 6).view(3, 2)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))


def objective(run: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    return lambda: run(X).square().sum()


def compiled(way: str) -> nn.Module:
    module = net()
    if way == "scripted":
        return torch.jit.script(module)
    if way == "wrapped":
        return torch.compile(module, backend="eager")  # type: ignore[return-value]
    (module[2] if way == "a layer" else module).compile(backend="eager")
    return module


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("way", "estimator"),
    [*itertools.product(["whole", "a layer", "wrapped"], ["forward", "jvp"]), ("scripted", "central")],
)
def test_what_is_compiled_is_probed_as_the_plain_module_is(way: str, estimator: str) -> None:
    values = []
    for module in (net(), compiled(way)):
        run, before = objective(module), [p.clone() for p in module.parameters()]
        with torch.no_grad():
            run()  # a graph is there before there are probes
        zo = ZerothOrder(module.parameters(), module=module, probes=2, mu=0.01, estimator=estimator)
        zo.probed = {0, 3}
        values.append(zo.project(run))
        assert all(map(torch.equal, before, module.parameters()))
    torch.testing.assert_close(*values)
    assert values[1].abs().min() > 0


def test_layer_by_layer_where_what_is_compiled_holds_nothing_that_is_probed() -> None:
    layer = compiled("a layer")
    assert not ZerothOrder(layer[0].parameters(), module=layer).compiled  # type: ignore[index]


@pytest.mark.parametrize("estimator", ["forward", "central", "jvp"])
def test_an_objective_that_runs_something_else_is_told(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = net()
    if estimator != "jvp":  # few parameters move all at once, and what is compiled sees it
        with pytest.raises(ValueError, match="a probe moved nothing: the objective does not call Sequential"):
            ZerothOrder(module.parameters(), module=module, estimator=estimator).step(objective(net()))
    monkeypatch.setattr(together, "FEW", 0)
    fast = torch.compile(module, backend="eager")
    with torch.no_grad():
        fast(X)  # compiled before there are probes
    for run in (fast, net()):
        zo = ZerothOrder(module.parameters(), SGD(lr=0.1), module=module, probes=2, estimator=estimator)
        with pytest.raises(ValueError, match="a probe moved nothing: the objective does not call Sequential"):
            zo.step(objective(run))


def test_without_module_a_compiled_one_is_probed_as_the_plain_one_is() -> None:
    module = net()
    fast = torch.compile(module, backend="eager")
    zo = ZerothOrder(module.parameters(), probes=2, mu=0.01)
    torch.testing.assert_close(zo.project(objective(fast)), zo.project(objective(module)))
    assert zo.project(objective(fast)).abs().min() > 0


def test_a_compiled_helper_of_a_module_is_no_matter() -> None:
    module = net()
    module.loss = torch.compile(nn.functional.mse_loss, backend="eager")  # type: ignore[assignment]
    assert compiled_around(module, ["0.weight"]) is None
    module[0].forward = torch.compile(module[0].forward, backend="eager")  # type: ignore[method-assign]
    assert compiled_around(module, ["2.weight"]) is None
    assert compiled_around(module, ["2.weight", "0.weight"]) == "0"
