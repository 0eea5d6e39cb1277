from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from hosfl_lightning.algorithms import SplitLearning
from tests.algorithms.plain_rounds import Reference, method, two_layers
from tests.algorithms.two_layers import Points, assert_equal, orchestrator, plain


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [1, 3])
def test_equals_an_independent_implementation(steps: int, rule: str, tmp_path: Path) -> None:
    algorithm = method(SplitLearning, rule, local_steps=steps)
    model, data, trainer = two_layers(rule), Points(), orchestrator(algorithm, tmp_path)
    trainer.fit(model, data)
    reference, (first, second) = Reference(data, rule), plain(two_layers(rule))
    for r in range(5):
        for k in trainer.sample(r):
            own = reference.optimizer(("client", k), first.parameters(), r)
            server = reference.optimizer("server", second.parameters(), r)
            reference.train(nn.Sequential(first, second), k, r, steps, own, server)
    assert_equal(model, first, second)


def test_there_is_nothing_to_aggregate() -> None:
    with pytest.raises(TypeError, match="aggregation"):
        method(SplitLearning, aggregation=None)
