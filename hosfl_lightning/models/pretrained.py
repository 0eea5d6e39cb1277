"""Where a pretrained model and its tokenizer come from: the one that ships, a folder, a GGUF file, or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from hosfl_lightning.gguf import named_after, opened, read_tokenizer, weights
from hosfl_lightning.models.checks import check_sizes
from hosfl_lightning.split import ClientHalf, ClientHead, SplitError, build_client

#: The model that ships with the package: a byte-level Llama of about a million parameters.
TINY_LM = "tiny_lm"


class PretrainedError(ValueError):
    """The model or tokenizer named in the recipe cannot be loaded."""


def resolve(pretrained: str) -> str:
    """``tiny_lm`` becomes the folder that ships with the package; everything else stays as it is."""
    return str(files("hosfl_lightning") / "assets" / TINY_LM) if pretrained == TINY_LM else pretrained


def load_model(
    auto_class: Any, pretrained: str, *, seed: int, fresh_head: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """``auto_class.from_pretrained``, its random parts (a fresh head) drawn under ``seed``, the global state untouched.

    Args:
        auto_class: Of transformers.
        pretrained: As in the recipe.
        seed: Of what is not in the file.
        fresh_head: A saved head of another size is replaced, and said so in one line.
        **kwargs: For ``from_pretrained``.

    Raises:
        PretrainedError: Not a folder and not to be had from the hub; the message names the setting.
        SplitError: A tensor has another size than the config says.
    """
    path = resolve(pretrained)
    with seeded(seed), quiet_loading(), named("model", pretrained), opened(path) as (folder, more):
        model, found = auto_class.from_pretrained(
            folder, ignore_mismatched_sizes=True, output_loading_info=True, **more, **weights(path), **kwargs
        )
        named_after(path, model)
    line = check_sizes(found["mismatched_keys"], pretrained, model.base_model_prefix if fresh_head else "")
    if line:
        rank_zero_info(f"{line}, drawn under seed={seed}")
    return model


def load_client(
    auto_class: Any, pretrained: str, cut: int, *, seed: int, **kwargs: Any
) -> tuple[ClientHalf, ClientHead | None]:
    """`build_client`, likewise: nothing of the other half is read.

    Raises:
        PretrainedError: As for the model.
        SplitError: As for `build_client`.
    """
    with seeded(seed), quiet_loading(), named("model", pretrained):
        return build_client(resolve(pretrained), cut, auto_class=auto_class, seed=seed, **kwargs)


def load_tokenizer(pretrained: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model.

    Raises:
        PretrainedError: As for the model.
    """
    with named("tokenizer", pretrained):
        return read_tokenizer(resolve(pretrained))


@contextmanager
def named(what: str, pretrained: str) -> Iterator[None]:
    """Whatever hinders loading becomes a `PretrainedError` that names the setting."""
    try:
        yield
    except SplitError:
        raise
    except (OSError, ValueError) as error:
        raise PretrainedError(_message(what, pretrained, error)) from error


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Draw under ``seed`` on the CPU and on ``device``, and give the random states back as they were."""
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        # Not torch.manual_seed: that reseeds every CUDA generator, and only this device's state was saved.
        torch.default_generator.manual_seed(seed)
        if device is not None and device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        yield


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No bars and no report of fresh head weights; the level is put back."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _message(what: str, pretrained: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"model.init_args.pretrained: no {what} at {pretrained!r}; give {TINY_LM!r}, a folder with a saved model, "
        f"a .gguf file, or a hub name while the hub can be reached ({reason})"
    )
