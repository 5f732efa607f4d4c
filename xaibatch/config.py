"""A run's configuration: YAML and command-line settings in, one typed, checked, hashable record out."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from xaibatch.data.findings import FindingOptions
from xaibatch.errors import ConfigError, UnknownNameError, UsageError
from xaibatch.maps import MapOptions
from xaibatch.options import Options, validated

EMBEDDED = "embedded"
"""As `data.path` and `model.checkpoint`: the shipped synthetic radiographs and their classifier."""

ALIASES: Final = {"attention_rollout": "attention_rollout_mean"}
"""Explainer labels that stand for another one, so that what a preset says of the one holds for both."""

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
    untrained: bool = False
    """Explain a model with random weights; without it, no weights at all are a mistake."""
    preprocessing: dict[str, Any] = Field(default_factory=dict)
    """Fields that replace those of the checkpoint's record or timm's configuration, e.g. `resize_short: 224`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for timm's `create_model`, e.g. `img_size: 384`."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = {"checkpoint": self.checkpoint is not None, "pretrained": self.pretrained, "untrained": self.untrained}
        if sum(given.values()) > 1:
            raise ValueError(f"{' and '.join(name for name in given if given[name])} exclude each other: give one")
        return self

    def check_weights(self) -> None:
        """Raise ConfigError where nothing says which weights: maps of a random model look like any others."""
        if self.checkpoint is None and not self.pretrained and not self.untrained:
            raise ConfigError(
                f"no weights for {self.name!r}: give --checkpoint (a .safetensors or weights-only .pth file), or "
                "--set model.pretrained=true for timm's own, or --set model.untrained=true for random ones"
            )


class DataConfig(Options):
    """Which images."""

    path: str | None = None
    """Folder with one sub-folder a class, a CSV/Parquet manifest, a known layout, or `embedded`; local or any URL."""
    layout: str = "auto"
    split: str | None = None
    """Only the images of this split, where the data set names splits."""
    limit: int | None = Field(default=None, ge=1)
    """A seeded, class-balanced sample of this many images; None: all."""
    checksum: Literal["listing", "contents"] = "listing"
    """What tells changed data apart: ids, labels, patients, splits, masks, twins and the files' sizes, or every file's
    bytes too."""
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

    @field_validator("gpus_per_replica")
    @classmethod
    def _share_or_whole(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("Ray reserves a share of one GPU (at most 1) or a whole number of GPUs")
        return value

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

    `explainers` and `metrics` may also be one name or a list of names, each with its default options.

    >>> load_config(None, {"engine.shard_size": 4}).engine.shard_size
    4
    >>> load_config(None, {"explainers": ["lime", "attention_rollout"]}).explainers
    {'lime': {}, 'attention_rollout_mean': {}}
    """
    content = {} if path is None else read_yaml(path)
    _name_methods(content)
    for key, value in (settings or {}).items():
        set_value(content, key, value)
    _name_methods(content)
    return validated(RunConfig, content, "configuration")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping of keys to values; ConfigError for a file that cannot be read or holds something else."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"the configuration {str(path)!r} is not a mapping of keys to values")
    return content or {}


def set_value(content: dict[str, Any], key: str, value: Any) -> None:
    """Put `value` at a dotted key, making the sections on the way. ConfigError where one of them is a value.

    >>> content = {"explainers": {}}
    >>> set_value(content, "explainers.my.module:maps.radius", 3)
    >>> content
    {'explainers': {'my.module:maps': {'radius': 3}}}
    """
    *path, last = _parts(content, key)
    for part in path:
        if content.get(part) is None:
            content[part] = {}
        content = content[part]
        if not isinstance(content, dict):
            raise ConfigError(f"cannot set {key!r}: {part!r} is not a section")
    content[last] = value


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


def select(
    config: RunConfig, base: RunConfig, *, explainers: Sequence[str] = (), metrics: Sequence[str] = ()
) -> RunConfig:
    """Keep the listed labels, with the configuration's options where it has them and defaults otherwise.

    `base` is the configuration before settings were applied. A setting of a label that is not listed is refused
    (UnknownNameError where the configuration does not know it, UsageError else): it would have no effect.
    """
    changes: dict[str, Any] = {}
    for section, listed in (("explainers", explainers), ("metrics", metrics)):
        if listed:
            there, before = getattr(config, section), getattr(base, section)
            labels = [label if label in there else ALIASES.get(label, label) for label in listed]
            for label in there:
                if label in labels or there[label] == before.get(label):
                    continue
                if label not in before:
                    raise UnknownNameError(f"name in --set {section}", label, labels)
                raise UsageError(f"--set {section}.{label}: not among --{section} {','.join(labels)}: no effect")
            changes[section] = {label: there.get(label, {}) for label in labels}
    return config.model_copy(update=changes)


def method_of(label: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The method's registered name and its options: `use` wins over the label.

    >>> method_of("lime_grid", {"use": "lime", "segmentation": "grid"})
    ('lime', {'segmentation': 'grid'})
    """
    options = dict(options)
    return str(options.pop("use", label)), options


def _name_methods(content: dict[str, Any]) -> None:
    """Bring `explainers` and `metrics`, in any of the forms they may be written in, to label -> options."""
    for section in ("explainers", "metrics"):
        value = content.get(section)
        if isinstance(value, str):
            value = [name.strip() for name in value.split(",")]
        if not isinstance(value, list | dict | None):
            raise ConfigError(f"{section}: expected names or a mapping of names to options, received {value!r}")
        entries = value if isinstance(value, list) else [value or {}]
        content[section] = {}
        for entry in entries:
            for label, options in entry.items() if isinstance(entry, dict) else [(entry, None)]:
                _add_method(content[section], section, label, options)


def _add_method(methods: dict[str, Any], section: str, label: Any, options: Any) -> None:
    if not isinstance(label, str) or not label:
        raise ConfigError(f"{section}: expected the name of a method, received {label!r}")
    if not isinstance(options, dict | None):
        raise ConfigError(f"{section}.{label}: expected options such as `name: value`, received {options!r}")
    if section == "explainers" and "use" not in (options or {}):
        label = ALIASES.get(label, label)
    if label in methods:
        raise ConfigError(f"{section}: {label!r} is named twice; give one of the two another label and `use: {label}`")
    methods[label] = dict(options or {})


def _parts(content: Mapping[str, Any], key: str) -> list[str]:
    """A dotted key's parts. The label of a method may hold dots itself: one that is there, or a plug-in's
    `package.module:name`, counts as one part."""
    section, _, rest = key.partition(".")
    methods = content.get(section)
    if section not in ("explainers", "metrics") or not rest or not isinstance(methods, dict):
        return key.split(".")
    there = [label for label in methods if rest == label or rest.startswith(f"{label}.")]
    plugin = re.match(r"[^:=]+:[^.]+", rest)
    label = max(there, key=len) if there else plugin.group() if plugin else rest.partition(".")[0]
    options = rest.removeprefix(label).removeprefix(".")
    if section == "explainers" and label not in methods:
        label = ALIASES.get(label, label)
    return [section, label, *(options.split(".") if options else [])]
