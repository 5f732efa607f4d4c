"""`xaibatch simulate` and `xaibatch train`: make synthetic radiographs with known truth, train a classifier."""

import typer


def add_to(app: typer.Typer) -> None:
    """Wired when the jobs' functions exist."""
