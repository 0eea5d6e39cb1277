"""``hosfl``: the commands."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from hosfl_lightning.rendering import fail, process

#: Of several runs, so that they take no recipe of one.
COMPARISONS = ("compare", "report")


def main(args: list[str] | None = None) -> None:
    """Entry point of ``hosfl``.

    Ends with exit code 2 and one line for what the user can mend; ``HOSFL_TRACEBACK=1`` shows where it came from.
    """
    args = sys.argv[1:] if args is None else args
    # As python -m does, for parts of one's own; last, so that they hide nothing.
    sys.path += [here for here in [os.getcwd()] if here not in sys.path]
    args = ["--insecure=true" if arg == "--insecure" else arg for arg in args]  # said aloud, it needs no value
    (_certs if args[:1] == ["certs"] else _run)(args)


def _certs(args: list[str]) -> None:
    """Apart from the rest, whose imports take seconds: it needs the extra ``remote`` alone."""
    try:
        from hosfl_lightning.link.command import main as certs

        certs(args[1:])
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, ImportError) as error:
        if os.environ.get("HOSFL_TRACEBACK"):
            raise
        fail(str(error))


def _run(args: list[str]) -> None:
    import wandb

    from hosfl_lightning.recipe import USER_ERRORS, command

    try:
        if args[:1] and args[0] in COMPARISONS:
            # Here, since it draws pictures: no other command has to wait for that library.
            from hosfl_lightning.compare.command import main as compare

            compare(args)
        elif args[:1] == ["join"]:
            from hosfl_lightning.client_command import main as join

            join(args[1:])
        else:
            command(_with_recipe(args))
    except KeyboardInterrupt as interrupt:
        if not process():
            print(f"hosfl: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(130) from None
    except USER_ERRORS as error:
        if os.environ.get("HOSFL_TRACEBACK"):
            raise
        fail(str(error))
    finally:
        if wandb.run is not None:
            wandb.finish(exit_code=int(sys.exc_info()[0] is not None))


def _with_recipe(args: list[str]) -> list[str]:
    """``replay`` on a run takes the recipe from its folder, unless one is given.

    Raises:
        FileNotFoundError: The folder is not that of a run.
    """
    if args[:1] != ["replay"] or any(arg.split("=")[0] in ("--config", "-c") for arg in args):
        return args
    pairs = zip(args, [*args[1:], ""])
    run = next((arg.partition("=")[2] or following for arg, following in pairs if re.match("--run(=|$)", arg)), None)
    if run is None:
        return args
    config = Path(run) / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"--run: {run} is no run folder: there is no {config.name} in it")
    return ["replay", f"--config={config}", *args[1:]]


if __name__ == "__main__":  # ``torchrun -m hosfl_lightning.cli``
    main()
