"""Trained weights, classes and preprocessing come in; one safetensors file that the evaluation takes goes out."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from safetensors.torch import save
from torch import Tensor

from xaibatch.data.preprocess import Preprocessing


def write_checkpoint(
    path: Path,
    state: Mapping[str, Tensor],
    class_names: Sequence[str],
    preprocessing: Preprocessing,
    *,
    record: Mapping[str, object],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `path` at once (temporary name, then rename).

    Metadata: `classes` (JSON list in the order of the logits), `preprocessing` (the whole record), `mean` and `std` for
    readers that know only those, `input_size`, and `record` (how it was made; values become JSON).
    """
    metadata = {
        "classes": json.dumps(list(class_names)),
        "preprocessing": preprocessing.model_dump_json(exclude={"source"}),
        "mean": ",".join(map(str, preprocessing.mean)),
        "std": ",".join(map(str, preprocessing.std)),
        "input_size": "x".join(map(str, preprocessing.image_size)),
        **{key: value if isinstance(value, str) else json.dumps(value) for key, value in record.items()},
    }
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    write_bytes(path, save(tensors, metadata))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is either there in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)
