"""``hosfl``: the commands."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from pathlib import Path

from hosfl_lightning.mistyped import mistyped
from hosfl_lightning.rendering import fail, nearest, process
from hosfl_lightning.usage import usage

#: Of one run, with a recipe.
OF_A_RUN = ("fit", "serve", "validate", "test", "predict", "export", "replay")
#: Of several runs, so that they take no recipe of one.
COMPARISONS = ("compare", "report")
COMMANDS = ("advise", *OF_A_RUN, "attack", *COMPARISONS, "certs", "join", "export-client")
#: By the option that names a run, whose folder has its recipe.
TAKES_A_RUN = {
    **dict.fromkeys(("fit", "validate", "test", "predict", "export"), "--ckpt_path"),
    **dict.fromkeys(("replay", "attack"), "--run"),
}


def main(args: list[str] | None = None) -> None:
    """Entry point of ``hosfl``.

    Ends with exit code 2 and one line for what the user can mend; ``HOSFL_TRACEBACK=1`` shows where it came from.
    """
    args = sys.argv[1:] if args is None else args
    if args and args[0] in ("-h", "--help"):
        print(usage())
        return
    # As python -m does, for parts of one's own; last, so that they hide nothing.
    sys.path += [here for here in [os.getcwd()] if here not in sys.path]
    args = ["--insecure=true" if arg == "--insecure" else arg for arg in args]  # said aloud, it needs no value
    if args and not args[0].startswith("-") and args[0] not in COMMANDS:
        fail(f"{args[0]!r} is no command; there are {', '.join(COMMANDS)}{nearest(args[0], COMMANDS)}")
    if args and args[0] in OF_A_RUN and (wrong := mistyped(args[0], args[1:])):
        fail(wrong)  # what the parser would say, seconds later
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


def _libraries() -> None:
    """Import what every command needs, once; on a terminal, say so, as it takes seconds.

    The collector rests: it would walk through all that is made, again and again, and what libraries make stays as long
    as the process does. So it need not look at it later either.
    """
    name, collects = f"{__package__}.recipe", gc.isenabled()
    if name in sys.modules:
        return
    if sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0":
        print("hosfl: loading PyTorch and Lightning", file=sys.stderr, flush=True)
    gc.disable()
    try:
        import_module(name)
        gc.freeze()
    finally:
        if collects:
            gc.enable()


def _run(args: list[str]) -> None:
    _libraries()
    from hosfl_lightning.recipe import USER_ERRORS, command

    try:
        if args[:1] and args[0] in COMPARISONS:
            # Here, since it draws pictures: no other command has to wait for that library.
            from hosfl_lightning.compare.command import main as compare

            compare(args)
        elif args[:1] == ["advise"]:
            from hosfl_lightning.advise.command import main as advise

            advise(args)
        elif args[:1] == ["attack"]:
            from hosfl_lightning.attack.command import main as attack

            attack(_with_recipe(args))
        elif args[:1] == ["join"]:
            from hosfl_lightning.client_command import main as join

            join(args[1:])
        elif args[:1] == ["export-client"]:
            from hosfl_lightning.device.command import main as export_client

            export_client(args[1:])
        else:
            command(_with_recipe(args))
    except KeyboardInterrupt as interrupt:
        if not process():
            print(f"hosfl: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(130) from None
    except (*USER_ERRORS, RuntimeError) as error:
        # EarlyStopping's complaint of a metric that is not there has no class of its own.
        ours = isinstance(error, USER_ERRORS) or "conditioned on metric" in str(error)
        if os.environ.get("HOSFL_TRACEBACK") or not ours:
            raise
        fail(str(error))
    finally:
        wandb = sys.modules.get("wandb")  # no run is open of what nobody has imported
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=int(sys.exc_info()[0] is not None))


def _with_recipe(args: list[str]) -> list[str]:
    """A command on a run takes the recipe from its folder, unless one is given; ``last`` is the run's of the recipe.

    Raises:
        FileNotFoundError: The folder is not that of a run.
        ValueError: ``best``, which nobody has written down.
    """
    option = TAKES_A_RUN.get(args[0]) if args else None
    if option is None:
        return args
    given, config = _given(args, option), _given(args, "--config", "-c")
    if given in ("last", "best"):
        return _of_the_config(args, option, given, config)
    if given is None or config is not None:
        return args
    path = Path(given)
    folders = [path] if path.is_dir() or option == "--run" else [*path.parents][:3]
    found = next((one / "config.yaml" for one in folders if (one / "config.yaml").is_file()), None)
    if found is None and (path.is_dir() or option == "--run"):
        raise FileNotFoundError(f"{option}: {given} is no run folder: there is no config.yaml in it")
    return args if found is None else [args[0], f"--config={found}", *args[1:]]


def _of_the_config(args: list[str], option: str, given: str, config: str | None) -> list[str]:
    """``last`` and ``best`` mean something beside the run's own recipe."""
    run = Path(config).parent if config is not None else Path("RUN")
    there = sorted((run / "checkpoints").rglob("*.ckpt"))
    if given == "last" and there:
        return [{given: str(run), f"{option}={given}": f"{option}={run}"}.get(arg, arg) for arg in args]
    names = f"one of {', '.join(map(str, there))}" if there else "RUN (its last one) or RUN/checkpoints/FILE.ckpt"
    raise ValueError(f"{option}: {given!r} is not known here; give {names}")


def _given(args: list[str], *options: str) -> str | None:
    """The value of an option, as ``--option=value`` or ``--option value``."""
    pairs = zip(args, [*args[1:], ""])
    return next((a.partition("=")[2] or after for a, after in pairs if a.partition("=")[0] in options), None)


if __name__ == "__main__":  # ``torchrun -m hosfl_lightning.cli``
    main()
