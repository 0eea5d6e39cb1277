"""Few, well-placed parameters of a client half: in d_c of 10² to 10³ dimensions P scalars are a real estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from peft import IA3Config, inject_adapter_in_model
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS
from torch import nn
from transformers.pytorch_utils import Conv1D

from hosfl_lightning.split.adapters import Lora
from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.side import ADAPTER, Side, of_side

ClientParameters = Literal["norm", "bias", "first_layer", "ia3"]
#: By what PEFT names them, words whose parameters are added to a model; the others are the model's own.
ADDED: dict[str, str] = {"ia3": "ia3_l"}
#: Where PEFT has no table for a model: keys, values, and the last linear module of a feedforward.
UNKNOWN = ["k_proj", "v_proj", "key", "value", "fc2", "down_proj", "output.dense"]
LAST = ["fc2", "down_proj", "output.dense"]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def choose(half: Any, word: ClientParameters | None, lora: Lora | None, side: Side | None) -> None:
    """Settle, in place, which parameters of a client half ask for a gradient.

    Args:
        half: with its LoRA and side adapter, in eval mode; modules that it shares with the whole are changed there too.
        word: ``norm``, ``bias``, ``first_layer``: the half's own, trained where they are and in its dtype. ``ia3``:
            PEFT's (IA)³, fp32, 1 at the start, so that z stays the same bit for bit. None: no others than of the
            adapters; without any, every weight.
        lora: of both halves; with it all that is no adapter is frozen already.
        side: the side adapter.

    Raises:
        SplitError: there is no such word, the half has no such parameters, or it has LoRA as well as (IA)³.
    """
    if lora is None and (word or (side is not None and side.client)):
        for name, parameter in half.named_parameters():
            parameter.requires_grad_(of_side(name))
    if word is None:
        return
    known = ", ".join(get_args(ClientParameters))
    if word not in get_args(ClientParameters):
        raise SplitError(f"model.init_args.client_parameters={word!r}: one of {known}, or null.")
    if word == "ia3":
        if lora is not None and lora.client is not None:
            raise SplitError("model.init_args.client_parameters: ia3 stands in place of LoRA; set lora.client to null.")
        add_ia3(half)
    names = set(select(half, word))
    if not names:
        raise SplitError(
            f"model.init_args.client_parameters: the client's half of {half.architecture} has no {word}; take another "
            f"of {known}, or move the cut."
        )
    for name, parameter in half.named_parameters():
        if name in names:
            parameter.requires_grad_(True)


def select(module: nn.Module, word: str) -> list[str]:
    """Names of the parameters that a word means in any module, in order; empty: it has none, or that is no word.

    A norm is a module of a class that has ``norm`` in its name, the first layer the first convolution to be registered.
    """
    if word == "norm":
        return [
            f"{name}.{own}" if name else own
            for name, part in module.named_modules()
            if "norm" in type(part).__name__.lower()
            for own, _ in part.named_parameters(recurse=False)
        ]
    names = [name for name, _ in module.named_parameters()]
    if word == "bias":
        return [name for name in names if name.rpartition(".")[2].endswith("bias")]
    if word == "first_layer":
        found = (name for name, part in module.named_modules() if isinstance(part, Convolution) and not of_side(name))
        first = next(found, None)
        return [] if first is None else [name for name in names if name.rpartition(".")[0] == first]
    return [name for name in names if word in ADDED and ADDED[word] in name.split(".")]


def add_ia3(half: Any) -> None:
    """(IA)³ on the layers of a client half, in place: ``l ⊙ (W x)`` on keys and values, ``W (l ⊙ x)`` on feedforwards.

    Which linear modules these are PEFT's tables say, by the kind of model; of a convolution every output channel gets
    a factor. Liu et al., arXiv:2205.05638.
    """
    kind = getattr(getattr(half, "config", None), "model_type", "")
    targets, feedforward = TARGETS.get(kind, UNKNOWN), FEEDFORWARD.get(kind, LAST)
    for layer in half.layers.values():
        found = [name for name, part in layer.named_modules() if _takes_ia3(name, part, targets)]
        if found:
            config = IA3Config(
                target_modules=found,
                feedforward_modules=[name for name in found if _ends(name, feedforward)],
                fan_in_fan_out=any(isinstance(part, Conv1D) for part in layer.modules()),
            )
            inject_adapter_in_model(config, layer, ADAPTER)
            layer.eval()
            for name in found:
                _answer_as(layer.get_submodule(name))


def _answer_as(wrapper: Any) -> None:
    """What a model may ask of the module within, such as MobileNetV2 of the stride, PEFT's wrapper says too."""
    known = {name: value for name, value in vars(wrapper.base_layer).items() if not name.startswith("_")}
    wrapper.__dict__.update({name: value for name, value in known.items() if not hasattr(wrapper, name)})


def _takes_ia3(name: str, part: nn.Module, targets: Sequence[str]) -> bool:
    linear = isinstance(part, nn.Linear | Conv1D) and _ends(name, targets)
    return bool(name) and not of_side(name) and (linear or isinstance(part, Convolution))


def _ends(name: str, targets: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)


def in_place(parameters: Mapping[str, nn.Parameter], word: ClientParameters | None) -> dict[str, nn.Parameter]:
    """Of what a client trains, by name, the model's own that ``word`` named: what no adapter holds."""
    return {} if word in (None, *ADDED) else {n: p for n, p in parameters.items() if not _of_adapter(n)}


def _of_adapter(name: str) -> bool:
    return of_side(name) or any(part.startswith("lora_") for part in name.split("."))
