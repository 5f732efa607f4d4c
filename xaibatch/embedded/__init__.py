"""Where the embedded radiographs and their classifier lie; synthetic, not for clinical use (see README.md here)."""

from importlib.resources import files
from pathlib import Path

MODEL_NAME = "vit_tiny_patch16_224"
"""timm's name of the shipped classifier."""


def manifest_path() -> Path:
    """Manifest of the 48 simulated radiographs, with lesion and lung masks and lesion-free twins."""
    return _path("radiographs", "manifest.csv")


def model_path() -> Path:
    """The classifier trained on other simulated radiographs; its metadata carry classes and preprocessing."""
    return _path("vit_tiny_synthetic.safetensors")


def _path(*parts: str) -> Path:
    return Path(str(files(__name__).joinpath(*parts)))
