"""The history of a run comes in; the picture of its learning curve goes out."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from xaibatch.training.checkpoint import write_bytes


def draw_learning_curve(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG: losses of train and val on the left, accuracies on val on the right, the best epoch marked."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, scores = figure.subplots(1, 2)
    losses.plot(epochs, [row["train_loss"] for row in history], label="train (weighted, smoothed)", color="#4c72b0")
    losses.plot(epochs, [row["val"]["nll"] for row in history], label="val", color="#dd8452")
    losses.set(xlabel="epoch", ylabel="cross-entropy, nats")
    best = max(history, key=lambda row: row["val"]["balanced_accuracy"])
    for name, colour in (("balanced_accuracy", "#55a868"), ("accuracy", "#8c8c8c"), ("auroc", "#8172b3")):
        values = [row["val"][name] for row in history]
        scores.plot(epochs, values, label=f"val {name.replace('_', ' ')}", color=colour)
    scores.axvline(best["epoch"], color="#c44e52", linewidth=0.8, linestyle="--")
    scores.annotate(
        f"best {best['val']['balanced_accuracy']:.3f}", (best["epoch"], best["val"]["balanced_accuracy"]), (4, -14),
        textcoords="offset points", fontsize=9, color="#c44e52",
    )  # fmt: skip
    scores.set(xlabel="epoch", ylim=(0, 1.02))
    for axes in (losses, scores):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    write_bytes(path, stream.getvalue())
