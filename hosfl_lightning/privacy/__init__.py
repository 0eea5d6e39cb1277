"""Differential privacy of what a client sends: settings, accountant, and an audit of the mechanism."""

from hosfl_lightning.privacy.settings import Privacy, TokenNoise

__all__ = ["Privacy", "TokenNoise"]
