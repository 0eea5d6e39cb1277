"""What clients see in place of the data as it is: sensors of images, and changes of texts."""

from hosfl_lightning.data.shift.blur import Blur
from hosfl_lightning.data.shift.cipher import Cipher
from hosfl_lightning.data.shift.contract import Sensor, Shift, TextShift, heard, seen
from hosfl_lightning.data.shift.light import ColourCast, Contrast
from hosfl_lightning.data.shift.noise import Noise, SensorPattern
from hosfl_lightning.data.shift.typing_noise import TypingNoise

__all__ = [
    "Blur",
    "Cipher",
    "ColourCast",
    "Contrast",
    "Noise",
    "Sensor",
    "SensorPattern",
    "Shift",
    "TextShift",
    "TypingNoise",
    "heard",
    "seen",
]
