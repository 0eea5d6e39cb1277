from __future__ import annotations

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


def test_a_module_that_is_compiled_is_refused_by_name() -> None:
    whole, layer, wrapped = net(), net(), torch.compile(net(), backend="eager")
    whole.compile(backend="eager")
    layer[2].compile(backend="eager")
    for module, name in ((whole, "Sequential is compiled and"), (layer, "Sequential is compiled at '2'"),
                         (wrapped, "OptimizedModule is compiled and")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"module={name}.*pass module=None"):
            ZerothOrder(module.parameters(), module=module)
    ZerothOrder(layer[0].parameters(), module=layer)  # what is compiled holds nothing that is probed


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
