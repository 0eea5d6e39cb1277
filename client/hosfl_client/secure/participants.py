"""The clients of one endpoint in a secure sum: messages in, messages out, for any engine's arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hosfl_client.bfloat16 import Array
from hosfl_client.refusals import EndpointError
from hosfl_client.secure.fixed_point import RangeError, encode
from hosfl_client.secure.masks import PUBLIC
from hosfl_client.secure.participant import Participant
from hosfl_client.wire import ProjectedGradients
from hosfl_client.wire.secure import MaskedGradients, SecureKeys, SecurePeers, SecureShares, UnmaskRequest


class Participants:
    """``ProjectedGradients`` kept, `SecureKeys` sent in their place, and the answers to what the server asks then.

    Args:
        tensor: A uint8 array in what the endpoint's messages hold.
    """

    def __init__(self, tensor: Callable[[Array], Any]) -> None:
        self.tensor = tensor
        self.held: dict[int, Participant] = {}

    def keep(self, answer: ProjectedGradients) -> SecureKeys:
        """What travels of an answer to λ."""
        keys, reason = np.zeros(2 * PUBLIC, np.uint8), ""
        try:
            held = Participant(answer.client, encode(np.asarray(answer.coefficients), answer.num_terms))
        except RangeError as error:
            reason = str(error)
        else:
            self.held[answer.client], keys = held, held.keys
        return SecureKeys(
            answer.round, answer.client, answer.basis, self._own(keys), answer.num_terms, answer.attempt, reason
        )

    def respond(self, request: SecurePeers | SecureShares | UnmaskRequest) -> SecureShares | MaskedGradients:
        """The next step of a client.

        Raises:
            EndpointError: It is not the next one, or would give away more than the sum.
        """
        held, address = self.held.get(request.client), (request.round, request.client)
        if held is None:
            raise EndpointError(f"client {request.client} is sent a {request.kind}, and holds no answer to sum")
        if isinstance(request, SecureShares):
            masked = held.mask(request.peers, np.asarray(request.shares))
            return MaskedGradients(*address, self._own(masked), request.attempt)
        if isinstance(request, SecurePeers):
            peers, rows = held.share(request.peers, np.asarray(request.keys), request.threshold)
        else:
            peers, rows = held.reveal(request.survivors)
        return SecureShares(*address, peers, self._own(rows), request.attempt)

    def forget(self) -> None:
        """Drop whatever is held of a round."""
        self.held.clear()

    def _own(self, array: Array) -> Any:
        return self.tensor(np.array(array))  # what is read from bytes cannot be written, and PyTorch warns of that
