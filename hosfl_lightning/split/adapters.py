"""LoRA on both halves of a model, as one PEFT adapter."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hosfl_lightning.split.cut import check_cut, tied_head
from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.placement import Placement
from hosfl_lightning.split.side import ADAPTER, SERVER_SEED
from hosfl_lightning.split.side_lora import SideLoraConfig
from hosfl_lightning.split.structure import LayerPath, find_layers
from hosfl_lightning.split.views import has_parameters


@dataclass
class LoraHalf:
    """LoRA on one half: W + (alpha / r) B A, with A (r, in) random and B (out, r) zero at the start, both fp32.

    Attributes:
        r: rank.
        alpha: scale of the update, before it is divided by the rank.
        target_modules: ends of the names of the linear modules that get it, such as ``["q_proj", "v_proj"]``; or
            ``"all-linear"``; or a regular expression for the whole name.
        dropout: on the input of A, server only: two probes of a client would see different masks.
    """

    r: int = 8
    alpha: int = 16
    target_modules: list[str] | str = field(default_factory=lambda: ["q_proj", "v_proj"])
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r={self.r}: the rank of LoRA must be at least 1.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1.")
        if not self.target_modules:
            raise ValueError("target_modules is empty: name at least one linear module, or 'all-linear'.")

    def patterns(self) -> dict[str, str]:
        """For each target, a regular expression for the whole name of a module."""
        if isinstance(self.target_modules, str):
            return {self.target_modules: ".*" if self.target_modules == "all-linear" else self.target_modules}
        return {target: rf".*\.{re.escape(target)}" for target in self.target_modules}


@dataclass
class Lora:
    """LoRA on a split model (Hu et al., arXiv:2106.09685).

    Attributes:
        client: on the layers below the cut; ``None``: none, the client trains a side adapter alone.
        server: on the layers from the cut on.
        head: rank of one on a causal LM's head, with ``alpha`` twice that; 0: none. It is where the labels are.
    """

    client: LoraHalf | None = field(default_factory=LoraHalf)
    server: LoraHalf = field(default_factory=LoraHalf)
    head: int = 0

    def __post_init__(self) -> None:
        if self.head < 0:
            raise ValueError(f"lora.head={self.head}: a rank, or 0 for none.")


def add_lora(
    model: PreTrainedModel,
    cut: int,
    lora: Lora,
    *,
    head: bool,
    seed: int = 0,
    base_model_name_or_path: str | None = None,
    side: Placement | None = None,
) -> PeftModel:
    """Inject LoRA into both halves, in place, and freeze the rest; then split ``peft_model.get_base_model()``.

    Args:
        model: the whole, causal LM or sequence classifier.
        cut: number of layers the client holds.
        lora: targets, rank and scale of each half.
        head: train the head as well, whole, at the server (a fresh classification head needs it).
        seed: of A's random values, drawn for each half apart, so that the server starts the same whatever LoRA its
            clients have; the global random state is left alone.
        base_model_name_or_path: what the exported adapter names as its base; the model's own name by default.
        side: bottlenecks to attach as well, in the same adapter.

    Raises:
        SplitError: targets match no linear module of a half, the client has dropout, the cut is out of range,
            the head to train is tied to the embeddings, or there is no layer to tap.
    """
    layers = find_layers(model)
    check_cut(cut, layers, type(model).__name__)
    numbers = range(layers.num_layers)
    targets = [] if lora.client is None else _client_targets(model, layers, cut, lora.client)
    targets += _targets(model, layers, numbers[cut:], lora.server, "server")
    above = [_head_target(model)] if lora.head else []
    first = lora.client or lora.server
    on_server = rf"{re.escape(layers.path)}\.(?:{'|'.join(map(str, numbers[cut:]))})\..*"
    settings: Callable[..., LoraConfig] = LoraConfig if side is None else partial(SideLoraConfig, side=asdict(side))
    config = settings(
        task_type=_task_type(model, head),
        r=first.r,
        lora_alpha=first.alpha,
        lora_dropout=lora.server.dropout,
        # Whole names, not a regular expression: of a mixture of experts PEFT forgets in which layers one matched.
        target_modules=targets + above,
        rank_pattern={on_server: lora.server.r} | {re.escape(name): lora.head for name in above},
        alpha_pattern={on_server: lora.server.alpha} | {re.escape(name): 2 * lora.head for name in above},
        modules_to_save=_head_modules(model, layers) if head else None,
        fan_in_fan_out=_has_conv1d(model, layers),
    )
    peft_model = _inject(model, config, targets + above, seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed + SERVER_SEED)
        for i in numbers[cut:]:
            for module in model.get_submodule(f"{layers.path}.{i}").modules():
                if isinstance(module, LoraLayer):
                    module.reset_lora_parameters("default", init_lora_weights=True)
    for name in above:
        _start_head(model, name, seed)
    config.target_modules = sorted(config.target_modules or [])
    if config.modules_to_save:
        config.modules_to_save = sorted(set(config.modules_to_save))  # PEFT adds names that are there already
    config.base_model_name_or_path = base_model_name_or_path or config.base_model_name_or_path
    _set_dropout(model, layers, cut)
    return peft_model


def add_client_lora(model: PreTrainedModel, layers: LayerPath, cut: int, half: LoraHalf, *, seed: int = 0) -> None:
    """What `add_lora` does to the client's layers, in place, on a model of which nothing else is left.

    PEFT draws in the order of the modules, and the client's layers come first: names and start are those of the whole.

    Args:
        model: pruned to the client's half.
        layers: of the whole.
        cut: number of layers the client holds.
        half: targets, rank and scale.
        seed: as in `add_lora`.

    Raises:
        SplitError: as for the client in `add_lora`.
    """
    targets = _client_targets(model, layers, cut, half)
    _inject(model, LoraConfig(
        r=half.r, lora_alpha=half.alpha, target_modules=targets, fan_in_fan_out=_has_conv1d(model, layers),
    ), targets, seed)  # fmt: skip


def add_head_lora(model: PreTrainedModel, rank: int, seed: int) -> None:
    """What `add_lora` does to the head, in place.

    Raises:
        SplitError: as for the head in `add_lora`.
    """
    name = _head_target(model)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[name])
    with torch.random.fork_rng(devices=[]), _quietly():
        inject_adapter_in_model(config, model, ADAPTER)
    _start_head(model, name, seed)


def _start_head(model: PreTrainedModel, name: str, seed: int) -> None:
    """A under a seed of its own, wherever it is; no dropout."""
    layer: Any = model.get_submodule(name)
    layer.lora_dropout[ADAPTER] = nn.Identity()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed + 2 * SERVER_SEED)
        layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)


def _head_target(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise SplitError(
            f"lora.head: {type(model).__name__} has no linear layer from hidden states to tokens; set it to 0."
        )
    return next(name for name, module in model.named_modules() if module is head)


def save_head(model: PreTrainedModel, layers: LayerPath) -> None:
    """What `add_lora` does to a head that is trained whole, in place, without LoRA anywhere."""
    for name in _head_modules(model, layers):
        wrapper = ModulesToSaveWrapper(model.get_submodule(name), ADAPTER)
        wrapper.set_adapter(ADAPTER)
        model._modules[name] = wrapper


def _inject(model: PreTrainedModel, config: LoraConfig, targets: list[str], seed: int) -> PeftModel:
    """PEFT's model, A drawn under ``seed``."""
    with torch.random.fork_rng(devices=[]), _quietly():
        torch.default_generator.manual_seed(seed)
        peft_model = get_peft_model(model, config)
    _check_injected(peft_model, targets)
    return peft_model


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT reads it
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # nothing is merged here
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to True")  # of GPT-2's layers; its head is another
        yield


def _has_conv1d(model: nn.Module, layers: LayerPath) -> bool:
    """Whether its linear layers hold (in, out) weights."""
    return any(isinstance(m, Conv1D) for m in model.get_submodule(layers.path).modules())


def _client_targets(model: nn.Module, layers: LayerPath, cut: int, half: LoraHalf) -> list[str]:
    if half.dropout:
        raise SplitError(
            f"lora.client.dropout={half.dropout}: probes of a client would see different masks; set it to 0."
        )
    return _targets(model, layers, range(cut), half, "client")


def _targets(model: nn.Module, layers: LayerPath, numbers: range, half: LoraHalf, role: str) -> list[str]:
    """Whole names of the half's linear modules that get LoRA; every entry of ``target_modules`` must match."""
    there = [
        f"{layers.path}.{i}.{name}"
        for i in numbers
        for name, module in model.get_submodule(f"{layers.path}.{i}").named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    found: set[str] = set()
    for target, pattern in half.patterns().items():
        hits = {name for name in there if re.fullmatch(pattern, name)}
        if not hits:
            ends = sorted({name.removeprefix(layers.path).split(".", 2)[2] for name in there})
            raise SplitError(
                f"lora.{role}.target_modules: {target!r} matches no linear module in layers {numbers[0]} to "
                f"{numbers[-1]} of {type(model).__name__}, the {role}'s; there are: {', '.join(ends)}."
            )
        found |= hits
    return [name for name in there if name in found]


def _head_modules(model: PreTrainedModel, layers: LayerPath) -> list[str]:
    tied = tied_head(model)
    if tied is not None:
        raise SplitError(
            f"the head of {type(model).__name__} cannot be trained: it is tied to the client's {tied[0]}; "
            "use head=False, or a model with tie_word_embeddings=False."
        )
    return [n for n, m in model.named_children() if n != layers.backbone and has_parameters(m)]


def _task_type(model: PreTrainedModel, head: bool) -> str | None:
    """PEFT's name of the task. It trains every classifier's head, so one with a frozen head gets no name."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS" if head else None
    return None if type(model).__name__.endswith("ForImageClassification") else "CAUSAL_LM"


def _check_injected(peft_model: PeftModel, targets: list[str]) -> None:
    """Refuse what PEFT read differently (it rewrites targets inside a mixture of experts)."""
    names = {n for n, m in peft_model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    if names != set(targets):
        peft_model.unload()
        raise SplitError(
            f"lora target_modules: PEFT cannot adapt {', '.join(sorted(names ^ set(targets)))}; leave it out."
        )


def _set_dropout(model: nn.Module, layers: LayerPath, cut: int) -> None:
    """No dropout on the client's layers, and the base model's mode on the server's: PEFT leaves them in train mode."""
    for i in range(layers.num_layers):
        for module in model.get_submodule(f"{layers.path}.{i}").modules():
            if isinstance(module, LoraLayer) and isinstance(module, nn.Module):
                if i < cut:
                    module.lora_dropout["default"] = nn.Identity()
                module.train(module.get_base_layer().training)


def dropouts(half: nn.Module) -> list[nn.Module]:
    """The adapters' own, those that drop anything."""
    found = [m.lora_dropout for m in half.modules() if isinstance(m, LoraLayer)]
    return [dropout for dropout in found if any(isinstance(m, nn.Dropout) for m in dropout.modules())]


@contextmanager
def training(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules that are in eval mode are in train mode inside."""
    for module in modules:
        module.train()
    try:
        yield
    finally:
        for module in modules:
            module.eval()
