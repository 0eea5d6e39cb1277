"""One half of a saved model, built without ever holding the other half's weights."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hosfl_lightning.split.cut import check_cut, prune_to_client, prune_to_server, stub_client
from hosfl_lightning.split.halves import ClientHalf, ServerHalf
from hosfl_lightning.split.structure import Structure, find_structure, siblings
from hosfl_lightning.split.views import set_submodule

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def load_client_half(
    path: str | PathLike[str], cut: int, *, auto_class: Any = AutoModelForCausalLM, **kwargs: Any
) -> ClientHalf:
    """Read the embeddings and the first ``cut`` layers of a saved model, and nothing else.

    The half has no adapter: LoRA and side adapters are attached to a whole model, which is split then.

    Args:
        path: folder or hub name of a model saved as safetensors, in one file or in shards.
        cut: number of layers the client holds, from 1 to the number of layers - 1.
        auto_class: ``AutoModelForCausalLM`` or ``AutoModelForSequenceClassification``: which model is cut.
        **kwargs: for ``from_pretrained``, such as ``dtype`` or ``revision``.

    Returns:
        The client half, in eval mode, as :func:`split` of the whole model would give it.

    Raises:
        SplitError: the cut is out of range, or the architecture has no list of layers.
    """
    model, structure = _load(path, cut, auto_class, prune_to_client, kwargs)
    return ClientHalf(model, structure, cut)


def load_server_half(
    path: str | PathLike[str], cut: int, *, auto_class: Any = AutoModelForCausalLM, **kwargs: Any
) -> ServerHalf:
    """Read the layers from ``cut`` on, the final norm and the head of a saved model, and nothing else.

    A tied head is read from the embeddings that it is tied to. Arguments and errors as in :func:`load_client_half`.
    """
    model, structure = _load(path, cut, auto_class, prune_to_server, kwargs)
    stub_client(model, structure)
    return ServerHalf(model, structure, cut)


Prune = Callable[[PreTrainedModel, Structure, int], PreTrainedModel]


def _load(
    path: str | PathLike[str], cut: int, auto_class: Any, prune: Prune, kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, Structure]:
    config = AutoConfig.from_pretrained(path, **{k: kwargs[k] for k in _HUB if k in kwargs})
    with torch.random.fork_rng(devices=[]):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
            empty = auto_class.from_config(config)
            structure, kind = find_structure(empty), type(empty)
        check_cut(cut, structure.layers, kind.__name__)
        model = _pruned(kind, structure, cut, prune).from_pretrained(path, **kwargs)
    model.__class__ = kind
    return model, structure


def _pruned(kind: type[PreTrainedModel], structure: Structure, cut: int, prune: Prune) -> type[PreTrainedModel]:
    """The model's class, with the other half's modules dropped while they are still on the meta device.

    ``from_pretrained`` then reads only the tensors that are left, with all it knows about dtypes, shards, renamed
    keys and buffers. An embedding tied to a head that is left stays for the time being: the head is read from it.
    """

    def init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        whole = dict(siblings(self, structure.layers))
        prune(self, structure, cut)
        left = {n for n, _ in self.named_parameters(remove_duplicate=False)}
        self.all_tied_weights_keys = {head: tied for head, tied in self.all_tied_weights_keys.items() if head in left}
        for name, module in whole.items():
            if any(tied.startswith(f"{name}.") for tied in self.all_tied_weights_keys.values()):
                set_submodule(self, name, module)

    silent = {"_keys_to_ignore_on_load_unexpected": [".*"]}  # the other half's tensors are no news
    return type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__, **silent})
