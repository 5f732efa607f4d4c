"""The main job: explain a Vision Transformer on chest X-rays and score the explanations.

The same script runs plainly (`python jobs/evaluate.py ...`), under `ray job submit -- python jobs/evaluate.py ...` and
against an existing cluster (`--address`). `--help` lists the options; jobs/README.md has data sets and clusters.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from xaibatch.cli import run_app
from xaibatch.cli.evaluate import evaluate

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(evaluate)
    run_app(app)
