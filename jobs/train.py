"""Train or fine-tune a Vision Transformer; leaves a checkpoint that jobs/evaluate.py takes as it is.

    python jobs/train.py --data data/cxr --model vit_tiny_patch16_224 --output runs/train-1

One CPU, several GPUs (`--num-workers 4`) or a Ray cluster (`--address`) with the same command; `--help` lists options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from xaibatch.cli import run_app
from xaibatch.cli.train import train

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(train)
    run_app(app)
