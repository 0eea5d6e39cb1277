"""An exported half computes what PyTorch's computes, and says what it is; what was measured is told."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from hosfl_client.half import OnnxHalf
from hosfl_client.manifest import FORMAT, Manifest, sha256
from hosfl_lightning.cli import main
from hosfl_lightning.device import writing
from hosfl_lightning.device.command import table
from hosfl_lightning.device.export import export_client, in_fp32
from hosfl_lightning.device.samples import Samples
from hosfl_lightning.models import SplitCausalLM
from hosfl_lightning.rng import Domain, Stream, add_direction_
from hosfl_lightning.split import Side, SplitError, run
from hosfl_lightning.split.side import features_of
from hosfl_lightning.wire import manifest as entries
from tests.device.exported import MODELS, Exported, exported, lora, with_side
from tests.fleet.pipe_client import model_of
from tests.recipe_runs import command_line

CLOSE = {"rtol": 0, "atol": 3e-5}


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("side")
    return exported(with_side(folder / "whole"), folder)


@pytest.fixture
def half(side: Exported) -> OnnxHalf:
    return OnnxHalf(side.path, threads=1)


def arrays(batch: Any) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in batch.items()}


class TestZ:
    @pytest.mark.parametrize("name", MODELS)
    def test_of_every_family(self, name: str, tmp_path: Path) -> None:
        quantize = {"gpt2": "int8"}.get(name, "none")
        there = exported(MODELS[name](tmp_path / "whole"), tmp_path, quantize=quantize)
        rows = there.manifest.figures["z"]
        assert len(rows) == 6 and there.manifest.figures["probes"] > 0.98
        assert max(relative for _, _, relative in rows) < (0.02 if quantize == "int8" else 2e-6)
        if quantize == "int8":
            graph = onnx.load(there.path).graph
            kinds = {one.data_type for one in graph.initializer if np.prod(one.dims) >= 1024}
            assert kinds == {onnx.TensorProto.UINT8, onnx.TensorProto.INT8}
            assert {one.op_type for one in graph.node} >= {"MatMulNBits"}

    def test_of_all_sizes_and_paddings(self, side: Exported, half: OnnxHalf) -> None:
        for batch in Samples(side.model).six().values():
            z = run(side.model.client_half, batch)
            counts = batch["attention_mask"].bool()
            found = torch.from_numpy(half.forward(arrays(batch)))
            assert found.isfinite().all()
            torch.testing.assert_close(found[counts], z.detach()[counts], **CLOSE)

    def test_taps_are_what_the_layers_gave(self, side: Exported, half: OnnxHalf) -> None:
        batch, seen = Samples(side.model).batch(3, 9), []
        layers = side.model.client_half.layers.values()
        # Before the last layer's own hook adds the bottlenecks up.
        hooks = [one.register_forward_hook(lambda *a: seen.append(features_of(a[2])), prepend=True) for one in layers]
        z = run(side.model.client_half, batch)
        for hook in hooks:
            hook.remove()
        found, taps = half.tapped(arrays(batch))
        counts = batch["attention_mask"].bool()
        torch.testing.assert_close(torch.from_numpy(found)[counts], z.detach()[counts], **CLOSE)
        assert len(taps) == len(seen) == 2
        for tap, h in zip(taps, seen):
            torch.testing.assert_close(torch.from_numpy(tap)[counts], h.detach()[counts], **CLOSE)

    def test_a_probe_is_pytorchs_and_leaves_nothing_behind(self, side: Exported, half: OnnxHalf) -> None:
        batch = Samples(side.model).batch(2, 6)
        before = half.forward(arrays(batch))

        def step(i: int, size: int) -> torch.Tensor:
            u = torch.zeros(size)
            add_direction_(u, 1.0, Stream(3, Domain.RADEMACHER, round=1), i)
            return 0.1 * u

        with half.perturbed(lambda i, theta: theta + step(i, theta.size).numpy().reshape(theta.shape)):
            probed = half.forward(arrays(batch))
        moved = {
            name: p.detach() + step(i, p.numel()).view(p.shape)
            for i, (name, p) in enumerate(side.model.client_parameters.items())
        }
        z = torch.func.functional_call(side.model.client_half, moved, tuple(batch.values()))
        counts = batch["attention_mask"].bool()
        torch.testing.assert_close(torch.from_numpy(probed)[counts], z.detach()[counts], **CLOSE)
        assert np.abs(probed - before).max() > 1e-3
        np.testing.assert_array_equal(half.forward(arrays(batch)), before)

    def test_parameters_are_written_to_in_place(self, side: Exported, half: OnnxHalf) -> None:
        batch = arrays(Samples(side.model).batch(2, 6))
        before = half.forward(batch)
        half.release()
        np.testing.assert_array_equal(half.forward(batch), before)
        for array in half.parameters().values():
            array[:] = 0
        assert np.abs(half.forward(batch) - before).max() > 1e-3


class TestManifest:
    def test_is_what_the_terms_say(self, side: Exported) -> None:
        written = Manifest.load(side.path)
        assert written == side.manifest
        assert written.terms == entries(side.model.client_parameters)
        assert written.backbone == side.model.client_fingerprint()
        assert (written.width, written.cut, written.labels, written.classes) == (32, 2, "token", 64)
        assert (written.max_length, written.vocabulary, written.pad_id) == (64, 64, 0)
        assert [[name.rsplit(".", 4)[0] for name in (rung.down, rung.up)] for rung in written.side] == [
            [f"model.layers.{i}"] * 2 for i in range(2)
        ]
        assert {*written.files} == {path.name for path in side.path.parent.iterdir() if path.is_file()} - {"phone.json"}

    def test_nothing_of_this_machine_is_in_the_graph(self, side: Exported) -> None:
        assert b".py" not in side.path.read_bytes()
        assert str(side.path.parent).encode() not in side.path.with_suffix(".json").read_bytes()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "hosfl-half/9"}, f"this client reads {FORMAT}"),
            ({"files": {"phone.onnx": "0", "phone.safetensors": "0", "../more": "0"}}, "is damaged"),
            ({"width": -1}, "is damaged"),
            ({"parameters": [["a", [1], "int8", "a"]]}, "is damaged"),
            ({"more": 1}, "is damaged"),
            ({"files": ["phone.onnx", "phone.safetensors"], "tokenizer": None}, "is damaged"),
            ({"files": {"phone.onnx": "0", "phone.safetensors": 0}, "tokenizer": None}, "is damaged"),
        ],
        ids=lambda value: str(value)[:24],
    )
    def test_another_one_is_refused(self, side: Exported, tmp_path: Path, change: Any, message: str) -> None:
        held = json.loads(side.path.with_suffix(".json").read_text())
        (tmp_path / "phone.json").write_text(json.dumps(held | change))
        with pytest.raises(ValueError, match=message):
            Manifest.load(tmp_path / "phone.onnx")

    @pytest.mark.parametrize("name", ["phone.onnx", "phone.safetensors"])
    def test_a_file_of_another_export_is_refused(self, side: Exported, tmp_path: Path, name: str) -> None:
        for path in side.path.parent.glob("phone.*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        with open(tmp_path / name, "ab") as file:
            file.write(b"\0")
        with pytest.raises(ValueError, match=f"{name} is not the file that was exported"):
            OnnxHalf(tmp_path / "phone.onnx")

    def test_trained_tensors_of_another_shape_are_refused(self, side: Exported, tmp_path: Path) -> None:
        for path in side.path.parent.glob("phone.*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        held = json.loads((tmp_path / "phone.json").read_text())
        held["parameters"][0][1][0] += 1
        (tmp_path / "phone.json").write_text(json.dumps(held))
        with pytest.raises(ValueError, match="the manifest says float32"):
            OnnxHalf(tmp_path / "phone.onnx")

    def test_a_batch_of_another_shape_is_refused(self, half: OnnxHalf) -> None:
        with pytest.raises(ValueError, match="the batch has no attention_mask"):
            half.forward({"input_ids": np.zeros((1, 2), np.int64)})
        with pytest.raises(ValueError, match="input_ids has the shape"):
            half.forward({"input_ids": np.zeros(2, np.int64), "attention_mask": np.ones((1, 2), np.int64)})

    def test_what_the_engine_says_is_one_line(self, half: OnnxHalf) -> None:
        with pytest.raises(ValueError, match=r"ONNX Runtime cannot run the half \(.*out of.*bounds"):
            half.forward({"input_ids": np.full((1, 2), 1 << 20), "attention_mask": np.ones((1, 2), np.int64)})


def test_a_head_lies_beside_a_half_that_keeps_its_labels(tiny_folder: Path, tmp_path: Path) -> None:
    """What is trained of it is where the updates go; it gives what PyTorch's gives, and says when it is damaged."""
    model = model_of(str(tiny_folder), labels="client", head=2, part="client")
    there = exported(model, tmp_path)
    assert there.manifest.of_head == [name for name in model.client_parameters if name.startswith("client_head.")]
    half, drawn = OnnxHalf(there.path), torch.Generator().manual_seed(0)
    z, labels = torch.randn(2, 7, 32, generator=drawn), torch.randint(0, 260, (2, 7), generator=drawn)
    mask = torch.ones(2, 7, dtype=torch.long)
    for _ in range(2):
        wanted = model.client_head.differentiate(z, mask, labels)
        assert half.head is not None
        told = half.head.differentiate(z.numpy(), mask.numpy(), labels.numpy())
        assert told.loss == pytest.approx(float(wanted.loss), rel=1e-5)
        for mine, theirs in zip([told.multiplier, *told.gradients], [wanted.multiplier, *wanted.gradients]):
            np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for name in there.manifest.of_head:
                half.parameters()[name][:] *= 2
                model.client_parameters[name].mul_(2)
    held = json.loads((tmp_path / "phone.json").read_text())
    held["head"]["output"]["linear"]["weight"] = "another"
    (tmp_path / "phone.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match=r"phone.head.safetensors: no head as the manifest describes it"):
        OnnxHalf(there.path)


def test_a_backbone_in_bf16_is_written_in_fp32(tiny_folder: Path) -> None:
    side = Side(client=4, taps="all")
    model = SplitCausalLM(str(tiny_folder), 2, lora("q_proj"), side=side, part="client", dtype="bfloat16")
    batch = tuple(Samples(model).batch(2, 6).values())
    half, trained = in_fp32(model)
    assert {one.dtype for one in half.state_dict().values() if one.is_floating_point()} == {torch.float32}
    z, before = half(*batch), model.client_half(*batch)
    moved = torch.func.functional_call(half, {name: theta + 0.1 for name, theta in trained.items()}, batch)
    assert (moved - z).abs().max() > 0.1, "the copy reads bottlenecks that are not its own"
    assert before.dtype == torch.bfloat16
    torch.testing.assert_close(model.client_half(*batch), before, rtol=0, atol=0)
    torch.testing.assert_close(z, before.float(), rtol=0.05, atol=0.05)


def test_large_weights_lie_beside_the_graph(side: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "LARGEST", 0)
    files = writing.write_graph(onnx.load(side.path), tmp_path / "phone.onnx")
    assert files == {name: sha256(tmp_path / name) for name in ("phone.onnx", "phone.onnx.data")}
    for path in side.path.parent.glob("phone.*"):
        if path.name not in files:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    held = json.loads((tmp_path / "phone.json").read_text())
    (tmp_path / "phone.json").write_text(json.dumps(held | {"files": held["files"] | files}))
    batch = arrays(Samples(side.model).batch(2, 6))
    np.testing.assert_array_equal(OnnxHalf(tmp_path / "phone.onnx").forward(batch), OnnxHalf(side.path).forward(batch))
    (tmp_path / "phone.onnx.data").unlink()
    with pytest.raises(ValueError, match=r"phone\.onnx\.data: No such file"):
        OnnxHalf(tmp_path / "phone.onnx")


def test_a_device_needs_no_pytorch(side: Exported) -> None:
    code = (
        "import sys, numpy as np; from hosfl_client.half import OnnxHalf; ids = np.ones((1, 3), np.int64);"
        "z = OnnxHalf(sys.argv[1]).forward({'input_ids': ids, 'attention_mask': ids});"
        "print(z.shape, {'torch', 'hosfl_lightning', 'onnx'} & sys.modules.keys())"
    )
    told = subprocess.run([sys.executable, "-c", code, side.path], capture_output=True, text=True, check=True)
    assert told.stdout == "(1, 3, 32) set()\n"


class TestCommand:
    @pytest.fixture(autouse=True)
    def loggers_as_they_were(self) -> Iterator[None]:
        before = logging.getLogger().handlers[:]
        yield
        assert logging.getLogger().handlers == before

    def test_exports_what_a_recipe_says(
        self, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        adapters = "{client: {r: 2, target_modules: [q_proj]}, server: {r: 2, target_modules: [q_proj]}}"
        (tmp_path / "recipe.yaml").write_text(
            "trainer: {max_rounds: 3}\n"
            "model:\n"
            "  class_path: hosfl_lightning.models.SplitCausalLM\n"
            f"  init_args: {{pretrained: '{tiny_folder}', cut: 2, lora: {adapters}}}\n"
        )
        out = tmp_path / "half" / "phone.onnx"
        given = [f"--config={tmp_path / 'recipe.yaml'}", f"--out={out}", "--quantize=int4", "--model.init_args.cut=1"]
        with command_line():
            main(["export-client", *given])
        written, said = Manifest.load(out), capsys.readouterr().out
        assert written.quantization == "int4" and written.cut == 1 and written.tokenizer == "phone.tokenizer.json"
        found = Tokenizer.from_file(str(out.with_name(written.tokenizer)))
        assert found.encode("a b\n").ids == AutoTokenizer.from_pretrained(tiny_folder)("a b\n")["input_ids"]
        assert 1e-3 < max(relative for _, _, relative in written.figures["z"]) < 0.25
        assert "correlation with the exact derivative" in said and "8 x 64 left" in said

    def test_warns_of_probes_that_estimate_nothing(self, side: Exported) -> None:
        held = json.loads(side.path.with_suffix(".json").read_text())
        assert "warning" not in table(side.manifest)
        bad = Manifest(**(held | {"figures": held["figures"] | {"probes": 0.9}, "quantization": "int4"}))
        assert "warning: below 0.95 probes on this half" in table(bad) and "--quantize int8" in table(bad)


class TestRefusals:
    def test_nothing_to_train(self, tiny_folder: Path, tmp_path: Path) -> None:
        model = SplitCausalLM(str(tiny_folder), cut=1, part="client")
        model._client_trainable = ()
        with pytest.raises(SplitError, match="the client trains nothing"):
            export_client(model, str(tmp_path / "phone.onnx"))

    def test_without_the_extra(self, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        model = SplitCausalLM(str(tiny_folder), cut=1, part="client", client_parameters="norm")
        with pytest.raises(ImportError, match=r"needs onnxscript, .* pip install 'hosfl_lightning\[device\]'"):
            export_client(model, str(tmp_path / "phone.onnx"))

    def test_another_path(self, tiny_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"--out: phone is no path of a graph"):
            export_client(SplitCausalLM(str(tiny_folder), cut=1, part="client"), "phone")

    def test_a_folder_that_cannot_be_made(self, tiny_folder: Path, tmp_path: Path) -> None:
        model = SplitCausalLM(str(tiny_folder), cut=1, part="client", client_parameters="norm")
        (tmp_path / "a").write_text("")
        with pytest.raises(ValueError, match=r"--out: .*a: File exists; give a path in a folder that can be written"):
            export_client(model, str(tmp_path / "a" / "phone.onnx"))

    @pytest.mark.parametrize("mu", [0.0, -1.0, float("nan")])
    def test_a_smoothing_length_that_divides_by_nothing(self, mu: float, tiny_folder: Path, tmp_path: Path) -> None:
        model = SplitCausalLM(str(tiny_folder), cut=1, part="client", client_parameters="norm")
        with pytest.raises(ValueError, match="--mu must be above 0"):
            export_client(model, str(tmp_path / "phone.onnx"), mu=mu)

    def test_bf16_that_is_trained(self, tiny_folder: Path, tmp_path: Path) -> None:
        model = SplitCausalLM(str(tiny_folder), cut=1, part="client", client_parameters="norm", dtype="bfloat16")
        with pytest.raises(SplitError, match="trained in bfloat16"):
            export_client(model, str(tmp_path / "phone.onnx"))

    def test_code_that_cannot_be_traced(
        self, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = SplitCausalLM(str(tiny_folder), cut=1, part="client", client_parameters="norm")
        plain = type(model.client_half).forward

        def forward(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return plain(self, input_ids, attention_mask) * int(input_ids.sum())

        monkeypatch.setattr(type(model.client_half), "forward", forward)
        with pytest.raises(SplitError, match=r"LlamaForCausalLM cannot be exported to ONNX \(.+hosfl join"):
            export_client(model, str(tmp_path / "phone.onnx"))
        assert not (tmp_path / "phone.json").exists()
