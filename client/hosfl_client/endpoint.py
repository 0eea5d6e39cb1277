"""One client's side of the conversation, over an engine that runs forwards alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from hosfl_client.basis import Basis, SharedDirections
from hosfl_client.basis_of import basis_of
from hosfl_client.beside import Beside
from hosfl_client.bfloat16 import Array
from hosfl_client.codecs import Coded
from hosfl_client.half import Half
from hosfl_client.head import Head
from hosfl_client.known_gradient import known_gradient
from hosfl_client.lagrangian import LagrangianTerm
from hosfl_client.manifest import Manifest
from hosfl_client.messages import CodedGradient, Multiplier, ProbedData, SmashedData
from hosfl_client.minibatches import Minibatch
from hosfl_client.optimizer import Optimizer
from hosfl_client.privacy import Mechanism, NoiseKey
from hosfl_client.refusals import EndpointError, TermsError
from hosfl_client.rng import DISTRIBUTIONS, round_coefficient
from hosfl_client.rules import rule_of
from hosfl_client.secure.extra import participants
from hosfl_client.terms import basis_of_terms, check_terms, kind_of, names_of
from hosfl_client.u_shape import MiddleOutput, OutputMultiplier, UnlabelledData
from hosfl_client.visit import Visit
from hosfl_client.wire import HeldOutRequest, ProbeRequest, ProjectedGradients, StepRequest, Terms

#: Of a probe: ``θ + μu``, ``θ − μu``.
SIDES = (1, -1)


class Endpoint:
    r"""A client of HO-SFL, of HOSL, of a side adapter, or one that stands still: what `hosfl_client.joined` drives.

    ::

        forward_only   z up;  λ down;  v_p = (1/μ) ⟨λ, f_c(θ + μ u_p) − z⟩ up        P forwards more; central 2P
        local          z up;  λ down;  the side adapter's exact gradient in the run's basis up      one forward more
        probed         z up;  for every probe asked for, f_c(θ ± μ u_p) up
        frozen         z up

    Where the labels stay, z₁ goes up without them, and before λ z₂ comes down and λ₂ goes up; the exact gradient of a
    head that is trained follows on the answer's other coefficients.

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
        self.names, theta = names_of(terms, manifest), half.parameters()
        self.optimizer = Optimizer([theta[name] for name in self.names], rule_of(terms.rule), terms.seed)
        self.head: Head | None = getattr(half, "head", None) if terms.settings.get("labels") == "client" else None
        self.head_size = sum(array.size for array in self.head.trained) if self.head is not None else 0
        self.reports = self.head is not None and terms.settings["report_loss"]
        side = {name for rung in manifest.side for name in (rung.down, rung.up)} if self.kind == "local" else set()
        below = [name for name in self.names if name not in manifest.of_head]
        self.probed = [name not in side for name in below]
        self.codecs = {name: terms.codecs[name] for name in ("smashed_data", "gradient", "multiplier")}
        #: Its noise is from a secret of this process, until another key is put in its place.
        self.privacy = Mechanism(terms.privacy, NoiseKey()) if terms.privacy else None
        self.probe_first = self.kind == "probed" and terms.settings["probe_first"]
        self.hidden = participants(lambda array: array) if terms.secure_aggregation else None
        self._check_basis()

    def _check_basis(self) -> None:
        basis = first_of(self.basis(0)) if self.answered_in else None
        probes = self.kind in ("forward_only", "probed", "local") and any(self.probed)
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
            frozen = self.terms.settings.get("kind") == "frozen" and not self.answered_in  # in a mixed run all move
            if request.kind == "update" and not frozen:
                self.optimizer.apply(request)
            return []
        place = request.round, getattr(request, "attempt", 0)
        if place != self._open:
            self.forget()
            self._open = place
        match request.kind:
            case "step_request":
                return [self._forward(request)]
            case "middle_output" if self.head is not None:
                return [self._output(request)]
            case "multiplier" if self.answered_in and self.kind != "probed":
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

    def _forward(self, request: StepRequest) -> SmashedData | UnlabelledData:
        batch = self.data(request.round)
        z = self._at(request.round, 0, 0, batch) if self.probe_first else self.half.forward(batch.inputs)
        mask = batch.mask(z.shape[1])
        waits = self.kind == "forward_only" and self.terms.settings["estimator"] == "forward"
        waits = waits or (self.kind == "local" and any(self.probed))
        if self.kind != "frozen" or self.head is not None:
            self.visit = Visit(batch, mask, z if waits else None)
        sent = self._noised(z, mask, SmashedData.kind, request)
        if self.head is not None:
            return UnlabelledData.pack(
                request.round, request.client, sent, mask, num_terms=batch.num_terms,
                codec=self.codecs["smashed_data"], seed=self.terms.seed, attempt=request.attempt,
            )  # fmt: skip
        return SmashedData.pack(
            request.round, request.client, sent, batch.labels, mask, self.codecs["smashed_data"], self.terms.seed, 0,
            request.attempt,
        )  # fmt: skip

    # ---- step 3, where the labels stay here

    def _output(self, request: MiddleOutput) -> OutputMultiplier:
        visit = self.visit
        if visit is None:
            raise EndpointError(f"client {request.client} is sent a middle's output, and waits for none")
        self._check_rows("z₂", request.z, visit)
        assert self.head is not None
        found = self.head.differentiate(request.unpack(visit.mask), visit.mask, visit.batch.labels)
        visit.head = np.concatenate([np.zeros(0), *(g.reshape(-1) for g in found.gradients)], dtype=np.float32)
        if not self.answered_in:
            self.visit = None
        terms = visit.batch.num_terms or 1
        sent = self._noised(found.multiplier, visit.mask, OutputMultiplier.kind, request, terms)
        return OutputMultiplier.pack(
            request.round, request.client, sent, visit.mask, loss=found.loss if self.reports else None,
            codec=self.codecs["multiplier"], seed=self.terms.seed, step=request.step, attempt=request.attempt,
        )  # fmt: skip

    def _check_rows(self, name: str, coded: Coded, visit: Visit) -> None:
        if len(coded.values) != int(visit.mask.sum()) or coded.width != self.manifest.width:
            raise EndpointError(f"{name} has the shape {[len(coded.values), coded.width]}, z another")
        if coded.dtype != "float32":
            raise EndpointError(f"{name} is {coded.dtype}, z was float32")

    def _noised(self, rows: Array, mask: Array, what: str, request: Any, scale: float = 1.0) -> Array:
        """Clipped and noised token by token, ``scale`` times as large, as the terms say."""
        if self.privacy is None or self.privacy.of_tokens[what][0] is None:
            return rows
        sent, place = rows.copy(), (request.kind, request.round, request.attempt, request.step, request.client)
        sent[mask] = self.privacy.tokens(rows[mask] * np.float32(scale), what, place) / np.float32(scale)
        return sent

    # ---- step 4

    def _answer(self, request: Multiplier) -> ProjectedGradients | CodedGradient:
        visit, self.visit = self.visit, None
        if visit is None:
            raise EndpointError(f"client {request.client} is sent a multiplier, and waits for none")
        coded: Coded = request.multiplier
        self._check_rows("λ", coded, visit)
        basis = self.basis(request.round)
        rows = self._measured(basis, visit, request)
        values = np.concatenate([self._released(rows, visit.batch, request), self._of_head(visit, request.client)])
        answer = ProjectedGradients(
            request.round, request.client, basis.describe(), values, visit.batch.num_terms, request.attempt
        )
        codec = self.codecs["gradient"]
        if codec == "fp32":
            return answer
        return CodedGradient.pack(
            answer.round, answer.client, answer.basis, answer.coefficients, answer.num_terms, codec, self.terms.seed,
            answer.attempt,
        )  # fmt: skip

    def _of_head(self, visit: Visit, client: int) -> Array:
        """The gradient of a head that is trained; zero without a loss term."""
        if self.head_size and visit.head is None and visit.batch.num_terms:
            raise EndpointError(f"client {client} is sent a multiplier before the middle's output")
        return visit.head if visit.head is not None else np.zeros(self.head_size, np.float32)

    def _measured(self, basis: Basis, visit: Visit, request: Multiplier) -> Array:
        """Coefficients ``(1, P)`` fp64, or of every example by itself, ``(B, P)``."""
        coded: Coded = request.multiplier
        by_example = self.privacy is not None and self.privacy.by_example
        first, size = first_of(basis), basis.size - self.head_size  # nothing of a half that trains nothing
        values = np.zeros((len(visit.mask) if by_example else 1, size), np.float64)
        if self.kind != "frozen" and any(self.probed):
            lagrangian = LagrangianTerm(coded, visit.mask)
            term = lagrangian.each if by_example else lagrangian
            base = None if visit.z is None else term(visit.z)
            visit.z = None
            values += self._projected(request.round, visit, term, base).T
        if self.kind == "local":
            for row, example in zip(values, range(len(values)) if by_example else [None]):
                known = known_gradient(self.half, self.manifest, visit.batch.inputs, coded, visit.mask, example)
                row += first.project(known[: len(self.probed)])
        return values

    def _released(self, rows: Array, batch: Minibatch, request: Multiplier) -> Array:
        """``(P,)`` fp32: as measured, or clipped and noised; an example's vector is made that of its own mean loss."""
        if self.privacy is None or self.privacy.level is None:
            return rows[0].astype(np.float32)
        if self.privacy.by_example:
            terms = batch.terms
            rows = rows * (np.where(terms > 0, batch.num_terms, 0) / np.maximum(terms, 1))[:, None]
        return self.privacy.answer(rows, request.round, request.attempt, request.client)

    def _projected(self, round: int, visit: Visit, lagrangian: Callable[[Array], Any], base: Any) -> Array:
        """``v_p`` of what is probed, ``(P,)`` or ``(P, B)`` fp64; ``base``: ``⟨λ, z⟩``, None: both sides are run."""

        def term(probe: int, side: int) -> Any:
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
        basis = first_of(self.basis(round))
        assert isinstance(basis, SharedDirections)
        theta = self.optimizer.parameters[: len(self.probed)]
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
        """In what the round's answer is expressed."""
        basis = basis_of(self.answered_in, self.terms.seed, round, self.optimizer.sizes)
        return basis if self.terms.client is None else basis.of_clients([self.terms.client])


def first_of(basis: Basis) -> Basis:
    """Without a head's gradient."""
    return basis.first if isinstance(basis, Beside) else basis
