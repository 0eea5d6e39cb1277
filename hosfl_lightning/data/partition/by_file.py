"""A file for each client."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from typing_extensions import override

from hosfl_lightning.data.partition.by_field import groups
from hosfl_lightning.data.partition.contract import Examples, Partitioner


class ByFile(Partitioner):
    """S_f = {i : file(i) = f}: each training file is a client, in the order in which the files are given.

    A client is named after its file, without folder and extension; where two files share that name, by the paths.

    Example::

        data = TextData(files=["ann.txt", "bob.txt"], partitioner=ByFile())
    """

    @override
    def __call__(self, examples: Examples, seed: int) -> dict[str, Tensor]:
        found = groups(examples.files)
        stems = [Path(path).name.split(".")[0] for path in found]
        return dict(zip(stems if len(set(stems)) == len(stems) else found, found.values()))
