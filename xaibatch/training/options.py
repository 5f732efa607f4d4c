"""What a training run is told: data, model, recipe and where it goes; typed, keyword-only, checked."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from xaibatch.options import Options

Range = tuple[float, float]


class AugmentationOptions(Options):
    """Changes that leave a frontal radiograph a plausible one: no vertical flip and, by default, no mirror
    image, since the heart has a side."""

    zoom: Range = (0.85, 1.05)
    """Share of the image's side that the crop covers; below 1 magnifies."""
    stretch: float = Field(default=0.05, ge=0)
    """Half width of a uniform change of the width against the height."""
    rotation_degrees: float = Field(default=7.0, ge=0)
    """Largest turn to either side."""
    shift: float = Field(default=0.05, ge=0)
    """Largest shift, share of the side."""
    mirror_probability: float = Field(default=0.0, ge=0, le=1)
    """Left-right flip; 0.5 helps small sets where the side of a finding does not matter."""
    brightness: float = Field(default=0.05, ge=0)
    """Largest change, in units of the full range."""
    contrast: Range = (0.85, 1.15)
    """Factor about the image's mean."""
    gamma: Range = (0.90, 1.10)
    noise: float = Field(default=0.01, ge=0)
    """Largest standard deviation of Gaussian noise, in units of the full range."""
    erase_probability: float = Field(default=0.1, ge=0, le=1)
    """Probability of covering one rectangle with the image's mean."""
    erase_side: Range = (0.1, 0.35)
    """Sides of that rectangle, share of the image's."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name, above in (("zoom", math.inf), ("contrast", math.inf), ("gamma", math.inf), ("erase_side", 1.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= above or math.isinf(high):
                limit = "" if math.isinf(above) else f" <= {above:g}"
                raise ValueError(f"{name} [{low:g}, {high:g}]: expected 0 < low <= high{limit}")
        return self


class TrainOptions(Options):
    """One training run. Equal options, data and number of workers give equal runs on the same hardware."""

    data: str
    """Folder or manifest with splits train, val and (if there is one) test."""
    layout: str = "auto"
    output: str
    """Folder of the run: `model.safetensors`, `history.jsonl`, `metrics.json`, `learning_curve.png`, `state.pt`."""
    model: str = "vit_tiny_patch16_224"
    checkpoint: str | None = None
    """Start weights, a local file or URL; layers of another shape (the head) start anew."""
    pretrained: bool = False
    """Start from timm's own weights (downloaded by timm)."""
    initialisation: Literal["timm", "mimetic"] = "timm"
    """Weights drawn as timm does, or attention that starts out local (Trockman and Kolter 2023): better from scratch on
    few images. Weights that are read replace either."""
    image_size: int = Field(default=224, ge=32)
    resize_short: int = Field(default=256, ge=32)
    """Short side in pixels before the crop of `image_size`."""

    epochs: int = Field(default=60, ge=1)
    max_minutes: float | None = Field(default=None, gt=0)
    """Wall time after which the run ends with the epoch; the schedule then follows the clock."""
    patience: int = Field(default=20, ge=1)
    """Epochs without a better `val` balanced accuracy after which the run stops."""
    batch_size: int = Field(default=32, ge=1)
    """Images a step over all workers together."""
    learning_rate: float = Field(default=5e-4, gt=0)
    final_rate: float = Field(default=0.01, ge=0, le=1)
    """Share of the learning rate that the cosine ends at."""
    warmup_epochs: float = Field(default=3.0, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    class_weights: Literal["balanced", "none"] = "balanced"
    average_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay per step of the averaged weights, which are evaluated and saved; 0 takes the last weights."""
    clip_norm: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the forward and backward pass; auto: bfloat16 where the device computes in it, else float16 or float32."""
    kept_share: tuple[float, float] = (1.0, 1.0)
    """Share of patches kept in training at the start and at the end (linear): fewer are faster and regularise."""
    augmentation: AugmentationOptions = Field(default_factory=AugmentationOptions)

    seed: int = 0
    num_workers: int = Field(default=1, ge=1)
    """Processes of the data-parallel training; one a GPU, or one a node on CPUs."""
    use_gpu: bool | None = None
    """None: where the cluster has GPUs."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPU threads of a worker, reserved from Ray."""
    cache_mib: int = Field(default=2048, ge=0)
    """Decoded images that a worker keeps in memory; the rest is decoded in each epoch."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.checkpoint is not None and self.pretrained:
            raise ValueError("give checkpoint or pretrained, not both")
        if self.resize_short < self.image_size:
            raise ValueError(f"resize_short {self.resize_short} is smaller than image_size {self.image_size}")
        if self.batch_size % self.num_workers:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of num_workers {self.num_workers}")
        if not 0 < min(self.kept_share) <= max(self.kept_share) <= 1:
            raise ValueError("kept_share must lie in (0, 1]")
        return self
