"""A device answers as a client in PyTorch with the same data does, and refuses what it cannot do by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric

from hosfl_client import messages as device
from hosfl_client.endpoint import Endpoint
from hosfl_client.examples import DataSettings, read_examples
from hosfl_client.minibatches import Minibatches
from hosfl_client.refusals import EndpointError, TermsError
from hosfl_client.secure.fixed_point import encode as encode_fixed
from hosfl_client.secure.participants import Participants
from hosfl_client.text import Text
from hosfl_lightning import HOSFL, SplitCausalLM
from hosfl_lightning.algorithms import Frozen
from hosfl_lightning.clients import Endpoint as TorchEndpoint
from hosfl_lightning.clients import Minibatches as TorchMinibatches
from hosfl_lightning.data import TextData
from hosfl_lightning.device.data import data_of
from hosfl_lightning.optim import SGD, Uncompressed
from hosfl_lightning.split import Lora, LoraHalf, Side
from hosfl_lightning.wire import (
    Codecs,
    MiddleOutput,
    Multiplier,
    ProbeRequest,
    StepRequest,
    Terms,
    Update,
    decode,
    encode,
)
from tests.client.torch_half import TorchHalf
from tests.fleet.pipe_client import adamw, model_of
from tests.fleet.test_pipe import CASES, common
from tests.secure.sums import Sum

BOTH = Lora(client=LoraHalf(r=2, target_modules=["q_proj"]), server=LoraHalf(r=4, target_modules="all-linear"))
STAY: dict[str, Any] = {"labels": "client", "head": 2}
METHODS: dict[str, Any] = {
    **{name: (case.algorithm, case.recipe, case.settings.get("codec", Codecs())) for name, case in CASES.items()},
    "side and LoRA": (lambda: HOSFL(probes=5, estimator="local", **common(SGD(lr=0.1))), {"both": True}, Codecs()),
    "labels stay, side": (
        lambda: HOSFL(estimator="local", compression=Uncompressed(), **common()), {**STAY, "side": True}, Codecs()
    ),
    "labels stay, own directions": (lambda: HOSFL(3, directions="client", **common()), STAY, Codecs()),
    "labels stay, frozen": (lambda: Frozen(**common()), STAY, Codecs("bf16", "fp16")),
    "labels stay, head alone": (lambda: HOSFL(2, **common()), {**STAY, "alone": True}, Codecs()),
    "own projections": (
        lambda: HOSFL(probes=5, estimator="local", directions="client", taps="keep", **common()), {"both": True},
        Codecs(),
    ),
    "projections": (lambda: HOSFL(probes=4, estimator="local", **common()), {"side": True}, Codecs("bf16", "fp16")),
}  # fmt: skip
DEVICES = [
    "hosfl", "hosfl central", "own directions", "side adapter", "coordinates", "side and LoRA", "projections",
    "own projections", "hosl", "zosfl", "frozen", "mixed", "mixed, side",
]  # fmt: skip


class Pair:
    """Two clients of one run, with one file: in PyTorch, and on a device."""

    def __init__(self, name: str, pretrained: str, folder: Path) -> None:
        method, recipe, codecs = METHODS[name]
        if "both" in recipe:
            model = SplitCausalLM(pretrained, cut=2, lora=BOTH, side=Side(client=4), optimizer=adamw)
        elif "alone" in recipe:
            lora = Lora(client=None, server=LoraHalf(r=4, target_modules="all-linear"), head=2)
            model = SplitCausalLM(pretrained, cut=2, lora=lora, optimizer=adamw, labels="client")
        else:
            model = model_of(pretrained, **recipe)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in model.client_parameters.values():  # at the start some gradients are zero
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.eval()
        arguments = {"files": str(folder / "mine.txt"), "num_clients": 1, "batch_size": 3, "sequence_length": 12}
        data = TextData(**arguments, validation_files=arguments["files"], tokenizer=model.tokenizer())
        data.setup("fit")
        terms = replace(method().terms(model, 7, codecs, 3), client=2, backbone=model.client_fingerprint())
        self.terms: Terms = decode(encode(terms), "terms")  # type: ignore[assignment]
        self.torch = TorchEndpoint.of(
            model, TorchMinibatches(data, model, 0), self.terms, Fabric(accelerator="cpu", devices=1)
        )
        self.torch.checks = False
        self.half = TorchHalf(model)
        self.settings = DataSettings.of(data_of({"class_path": "hosfl_lightning.data.TextData",
                                                 "init_args": arguments}, model))  # fmt: skip
        (folder / "tokenizer.json").write_text(model.tokenizer().backend_tokenizer.to_str())
        examples = read_examples(arguments["files"], self.settings, Text(folder / "tokenizer.json"))
        self.batches = Minibatches(examples, self.settings)
        self.device = self.another()

    def another(self, **changes: Any) -> Endpoint:
        return Endpoint(self.half, self.half.manifest, self.batches, replace(self.terms, **changes))

    def ask(self, request: Any) -> tuple[Any, Any]:
        """Both answers, in torch's tensors; the device's through its frames."""
        frame = encode(request)
        [theirs] = self.torch.handle([decode(frame)])
        [mine] = self.device.handle([device.decode(frame)])
        return theirs, decode(device.encode(mine))

    def tell(self, message: Any) -> None:
        self.torch.handle([message])
        self.device.handle([device.decode(encode(message))])

    def move(self, round: int, coefficients: torch.Tensor, basis: dict[str, Any]) -> None:
        self.tell(Update(round, basis, coefficients, self.terms.rule, round + 1, [2], [1.0], 1e-3))


@pytest.fixture
def pair(tiny_folder: Path, tmp_path: Path) -> Callable[[str], Pair]:
    (tmp_path / "mine.txt").write_text("the quick brown fox jumps over the lazy dog; " * 6)
    return lambda name: Pair(name, str(tiny_folder), tmp_path)


def close(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-3) -> None:
    scale = float(theirs.abs().max()) or 1.0
    assert float((mine - theirs).abs().max()) <= tolerance * scale


def values(message: Any) -> torch.Tensor:
    return message.unpack() if message.kind == "coded_gradient" else message.coefficients


@pytest.mark.parametrize("name", DEVICES)
def test_it_answers_as_a_client_in_pytorch_does(name: str, pair: Any) -> None:
    both = pair(name)
    codecs = both.terms.codecs
    for round in range(2):
        theirs, mine = both.ask(StepRequest(round, 2, attempt=round))
        assert torch.equal(mine.labels, theirs.labels) and torch.equal(mine.mask, theirs.mask)
        assert (mine.labels_per_token, mine.attempt, mine.step) == (True, round, 0)
        z, theirs_z = mine.unpack()[0], theirs.unpack()[0]
        close(
            z,
            theirs_z,
            0.03 if codecs["smashed_data"] == "int8" else 0.01 if codecs["smashed_data"] == "bf16" else 1e-5,
        )
        if both.terms.endpoint == "ProbedEndpoint":
            mask = mine.mask
            for probe, side in ((0, 0), (1, 1)):
                theirs, mine = both.ask(ProbeRequest(round, 2, probe, side, attempt=round))
                close(mine.unpack(mask), theirs.unpack(mask), 1e-5)
            answer = torch.tensor([0.5, -1.0])
        elif name == "mixed":
            assert both.device.kind == "frozen" and both.device.visit is None  # and moves with the others
        elif name == "frozen":
            both.move(round, torch.ones(2), {"kind": "shared_directions", "probes": 2, "distribution": "rademacher"})
            assert both.device.version == both.torch.version == 0
            assert both.device.digest() == both.torch.digest()
            continue
        else:
            multiplier = torch.randn(theirs_z.shape, generator=torch.Generator().manual_seed(round))
            theirs, mine = both.ask(
                Multiplier.pack(round, 2, multiplier, theirs.mask, codecs["multiplier"], 7, attempt=round)
            )
            assert (mine.kind, mine.basis, mine.num_terms) == (theirs.kind, theirs.basis, theirs.num_terms)
            # int4 rounds at random, in the same places
            close(values(mine), values(theirs), 0.2 if codecs["gradient"] == "int4" else 2e-3)
            answer = values(theirs)
        basis = getattr(theirs, "basis", both.terms.basis)
        if "mixed" in name:  # all kinds apply what the server makes of their answers
            answer, basis = torch.linspace(-1, 1, sum(both.device.optimizer.sizes)), {"kind": "dense"}
        both.move(round, answer, basis)
        assert both.device.version == both.torch.version == round + 1
        assert both.device.digest() == both.torch.digest()


STAYS = [name for name in METHODS if name.startswith("labels stay")]


@pytest.mark.parametrize("name", STAYS)
def test_it_keeps_its_labels_as_a_client_in_pytorch_does(name: str, pair: Any) -> None:
    """Loss and λ₂ of the same z₂, the answer with the gradient of its head, and the same bits after an update."""
    both = pair(name)
    codecs, drawn = both.terms.codecs, torch.Generator().manual_seed(0)
    for round in range(2):
        theirs, mine = both.ask(StepRequest(round, 2, attempt=round))
        assert mine.kind == theirs.kind == "unlabelled_data" and mine.num_terms == theirs.num_terms > 0
        mask = theirs.mask
        z = torch.randn(*mask.shape, 32, generator=drawn)
        down = MiddleOutput.pack(round, 2, z, mask, codec=codecs["smashed_data"], seed=7, attempt=round)
        theirs, mine = both.ask(down)
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        close(mine.unpack(mask), theirs.unpack(mask), 0.2 if codecs["multiplier"] == "int4" else 2e-3)
        multiplier = torch.randn(z.shape, generator=drawn)
        theirs, mine = both.ask(Multiplier.pack(round, 2, multiplier, mask, codecs["multiplier"], 7, attempt=round))
        assert mine.basis == theirs.basis and mine.coefficients.shape == theirs.coefficients.shape
        head = 2 * (32 + 260)
        if len(theirs.coefficients) > head:
            close(mine.coefficients[:-head], theirs.coefficients[:-head], 2e-3)
        close(mine.coefficients[-head:], theirs.coefficients[-head:], 1e-4)
        assert theirs.coefficients[-head:].any()
        both.move(round, theirs.coefficients, theirs.basis)
        assert both.device.version == both.torch.version == round + 1
        assert both.device.digest() == both.torch.digest()


def test_labels_stay_in_the_order_of_the_round(pair: Any) -> None:
    both = pair("labels stay")
    z, mask = torch.zeros(3, 12, 32), torch.ones(3, 12, dtype=torch.bool)
    down = device.decode(encode(MiddleOutput.pack(0, 2, z, mask)))
    for endpoint in (both.device, both.torch):
        with pytest.raises(EndpointError, match="middle's output, and waits for none"):
            endpoint.handle([down if endpoint is both.device else MiddleOutput.pack(0, 2, z, mask)])
    both.ask(StepRequest(0, 2))
    frame = encode(Multiplier.pack(0, 2, z, mask))
    for endpoint, read in ((both.device, device.decode), (both.torch, decode)):
        with pytest.raises(EndpointError, match="a multiplier before the middle's output"):
            endpoint.handle([read(frame)])
    with pytest.raises(TermsError, match="the run keeps labels at the server, and this half was exported"):
        both.another(settings={**both.terms.settings, "labels": "server"})


def test_what_waits_for_the_multiplier(pair: Any) -> None:
    """z where the answer needs it, and what was sent where it does not."""
    forward, central, local = (pair(name) for name in ("hosfl", "hosfl central", "side adapter"))
    for one, held in ((forward, True), (central, False), (local, False)):
        one.ask(StepRequest(0, 2))
        assert (one.device.visit.z is not None) is held
        one.device.forget()
        assert one.device.visit is None


def test_what_does_not_follow(pair: Any) -> None:
    both = pair("hosfl")
    multiplier = Multiplier.pack(0, 2, torch.zeros(3, 12, 32), torch.ones(3, 12, dtype=torch.bool))
    frame = device.decode(encode(multiplier))
    with pytest.raises(EndpointError, match="waits for none"):
        both.device.handle([frame])
    both.ask(StepRequest(0, 2))
    with pytest.raises(EndpointError, match="does not take a probe_request"):
        both.device.handle([device.decode(encode(ProbeRequest(0, 2, 0, 0)))])
    both.device.handle([device.decode(encode(StepRequest(1, 2)))])
    with pytest.raises(EndpointError, match="waits for none"):
        both.device.handle([frame])  # of the round before
    both.device.handle([device.decode(encode(StepRequest(1, 2)))])
    narrow = Multiplier.pack(1, 2, torch.zeros(3, 12, 8), torch.ones(3, 12, dtype=torch.bool))
    with pytest.raises(EndpointError, match="z another"):
        both.device.handle([device.decode(encode(narrow))])
    both.device.handle([device.decode(encode(StepRequest(1, 2)))])
    coarse = Multiplier.pack(1, 2, torch.zeros(3, 12, 32).bfloat16(), torch.ones(3, 12, dtype=torch.bool))
    with pytest.raises(EndpointError, match="λ is bfloat16, z was float32"):
        both.device.handle([device.decode(encode(coarse))])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rules": "hosfl-rules/0"}, "install the hosfl-client of the server's version"),
        ({"endpoint": "LocalSplitEndpoint"}, "no engine; take HOSFL or HOSL"),
        ({"settings": {"kind": "first_order"}}, "backpropagates; take HOSFL with estimator"),
        ({"settings": {"kind": "forward_only", "estimator": "jvp"}}, "estimator to forward or central"),
        ({"settings": {"kind": "local"}}, "exported without one"),
        ({"manifest": []}, "trains other tensors than the run, the first is .* here, nothing there"),
        ({"backbone": "other"}, "frozen weights are not those of the run"),
        ({"precision": "bf16-mixed"}, "set trainer.precision: 32-true"),
        ({"codecs": {"smashed_data": "own"}}, "the codec 'own', this client only fp32, bf16"),
        ({"codecs": {"smashed_data": "ternary", "gradient": "ternary"}}, "for its smashed_data the codec 'ternary'"),
        ({"rule": {"name": "Lion"}}, "is 'Lion', a client without PyTorch knows SGD, AdamW"),
        ({"settings": {"kind": "forward_only", "estimator": "forward"}}, "do not say what this client needs .*'mu'"),
        ({"settings": {"kind": "forward_only", "estimator": "forward", "mu": 0.0, "distribution": "rademacher"}},
         "mu is 0.0, and probes need one > 0"),
        ({"codecs": {"smashed_data": "fp32"}}, "do not say what this client needs .*'gradient'"),
        ({"basis": {"kind": "unit_sphere"}}, "no basis is described by"),
        ({"basis": {"kind": "dense"}}, "probed along shared directions; set .*compression: null"),
    ],
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], said: str, pair: Any) -> None:
    with pytest.raises(TermsError, match=said):
        pair("hosfl").another(**changes)


def test_a_state_comes_back(pair: Any) -> None:
    both = pair("hosfl")
    both.move(0, torch.tensor([1.0, -0.5, 0.2]), both.terms.basis)
    state = {name: array.copy() for name, array in both.device.shared_state().items()}
    digest, theta = both.device.digest(), state["0.theta"].copy()
    both.move(1, torch.tensor([1.0, -0.5, 0.2]), both.terms.basis)
    assert both.device.digest() != digest and not np.array_equal(both.half.parameters().popitem()[1], theta)
    both.device.load_shared(state, 1)
    assert (both.device.digest(), both.device.version) == (digest, 1)
    first = next(iter(both.half.parameters().values()))
    assert np.array_equal(first, theta)  # what the half reads


def test_its_answer_and_that_of_a_client_in_pytorch_are_summed_under_masks(pair: Any, tiny_folder: Path) -> None:
    """Bit for bit the sum of what each of the two would send in the open, and of a third."""
    open_, both = pair("hosfl"), pair("hosfl")
    secure = replace(both.terms, secure_aggregation=True)
    both.device = both.another(secure_aggregation=True)
    both.torch = TorchEndpoint.of(both.torch.model, both.torch.data, secure, both.torch.fabric)
    both.torch.checks = False
    plain, sides = {}, {1: both.torch, 2: both.device}
    for one in (open_, both):
        one.torch.handle([StepRequest(0, 1)])
        one.device.handle([StepRequest(0, 2)])
    multiplier = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 12, dtype=torch.bool)
    for k, side in ((1, open_.torch), (2, open_.device)):
        [plain[k]] = asked(side, Multiplier.pack(0, k, multiplier, mask))
    plain[3] = replace(plain[1], client=3, coefficients=torch.ones(3))
    total = Sum(plain, clients=Both(sides, multiplier, mask)).run()
    wanted = [encode_fixed(one.coefficients.numpy(), one.num_terms) for one in plain.values()]
    assert np.array_equal(total, np.add.reduce(np.stack(wanted)))
    assert not torch.equal(plain[1].coefficients, plain[3].coefficients)


def asked(side: Any, request: Any) -> Any:
    """The answers of either engine, in torch's tensors."""
    if isinstance(side, TorchEndpoint):
        return side.handle([decode(encode(request))])
    return [decode(device.encode(one)) for one in side.handle([device.decode(encode(request))])]


class Both(Participants):
    """Two endpoints behind their messages, and a third client without one."""

    def __init__(self, sides: dict[int, Any], multiplier: torch.Tensor, mask: torch.Tensor) -> None:
        super().__init__(lambda array: array)
        self.sides, self.multiplier, self.mask = sides, multiplier, mask

    def keep(self, answer: Any) -> Any:
        if answer.client not in self.sides:
            return super().keep(answer)
        request = Multiplier.pack(0, answer.client, self.multiplier, self.mask)
        [keys] = asked(self.sides[answer.client], request)
        assert keys.kind == "secure_keys" and keys.num_terms == answer.num_terms
        return keys

    def respond(self, request: Any) -> Any:
        if request.client not in self.sides:
            return super().respond(request)
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in vars(request).items()
                   if isinstance(value, np.ndarray)}  # fmt: skip
        [answer] = asked(self.sides[request.client], replace(request, **tensors))
        return answer
