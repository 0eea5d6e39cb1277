"""The ClientApp: ``hosfl join`` for a whole run, within one message."""

from __future__ import annotations

from commands import file, run
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from hosfl_lightning.client_command import main as join

app = ClientApp()


@app.train()
def take_part(message: Message, context: Context) -> Message:
    """Stay with the server until the run is over; what the client keeps lies in the SuperNode's working folder.

    Raises:
        ValueError: The node has no number.
        RuntimeError: ``hosfl join`` could not take part.
    """
    config, node = context.run_config, context.node_config
    plain, own, partition = bool(config["insecure"]), node.get("recipe", ""), node.get("partition-id", "")
    if partition == "" and (plain or not own):
        raise ValueError("--node-config: give partition-id=K, the client's number in clients.yaml")
    settings = {
        "config": own or file(config["shared"]),
        "server": config["server"],
        "index": "" if own else partition,  # a recipe of the node's own has the node's data alone
        "name": f"site-{partition}" if plain else "",
        "insecure": plain,
        "certs": "" if plain else node.get("certs", ""),
        "give_up": config["give-up"],
    }
    run(join, settings)
    return Message(RecordDict(), reply_to=message)
