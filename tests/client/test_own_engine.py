"""The half of docs/own_engine.md, which knows numpy and nothing else, takes part in a round."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hosfl_client.endpoint import Endpoint
from hosfl_client.join import join
from hosfl_client.manifest import Input, Manifest
from hosfl_client.messages import Multiplier
from hosfl_client.minibatches import Minibatch
from hosfl_client.wire import StepRequest, Terms, Update
from tests.recipe_runs import ROOT

RULE = {"name": "SGD", "lr": 0.5, "weight_decay": 0.0, "momentum": 0.0}
BASIS = {"kind": "shared_directions", "probes": 3, "distribution": "rademacher"}


def halves() -> Any:
    """The page's class, made twice of the same arrays, and its embedding."""
    text = (ROOT / "docs/own_engine.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(code.splitlines()) <= 40
    names: dict[str, Any] = {}
    exec(code, names)
    rng = np.random.default_rng(0)
    embedding, frozen = rng.standard_normal((11, 6), np.float32), rng.standard_normal((4, 6), np.float32)
    a, b = rng.standard_normal((2, 6), np.float32), rng.standard_normal((4, 2), np.float32)
    return names["LinearHalf"](embedding, frozen, a, b), embedding


def test_it_takes_part_in_a_round() -> None:
    half, embedding = halves()
    a, b = half.parameters().values()
    manifest = Manifest(
        graph="", weights="", files={}, inputs=(Input("input_ids", "int64", (-1, -1)),), output="z", width=4,
        parameters=(("A", (2, 6), "float32", "A"), ("B", (4, 2), "float32", "B")), positions=None, side=(),
        backbone="", architecture="", cut=1, labels="token", classes=11, pretrained="", tokenizer=None, pad_id=0,
        vocabulary=11, max_length=None, precision="32-true", opset=18, quantization="none", figures={},
    )  # fmt: skip
    settings = {"kind": "forward_only", "estimator": "forward", "mu": 1e-3, "distribution": "rademacher"}
    codecs = {"smashed_data": "fp32", "multiplier": "fp32", "gradient": "fp32"}
    terms = Terms(0, 1, "SplitEndpoint", settings, 7, manifest.terms, RULE, BASIS, codecs)
    ids = np.random.default_rng(1).integers(0, 11, (2, 5))
    batch = Minibatch({"input_ids": ids, "attention_mask": np.ones_like(ids)}, ids, 8)
    client = Endpoint(half, manifest, lambda round: batch, terms)

    [sent] = client.handle([StepRequest(0, 1)])
    h = embedding[ids]
    np.testing.assert_allclose(sent.unpack()[0], h @ (half.frozen + b @ a).T, rtol=1e-4, atol=1e-5)

    factor = np.random.default_rng(2).standard_normal((2, 5, 4), np.float32)
    [answer] = client.handle([Multiplier.pack(0, 1, factor, batch.mask(5))])
    gradient = [np.einsum("bso,or,bsi->ri", factor, b, h), np.einsum("bso,bsi,ri->or", factor, h, a)]
    assert answer.coefficients == pytest.approx(client.basis(0).project(gradient), rel=1e-2)

    before = sent.unpack()[0]
    client.handle([Update(0, BASIS, answer.coefficients, RULE, 1, [1], [1.0], 1e-3)])
    np.testing.assert_array_equal(half.parameters()["A"], a)  # moved in place
    [sent] = client.handle([StepRequest(1, 1)])
    assert np.abs(sent.unpack()[0] - before).max() > 0.1


def test_join_takes_it(exported: Any, tmp_path: Path) -> None:
    def engine(path: Path, threads: int | None) -> Any:
        raise LookupError(f"{path.name}, {threads}")

    (tmp_path / "mine.txt").write_text("the text of a device, which stays where it is; " * 5)
    with pytest.raises(LookupError, match=r"phone\.onnx, 3"):
        join("127.0.0.1:1", exported(), tmp_path / "mine.txt", name="a", insecure=True, threads=3, engine=engine,
             give_up=0.0)  # fmt: skip
