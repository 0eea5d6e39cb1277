"""Whether this client can take part in a run, by its terms; what it cannot is refused by name, with the fix."""

from __future__ import annotations

from typing import Any

from hosfl_client.codecs import CODECS, TOKEN_CODECS
from hosfl_client.manifest import Manifest
from hosfl_client.refusals import TermsError
from hosfl_client.wire import Terms
from hosfl_client.wire.terms import RULES, difference

#: What clients of a run may be, by the name of their endpoint.
ENDPOINTS = ("MixedEndpoint", "ProbedEndpoint", "SplitEndpoint")
#: Kinds of a `SplitEndpoint`, and of a client of a `MixedEndpoint`.
KINDS = ("forward_only", "local", "frozen")
ESTIMATORS = ("forward", "central")


def check_terms(terms: Terms, manifest: Manifest) -> None:
    """Raises TermsError unless a client with that half can take part."""
    settings, kind = terms.settings, kind_of(terms)
    if terms.rules != RULES:
        raise TermsError(
            f"the run's updates move weights by {terms.rules!r:.80}, this client's by {RULES!r}, to other bits; "
            "install the hosfl-client of the server's version"
        )
    labels = settings.get("labels", "server")
    if (labels == "client") != (manifest.head is not None):
        raise TermsError(f"the run keeps labels at the {labels!s:.80}, and this half was exported for a run that does "
                         "not; export it from the server's recipe")  # fmt: skip
    if terms.endpoint not in ENDPOINTS:
        raise TermsError(f"the run's clients are a {terms.endpoint!r:.80}, for which this client has no engine; take "
                         "HOSFL or HOSL at the server, or a client in PyTorch (hosfl join)")  # fmt: skip
    if kind not in (*KINDS, "probed"):
        raise TermsError(
            f"the run's clients are of the kind {kind!r:.80}, which backpropagates; take HOSFL with estimator: "
            "forward, central or local at the server, or a client in PyTorch (hosfl join)"
        )
    if kind in ("forward_only", "probed") and settings.get("estimator") not in ESTIMATORS:
        raise TermsError(
            f"the run's estimator is {settings.get('estimator')!r:.80}, and an exported half runs forwards alone; set "
            "trainer.algorithm.init_args.estimator to forward or central"
        )
    if terms.privacy and (terms.endpoint != "SplitEndpoint" or (kind == "frozen" and terms.privacy["level"])):
        raise TermsError(f"the run's clients add noise, and a {terms.endpoint:.80} cannot; set trainer.privacy: null "
                         "at the server")  # fmt: skip
    if kind == "local" and not manifest.side:
        raise TermsError("the run's clients know the gradient of a side adapter, and this half was exported without "
                         "one; export it from the server's recipe")  # fmt: skip
    trained = [entry for entry in manifest.terms if entry[0] in names_of(terms, manifest)]
    if (differ := difference(trained, terms.manifest)) is not None:
        raise TermsError(f"the half trains other tensors than the run, the first is {differ}; export it from the "
                         "server's recipe (hosfl export-client)")  # fmt: skip
    if terms.backbone not in ("", manifest.backbone):
        raise TermsError("the half's frozen weights are not those of the run; export it from the server's recipe")
    if terms.precision != manifest.precision:
        raise TermsError(f"the run computes in {terms.precision!r:.80}, the exported half in {manifest.precision!r}; "
                         f"set trainer.precision: {manifest.precision}")  # fmt: skip
    for name, codec in terms.codecs.items():
        known = CODECS if name == "gradient" else TOKEN_CODECS
        if codec not in known:
            raise TermsError(f"the run takes for its {name:.80} the codec {codec!r:.80}, this client only "
                             f"{', '.join(known)}; set trainer.codec to these")  # fmt: skip


def names_of(terms: Terms, manifest: Manifest) -> list[str]:
    """What a client of the run trains: all of the half's, or its head alone beside a half that is frozen."""
    alone = manifest.head is not None and kind_of(terms) == "frozen"
    return manifest.of_head if alone else [name for name, *_ in manifest.parameters]


def kind_of(terms: Terms) -> Any:
    """Of a client: one of `KINDS`, ``probed`` whose probes the server evaluates, or another."""
    if terms.endpoint == "MixedEndpoint":
        return terms.settings["kinds"][terms.settings["kind_of"][terms.client]]
    return "probed" if terms.endpoint == "ProbedEndpoint" else terms.settings.get("kind")


def basis_of_terms(terms: Terms) -> dict[str, Any]:
    """In what this client answers λ, as `hosfl_client.basis_of.basis_of` takes it; empty: it does not."""
    settings = terms.settings
    if terms.endpoint != "MixedEndpoint":
        return terms.basis
    if kind_of(terms) == "frozen":
        return {}
    probes = settings["probes_of"][settings["kind_of"][terms.client]]
    directions = {"kind": "shared_directions", "probes": probes, "distribution": settings["distribution"]}
    return directions if probes else {"kind": "dense"}
