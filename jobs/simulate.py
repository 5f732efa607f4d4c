"""Simulated radiographs with exact lesion masks, lung masks and lesion-free twins; synthetic, not for clinical use.

    python jobs/simulate.py --num 3000 --seed 7 --output data/simulated

runs on all CPUs of this machine or of a Ray cluster (`--address`), `--no-ray` in one process. `--help` lists options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from xaibatch.cli import run_app
from xaibatch.cli.simulate import simulate

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(simulate)
    run_app(app)
