"""A file for each client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from typing_extensions import override

from hosfl_lightning.data.partition.by_field import groups
from hosfl_lightning.data.partition.contract import Examples, Partitioner


class ByFile(Partitioner):
    """S_f = {i : file(i) = f}: each training file is a client, in the order in which the files are given.

    A client is named after its file, without folder and extension; those that share that name also get the last folder,
    and where that is no difference the extension, or the whole path.

    Example::

        data = TextData(files=["ann.txt", "bob.txt"], partitioner=ByFile())
    """

    @override
    def __call__(self, examples: Examples, seed: int) -> dict[str, Tensor]:
        found = groups(examples.files)
        return dict(zip(_names([*found]), found.values()))


def _names(paths: Sequence[str]) -> list[str]:
    """For each path the shortest name that no other has."""
    ways = [
        [Path(path).name.split(".")[0] for path in paths],
        ["/".join([Path(path).parent.name, Path(path).name.split(".")[0]]) for path in paths],
        ["/".join(Path(path).parts[-2:]) for path in paths],
    ]
    counts = [Counter(names) for names in ways]
    return [
        next((names[i] for names, count in zip(ways, counts) if count[names[i]] == 1), path)
        for i, path in enumerate(paths)
    ]
