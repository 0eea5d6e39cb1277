"""A device builds its own half of a model and nothing of the other one."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM, SplitImageClassifier, SplitSequenceClassifier
from hosfl_lightning.clients import Endpoint, Minibatches, SplitEndpoint
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.data.tokenization import Example
from hosfl_lightning.models import PretrainedError, SplitModule, halves
from hosfl_lightning.networks import ConvNet
from hosfl_lightning.split import Lora, LoraHalf, Side, SplitError, run
from hosfl_lightning.wire import Codecs, Multiplier, StepRequest, encode, manifest
from tests.models.image_runs import saved
from tests.random_tokens import RandomTokens
from tests.recipe_runs import tiny_pretrained
from tests.split.test_build import tensors_read
from tests.split.tiny_images import CLASSES, images, tiny_image_model

LAYERS, CUT = 4, 2
ADDED = re.compile(r"\.(lora_|ia3_)")
ALL = LoraHalf(r=2, target_modules="all-linear")
#: Whether the head is the embedding.
FAMILIES = {
    "llama": False, "gpt2": True, "opt": True, "gemma3_text": True, "bloom": True, "mixtral": False, "bert": False,
    "modernbert": False, "deberta-v2": False,
}  # fmt: skip
CLASSIFIERS = ("bert", "modernbert", "deberta-v2")
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora": Lora(ALL, LoraHalf(r=3, dropout=0.1, target_modules="all-linear"))},
    "side": {"side": Side(client=4, server=3), "lora": Lora(None, ALL)},
    "side and lora": {"side": Side(client=4, taps="all", server=3), "lora": Lora(ALL, ALL)},
    "nothing at the client": {"lora": Lora(None, ALL)},
    "side at the server": {"side": Side(client=0, server=3), "lora": Lora(ALL, ALL)},
    "norm": {"client_parameters": "norm", "lora": Lora(None, ALL)},
    "ia3": {"client_parameters": "ia3", "lora": Lora(None, ALL)},
    "norm, lora and side": {"client_parameters": "norm", "side": Side(client=4), "lora": Lora(ALL, ALL)},
    "norm alone": {"client_parameters": "norm", "lora": None},
    "ia3 and side alone": {"client_parameters": "ia3", "side": Side(client=4), "lora": None},
    "all weights": {"lora": None},
    "side alone": {"side": Side(client=4, server=3), "lora": None},
    "all weights, side at the server": {"side": Side(client=0, server=3), "lora": None},
}
CASES = [
    (family, adapters)
    for family, tied in FAMILIES.items()
    for adapters, given in ADAPTERS.items()
    if (given["lora"] is not None or not tied) and (family == "llama" or adapters in list(ADAPTERS)[:3])
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a model of a family is saved."""
    root = tmp_path_factory.mktemp("saved")
    return lambda family: tiny_pretrained(root / family, family, LAYERS, classifier=family in CLASSIFIERS)


def build(folder: Path, part: str, **kwargs: Any) -> SplitModule:
    settings: dict[str, Any] = {"pretrained": str(folder), "cut": CUT, "part": part, "seed": 5} | kwargs
    if folder.name in CLASSIFIERS:
        return SplitSequenceClassifier(num_labels=3, **settings).eval()
    return SplitCausalLM(**settings).eval()


def batch() -> dict[str, Tensor]:
    tokens, mask = torch.arange(3, 21).view(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = mask[2, :2] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


def tensors(half: nn.Module) -> dict[str, Tensor]:
    return {**dict(half.named_parameters()), **dict(half.named_buffers())}


@torch.no_grad()
def smashed(model: SplitModule, given: dict[str, Tensor]) -> Tensor:
    """z once the adapters have moved, or they would not be seen."""
    generator = torch.Generator().manual_seed(0)
    for p in model.client_parameters.values():
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return run(model.client_half, model.prepare(given))


def assert_same_client(alone: SplitModule, both: SplitModule, given: dict[str, Tensor] | None = None) -> None:
    """The names, bits and gradients of all that a client holds, and its z."""
    assert manifest(alone.client_parameters) == manifest(both.client_parameters)
    mine, theirs = tensors(alone.client_half), tensors(both.client_half)
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.requires_grad == theirs[name].requires_grad, name
        assert tensor.device.type == "cpu"
    assert not any(module.training for module in alone.client_half.modules())
    assert alone.client_fingerprint() == both.client_fingerprint()
    given = given or batch()
    assert torch.equal(smashed(alone, given), smashed(both, given))


@pytest.mark.parametrize(("family", "adapters"), CASES)
def test_a_client_alone_is_the_client_of_the_whole(
    family: str, adapters: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, saved = ADAPTERS[adapters], folder(family)
    both = build(saved, "both", **settings)
    state = torch.get_rng_state()
    with tensors_read(monkeypatch) as read:
        alone = build(saved, "client", **settings)
    assert torch.equal(torch.get_rng_state(), state)
    of_server = re.compile(r"(layers|layer|h)\.[23]\.")
    assert read and not any(of_server.search(name) for name in read)
    if family != "mixtral":  # whose experts are fused as they are read
        assert len(read) == len([n for n, _ in alone.client_half.named_parameters() if not ADDED.search(n)])
    assert {id(p) for p in alone.parameters()} == {id(p) for p in alone.client_half.parameters()}
    assert set(alone.trained_state()) == {f"client_half.{name}" for name in both.client_parameters}
    assert_same_client(alone, both)


def test_the_start_is_drawn_under_the_seed(folder: Callable[[str], Path]) -> None:
    starts = []
    for seed in (5, 6):
        model = build(folder("llama"), "client", seed=seed, **ADAPTERS["side and lora"])
        starts.append({n: p for n, p in model.client_parameters.items() if "lora_B" not in n and ".up." not in n})
    assert not any(torch.equal(one, starts[1][name]) for name, one in starts[0].items())


@pytest.mark.parametrize("adapters", ["lora", "side and lora", "norm", "ia3", "all weights"])
def test_in_bf16(adapters: str, folder: Callable[[str], Path]) -> None:
    both, alone = (build(folder("llama"), part, dtype="bfloat16", **ADAPTERS[adapters]) for part in ("both", "client"))
    assert_same_client(alone, both)
    assert alone.client_fingerprint() == build(folder("llama"), "client", **ADAPTERS[adapters]).client_fingerprint()


def of_client(name: str, client: set[str]) -> bool:
    return any(name == own or own.endswith(f".{name}") for own in client)


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "modernbert", "deberta-v2"])
def test_the_servers_tensors_are_not_read(
    family: str, removed: bool, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = ADAPTERS["side and lora"]
    both = build(folder(family), "both", **settings)
    client = {name.replace(".base_layer", "") for name, _ in both.client_half.named_parameters()}
    file = "model.safetensors"
    held = load_file(folder(family) / file)
    kept = {n: t if of_client(n, client) else t * float("nan") for n, t in held.items()}
    kept = {n: t for n, t in kept.items() if not removed or of_client(n, client)}
    assert 0 < sum(of_client(n, client) for n in held) == len([n for n in client if "lora_" not in n]) < len(held)

    mutilated = tmp_path / family
    mutilated.mkdir()
    save_file(kept, mutilated / file, metadata={"format": "pt"})
    (mutilated / "config.json").write_bytes((folder(family) / "config.json").read_bytes())
    assert_same_client(build(mutilated, "client", **settings), both)


def test_what_changes_the_config_changes_it_for_both(folder: Callable[[str], Path]) -> None:
    both, alone = (
        build(folder("llama"), part, num_hidden_layers=3, lora=Lora(ALL, ALL)) for part in ("both", "client")
    )
    assert_same_client(alone, both)
    with pytest.raises(SplitError, match="cut=3 is out of range"):
        build(folder("llama"), "client", num_hidden_layers=3, cut=3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cut": LAYERS}, "cut=4 is out of range"),
        ({"lora": None}, "transformer.wte.weight is both the embedding"),
        ({"lora": None, "side": Side(client=4)}, "transformer.wte.weight is both the embedding"),
        (
            {"lora": Lora(LoraHalf(target_modules=["nowhere"]), ALL)},
            "client.target_modules: 'nowhere' matches no linear",
        ),
        ({"lora": Lora(LoraHalf(dropout=0.1), ALL)}, "lora.client.dropout=0.1"),
        ({"lora": Lora(ALL, ALL), "side": Side(client=4), "cut": 1}, "side.taps='below' with cut=1"),
    ],
)
def test_what_is_refused_for_both_is_refused_for_the_client(
    kwargs: dict[str, Any], message: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("both", "client"):
        with pytest.raises(SplitError, match=message):
            build(folder("gpt2"), part, **kwargs)


def test_a_model_that_is_not_there_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PretrainedError, match=r"model.init_args.pretrained: no model at .*nowhere"):
        build(tmp_path / "nowhere", "client")
    with pytest.raises(SplitError, match=r"model.init_args.part='server'"):
        build(tmp_path / "nowhere", "server")


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: m.server_half,
        lambda m: m.whole,
        lambda m: m.server_parameters,
        lambda m: m.fingerprint(),
        lambda m: m.configure_optimizers(),
        lambda m: m(**batch()),
        lambda m: m.logits(batch()),
        lambda m: m.training_step({"z": torch.zeros(1, 2, 32), **batch(), "labels": batch()["input_ids"]}, 0),
        lambda m: m.validation_step({**batch(), "labels": batch()["input_ids"]}, 0),
        lambda m: m.test_step({**batch(), "labels": batch()["input_ids"]}, 0),
        lambda m: m.predict_step(batch(), 0),
        lambda m: m.auxiliary_head(1),
        lambda m: m.export("adapter"),
        lambda m: m.dropout_active().__enter__(),
    ],
)
def test_what_needs_the_server_says_what_is_missing(ask: Callable[[Any], Any], folder: Callable[[str], Path]) -> None:
    model = build(folder("llama"), "client", lora=Lora(ALL, ALL))
    with pytest.raises(SplitError, match=r"is not here: with model.init_args.part: client a model holds"):
        ask(model)


def test_a_run_is_refused(
    folder: Callable[[str], Path], make_orchestrator: Callable[..., Orchestrator], data: FederatedDataModule
) -> None:
    with pytest.raises(SplitError, match=r"model.init_args.part: client"):
        make_orchestrator().fit(build(folder("llama"), "client", lora=Lora(ALL, ALL)), data)


def test_it_counts_prepares_tokenizes_and_keeps_what_is_trained(folder: Callable[[str], Path]) -> None:
    model, other = (build(folder("llama"), "client", lora=Lora(ALL, ALL), seed=seed) for seed in (0, 1))
    assert model.client_half.hidden_size == 32
    assert model.tokenizer() is not None
    assert model.count(batch()["input_ids"]) == 15
    assert model.prepare(batch()).keys() == batch().keys()
    smashed(model, batch())
    other.load_trained_state(model.trained_state())
    assert all(torch.equal(t, other.trained_state()[n]) for n, t in model.trained_state().items())
    with pytest.raises(SplitError, match="another model, cut or LoRA setting"):
        model.load_trained_state(build(folder("llama"), "both", lora=Lora(ALL, ALL)).trained_state())
    with pytest.raises(ValueError, match=r"token id 260, .* embeds 260 tokens"):
        model.check_examples([Example([260], [260])], "client 0")


def test_it_is_made_from_a_recipe(folder: Callable[[str], Path]) -> None:
    for kind, family, more in (("CausalLM", "llama", {}), ("SequenceClassifier", "bert", {"num_labels": 3})):
        parser = ArgumentParser()
        parser.add_subclass_arguments(SplitModule, "model")
        settings = {"pretrained": str(folder(family)), "cut": CUT, "part": "client", **more}
        recipe = {"class_path": f"hosfl_lightning.models.Split{kind}", "init_args": settings}
        model = parser.instantiate(parser.parse_object({"model": recipe})).model
        assert model.part == "client"
        assert "server_half" not in dict(model.named_children())


class Gained(SplitCausalLM):
    """Loads in a way of its own."""

    def load_whole(self, dtype: str, seed: int, **model_kwargs: Any) -> Any:
        whole = super().load_whole(dtype, seed, **model_kwargs)
        whole.model.layers[0].register_parameter("gain", nn.Parameter(torch.ones(1)))
        return whole


def test_who_loads_in_a_way_of_its_own_gets_its_own_client(folder: Callable[[str], Path]) -> None:
    both, alone = (Gained(str(folder("llama")), CUT, part=part).eval() for part in ("both", "client"))  # type: ignore[arg-type]
    assert "model.layers.0.gain" in alone.client_parameters
    assert_same_client(alone, both)


@pytest.mark.parametrize("name", ["ConvNet", "ResNet", "ViT", "Swin"])
def test_of_an_image_model_the_servers_half_is_dropped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"cut": 1, "num_labels": 2, "image_size": 8, "channels": 1}
    given = torch.linspace(-1, 1, 3 * 64).view(3, 1, 8, 8)
    if name == "ConvNet":
        settings |= {"network": partial(ConvNet, widths=(4, 8), num_labels=2), "side": None}
    else:
        settings |= {"pretrained": saved(tiny_image_model(name), tmp_path), "num_labels": CLASSES, "cut": 2}
        settings |= {"image_size": 32, "channels": 3}
        settings |= {"side": Side(client=4, taps="all", server=3)} if name != "Swin" else {}  # whose layers differ
        settings |= {"lora": Lora(ALL, ALL)} if name != "ResNet" else {}
        given = images()
    servers: list[weakref.ref[Tensor]] = []
    cut = halves._cut

    def watched(*args: Any) -> Any:
        made = cut(*args)
        servers.extend(weakref.ref(p) for p in made.server.parameters())
        return made

    with monkeypatch.context() as patch:
        patch.setattr(halves, "_cut", watched)
        alone = SplitImageClassifier(**settings, part="client")
    gc.collect()
    assert servers and not any(reference() is not None for reference in servers)
    with pytest.raises(SplitError, match=r"model.init_args.part: client"):
        alone.server_half  # noqa: B018
    assert_same_client(alone, SplitImageClassifier(**settings), {"pixel_values": given})


@pytest.mark.parametrize("adapters", ["lora", "side and lora"])
def test_an_endpoint_answers_as_that_of_the_whole(adapters: str, folder: Callable[[str], Path]) -> None:
    settings = ADAPTERS[adapters]
    estimator = "local" if "side" in settings else "forward"
    both = build(folder("llama"), "both", **settings)
    algorithm = HOSFL(estimator=estimator, probes=2)
    terms = algorithm.terms(both, 3, Codecs("int8"), clients=3)
    frames = []
    for model in (both, build(folder("llama"), "client", **settings)):
        data = RandomTokens([[9, 12, 7], [6, 10, 10, 4], [12, 11]])
        data.tokenizer = model.tokenizer()
        data.setup("fit")
        endpoint = Endpoint.of(model, Minibatches(data, model), terms, Fabric(accelerator="cpu", devices=1))
        assert isinstance(endpoint, SplitEndpoint)
        [up] = endpoint.handle([StepRequest(0, 1)])
        valid = Minibatches(data, model)([1], 0)
        rows, width, _ = valid.parts()[1]
        mask = valid.mask(rows, width)
        multiplier = torch.linspace(-1, 1, mask.numel() * 32).view(*mask.shape, 32)
        [answer] = endpoint.handle([Multiplier.pack(0, 1, multiplier, mask)])
        frames.append((encode(up), encode(answer)))
    assert frames[0] == frames[1]
