"""Messages with tensors of PyTorch as bytes, and back."""

from __future__ import annotations

from hosfl_client.wire.frames import Frames
from hosfl_lightning.wire.arrays import TENSORS
from hosfl_lightning.wire.messages import MESSAGES, Message

FRAMES: Frames[Message] = Frames(TENSORS, MESSAGES)
encode = FRAMES.encode
encoded_size = FRAMES.encoded_size
decode = FRAMES.decode
check_finite = FRAMES.check_finite
