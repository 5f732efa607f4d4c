"""Which explanation of this Vision Transformer can I trust, and is the difference real?

The public names load lazily, so that a worker that only scores does not import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xaibatch.api import explain
    from xaibatch.data.dataset import open_dataset
    from xaibatch.models.load import load_model
    from xaibatch.results.frames import open_run

__version__ = "0.1.0"

_PUBLIC = {
    "explain": "xaibatch.api",
    "load_model": "xaibatch.models.load",
    "open_dataset": "xaibatch.data.dataset",
    "open_run": "xaibatch.results.frames",
}

__all__ = ["__version__", "explain", "load_model", "open_dataset", "open_run"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'xaibatch' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
