"""One client's side of the conversation, over an engine that runs forwards alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from hosfl_client.basis import Basis, SharedDirections, basis_of
from hosfl_client.bfloat16 import Array
from hosfl_client.codecs import Coded
from hosfl_client.half import Half
from hosfl_client.known_gradient import known_gradient
from hosfl_client.lagrangian import LagrangianTerm
from hosfl_client.manifest import Manifest
from hosfl_client.messages import CodedGradient, Multiplier, ProbedData, SmashedData
from hosfl_client.minibatches import Minibatch
from hosfl_client.optimizer import Optimizer
from hosfl_client.refusals import EndpointError, TermsError
from hosfl_client.rng import DISTRIBUTIONS, round_coefficient
from hosfl_client.rules import rule_of
from hosfl_client.secure.extra import participants
from hosfl_client.terms import basis_of_terms, check_terms, kind_of
from hosfl_client.wire import HeldOutRequest, ProbeRequest, ProjectedGradients, StepRequest, Terms

#: Of a probe: ``θ + μu``, ``θ − μu``.
SIDES = (1, -1)


@dataclass
class Visit:
    """What is held of a round while it waits.

    Attributes:
        batch: Its minibatch.
        mask: Valid positions ``(B, S)``.
        z: As it was sent, where the answer needs it; dropped when λ has come.
    """

    batch: Minibatch
    mask: Array
    z: Array | None = None


class Endpoint:
    r"""A client of HO-SFL, of HOSL, of a side adapter, or one that stands still: what `hosfl_client.joined` drives.

    ::

        forward_only   z up;  λ down;  v_p = (1/μ) ⟨λ, f_c(θ + μ u_p) − z⟩ up        P forwards more; central 2P
        local          z up;  λ down;  the side adapter's exact gradient in the run's basis up      one forward more
        probed         z up;  for every probe asked for, f_c(θ ± μ u_p) up
        frozen         z up

    While it waits for λ it holds its minibatch and, for ``forward``, z; then λ as it travelled.

    Args:
        half: ``f_c``.
        manifest: Of the half.
        data: The minibatch of a round.
        terms: The contract of the run.

    Raises:
        TermsError: This client cannot take part; says why.
    """

    held_out_batches = 0

    def __init__(self, half: Half, manifest: Manifest, data: Callable[[int], Minibatch], terms: Terms) -> None:
        try:
            check_terms(terms, manifest)
            self._prepare(half, manifest, data, terms)
        except (KeyError, IndexError, TypeError) as error:
            raise TermsError(f"the run's terms do not say what this client needs ({error!r:.80}); install the "
                             "hosfl-client of the server's version") from error  # fmt: skip
        except ValueError as error:
            raise error if isinstance(error, TermsError) else TermsError(str(error)) from error
        self.visit: Visit | None = None
        self._open = (-1, -1)

    def _prepare(self, half: Half, manifest: Manifest, data: Callable[[int], Minibatch], terms: Terms) -> None:
        """What the terms fix; a setting that is missing shows here, and not in the middle of a round."""
        self.half, self.manifest, self.data, self.terms = half, manifest, data, terms
        self.kind, self.answered_in = kind_of(terms), basis_of_terms(terms)
        self.names = [name for name, *_ in manifest.parameters]
        self.optimizer = Optimizer([*half.parameters().values()], rule_of(terms.rule), terms.seed)
        side = {name for rung in manifest.side for name in (rung.down, rung.up)} if self.kind == "local" else set()
        self.probed = [name not in side for name in self.names]
        self.codecs = {name: terms.codecs[name] for name in ("smashed_data", "gradient")}
        self.probe_first = self.kind == "probed" and terms.settings["probe_first"]
        self.hidden = participants(lambda array: array) if terms.secure_aggregation else None
        self._check_basis()

    def _check_basis(self) -> None:
        basis = self.basis(0) if self.answered_in else None
        probes = self.kind in ("forward_only", "probed") or (self.kind == "local" and any(self.probed))
        self.mu = self._rounded_mu() if probes else math.nan
        if probes and not self.mu > 0:
            raise TermsError(f"the run's mu is {self.mu}, and probes need one > 0; set trainer.algorithm.init_args.mu")
        if probes and not isinstance(basis, SharedDirections):
            raise TermsError(
                f"the run's basis is {self.answered_in.get('kind')!r:.80}, and what is trained below the backbone is "
                "probed along shared directions; set trainer.algorithm.init_args.compression: null"
            )

    # ---- the conversation

    def handle(self, requests: Sequence[Any]) -> list[Any]:
        """The answer to a request; none to what is for everybody.

        Raises:
            EndpointError: It does not follow from what came before.
        """
        [request] = requests
        if request.kind in ("update", "round_end"):
            self.forget()
            if request.kind == "update" and self.terms.settings.get("kind") != "frozen":  # in a mixed run all move
                self.optimizer.apply(request)
            return []
        place = request.round, getattr(request, "attempt", 0)
        if place != self._open:
            self.forget()
            self._open = place
        match request.kind:
            case "step_request":
                return [self._forward(request)]
            case "multiplier" if self.kind in ("forward_only", "local"):
                answer: Any = self._answer(request)
                return [answer if self.hidden is None else self.hidden.keep(answer)]
            case "secure_peers" | "secure_shares" | "unmask_request" if self.hidden is not None:
                return [self.hidden.respond(request)]
            case "probe_request" if self.kind == "probed":
                return [self._probe(request)]
        raise EndpointError(f"a client of the kind {self.kind} does not take a {request.kind}")

    def hold_out(self, request: HeldOutRequest) -> list[Any]:
        """Raises EndpointError: a device has no validation data."""
        raise EndpointError(f"client {request.client} is asked for validation data, and has none")

    def forget(self) -> None:
        """Drop whatever is held of a round."""
        self.visit = None
        if self.hidden is not None:
            self.hidden.forget()

    # ---- what all clients hold

    @property
    def version(self) -> int:
        """Updates that it holds."""
        return self.optimizer.steps

    def shared_state(self) -> dict[str, Array]:
        """θ_c and the rule's moments."""
        return self.optimizer.state()

    def load_shared(self, state: Mapping[str, Array], version: int) -> None:
        """Go on from a `shared_state`.

        Raises:
            CatchUpError: It is of other tensors. Nothing has moved then.
        """
        self.optimizer.load(state, version)

    def digest(self) -> str:
        """Of a `shared_state` and its version."""
        return self.optimizer.digest()

    def own_state(self, client: int) -> None:
        """None: it knows nothing that the others do not."""

    def load_own(self, client: int, state: Any) -> None:
        """Nothing."""

    # ---- step 2

    def _forward(self, request: StepRequest) -> SmashedData:
        batch = self.data(request.round)
        z = self._at(request.round, 0, 0, batch) if self.probe_first else self.half.forward(batch.inputs)
        mask = batch.mask(z.shape[1])
        waits = self.kind == "forward_only" and self.terms.settings["estimator"] == "forward"
        waits = waits or (self.kind == "local" and any(self.probed))
        if self.kind != "frozen":
            self.visit = Visit(batch, mask, z if waits else None)
        return SmashedData.pack(
            request.round, request.client, z, batch.labels, mask, self.codecs["smashed_data"], self.terms.seed, 0,
            request.attempt,
        )  # fmt: skip

    # ---- step 4

    def _answer(self, request: Multiplier) -> ProjectedGradients | CodedGradient:
        visit, self.visit = self.visit, None
        if visit is None:
            raise EndpointError(f"client {request.client} is sent a multiplier, and waits for none")
        coded: Coded = request.multiplier
        if len(coded.values) != int(visit.mask.sum()) or coded.width != self.manifest.width:
            raise EndpointError(f"λ has the shape {[len(coded.values), coded.width]}, z another")
        if coded.dtype != "float32":
            raise EndpointError(f"λ is {coded.dtype}, z was float32")
        basis = self.basis(request.round)
        values = np.zeros(basis.size, np.float64)
        if any(self.probed):
            lagrangian = LagrangianTerm(coded, visit.mask)
            base = None if visit.z is None else lagrangian(visit.z)
            visit.z = None
            values += self._projected(request.round, visit, lagrangian, base)
        if self.kind == "local":
            values += basis.project(known_gradient(self.half, self.manifest, visit.batch.inputs, coded, visit.mask))
        answer = ProjectedGradients(
            request.round, request.client, basis.describe(), values.astype(np.float32), visit.batch.num_terms,
            request.attempt,
        )  # fmt: skip
        codec = self.codecs["gradient"]
        if codec == "fp32":
            return answer
        return CodedGradient.pack(
            answer.round, answer.client, answer.basis, answer.coefficients, answer.num_terms, codec, self.terms.seed,
            answer.attempt,
        )  # fmt: skip

    def _projected(self, round: int, visit: Visit, lagrangian: LagrangianTerm, base: float | None) -> Array:
        """``v_p`` of what is probed, ``(P,)`` fp64; ``base`` is ``⟨λ, z⟩``, None: both sides of every probe are run."""

        def term(probe: int, side: int) -> float:
            return lagrangian(self._at(round, probe, side, visit.batch))

        probes = range(self.answered_in["probes"])
        if base is None:
            return np.array([(term(p, 0) - term(p, 1)) / (2 * self.mu) for p in probes])
        return np.array([(term(p, 0) - base) / self.mu for p in probes])

    # ---- probes

    def _probe(self, request: ProbeRequest) -> ProbedData:
        if self.visit is None:
            raise EndpointError(f"client {request.client} is asked for a probe, and has begun no round")
        z = self._at(request.round, request.probe, request.side, self.visit.batch)
        return ProbedData.pack(
            request.round, request.client, request.probe, request.side, z, self.visit.mask,
            self.codecs["smashed_data"], self.terms.seed, attempt=request.attempt,
        )  # fmt: skip

    def _at(self, round: int, probe: int, side: int, batch: Minibatch) -> Array:
        """``f_c(x; θ_c ± μ u_p)``."""
        with self._perturbed(round, probe, SIDES[side] * self.mu):
            return self.half.forward(batch.inputs)

    @contextmanager
    def _perturbed(self, round: int, probe: int, scale: float) -> Iterator[None]:
        basis = self.basis(round)
        assert isinstance(basis, SharedDirections)
        theta = self.optimizer.parameters
        moved = [np.empty_like(p) if probed else None for p, probed in zip(theta, self.probed)]
        basis.perturb(theta, probe, scale, moved)

        def move(number: int, held: Array) -> Array:
            other = moved[number]
            return held if other is None else other

        with self.half.perturbed(move):
            yield

    def _rounded_mu(self) -> float:
        """``μ``, as rounded for the distribution."""
        settings = self.terms.settings
        return float(round_coefficient(settings["mu"], DISTRIBUTIONS[settings["distribution"]]))

    def basis(self, round: int) -> Basis:
        """In what the round's answers and its update are expressed."""
        return basis_of(self.answered_in, self.terms.seed, round, self.optimizer.sizes)
