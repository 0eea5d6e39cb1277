"""What a client is asked again after its connection was cut."""

from __future__ import annotations

from hosfl_lightning.fleet.conversation import Conversation, Exchange
from hosfl_lightning.wire import SmashedData, StepRequest, checksum, encode


def test_who_was_cut_off_is_asked_for_what_it_has_not_answered_and_who_has_forgotten_for_all() -> None:
    conversation = Conversation()
    frames = [encode(StepRequest(0, 1, step=step)) for step in range(3)]
    for step, frame in enumerate(frames):
        conversation.ask(Exchange(StepRequest(0, 1, step=step), frame, [SmashedData]))
    assert conversation.again(forgotten=False) == frames
    answer = encode(StepRequest(0, 1, step=9))
    awaited = conversation.awaited
    assert awaited is not None and awaited.frame == frames[0]
    assert not conversation.knows(answer)
    awaited.digest = checksum(answer)
    conversation.answered = 1
    assert conversation.knows(answer)
    assert conversation.again(forgotten=False) == frames[1:]
    assert conversation.again(forgotten=True) == frames
    assert conversation.awaited is awaited  # its answer is compared with the first
    assert not conversation.knows(answer)  # on the new connection it has not come yet
    conversation.answered = 3
    assert conversation.awaited is None
