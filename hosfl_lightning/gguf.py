"""GGUF files (of llama.cpp) as checkpoints: read by transformers, from the one file alone, and dequantised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, modeling_gguf_pytorch_utils


def is_gguf(path: str) -> bool:
    """Whether a checkpoint is one GGUF file, by its name, as transformers goes by it."""
    return path.endswith(".gguf")


@contextmanager
def opened(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What ``from_pretrained`` is told inside: where to look, and more arguments; nothing changes but for GGUF.

    The folder named is an empty one and the file's path whole, so that no config, adapter or tokenizer that lies beside
    the file is read, and no file of that name in the current folder.

    Args:
        path: Folder, name on the hub, or GGUF file.

    Raises:
        FileNotFoundError: There is no such GGUF file.
        ImportError: The package ``gguf`` is not installed.
        ValueError: The file is damaged, or of an architecture that transformers does not read.
    """
    if not is_gguf(path):
        yield path, {}
        return
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    if find_spec("gguf") is None:
        raise ImportError(
            f"{path}: a GGUF file needs gguf, which is not installed: pip install 'hosfl_lightning[gguf]'"
        )
    with TemporaryDirectory() as empty, _bar_on_terminals_alone():
        try:
            yield empty, {"gguf_file": os.path.abspath(path)}
        except (ValueError, OSError, ImportError):
            raise
        except Exception as error:  # whatever a reader makes of bytes that are none
            raise ValueError(
                f"{path} is damaged, or a GGUF that transformers does not read ({error!r:.200})"
            ) from error


def weights(path: str) -> dict[str, Any]:
    """More arguments for weights: unpacked, an ordinary model, which can be trained and saved; packed ones cannot."""
    if not is_gguf(path):
        return {}
    from transformers import GgufConfig  # there from 5.23 on, which the extra asks for

    return {"quantization_config": GgufConfig(dequantize=True)}


def named_after(path: str, loaded: PreTrainedModel | PreTrainedTokenizerBase) -> None:
    """Of a GGUF file: what was loaded from it has its name, and not the empty folder's."""
    if is_gguf(path):
        loaded.name_or_path = path
        if isinstance(loaded, PreTrainedModel):
            loaded.config.name_or_path = path


def read_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, of a GGUF file its own.

    Raises:
        OSError, ValueError, ImportError: As `opened` and transformers.
    """
    with opened(path) as (folder, more):
        tokenizer = AutoTokenizer.from_pretrained(folder, **more)
    named_after(path, tokenizer)
    return tokenizer


@contextmanager
def _bar_on_terminals_alone() -> Iterator[None]:
    """The reader draws its bar wherever it writes to; it has no setting."""
    module: Any = modeling_gguf_pytorch_utils
    bar = module.tqdm
    module.tqdm = partial(bar, disable=None, leave=False)
    try:
        yield
    finally:
        module.tqdm = bar
