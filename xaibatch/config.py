"""A run's configuration: YAML and command-line settings in, one typed, checked, hashable record out."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from xaibatch.data.findings import FindingOptions
from xaibatch.errors import ConfigError
from xaibatch.maps import MapOptions
from xaibatch.options import Options, validated

EMBEDDED = "embedded"
"""As `data.path` and `model.checkpoint`: the shipped synthetic radiographs and their classifier."""

Precision = Literal["auto", "float32", "float64", "bfloat16"]


class ModelConfig(Options):
    """Which classifier is explained."""

    name: str = "vit_tiny_patch16_224"
    """timm model name."""
    checkpoint: str | None = None
    """Local path or URL of `.safetensors` or weights-only `.pth`, or `embedded`."""
    class_names: tuple[str, ...] | None = None
    """Class names in the order of the logits; None: from the checkpoint, a JSON beside it, or the data."""
    pretrained: bool = False
    """Load timm's own pretrained weights (needs the network or timm's cache)."""
    preprocessing: dict[str, Any] = Field(default_factory=dict)
    """Fields that replace those of the checkpoint's record or timm's configuration, e.g. `resize_short: 224`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for timm's `create_model`, e.g. `img_size: 384`."""


class DataConfig(Options):
    """Which images."""

    path: str | None = None
    """Folder with one sub-folder a class, a CSV/Parquet manifest, a known layout, or `embedded`; local or any URL."""
    layout: str = "auto"
    split: str | None = None
    """Only the images of this split, where the data set names splits."""
    limit: int | None = Field(default=None, ge=1)
    """A seeded, class-balanced sample of this many images; None: all."""
    allow_outside_root: bool = False
    """Allow a manifest to name files outside its own folder."""
    findings: FindingOptions = FindingOptions()
    """How a set with several findings an image (NIH ChestX-ray14, CheXpert) becomes one with one class an image."""


class PrecisionConfig(Options):
    """Which arithmetic the model's forward passes use, per explainer or metric."""

    default: Precision = "auto"
    """`auto`: the lowest precision that keeps the error of the mean score under `tolerance` on a calibration sample."""
    tolerance: float = Field(default=0.01, gt=0)
    """Largest allowed change of a metric's mean score, in the score's own unit, when `auto` chooses."""
    num_images: int = Field(default=8, ge=2)
    """Images of the calibration sample."""


class EngineConfig(Options):
    """How the work is cut and where it runs. Only `shard_size` and the batch sizes belong to the run's identity."""

    shard_size: int = Field(default=0, ge=0)
    """Images a shard; 0: an eighth of the images, at most 16, so that a small run shows progress and loses little when
    it is killed."""
    batch_size: int = Field(default=0, ge=0)
    """Perturbed copies in one forward pass; 0: chosen for the device."""
    explain_batch_size: int = Field(default=0, ge=0)
    """Images traced together (forward and backward kept); 0: chosen for the device."""
    address: str | None = None
    """Ray cluster to join; None: a cluster of this machine's own, or the one that `ray job submit` started this in."""
    replicas: int = Field(default=0, ge=0)
    """Model replicas; 0: one for each GPU (or share of one), one on a machine without."""
    gpus_per_replica: float = Field(default=1.0, gt=0)
    """Whole GPUs or a fraction that a replica reserves, where there are GPUs."""
    threads: int = Field(default=0, ge=0)
    """CPU threads a replica computes with when it runs on the CPU; 0: cores / replicas."""
    max_attempts: int = Field(default=4, ge=1)
    """Attempts at one cell before it is reported as failed."""
    shards_in_flight: int = Field(default=2, ge=1)
    """Shards a replica has queued: the bounded window."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def images_per_shard(self, num_images: int) -> int:
        """The shard size that a run of `num_images` uses; follows from the configuration and the data alone.

        >>> EngineConfig().images_per_shard(12), EngineConfig().images_per_shard(1000)
        (2, 16)
        """
        return self.shard_size or min(max(1, math.ceil(num_images / 8)), 16)


class RunConfig(Options):
    """Everything that a run depends on. `explainers` and `metrics` map a label to options; `use` names the method where
    the label is not its name (so one method can appear twice with different options)."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    explainers: dict[str, dict[str, Any]] = Field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = Field(default_factory=dict)
    maps: MapOptions = MapOptions()
    target: Literal["predicted", "label"] = "predicted"
    """The class that is explained: predicted for that very input (a noisy copy's own), or the true label."""
    repeats: int = Field(default=1, ge=1)
    """Independent repetitions of every random draw."""
    seed: int = 0
    precision: PrecisionConfig = PrecisionConfig()
    engine: EngineConfig = EngineConfig()
    output: str | None = None
    """Run folder, local or any fsspec URL; None: a name under `runs/` from the configuration's hash."""

    def identity(self) -> dict[str, Any]:
        """The part that decides the rows and scores: without where and how fast it runs."""
        content: dict[str, Any] = self.model_dump(mode="json")
        engine = content.pop("engine")
        content.pop("output")
        content["cut"] = {key: engine[key] for key in ("shard_size", "batch_size", "explain_batch_size")}
        return content

    def digest(self) -> str:
        """SHA-256 of `identity` (hex): equal digests mean the same rows."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def load_config(path: str | Path | None, settings: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a YAML file (or the built-in defaults) and apply dotted `settings` on top; ConfigError names what is wrong.

    >>> load_config(None, {"engine.shard_size": 4}).engine.shard_size
    4
    """
    content: dict[str, Any] = {}
    if path is not None:
        try:
            content = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the configuration {str(path)!r}: {error}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"the configuration {str(path)!r} is not a mapping of keys to values")
    for section in ("explainers", "metrics"):
        content[section] = {label: dict(options or {}) for label, options in (content.get(section) or {}).items()}
    for key, value in (settings or {}).items():
        _set(content, key.split("."), value, key)
    return validated(RunConfig, content, "configuration")


def parse_setting(text: str) -> tuple[str, Any]:
    """`key.path=value` with a YAML value -> (key, value).

    >>> parse_setting("explainers.lime.num_samples=100")
    ('explainers.lime.num_samples', 100)
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"a setting is written key.path=value, received {text!r}")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {key!r} is not valid YAML: {error}") from None


def select(config: RunConfig, *, explainers: Sequence[str] = (), metrics: Sequence[str] = ()) -> RunConfig:
    """Keep the named labels, with the configuration's options where it has them and defaults otherwise."""
    changes: dict[str, Any] = {}
    if explainers:
        changes["explainers"] = {label: config.explainers.get(label, {}) for label in explainers}
    if metrics:
        changes["metrics"] = {label: config.metrics.get(label, {}) for label in metrics}
    return config.model_copy(update=changes)


def method_of(label: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The method's registered name and its options: `use` wins over the label.

    >>> method_of("lime_grid", {"use": "lime", "segmentation": "grid"})
    ('lime', {'segmentation': 'grid'})
    """
    options = dict(options)
    return str(options.pop("use", label)), options


def _set(content: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    for part in path[:-1]:
        content = content.setdefault(part, {})
        if not isinstance(content, dict):
            raise ConfigError(f"cannot set {key!r}: {part!r} is not a section")
    content[path[-1]] = value
