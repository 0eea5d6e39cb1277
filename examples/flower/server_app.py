"""The ServerApp: the server of ``hosfl serve``, and an invitation to it for every node."""

from __future__ import annotations

from commands import file, run
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from invitations import Invitations

from hosfl_lightning.recipe import command

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the run until it is over."""
    config = context.run_config
    plain = bool(config["insecure"])
    settings = {
        "trainer.max_rounds": config["rounds"],
        "listen": config["listen"],
        "clients": file(config["clients"]),
        "run": config["run"],
        "insecure": plain,
        "certs": "" if plain else config["certs"],
    }
    recipes = [f"--config={file(config[name])}" for name in ("shared", "recipe")]
    with Invitations(grid, float(config["longest"])):
        run(lambda args: command(["serve", *recipes, *args]), settings)
