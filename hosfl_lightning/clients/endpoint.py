"""One client's side of the conversation: messages in, messages out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from hosfl_client.privacy import Mechanism, NoiseKey
from hosfl_client.refusals import EndpointError, TermsError
from hosfl_client.wire.terms import RULES, difference
from hosfl_lightning.clients.catch_up import client_state, load_state, state_digest
from hosfl_lightning.clients.cohort import Cohort
from hosfl_lightning.optim import Basis, UpdateRule, ZerothOrder, basis_of, estimator_of, rule_of
from hosfl_lightning.optim.compiled import eager
from hosfl_lightning.parts import PartError
from hosfl_lightning.split.run import run
from hosfl_lightning.wire import (
    Codec,
    HeldOutRequest,
    Message,
    RoundEnd,
    SmashedData,
    StepRequest,
    Terms,
    UnlabelledData,
    Update,
    manifest,
)

if TYPE_CHECKING:
    from hosfl_client.secure.participants import Participants

#: The minibatches of some clients at a local step, counted over all rounds.
ClientData = Callable[[list[int], int], Cohort]


class Endpoint(ABC):
    """One client, or several that run as one batch; knows no server, only what is sent to it.

    Args:
        model: A `hosfl_lightning.models.SplitModule`, of which nothing is used but what a client holds.
        data: Its minibatches.
        terms: The contract of the run.
        fabric: Device and precision.

    Attributes:
        trained: What it trains, by name, in manifest order.
        client: The engine that holds it, and the rule that moves it.
        checks: Whether its first answer looks at μ and warns.

    Raises:
        TermsError: The model trains other tensors than the terms say.
    """

    #: By the name that `Terms.endpoint` gives.
    known: ClassVar[dict[str, type[Endpoint]]] = {}
    #: Its part in secure sums; None: its answers travel in the open.
    hidden: Participants | None = None
    #: Of the model: the client's ``half`` (a model with ``part="client"`` will do), or the ``whole`` of it.
    needs: ClassVar[Literal["half", "whole"]] = "half"
    #: Whether all that it sends can be noised: z by `smashed`, and one vector of coefficients.
    noises: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = Endpoint.known.setdefault(cls.__name__, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"an endpoint {cls.__name__} is in {known.__module__} already; terms name it: rename one")
        Endpoint.known[cls.__name__] = cls  # of a module that was loaded again

    def __init__(self, model: Any, data: ClientData, terms: Terms, fabric: Fabric) -> None:
        self.model, self.data, self.terms, self.fabric = model, data, terms, fabric
        if terms.rules != RULES:
            raise TermsError(
                f"the run's updates move weights by {terms.rules!r:.80}, this client's by {RULES!r}, to other bits; "
                "use the server's version of hosfl_lightning"
            )
        if (labels := terms.settings.get("labels", "server")) != model.labels:
            raise TermsError(
                f"the run keeps labels at the {labels!s:.80}, this model at the {model.labels}; set "
                f"model.init_args.labels: {labels!s:.80}"
            )
        half, self.trained = self.hold(model, terms.settings)
        if (differ := difference(manifest(self.trained), terms.manifest)) is not None:
            raise TermsError(
                f"the model trains other tensors at a client than the run, the first is {differ}; use the server's "
                "cut, adapters and dtype"
            )
        if unknown := sorted({*terms.codecs.values()} - Codec.known.keys()):
            raise TermsError(
                f"the run's messages come in the codec {unknown[0]!r:.80}, which is not known here, only "
                f"{', '.join(Codec.known)}; import its class (hosfl join: --imports)"
            )
        if terms.privacy and not self.noises:
            raise TermsError(f"the run's clients add noise, and a {type(self).__name__} cannot; set trainer.privacy: "
                             "null at the server")  # fmt: skip
        #: Its noise is from a secret of this process, until another key is put in its place.
        self.privacy = Mechanism(terms.privacy, NoiseKey()) if terms.privacy else None
        try:
            self.client: Any = self.make_client(half)
        except PartError as error:  # a rule or an estimator that is not known here
            raise TermsError(str(error)) from error
        self.checks = True
        #: Its validation data, where it has some: the batch of a number.
        self.held_out: ClientData | None = None
        self.held_out_batches = 0
        self._open = (-1, -1)

    @staticmethod
    def of(model: Any, data: ClientData, terms: Terms, fabric: Fabric) -> Endpoint:
        """The endpoint that the terms name.

        Raises:
            TermsError: It is not known here, or cannot take part.
        """
        kind = Endpoint.known.get(terms.endpoint)
        if kind is None:
            raise TermsError(
                f"the run's clients are a {terms.endpoint!r}, which is not known here; import its module first (hosfl "
                "join: --imports)"
            )
        return kind(model, data, terms, fabric)

    # ---- what a method says about its client

    @staticmethod
    def hold(model: Any, settings: dict[str, Any]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """What a client holds of the model, and what of it is trained: the layers before the cut."""
        return model.client_half, model.client_parameters

    @abstractmethod
    def make_client(self, half: nn.Module) -> Any:
        """The engine, over what `hold` gave."""

    def respond(self, requests: Sequence[Any]) -> list[Message]:
        """One answer to each request of one kind; a subclass knows some kinds and hands the others on.

        Raises:
            EndpointError: A kind that this client does not take.
        """
        raise EndpointError(f"a client with {type(self).__name__} does not take a {requests[0].kind}")

    def apply(self, message: Update) -> None:
        """Step 6: all clients move alike."""
        self.client.apply(message)

    def end(self, message: RoundEnd) -> None:
        """An attempt is over."""
        self.forget()

    def forget(self) -> None:  # noqa: B027  # some hold nothing
        """Drop whatever is held of a round."""

    # ---- the conversation

    def handle(self, requests: Sequence[Message]) -> list[Message]:
        """Answer the server.

        Args:
            requests: Of one kind; one a client, ascending, or one for everybody.

        Returns:
            One answer to each, or nothing to what is for everybody.
        """
        first = requests[0]
        if isinstance(first, Update):
            self.forget()  # before it moves: who holds an open round would put θ back
            self.apply(first)
            return []
        if isinstance(first, RoundEnd):
            self.end(first)
            return []
        place = (first.round, getattr(first, "attempt", 0))
        if place != self._open:
            self.forget()
            self._open = place
        return self.respond(requests)

    # ---- what most of them need

    @property
    def below(self) -> dict[str, nn.Parameter]:
        """Of what is trained, what the engine measures a gradient of."""
        return self.trained

    @property
    def rule(self) -> UpdateRule:
        """As the run begins."""
        return rule_of(self.terms.rule)

    def basis(self, round: int) -> Basis:
        """In what the round's answers and its update are expressed."""
        sizes = [p.numel() for p in self.trained.values()]
        return basis_of(self.terms.basis, self.terms.seed, round, sizes)

    def zeroth_order(self, module: nn.Module, estimator: str | None = None) -> ZerothOrder:
        """An optimizer of what is trained, probed layer by layer in ``module``, with the settings of the terms."""
        settings = self.terms.settings
        return ZerothOrder(
            self.below.items(), self.rule, module=module, probes=settings["probes"], mu=settings["mu"],
            estimator=estimator or estimator_of(settings), distribution=settings["distribution"], seed=self.terms.seed,
        )  # fmt: skip

    def smashed(
        self, cohort: Cohort, z: Tensor, request: StepRequest | Any, step: int = 0
    ) -> list[SmashedData | UnlabelledData]:
        """z, mask and labels of each client, or how many loss terms it has where the labels stay with it.

        Padding and the joint batch's extra width stay behind.

        Args:
            cohort: Whose z it is.
            z: ``(B, S, h)``.
            request: What it answers.
            step: The local step.
        """
        packed: list[SmashedData | UnlabelledData] = []
        codec = self.terms.codecs["smashed_data"]
        for client, (rows, width, num_terms) in cohort.parts().items():
            mask = cohort.mask(rows, width)
            place = request.kind, request.round, request.attempt, step, client
            sent = self.noised(z[rows, :width], mask, SmashedData.kind, place)
            if self.model.labels == "client":
                packed.append(UnlabelledData.pack(
                    request.round, client, sent, mask, num_terms=num_terms, codec=codec, seed=self.terms.seed,
                    step=step, attempt=request.attempt,
                ))  # fmt: skip
                continue
            packed.append(SmashedData.pack(
                request.round, client, sent, cohort.labels(rows, width), mask, codec, self.terms.seed, step,
                request.attempt,
            ))  # fmt: skip
        return packed

    def noised(self, rows: Tensor, mask: Tensor, what: str, place: tuple[object, ...], scale: float = 1.0) -> Tensor:
        """Clipped and noised token by token, as the terms say; in its own dtype.

        Args:
            rows: ``(B, S, h)`` of one client.
            mask: ``(B, S)`` bool, on the host: the others do not travel.
            what: Kind of the message, as `hosfl_client.privacy.Mechanism.tokens` takes it.
            place: Kind of the request, round, attempt, step and client.
            scale: How many times as large they are noised.
        """
        if self.privacy is None or self.privacy.of_tokens[what][0] is None:
            return rows
        mask, sent = mask.to(rows.device), rows.clone()
        released = self.privacy.tokens((rows[mask].float() * scale).cpu().numpy(), what, place)
        sent[mask] = (torch.from_numpy(released) / scale).to(rows)
        return sent

    @property
    def shared(self) -> dict[str, nn.Parameter]:
        """Of what is trained, what is the same at all clients: what the server has a replica of."""
        return self.trained

    @property
    def shared_rule(self) -> ZerothOrder:
        """The rule that moves `shared`."""
        return self.client.optimizer

    def own_parameters(self) -> dict[int, dict[str, Tensor]]:
        """The rest of it by client and name, of those that have moved; the others hold the start."""
        return {}

    def slots(self, client: int) -> list[Tensor]:
        """The optimizer state that a client keeps from round to round."""
        return [t for held in self.shared_rule.state.values() for t in held.values()]

    # ---- a client on a machine of its own

    @property
    def version(self) -> int:
        """Updates that it holds."""
        return self.shared_rule.steps

    def shared_state(self) -> dict[str, Tensor]:
        """What all clients hold at this version."""
        return client_state(self.shared_rule)

    def load_shared(self, state: Mapping[str, Tensor], version: int) -> None:
        """Go on from a `shared_state`.

        Raises:
            CatchUpError: It is of other tensors. Nothing has moved then.
        """
        load_state(self.shared_rule, dict(state), version)

    def digest(self) -> str:
        """Of a `shared_state` and its version."""
        return state_digest(self.shared_rule)

    @torch.no_grad()
    def hold_out(self, request: HeldOutRequest) -> list[Any]:
        """z of a batch of its validation data, at what is held now.

        Raises:
            EndpointError: This client has no such data, or keeps its labels.
        """
        if self.model.labels == "client":
            raise EndpointError(f"client {request.client} is asked for labels of validation data, and keeps its labels")
        if self.held_out is None:
            raise EndpointError(f"client {request.client} is asked for validation data, and has none")
        cohort = self.held_out([request.client], request.step)
        with self.fabric.autocast(), eager(self.model.compiles):
            z = run(self.model.client_half, self.fabric.to_device(cohort.batch))
        return self.smashed(cohort, z, request, request.step)

    def own_state(self, client: int) -> dict[str, Tensor] | None:
        """What the client alone knows of its part in the round, which the server has not counted; None: nothing."""
        return None

    def load_own(self, client: int, state: dict[str, Tensor] | None) -> None:  # noqa: B027
        """Go on from an `own_state` that counts; None: begin anew."""

    # ---- what goes on from a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """What the clients keep from round to round, beside what is trained of the model."""
        return {"client_optimizer": self.shared_rule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.shared_rule.load_state_dict(state["client_optimizer"])
