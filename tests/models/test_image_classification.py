from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from hosfl_lightning import HOSFL, Orchestrator, SplitImageClassifier, algorithms
from hosfl_lightning.algorithms import ClientKind, MixedHOSFL, SplitFedSGD
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.data.tokenization import Example
from hosfl_lightning.models import PretrainedError, SplitModule
from hosfl_lightning.networks import ConvNet
from hosfl_lightning.optim import SGD, Uncompressed
from hosfl_lightning.split import Lora, LoraHalf, Side, SplitError
from hosfl_lightning.wire import SmashedData
from tests.models.image_runs import RandomImages, saved, sgd
from tests.split.tiny_images import CLASSES, images, tiny_image_model

pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe")
#: Two blocks and a head for grey 8x8 images of two classes.
small = partial(ConvNet, widths=(4, 8), num_labels=2)
MOBILENET = Path(__file__).parents[3] / "shared" / "data" / "mobilenet_v2"


def grey(count: int) -> Tensor:
    """Seeded images that `small` takes."""
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def classifier(**kwargs: Any) -> SplitImageClassifier:
    settings: dict[str, Any] = {"cut": 1, "num_labels": 2, "image_size": 8, "channels": 1, "network": small}
    return SplitImageClassifier(**(settings | kwargs))


def of_folder(model: Any, folder: Path, **kwargs: Any) -> SplitImageClassifier:
    settings: dict[str, Any] = {"network": None, "pretrained": saved(model, folder), "image_size": 32, "channels": 3}
    return classifier(**({"num_labels": CLASSES} | settings | kwargs))


def state(model: SplitModule) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.trained_state().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", ["ResNet", "ViT", "Swin"])
def test_a_saved_model_is_read_whole(name: str, tmp_path: Path) -> None:
    whole = tiny_image_model(name)
    model = of_folder(whole, tmp_path, cut=2)
    with torch.no_grad():
        assert torch.equal(model(images()), whole(images()).logits)
    assert model.loss(model(images()), torch.tensor([0, 4, 2])).item() == pytest.approx(
        whole(images(), labels=torch.tensor([0, 4, 2])).loss.item()
    )
    assert len(model.client_parameters) + len(model.server_parameters) == len(list(whole.parameters()))


def test_another_number_of_classes_gets_a_fresh_head_that_follows_from_the_seed(tmp_path: Path) -> None:
    whole = tiny_image_model("ResNet")
    before = torch.get_rng_state()
    one, again, other = (of_folder(whole, tmp_path, num_labels=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    heads = [m.server_half.get_parameter("classifier.1.weight") for m in (one, again, other)]
    assert heads[0].shape == (3, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    kept = "resnet.encoder.stages.3.layers.0.layer.0.convolution.weight"
    assert torch.equal(one.server_half.get_parameter(kept), whole.get_parameter(kept))


def test_a_network_starts_from_the_seed_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    one, again, other = (state(classifier(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(one, again)
    assert not equal(one, other)
    assert classifier(dtype="bfloat16").client_parameters["0.conv.weight"].dtype == torch.bfloat16


def test_it_is_made_from_a_recipe() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(SplitModule, "model")
    network = {"class_path": "hosfl_lightning.networks.ConvNet", "init_args": {"widths": [4, 8], "num_labels": 2}}
    settings = {"cut": 1, "num_labels": 2, "image_size": 8, "channels": 1, "network": network, "frozen": ["norm"]}
    recipe = {"class_path": "hosfl_lightning.models.SplitImageClassifier", "init_args": settings}
    model = parser.instantiate(parser.parse_object({"model": recipe})).model
    assert equal(state(model), state(classifier(frozen=["norm"])))


def test_one_of_pretrained_and_network_is_given(tmp_path: Path) -> None:
    for given in ({"network": None}, {"pretrained": "some"}, {"network": small()}):
        with pytest.raises(PretrainedError, match=r"give one of pretrained .* and network .* not a module"):
            classifier(**given)
    with pytest.raises(PretrainedError, match="no model at"):
        classifier(network=None, pretrained=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("algorithm", [partial(HOSFL, probes=8), SplitFedSGD])
def test_training_lowers_the_loss_and_moves_both_halves(
    algorithm: Callable[..., Any], make_orchestrator: Callable[..., Orchestrator]
) -> None:
    model = classifier(optimizer=partial(torch.optim.AdamW, lr=0.03))
    before = state(model)
    trainer = make_orchestrator(algorithm(client_optimizer=SGD(lr=0.02)), max_rounds=25, val_check_interval=25)
    trainer.fit(model, RandomImages())
    first, last = trainer.summary["metrics_first"], trainer.summary["metrics_last"]
    assert last["val/loss"] < first["val/loss"] - 0.1
    assert last["val/accuracy"] >= first["val/accuracy"]
    moved = [name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])]
    assert moved == list(before)
    # A step of the clients costs one forward and one a probe; backprop costs a forward and its two products.
    forwards = trainer.summary["client_forwards_per_round"]
    assert forwards == (9 if algorithm is not SplitFedSGD else pytest.approx(2.0, abs=1.0))


@pytest.mark.parametrize(
    "name", [name for name in algorithms.__all__ if name not in ("Algorithm", "ClientKind", "TooFewClientsError")]
)
def test_every_method_trains_on_images(name: str, make_orchestrator: Callable[..., Orchestrator]) -> None:
    method = getattr(algorithms, name)
    kinds = [ClientKind("forward_only", clients=[0]), ClientKind("first_order", clients=[1, 2])]
    needed: dict[str, Any] = {"clients": kinds} if method is MixedHOSFL else {}
    model = classifier(optimizer=sgd(0.05), client_holds=method.client_holds)
    trainer = make_orchestrator(method(client_optimizer=SGD(lr=0.01), **needed))
    trainer.fit(model, RandomImages())
    assert trainer.summary["metrics_last"]["val/loss"] < trainer.summary["metrics_first"]["val/loss"]


def test_the_auxiliary_head_is_one_linear_layer() -> None:
    model = classifier(seed=3)
    head, again = model.auxiliary_head(0), classifier(seed=3).auxiliary_head(0)
    assert [p.shape for p in head.parameters()] == [(2, 4), (2,)]
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters()))
    assert not torch.equal(
        head.get_parameter("linear.weight"), classifier().auxiliary_head(0).get_parameter("linear.weight")
    )
    with pytest.raises(SplitError, match=r"auxiliary_blocks=1, .* set it to 0"):
        model.auxiliary_head(1)


def test_split_first_order_training_is_plain_sgd_on_the_whole(make_orchestrator: Callable[..., Orchestrator]) -> None:
    model, data = classifier(optimizer=sgd(0.1)), RandomImages()
    network = small()
    network.load_state_dict({n.split(".", 1)[1]: t for n, t in state(model).items()})
    trainer = make_orchestrator(SplitFedSGD(client_optimizer=SGD(lr=0.1)), max_rounds=3)
    trainer.fit(model, data)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for step in range(3):
        batches = [data.client_batch(k, step) for k in range(3)]
        logits = network(torch.cat([batch["pixel_values"] for batch in batches]))
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.cat([batch["labels"] for batch in batches])).backward()
        optimizer.step()
    for name, tensor in state(model).items():
        torch.testing.assert_close(tensor, network.get_parameter(name.split(".", 1)[1]), msg=name)


@pytest.mark.parametrize("algorithm", [HOSFL, SplitFedSGD])
def test_norm_statistics_and_what_is_frozen_do_not_move_in_a_run(
    algorithm: Callable[..., Any], make_orchestrator: Callable[..., Orchestrator], tmp_path: Path
) -> None:
    model = of_folder(tiny_image_model("ResNet", noise=0), tmp_path / "model", frozen=["normalization"], cut=2)
    model.train()
    held = {n: t.clone() for n, t in model.state_dict().items() if "normalization" in n}
    assert any(name.endswith("running_var") for name in held)
    assert not any("normalization" in name for name in model.trained_state())
    trained = state(model)
    trainer = make_orchestrator(algorithm(client_optimizer=SGD(lr=1e-3)), max_rounds=2)
    trainer.fit(model, RandomImages(size=32, channels=3))
    assert equal({n: t for n, t in model.state_dict().items() if n in held}, held)
    assert not any(torch.equal(tensor, trained[name]) for name, tensor in state(model).items())


def test_frozen_settings_that_cannot_be_are_named() -> None:
    with pytest.raises(SplitError, match=r"frozen: 'embed' is in no parameter name of ConvNet \(0\.conv\.weight, "):
        classifier(frozen=["conv", "embed"])
    with pytest.raises(SplitError, match="frozen: it leaves the client's half of 'ConvNet' nothing to train"):
        classifier(frozen=[r"^0\."])
    with pytest.raises(SplitError, match="frozen: it leaves the server's half of 'ConvNet' nothing to train"):
        classifier(frozen=["linear"], cut=2)


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Swin"])
def test_adapters_of_a_vision_transformer_are_trained_and_exported(
    name: str, make_orchestrator: Callable[..., Orchestrator], tmp_path: Path
) -> None:
    lora = Lora(client=LoraHalf(r=2), server=LoraHalf(r=2, dropout=0.1))
    whole = tiny_image_model(name, noise=0)
    model = of_folder(whole, tmp_path / "model", num_labels=2, lora=lora, cut=2, optimizer=sgd(0.1))
    blocks = 3 if name == "Swin" else 2  # in two layers
    assert len(model.client_parameters) == 2 * 2 * blocks  # A and B of two modules
    assert all("lora_" in name or "classifier" in name for name in model.trained_state())
    with torch.no_grad():
        untrained = model(images())
    trainer = make_orchestrator()
    trainer.fit(model, RandomImages(size=32, channels=3))
    base = AutoModelForImageClassification.from_pretrained(
        tmp_path / "model", num_labels=2, ignore_mismatched_sizes=True
    )
    exported = PeftModel.from_pretrained(base, Path(trainer.log_dir) / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(exported(images()).logits, model(images()))
    assert not torch.equal(untrained, model(images()))


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_side_adapter_of_a_network_is_all_its_client_trains(
    make_orchestrator: Callable[..., Orchestrator], kernel: int
) -> None:
    """Beside backprop through the client's half: the client knows its gradient exactly."""
    side = Side(4, taps="all", server=3, kernel=kernel)
    models = [classifier(cut=2, side=side, optimizer=sgd(0.1)) for _ in range(2)]
    assert {n.split(".", 1)[1] for n in models[0].client_parameters} == {
        f"lora_side.default.{n}.weight" for n in ("down", "up")
    }
    assert len(models[0].client_parameters) == 2 * 2
    before = state(models[0])
    local = HOSFL(estimator="local", compression=Uncompressed(), client_optimizer=SGD(lr=0.1))
    for model, algorithm in zip(models, (local, SplitFedSGD(client_optimizer=SGD(lr=0.1)))):
        make_orchestrator(algorithm, max_rounds=3).fit(model, RandomImages())
    for name, tensor in state(models[0]).items():
        assert not torch.equal(tensor, before[name]), name
        torch.testing.assert_close(tensor, state(models[1])[name], msg=name)


def test_a_side_adapter_of_a_pretrained_network_leaves_its_norms(
    make_orchestrator: Callable[..., Orchestrator], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"frozen": ["normalization"], "cut": 2, "optimizer": sgd(1e-3)}
    model = of_folder(tiny_image_model("ResNet", noise=0), tmp_path / "model", side=Side(4), **settings)
    model.train()
    assert list(model.client_parameters) == [
        f"resnet.encoder.stages.0.lora_side.default.{n}.weight" for n in ("down", "up")
    ]
    held = {n: t.clone() for n, t in model.state_dict().items() if n not in model.trained_state()}
    assert any(name.endswith("running_var") for name in held)
    trainer = make_orchestrator(HOSFL(estimator="local", probes=8, client_optimizer=SGD(lr=1e-2)))
    trainer.fit(model, RandomImages(size=32, channels=3))
    assert equal({n: t for n, t in model.state_dict().items() if n in held}, held)
    assert all(p.any() for p in model.client_parameters.values())


def test_a_side_adapter_of_a_vision_transformer_is_exported_with_lora(tmp_path: Path) -> None:
    lora = Lora(client=None, server=LoraHalf(r=2))
    model = of_folder(tiny_image_model("ViT"), tmp_path / "model", lora=lora, cut=2, side=Side(4, server=3))
    with torch.no_grad():
        untrained = model(images())
        for tensor in model.trained_state().values():
            tensor.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    model.export(str(tmp_path / "adapter"))
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path / "adapter")(images()).logits, model(images()))
        assert not torch.equal(untrained, model(images()))


def test_adapters_need_a_transformer() -> None:
    with pytest.raises(SplitError, match=r"lora: ConvNet is no vision transformer; set lora to null, and frozen"):
        classifier(lora=Lora())


def test_it_objects_to_smashed_data_of_another_cut() -> None:
    model = classifier()

    def objection(labels: Any = (0, 1), positions: int = 64, width: int = 4, valid: int = 64) -> str | None:
        mask = torch.arange(positions).expand(2, -1) < valid
        return model.objection(SmashedData.pack(0, 0, torch.zeros(2, positions, width), torch.tensor(labels), mask))

    assert objection() is None
    assert objection((0, 2)) == "its label 2 is not in 0..1"
    assert objection(width=5) == "its smashed data have 5 columns, the cut has 4"
    for bad in (objection(positions=63), objection(positions=65, valid=65), objection(valid=63)):
        assert bad == "its smashed data do not have 64 positions an image, as the cut has"
    assert objection(torch.zeros(2, 64).long().tolist()) == "it sent one label a token, a classifier has one a sequence"


def test_data_that_do_not_fit_are_refused_with_the_setting(make_orchestrator: Callable[..., Orchestrator]) -> None:
    trainer = make_orchestrator()
    with pytest.raises(ValueError, match=r"\(4, 1, 16, 16\), but the model takes \(B, 1, 8, 8\); set image_size"):
        trainer.fit(classifier(), RandomImages(size=16))
    with pytest.raises(ValueError, match=r"data of client 'client_0': label 2 is not in 0\.\.1; set model.*num_labels"):
        trainer.fit(classifier(), RandomImages(classes=3))
    with pytest.raises(ValueError, match=r"'a': an example has no pixel_values; for images subclass .*ImageData"):
        classifier().check_examples([Example([1, 2], 0)], "client 'a'")


def test_data_of_ones_own_are_told_of_image_data(make_orchestrator: Callable[..., Orchestrator]) -> None:
    class Without(FederatedDataModule):
        pass

    class OfText(RandomImages):
        collate = FederatedDataModule.collate

    trainer = make_orchestrator()
    for data in (Without(batch_size=2), OfText()):
        with pytest.raises(ValueError, match=r"for images subclass hosfl_lightning.data.ImageData, whose read returns"):
            trainer.fit(classifier(), data)


def test_a_batch_gets_a_mask_over_all_positions() -> None:
    batch = classifier().prepare({"pixel_values": torch.zeros(3, 1, 8, 8), "labels": torch.zeros(3).long()})
    assert torch.equal(batch["attention_mask"], torch.ones(3, 64, dtype=torch.long))


def test_a_network_with_another_number_of_classes_is_refused() -> None:
    with pytest.raises(SplitError, match=r"num_labels=3: 'ConvNet' gives 2 logits"):
        classifier(num_labels=3)


def test_mobilenet_trains_between_its_blocks(make_orchestrator: Callable[..., Orchestrator]) -> None:
    if not MOBILENET.is_dir():
        pytest.skip(f"no pretrained MobileNetV2 at {MOBILENET}")
    model = SplitImageClassifier(
        4, 2, 32, pretrained=str(MOBILENET), frozen=["normalization"], optimizer=partial(torch.optim.SGD, lr=0.01)
    )
    whole: nn.Module = model.whole
    with torch.no_grad():
        assert torch.equal(model(images()), whole(images()).logits)
    held = {n: b.clone() for n, b in whole.named_buffers()}
    trainer = make_orchestrator(SplitFedSGD(client_optimizer=SGD(lr=1e-3)), max_rounds=3)
    trainer.fit(model, RandomImages(size=32, channels=3))
    assert trainer.summary["metrics_last"]["val/loss"] < trainer.summary["metrics_first"]["val/loss"]
    assert all(torch.equal(b, held[n]) for n, b in whole.named_buffers())


class TestWeights:
    """A network that starts from a file."""

    @staticmethod
    def file(folder: Path, **changed: Tensor | None) -> str:
        torch.manual_seed(5)
        tensors = {name: one.contiguous() for name, one in small().state_dict().items()} | changed
        save_file({name: one for name, one in tensors.items() if one is not None}, folder / "w.safetensors")
        return str(folder / "w.safetensors")

    def test_the_split_network_is_that_of_the_file_whatever_the_seed(self, tmp_path: Path) -> None:
        path = self.file(tmp_path)
        whole = small()
        whole.load_state_dict(load_file(path))
        for seed in (0, 1):
            assert torch.equal(classifier(weights=path, seed=seed)(grey(3)), whole(grey(3)))
        other = classifier(seed=1)(grey(3))
        assert not torch.equal(other, whole(grey(3)))

    def test_a_client_alone_starts_from_it_too(self, tmp_path: Path) -> None:
        path = self.file(tmp_path)
        alone, both = classifier(weights=path, part="client", seed=1), classifier(weights=path)
        for (name, one), (_, other) in zip(
            alone.client_half.named_parameters(), both.client_half.named_parameters(), strict=True
        ):
            assert torch.equal(one, other), name

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"1.conv.weight": None}, r"w\.safetensors lacks 1\.conv\.weight: it is of another network than ConvNet"),
            ({"more": torch.zeros(1)}, r"w\.safetensors has more, which the network has not"),
            (
                {"0.conv.weight": torch.zeros(4, 1, 5, 5)},
                r"has 0\.conv\.weight of shape \(4, 1, 5, 5\), the network \(4",
            ),
        ],
    )
    def test_other_names_or_shapes_are_refused_by_name(
        self, changed: dict[str, Tensor | None], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(PretrainedError, match=message):
            classifier(weights=self.file(tmp_path, **changed))

    def test_what_is_no_such_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "w.bin").write_bytes(b"\x80\x02pickle, not read")
        for path, message in (("w.bin", "is no safetensors file"), ("none", "is no file; give a safetensors file")):
            with pytest.raises(PretrainedError, match=message):
                classifier(weights=str(tmp_path / path))
        with pytest.raises(PretrainedError, match=r"model\.init_args\.weights: they are a network's; give network"):
            classifier(network=None, pretrained=str(tmp_path), weights=str(tmp_path / "w.bin"))
