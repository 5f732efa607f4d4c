"""A checkpoint file in, named tensors and what it records of itself out; no code in the file is ever run."""

import argparse
import hashlib
import io
import json
import pickle
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from xaibatch.data.storage import ReadOptions, absolute, is_file, join, one_line, parent, read_bytes
from xaibatch.errors import ModelError

PICKLE_SUFFIXES: Final = (".pth", ".pt", ".bin", ".ckpt", ".tar")
NESTED: Final = ("state_dict", "model_state_dict", "model", "model_ema", "state_dict_ema")
"""Keys under which training scripts put the weights; the first one that holds tensors is taken."""

PREFIXES: Final = ("module.", "_orig_mod.", "backbone.", "model.")
"""What wrappers put before every name: data parallel, torch.compile, this package's Classifier, Lightning."""

RECORDED: Final = ("classes", "class_names", "mean", "std", "preprocessing")
"""What is taken over from beside the weights of a `.pth`; a safetensors header is taken over whole."""

MAX_BYTES: Final = 64 << 30


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint's content.

    state:        weights by name, wrappers' prefixes stripped, in the file's dtype on the CPU.
    metadata:     what the safetensors header and a JSON beside the file say (the header wins).
    sha256:       of the file's bytes, hex.
    nested_under: key that held the weights, empty at the top level.
    """

    path: str
    state: Mapping[str, Tensor]
    sha256: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    nested_under: str = ""


def read_checkpoint(path: str) -> Checkpoint:
    """Read `.safetensors`, or a `.pth`/`.pt`/`.bin` that holds tensors only; local or any fsspec URL.

    Raises ModelError for a file that is missing, damaged, of another kind, without weights, or a pickle that asks to
    run code.
    """
    full = absolute(path)
    suffix = "." + full.lower().rpartition(".")[2]
    if suffix != ".safetensors" and suffix not in PICKLE_SUFFIXES:
        raise ModelError(f"checkpoint {path!r}: expected a file ending in .safetensors, {', '.join(PICKLE_SUFFIXES)}")
    try:
        content = read_bytes(full, ReadOptions(max_bytes=MAX_BYTES))
    except FileNotFoundError:
        raise ModelError(f"no checkpoint at {path!r}") from None
    except OSError as error:
        raise ModelError(f"checkpoint {path!r} cannot be read: {one_line(error)}") from None
    state, metadata, nested_under = (
        _safetensors(content, path) if suffix == ".safetensors" else _tensors_of_pickle(content, path)
    )
    return Checkpoint(
        path=path,
        state=_stripped(state, path),
        sha256=hashlib.sha256(content).hexdigest(),
        metadata={**json_beside(full), **metadata},
        nested_under=nested_under,
    )


def json_beside(path: str) -> dict[str, Any]:
    """What a JSON file beside the checkpoint says: `<file>.json`, `<file without suffix>.json`, `classes.json` or
    timm's `config.json`.

    A list is taken for the class names in order, a mapping of indices to names (or names to indices) likewise. The
    first file that exists counts. Raises ModelError where it is no JSON.
    """
    folder, name = parent(path), path.rpartition("/")[2]
    for candidate in (f"{name}.json", f"{name.rpartition('.')[0]}.json", "classes.json", "config.json"):
        beside = join(folder, candidate)
        if not is_file(beside):
            continue
        try:
            content = json.loads(read_bytes(beside))
        except (ValueError, OSError) as error:
            raise ModelError(f"{candidate} beside the checkpoint is not JSON: {one_line(error)}") from None
        if isinstance(content, list):
            content = {"classes": content}
        if not isinstance(content, dict):
            raise ModelError(
                f"{candidate} beside the checkpoint: expected a list of class names or an object, "
                f"received {type(content).__name__}"
            )
        return (
            {"classes": content, "json": candidate}
            if _is_mapping_of_classes(content)
            else {**content, "json": candidate}
        )
    return {}


def class_names_of(metadata: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The class names that a checkpoint's metadata gives under `classes`, `class_names`, `label_names` or `id2label`,
    else None.

    Text is split at commas (or read as JSON where it starts with a bracket).

    >>> class_names_of({"classes": "COVID-19, Normal"}), class_names_of({"classes": {"1": "b", "0": "a"}})
    (('COVID-19', 'Normal'), ('a', 'b'))
    """
    value = next(
        (metadata[key] for key in ("classes", "class_names", "label_names", "id2label") if metadata.get(key)), None
    )
    if isinstance(value, str):
        value = (
            json.loads(value) if value.lstrip().startswith(("[", "{")) else [name.strip() for name in value.split(",")]
        )
    if isinstance(value, Mapping):
        by_index = (
            {int(key): item for key, item in value.items()}
            if _keys_are_indices(value)
            else {int(item): key for key, item in value.items()}
        )
        value = [by_index[index] for index in sorted(by_index)]
    return None if value is None else tuple(str(name) for name in value)


def _is_mapping_of_classes(content: Mapping[str, Any]) -> bool:
    return bool(content) and (_keys_are_indices(content) or all(isinstance(item, int) for item in content.values()))


def _keys_are_indices(content: Mapping[str, Any]) -> bool:
    return all(str(key).isdigit() for key in content)


def _safetensors(content: bytes, path: str) -> tuple[Mapping[str, Tensor], dict[str, Any], str]:
    try:
        state = safetensors.torch.load(content)
        (length,) = struct.unpack("<Q", content[:8])
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, struct.error) as error:
        raise ModelError(f"checkpoint {path!r} is truncated or no safetensors file: {one_line(error)}") from None
    return state, dict(metadata), ""


def _tensors_of_pickle(content: bytes, path: str) -> tuple[Mapping[str, Tensor], dict[str, Any], str]:
    try:
        # A Namespace is what training scripts add most often (their arguments); it holds values and runs nothing.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols that are refused or read all the same
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = str(error).partition("GLOBAL ")[2].partition(" ")[0]
        objects = f"Python objects ({wanted})" if wanted else "Python objects"
        raise ModelError(
            f"checkpoint {path!r} is refused: it is damaged, or besides weights it holds {objects} that could run code "
            "when loaded. Where you trust it, save its weights alone: "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        ) from None
    except MemoryError:
        raise
    except Exception as error:
        raise ModelError(f"checkpoint {path!r} is truncated or no PyTorch file: {one_line(error)[:200]}") from None
    for key in (*NESTED, ""):
        state = loaded if not key else loaded.get(key) if isinstance(loaded, Mapping) else None
        if isinstance(state, Mapping) and any(isinstance(value, Tensor) for value in state.values()):
            tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
            return tensors, {name: loaded[name] for name in RECORDED if key and name in loaded}, key
    raise ModelError(f"checkpoint {path!r} holds no weights at its top level nor under {', '.join(NESTED)}")


def _stripped(state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    stripped: dict[str, Tensor] = {}
    for full_name, tensor in state.items():
        name = full_name
        while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
            name = name.removeprefix(prefix)
        if name in stripped:
            raise ModelError(f"checkpoint {path!r} holds {name!r} more than once, under different prefixes")
        stripped[name] = tensor
    return stripped
