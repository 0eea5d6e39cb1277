"""A client of the test's own process, at the end of a real line: every frame of it may be changed on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hosfl_client.connection import Backoff, Connection
from hosfl_lightning import __version__
from hosfl_lightning.clients.endpoint import Endpoint
from hosfl_lightning.clients.joined import Joined
from hosfl_lightning.clients.own_state import OwnState
from hosfl_lightning.join import _endpoint
from hosfl_lightning.wire import Terms, decode, encode, peek
from tests.fleet.pipe_client import LENGTHS, model_of
from tests.fleet.test_pipe import CASES
from tests.random_tokens import RandomTokens

Frames = list[bytes]
Meddle = Callable[["Meddler", bytes], Frames]


def leave_alone(_: Meddler, frame: bytes) -> Frames:
    return [frame]


class Meddler(Joined):
    """What a client sends and hears passes through two functions.

    Attributes:
        sent: What it has sent, as it would have been without them.
        heard: What it has heard, likewise.
    """

    out: Meddle = staticmethod(leave_alone)
    into: Meddle = staticmethod(leave_alone)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sent: Frames = []
        self.heard: Frames = []

    def handle(self, frame: bytes) -> Frames:
        self.heard.append(frame)
        answers = [answer for one in self.into(self, frame) for answer in super(Meddler, self).handle(one)]
        self.sent += answers
        return [one for answer in answers for one in self.out(self, answer)]


class Puppet(threading.Thread):
    """The product's client, but for its meddling."""

    def __init__(
        self, stage: Any, name: str, out: Meddle = leave_alone, into: Meddle = leave_alone, index: int | None = None
    ) -> None:
        super().__init__(daemon=True)
        self.said: list[str] = []
        recipe = CASES[stage.case].recipe

        def model(part: str) -> Any:
            return model_of(stage.pretrained, part=part, **recipe)  # type: ignore[arg-type]

        def build(terms: Terms) -> Endpoint:
            endpoint = _endpoint(terms, model, RandomTokens(LENGTHS), index, "cpu")
            endpoint.checks = False  # it warns, which is an error here
            return endpoint

        self.joined = Meddler(
            name, __version__, build, OwnState(Path(stage.folder) / f"state_{name}"), 1, self.said.append,
        )  # fmt: skip
        self.joined.out, self.joined.into = out, into
        self.connection = Connection(stage.address, None, self.joined, backoff=Backoff(0.05, 0.2, 30.0))
        self.ended: str | BaseException | None = None

    def run(self) -> None:
        torch.set_num_threads(1)
        try:
            self.ended = self.connection.run()
        except Exception as error:
            self.ended = error

    def wait(self, seconds: float = 60.0) -> str | BaseException | None:
        self.join(seconds)
        assert not self.is_alive(), f"the puppet has not ended: {self.said}"
        return self.ended


def changed(frame: bytes, **fields: Any) -> bytes:
    """The same message with other fields, whatever is wrong with them."""
    message: Any = replace(decode(frame), **fields)  # type: ignore[call-overload]
    with mock.patch.object(type(message), "check", return_value=None):
        return encode(message, peek(frame).run_id)
