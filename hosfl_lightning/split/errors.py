"""The error of everything that cuts a model."""


class SplitError(ValueError):
    """The model cannot be cut as asked; the message names the architecture or the setting, and the fix."""
