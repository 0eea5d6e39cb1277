"""A network's start from a file."""

from __future__ import annotations

import os

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from hosfl_lightning.models.pretrained import PretrainedError

#: Names in a message.
NAMED = 3


def load_weights(network: nn.Module, path: str) -> None:
    """Every tensor of the network's ``state_dict``, in place; the file's dtype becomes the network's.

    Nothing in the file is executed: it is safetensors, never pickle.

    Raises:
        PretrainedError: There is no such file, it is damaged, or its names or shapes are not the network's.
    """
    where = f"model.init_args.weights: {path}"
    if not os.path.isfile(path):
        raise PretrainedError(f"{where} is no file; give a safetensors file")
    try:
        with open(path, "rb") as file:
            found = safetensors.torch.load(file.read())
    except (SafetensorError, OSError, ValueError) as error:
        raise PretrainedError(
            f"{where} is no safetensors file ({error}); write it with safetensors.torch.save_model(network, FILE)"
        ) from error
    wanted = network.state_dict()
    wrong = [f"lacks {name}" for name in wanted if name not in found]
    wrong += [f"has {name}, which the network has not" for name in found if name not in wanted]
    wrong += [
        f"has {name} of shape {tuple(found[name].shape)}, the network {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise PretrainedError(
            f"{where} {', '.join(wrong[:NAMED])}{more}: it is of another network than {type(network).__name__} with "
            "these arguments; set model.init_args.network to the one that wrote it"
        )
    network.load_state_dict(found)
