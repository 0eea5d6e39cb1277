"""What a user should hear of, once."""

from lightning.pytorch.utilities.rank_zero import rank_zero_only


@rank_zero_only
def say(line: str) -> None:
    """Print a line, in the first process alone."""
    print(line, flush=True)
