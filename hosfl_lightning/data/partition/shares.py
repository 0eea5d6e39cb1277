"""Random shares of random orders, with at least so many examples for every client."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hosfl_lightning.data.partition.contract import say

#: After so many, examples are moved.
MOST_REDRAWS = 100


def check_clients(n: int, k: int, least: int = 1) -> None:
    """Refuse a number of clients that n examples do not give `least` each.

    Raises:
        ValueError: Names the settings and the fix.
    """
    if k < 1:
        raise ValueError(f"num_clients={k}: there must be at least one client")
    check_least(least)
    if least and k > n:
        raise ValueError(f"num_clients={k} is more than the {n} examples: lower num_clients to {n} or fewer")
    if k * least > n:
        raise ValueError(
            f"min_examples_per_client={least}: {k} clients need {k * least} examples, and there are {n}; lower it to "
            f"{n // k} or fewer, or lower num_clients"
        )


def check_least(least: int) -> None:
    """Refuse a number of examples below 0."""
    if least < 0:
        raise ValueError(f"min_examples_per_client={least}: must be at least 0")


def by_shares(
    groups: Sequence[Sequence[int]],
    draw: Callable[[], Sequence[NDArray[np.float64]]],
    order: Sequence[int],
    least: int,
    who: str,
    redraws: int = MOST_REDRAWS,
) -> list[Tensor]:
    """Of every group g, client j gets what lies from round(n_g · P_{g,j-1}) to round(n_g · P_{g,j}), P = cumsum(p_g).

    A draw of p that leaves a client with fewer than `least` examples is drawn again, at most `redraws` times. If none
    is accepted, of all draws the one that lacks fewest examples is taken, and single examples go to the clients that
    lack some: always from the client that then has most, its last in `order`. One line says how often and how many,
    and where it is over a tenth of all that the partition is far from the one asked for.

    Args:
        groups: The examples of each group.
        draw: Draws p, for each group the shares (k,) of the clients.
        order: All examples in random order.
        least: The fewest examples of a client; k · least is not more than there are.
        who: Begins the line.
        redraws: 0 where every draw is the same.

    Returns:
        k ascending index tensors (int64).
    """
    counts = [len(group) for group in groups]
    cuts = _cuts(draw(), counts)
    first, drawn = cuts, 0
    while _missing(cuts, least) and drawn < redraws:
        drawn += 1
        again = _cuts(draw(), counts)
        cuts = again if _missing(again, least) < _missing(cuts, least) else cuts
    parts: list[list[int]] = [[] for _ in range(cuts.shape[1] - 1)]
    for group, ends in zip(groups, cuts.tolist()):
        for part, start, stop in zip(parts, ends, ends[1:]):
            part.extend(group[start:stop])
    moved = _fill(parts, order, least)
    if moved or cuts is not first:
        ways = [f"drawn again {drawn} time(s)"] * bool(drawn) + [f"{moved} example(s) moved"] * bool(moved)
        far = (
            f"; {moved / len(order):.0%} of all, so this is far from the partition that is asked for: "
            "lower num_clients or min_examples_per_client"
        )
        say(
            f"{who}: {' and '.join(ways)}, so that each of {len(parts)} clients holds at least {least}"
            f"{far if 10 * moved > len(order) else ''}"
        )
    return [torch.tensor(part, dtype=torch.int64).sort().values for part in parts]


def _cuts(shares: Sequence[NDArray[np.float64]], counts: Sequence[int]) -> NDArray[np.int64]:
    """Where each group is cut (groups, k + 1)."""
    inner = [np.rint(np.cumsum(share)[:-1] * count).astype(int) for share, count in zip(shares, counts)]
    return np.array([[0, *ends, count] for ends, count in zip(inner, counts)])


def _missing(cuts: NDArray[np.int64], least: int) -> int:
    """How many examples the clients lack, all together."""
    return int(np.maximum(least - np.diff(cuts, axis=1).sum(0), 0).sum())


def _fill(parts: list[list[int]], order: Sequence[int], least: int) -> int:
    """Move examples until no client has fewer than `least`; how many."""
    sizes = np.array([len(part) for part in parts])
    if sizes.min() >= least:
        return 0
    rank = {index: place for place, index in enumerate(order)}
    moved = 0
    for part in parts:
        part.sort(key=rank.__getitem__)
    for receiver, size in enumerate(sizes.tolist()):
        for _ in range(least - size):
            donor = int(sizes.argmax())
            parts[receiver].append(parts[donor].pop())
            sizes[donor] -= 1
            sizes[receiver] += 1
            moved += 1
    return moved
