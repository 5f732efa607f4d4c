"""How close to the bare forward pass, and how far ahead of the stock tools: one run, one table, one JSON.

    python jobs/benchmark.py explainers --images 4 --json explainers.json

Without --data it measures on random pictures and an untrained model. `--help` lists options; jobs/README.md has tables.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from xaibatch.benchmark.command import benchmark
from xaibatch.cli import run_app

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(benchmark)
    run_app(app)
