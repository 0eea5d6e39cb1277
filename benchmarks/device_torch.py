"""The same measurements of a client in PyTorch, in a process of its own: what `benchmarks.device` starts.

    python -m benchmarks.device_torch imports | held | took  PRETRAINED KIND TERMS EXAMPLES LENGTH REPEATS

prints JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.device_script import TEXT, Script, held, memory, took


def main(role: str, *given: str) -> None:
    """One of them."""
    import hosfl_lightning.algorithms
    import hosfl_lightning.client_command
    import hosfl_lightning.data
    import hosfl_lightning.join
    import hosfl_lightning.models  # noqa: F401  # what `hosfl join` imports for a recipe

    torch.set_num_threads(1)
    found: dict[str, Any] = {"imports": memory()["VmRSS"]}
    if role != "imports":
        pretrained, kind, terms, examples, length, repeats = given
        script = join(pretrained, kind, Path(terms), int(examples), int(length))
        found |= {"held": held, "took": took}[role](script, int(repeats))
    print(json.dumps(found))


def join(pretrained: str, kind: str, terms: Path, examples: int, length: int) -> Script:
    """A client of `benchmarks.device_recipe`, whose server is a `Script`."""
    from benchmarks.device_recipe import model
    from hosfl_client.messages import FRAMES
    from hosfl_lightning.clients.joined import Joined
    from hosfl_lightning.data import TextData
    from hosfl_lightning.join import _endpoint

    folder = Path(tempfile.mkdtemp(dir=terms.parent))
    (text := folder / "mine.txt").write_text(TEXT)
    data = TextData(
        files=str(text), validation_files=str(text), num_clients=1, batch_size=examples, sequence_length=length
    )

    def build(terms: Any) -> Any:
        return _endpoint(terms, lambda part: model(pretrained, kind), data, None, "cpu")

    told: Any = FRAMES.decode(terms.read_bytes(), "terms")
    return Script(told, Joined("a", "0", build))


if __name__ == "__main__":
    main(*sys.argv[1:])
