"""What every worker of a run needs to know, and the records that flow between the stages of a shard; NumPy only.

Shape letters: B images, C channels, H W pixels, h w a map's own sides, K classes, S samples of a plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from xaibatch.config import RunConfig
from xaibatch.data.load import load_shard
from xaibatch.data.preprocess import Preprocessing
from xaibatch.maps import PlacedMapOptions, TokenGrid, fitting_grid
from xaibatch.metrics.base import Metric, Variant
from xaibatch.perturb.plans import PerturbationPlan
from xaibatch.pipeline.cells import MetricGroup, build_metrics, metric_groups
from xaibatch.results.parts import RunFolder
from xaibatch.seeding import DrawKey
from xaibatch.types import ExplanationBatch, Failure, ImageBatch, Shard


@dataclass(frozen=True, kw_only=True)
class Job:
    """The facts of a run that were settled before it started; small and picklable.

    precisions: label of an explainer or metric -> `float32`, `float64` or `bfloat16`; patch_size: side of a token in
    pixels (16 for models without tokens); num_classes follows from class_names.
    """

    config: RunConfig
    folder: RunFolder
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    precisions: Mapping[str, str]
    patch_size: int
    random_explainers: frozenset[str]
    """Labels of explainers that draw random numbers: explained anew for every repeat."""
    granularities: Mapping[str, str]
    """Label of an explainer -> `token`, `pixel` or `segment`."""
    grid: TokenGrid | None = None
    """Where the model's tokens lie on the run's images; None: squares of patch_size, as many as fit in."""
    run_id: str = ""
    """What the parts of this run are sealed with."""
    data_root: str = ""
    """Folder or URL that the image paths in `predictions` start at; empty: they stay as they are."""
    weights_sha256: str = ""
    """Of the checkpoint's bytes (hex) when the run began; empty for a model without a checkpoint."""
    paths: tuple[str, ...] = ()
    """Absolute local paths of data, checkpoint and run that must be there wherever the run works (see `placed`)."""

    @cached_property
    def tokens(self) -> TokenGrid:
        """The grid that maps are stored on."""
        return self.grid or fitting_grid(self.preprocessing.image_size, self.patch_size)

    @cached_property
    def map_options(self) -> PlacedMapOptions:
        """How this run's maps reach the pixels."""
        return PlacedMapOptions(**self.config.maps.model_dump(), grid=self.tokens)

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        return build_metrics(self.config)

    @cached_property
    def groups(self) -> tuple[MetricGroup, ...]:
        return metric_groups(self.config, self.metrics)

    @property
    def run(self) -> str:
        return self.folder.name

    @property
    def dtype(self) -> str:
        """Of images and weights: float64 only where everything is asked for in float64."""
        return "float64" if self.config.precision.default == "float64" else "float32"

    def needs(self, what: str) -> bool:
        """Whether any metric needs `image`, `mask`, `label` or `twin`."""
        return any(what in metric.needs for metric in self.metrics.values())

    def read(self, shard: Shard) -> tuple[ImageBatch, tuple[Failure, ...]]:
        """Read and preprocess a shard's images (masks and twins only where a metric needs them)."""
        return load_shard(
            shard,
            self.preprocessing,
            self.class_names,
            with_masks=self.needs("mask"),
            with_twins=self.needs("twin"),
            dtype=self.dtype,
            roots=self.paths,
        )

    def key(self, image_id: str, repeat: int) -> DrawKey:
        return DrawKey(seed=self.config.seed, image_id=image_id, repeat=repeat)

    def map_repeat(self, explainer: str, repeat: int) -> int:
        """The repeat whose map is scored: an explainer without random numbers is explained once."""
        return repeat if explainer in self.random_explainers else 0


@dataclass(frozen=True, kw_only=True)
class ShardExplanations:
    """The outcome of the stage `explain` for the readable images of one shard.

    logits_BK: float64, the model's output on the images themselves.
    maps:      (explainer label, repeat) -> maps; a failed image's map is NaN and its reason stands in `missing`.
    failures:  unreadable images, and explainers that failed on an image.
    """

    ids: tuple[str, ...]
    labels_B: NDArray[np.int64]
    patients: tuple[str | None, ...]
    shape_CHW: tuple[int, int, int]
    logits_BK: NDArray[np.float64]
    maps: Mapping[tuple[str, int], ExplanationBatch] = field(default_factory=dict)
    missing: Mapping[tuple[str, int, str], str] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One thing that a metric group asks the replica for: a plan or a variant of image `row`; `explainer` is None where
    the question does not depend on the map and its answer serves all explainers."""

    row: int
    repeat: int
    explainer: str | None
    ask: PerturbationPlan | Variant


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A question that could not be asked: the scores that need it are null with this status and reason."""

    row: int
    repeat: int
    explainer: str | None
    status: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """All questions of one metric group for one shard, in a fixed order (which fixes how they are packed)."""

    questions: tuple[Question, ...]
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The replica's answer to one question: logits (S,K) of a plan; of a variant, logits (K,), the class explained and
    the map of every explainer (None where it failed)."""

    logits: NDArray[np.floating]
    target: int = -1
    maps: Mapping[str, NDArray[np.floating] | None] = field(default_factory=dict)
