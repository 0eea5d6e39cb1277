"""Exact search: which token, behind those found so far, gives this z?"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from hosfl_lightning.attack.halves import CHUNK, TextHalf, cosines, rows

#: A z is found when it is as near as this, relative to its own length: what rounding in fp32 leaves.
FOUND = 1e-3


@torch.no_grad()
def search(half: TextHalf, z: Tensor, mask: Tensor, beam: int = 4) -> list[int]:
    r"""``y_t = argmin_v ‖z_t − f_c(y_1 … y_{t−1}, v)_t‖²``, position after position.

    Candidates are tried in the order of the cosine of z_t with their z alone, until one is found (`FOUND`), else all of
    them. Where z is coded or noisy, prefixes stay in the beam whose summed distance is within one step's residual of
    the best. The cost is at most ``beam · V`` forwards of one token a position.

    Args:
        half: A causal half.
        z: ``(S, h)``.
        mask: ``(S,)``, valid positions.
        beam: Prefixes that are kept at most.

    Returns:
        Tokens of the valid positions.

    Reference: SIPIT, arXiv 2510.15511.
    """
    prefixes: list[list[int]] = [[]]
    scores, cache = z.new_zeros(1, dtype=torch.float64), DynamicCache()
    likely = cosines(z, half.alone).argsort(-1, descending=True)
    for t in range(int(mask.nonzero().max()) + 1):
        seen = mask[: t + 1]
        if not mask[t]:
            half.step(torch.zeros(len(prefixes), dtype=torch.long, device=z.device), seen, cache)
            continue
        distances = _distances(half, z[t], likely[t], seen, cache, len(prefixes))  # (beam, V)
        totals = (scores[:, None] + distances).flatten()
        best, place = totals.min(0)
        values, places = totals.topk(min(beam, len(totals)), largest=False)
        kept = places[values <= best + distances.flatten()[place]]
        parents, chosen = kept // distances.shape[1], kept % distances.shape[1]
        scores = totals[kept]
        prefixes = [[*prefixes[p], int(v)] for p, v in zip(parents.tolist(), chosen.tolist())]
        cache = rows(cache, parents)
        half.step(chosen, seen, cache)
    return prefixes[int(scores.argmin())]


def _distances(
    half: TextHalf, target: Tensor, likely: Tensor, seen: Tensor, cache: DynamicCache, prefixes: int
) -> Tensor:
    """``‖target − z‖²`` of every token behind every prefix of the cache, fp64; inf where none was needed."""
    length = float(target.double().square().sum())
    found = target.new_full((prefixes, len(likely)), float("inf"), dtype=torch.float64)
    for prefix in range(prefixes):
        parent = torch.tensor(prefix, device=target.device)
        for tokens in likely.split(CHUNK):
            z = half.step(tokens, seen, rows(cache, parent.expand(len(tokens))))
            found[prefix, tokens] = (z.double() - target.double()).square().sum(-1)
            if found[prefix].min() <= FOUND**2 * length:
                break
    return found
