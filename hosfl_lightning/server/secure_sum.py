"""Steps 4 and 5 of a round whose answers nobody sees: the server learns their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from hosfl_client.bfloat16 import Array
from hosfl_client.secure.fixed_point import MOST_CLIENTS, decode_mean
from hosfl_client.secure.masks import PUBLIC, SEALED, SEED
from hosfl_client.secure.participant import LEAST
from hosfl_client.secure.summation import MaskedSum, UnmaskError, threshold_of
from hosfl_lightning.aggregation import LIMIT
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.optim import Basis
from hosfl_lightning.server.call import Call
from hosfl_lightning.server.server import TooFewClientsError
from hosfl_lightning.server.tally import Counted
from hosfl_lightning.wire import (
    MaskedGradients,
    SecureKeys,
    SecurePeers,
    SecureShares,
    UnmaskRequest,
)


class Asking(Protocol):
    """What a secure sum needs of the `hosfl_lightning.server.Server`."""

    call: Call
    secure_threshold: float | None

    def basis(self, round: int, /) -> Basis | None:
        """Of the round."""

    def honest(self, answer: Any, inbox: Counted, /) -> bool:
        """Whether it claims the loss terms that it has."""

    def require(self, answers: int) -> None:
        """Raise `TooFewClientsError` when so few answers make no round."""


class SecureSum:
    r"""``v̄ = Σ_k n_k v_k / Σ_k n_k`` by pairwise masks on fixed-point numbers, over those who do not drop out.

    ::

        λ_k → SecureKeys → SecurePeers → SecureShares → SecureShares → MaskedGradients → UnmaskRequest → SecureShares

    Keys are made when a client has its answer, so whoever is lost while it computes costs nothing. Who sends keys and
    no shares, or shares and no masked answer, is not in the sum; who sends a masked answer is, even if it is lost then.

    Args:
        server: Whose round it is.
        fleet: The clients.

    Reference: Bonawitz et al., arXiv 1611.04482, the protocol for an honest-but-curious server.
    """

    def __init__(self, server: Asking, fleet: Fleet) -> None:
        self.server, self.fleet, self.call = server, fleet, server.call
        basis = server.basis(server.call.round)
        assert basis is not None
        self.basis = basis

    def mean(self, answers: Sequence[SecureKeys], inbox: Counted) -> tuple[dict[int, int], torch.Tensor]:
        """Sum, and open the sum.

        Args:
            answers: To λ, of all clients of the round.
            inbox: Says how many loss terms each of them has.

        Returns:
            ``n_k`` by client of those in it, ascending, and ``v̄ (P,)`` float32.

        Raises:
            TooFewClientsError: Too few are left at some step, or what came gives no sum.
        """
        keys = self.keys(answers, inbox)
        self.enough(keys, LEAST, "have an answer to sum")
        threshold = threshold_of(self.server.secure_threshold or 0, len(keys))
        shares = self.shares(keys, threshold)
        self.enough(shares, threshold, "have shared their secrets")
        total = self.masked(keys, shares, threshold)
        self.enough(total.survivors, threshold, "have sent a masked answer")
        num_terms = {client: keys[client].num_terms for client in total.survivors}
        self.server.require(sum(n > 0 for n in num_terms.values()))
        return num_terms, self.opened(total, sum(num_terms.values()))

    def keys(self, answers: Sequence[SecureKeys], inbox: Counted) -> dict[int, SecureKeys]:
        """Of those who have an answer that can be summed."""
        found: dict[int, SecureKeys] = {}
        for answer in answers:
            reason: str | None = answer.reason or None
            if answer.basis != self.basis.describe():
                reason = f"its answer is in the basis {answer.basis}, the round's is {self.basis.describe()}"
            elif answer.keys.shape != (2 * PUBLIC,):
                reason = f"its public keys have {len(answer.keys)} bytes, not {2 * PUBLIC}"
            elif len(found) == MOST_CLIENTS:
                reason = f"a secure sum has at most {MOST_CLIENTS} clients"
            if reason is not None:
                self.fleet.refuse(answer.client, reason)
            elif self.server.honest(answer, inbox):
                found[answer.client] = answer
        return found

    def shares(self, keys: Mapping[int, SecureKeys], threshold: int) -> dict[int, SecureShares]:
        """Of each client for each other one, sealed."""
        peers, rows = [*keys], torch.stack([answer.keys for answer in keys.values()])
        told = {k: SecurePeers(self.call.round, k, peers, rows, threshold, self.call.attempt) for k in peers}
        answers = self.fleet.ask(told, SecureShares)
        return self.fitting(answers, {k: [j for j in peers if j != k] for k in peers}, SEALED)

    def masked(self, keys: Mapping[int, SecureKeys], shares: Mapping[int, SecureShares], threshold: int) -> MaskedSum:
        """The sum of the masked answers."""
        bytes_of = {client: answer.keys.numpy().tobytes() for client, answer in keys.items()}
        total = MaskedSum(bytes_of, [*shares], threshold, self.basis.size)
        handed = {}
        for k in shares:
            others = [j for j in shares if j != k]
            rows = torch.stack([shares[j].shares[shares[j].peers.index(k)] for j in others])
            handed[k] = SecureShares(self.call.round, k, others, rows, self.call.attempt)
        for answer in self.fleet.ask(handed, MaskedGradients):
            try:
                total.add(answer.client, answer.masked.numpy())
            except UnmaskError as error:
                self.fleet.refuse(answer.client, str(error))
        return total

    def opened(self, total: MaskedSum, num_terms: int) -> torch.Tensor:
        """``v̄``, of the sum."""
        asked = {k: UnmaskRequest(self.call.round, k, total.survivors, self.call.attempt) for k in total.survivors}
        answers = self.fleet.ask(asked, SecureShares)
        revealed = self.fitting(answers, dict.fromkeys(total.survivors, total.sharers), SEED)
        try:
            mean: Array = decode_mean(total.open({k: one.shares.numpy() for k, one in revealed.items()}), num_terms)
        except UnmaskError as error:
            raise TooFewClientsError(f"the sum of the answers cannot be opened: {error}") from error
        if not np.all(np.abs(mean) <= LIMIT):
            raise TooFewClientsError(
                f"the mean of the answers is beyond ±{LIMIT:g}: a client has sent a share, or an answer, that is none"
            )
        return torch.from_numpy(mean)

    def fitting(
        self, answers: Sequence[SecureShares], peers: Mapping[int, list[int]], width: int
    ) -> dict[int, SecureShares]:
        """By client, the shares that are of these and of so many bytes; who sent others is refused."""
        taken = {}
        for answer in answers:
            wanted = peers[answer.client]
            if answer.peers == wanted and answer.shares.shape == (len(wanted), width):
                taken[answer.client] = answer
            else:
                self.fleet.refuse(answer.client, f"it sent shares of {len(answer.peers)} clients, or of another size "
                                                 f"than {width} bytes, where {len(wanted)} were asked for")  # fmt: skip
        return taken

    def enough(self, clients: Any, threshold: int, what: str) -> None:
        """Raise `TooFewClientsError` when the sum would be of too few, or could not be opened."""
        least = max(LEAST, threshold)
        if len(clients) < least:
            raise TooFewClientsError(f"{len(clients)} client(s) {what}, and a secure sum of this round needs {least}")
