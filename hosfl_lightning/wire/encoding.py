"""Messages with tensors of PyTorch as bytes, and back."""

from __future__ import annotations

from hosfl_client.wire.frames import Frames
from hosfl_lightning.wire.arrays import TENSORS
from hosfl_lightning.wire.messages import MESSAGES, Message

_FRAMES: Frames[Message] = Frames(TENSORS, MESSAGES)
encode = _FRAMES.encode
encoded_size = _FRAMES.encoded_size
decode = _FRAMES.decode
check_finite = _FRAMES.check_finite
