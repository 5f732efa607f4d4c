"""Make the embedded radiographs and their classifier again (about an hour on two cores; needs xaibatch[simulate]).

    python jobs/train_embedded.py --work build/embedded --output build/embedded/vit_tiny_synthetic.safetensors

Not by the training job, and why: see xaibatch/training/shipped.py.

The 48 radiographs themselves: python jobs/simulate.py --num 48 --seed 48 --output xaibatch/embedded/radiographs \\
    --set 'split_shares={"test": 1.0}'
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from xaibatch.cli import run_app
from xaibatch.training.shipped import make


def main(
    work: Annotated[Path, typer.Option(help="folder for rendered poses and the resumable state")],
    output: Annotated[Path, typer.Option(help="the checkpoint to write (.safetensors)")],
    processes: Annotated[int, typer.Option(min=1, help="one-thread processes")] = 2,
) -> None:
    """Render the training poses, train from scratch by the twin curriculum, write checkpoint and record."""
    make(work, output, num_processes=processes)
    print(output.with_suffix(".record.json").read_text())


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    run_app(app)
