"""What ``hosfl --help`` says, which waits for no library."""

from __future__ import annotations

from textwrap import wrap

WIDTH, COLUMN = 80, 15
HEAD = "usage: hosfl COMMAND [--config RECIPE.yaml] [--SETTING VALUE ...]"
ABOUT = "Fine-tune a split model without backprop on the clients."
MORE = "hosfl COMMAND --help lists its settings."
#: Commands with what they do, by what they are for.
GROUPS: dict[str, dict[str, str]] = {
    "one run, from a recipe": {
        "fit": "Run the rounds, then the controls; leaves the adapter, tables and a summary in the run's folder.",
        "validate": "One pass over the validation data, of the model as it begins or of --ckpt_path RUN.",
        "test": "One pass over the test data, likewise.",
        "predict": "Predictions of every batch, likewise.",
        "export": "Write the adapter of --ckpt_path RUN as one standard PEFT folder.",
        "replay": "Rebuild what the clients hold at any round from the base model and the update log of --run RUN.",
    },
    "before it, and several": {
        "advise": "Which client to train, before training: what each should gain, and at what price.",
        "compare": "Several methods at equal conditions: tables and pictures.",
        "report": "The same from runs that are there.",
    },
    "clients on other machines": {
        "serve": "Run the rounds with clients that hosfl join; start it again and it goes on.",
        "join": "Take part in such a run, with the data of this machine.",
        "certs": "Certificates for both.",
        "export-client": "Write the client's half for devices without PyTorch (hosfl-client).",
    },
    "what the server learns": {
        "attack": "Try to recover the clients' data from what --run RUN has sent.",
    },
}  # fmt: skip


def usage() -> str:
    """The whole of it."""
    lines = [HEAD, "", ABOUT, MORE]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        for name, what in commands.items():
            first, *rest = wrap(what, WIDTH - COLUMN - 2)
            lines += [f"  {name:<{COLUMN}}{first}", *(" " * (COLUMN + 2) + line for line in rest)]
    return "\n".join(lines)
