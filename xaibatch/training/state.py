"""What a run has reached comes in after each epoch; files that survive a kill, and the final ones, go out."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from xaibatch.data.preprocess import Preprocessing
from xaibatch.errors import RunFolderError
from xaibatch.training.checkpoint import write_bytes, write_checkpoint
from xaibatch.training.curve import draw_learning_curve
from xaibatch.training.model import Averaged
from xaibatch.training.options import TrainOptions

FREE_TO_CHANGE = ("output", "cache_mib", "cpus_per_worker", "use_gpu", "patience", "num_workers")
"""Options that a resume may change: they do not change what is learnt (workers do so by rounding only)."""


class RunState:
    """The run's folder: history, resumable state, best model, final metrics and picture."""

    def __init__(self, folder: Path, options: TrainOptions) -> None:
        self.folder = folder
        self.history: list[dict[str, Any]] = []
        self.model_path, self.curve_path = folder / "model.safetensors", folder / "learning_curve.png"
        self._state_path = folder / "state.pt"
        if folder.exists() and not folder.is_dir():
            raise RunFolderError(f"{folder} is a file; the output of a training run is a folder")
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, options: TrainOptions) -> dict[str, Any] | None:
        """The stored state, None for a new run. Raises RunFolderError where the folder holds a run of other options."""
        if not self._state_path.is_file():
            return None
        stored: dict[str, Any] = torch.load(self._state_path, map_location="cpu", weights_only=True)
        before, now = json.loads(stored["options"]), _essential(options)
        different = sorted(key for key in now if before.get(key) != now[key])
        if different:
            told = ", ".join(f"{key} was {before.get(key)!r}, now {now[key]!r}" for key in different)
            raise RunFolderError(f"{self.folder} holds a run with other options ({told}): give another output folder")
        self.history = json.loads(stored["history"])
        return stored

    def is_over(self, options: TrainOptions, elapsed_s: float) -> bool:
        """Whether patience or the clock has run out."""
        if not self.history:
            return False
        if options.max_minutes is not None and elapsed_s >= 60 * options.max_minutes:
            return True
        scores = [row["val"]["balanced_accuracy"] for row in self.history]
        return len(scores) - (scores.index(max(scores)) + 1) >= options.patience

    @property
    def best_epoch(self) -> int:
        return max(self.history, key=_quality)["epoch"]

    def add(self, row: dict[str, Any]) -> bool:
        """Append an epoch; returns whether it is the best so far (ties: the lower loss on val)."""
        self.history.append(row)
        return self.best_epoch == row["epoch"]

    def save(
        self,
        options: TrainOptions,
        model: nn.Module,
        averaged: Averaged,
        optimiser: torch.optim.Optimizer,
        scaler: Any,
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        *,
        better: bool,
    ) -> None:
        """Write the best model if it is one, then the state: a kill in between only repeats an epoch."""
        if better:
            row = self.history[-1]
            record = {
                "model": options.model,
                "epoch": row["epoch"],
                "val": {k: row["val"][k] for k in ("balanced_accuracy", "accuracy", "auroc", "ece")},
                "options": _essential(options),
            }
            write_checkpoint(self.model_path, averaged.model.state_dict(), class_names, preprocessing, record=record)
        stream = io.BytesIO()
        stored = {
            "options": json.dumps(_essential(options)), "history": json.dumps(self.history),
            "model": model.state_dict(), "averaged": averaged.model.state_dict(), "num_updates": averaged.num_updates,
            "optimiser": optimiser.state_dict(), "scaler": scaler.state_dict(),
        }  # fmt: skip
        torch.save(stored, stream)
        write_bytes(self._state_path, stream.getvalue())
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        write_bytes(self.folder / "history.jsonl", lines.encode())

    def load_best(self, model: nn.Module) -> None:
        model.load_state_dict(load_file(self.model_path))

    def write_results(self, results: Mapping[str, Any]) -> int:
        """Write metrics and learning curve; returns the epoch of the best weights."""
        content = json.dumps({"best_epoch": self.best_epoch, **results}, indent=2) + "\n"
        write_bytes(self.folder / "metrics.json", content.encode())
        draw_learning_curve(self.history, self.curve_path)
        return int(self.best_epoch)


def _quality(row: Mapping[str, Any]) -> tuple[float, float]:
    return (row["val"]["balanced_accuracy"], -row["val"]["nll"])


def _essential(options: TrainOptions) -> dict[str, Any]:
    return {key: value for key, value in options.model_dump(mode="json").items() if key not in FREE_TO_CHANGE}
